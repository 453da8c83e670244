"""Whole runs on a tiny FLUX: every method, resume, command line, and what can be wrong."""

import html
import json
import math
import shlex
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import pixrl
from pixrl import api, cli, models
from pixrl.algorithms.exploration import Group, NoiseOnly, prepare
from pixrl.errors import CheckpointError, ConfigError, InputError
from pixrl.jobs import align as align_job
from pixrl.models.flux import FluxPolicy, Preset
from pixrl.runs.config import PersonalizeConfig, load_recipe
from pixrl.runs.folder import RunFolder
from pixrl.runs.measure import open_run
from pixrl.runs.planner import kept_bytes, require_room
from studies.config import AlignStudyConfig
from tests import tiny, tiny_dino
from tests.align.parts import JUDGE, final, same
from tests.personalize.conftest import STUDIED, make_subject
from tests.personalize.test_lora import published

METHODS: dict[str, dict[str, Any]] = {
    "customized": {},
    "naive": {"advantage": {}},
    "nft": {
        "sampling": {"steps": 3, "solver": "dpm"},
        "loss": {"kind": "nft", "timesteps": 2},
    },
    "e2po-sars": {
        "sampling": {"steps": 3, "solver": "dpm"},
        "loss": {"kind": "nft", "timesteps": 2},
        "exploration": {"kind": "perturbed", "noises": 2, "variants": 2, "steps": 2},
    },
    "e2po-grpo-sars": {"exploration": {"kind": "perturbed", "noises": 2, "variants": 2, "steps": 2}},
    "rpo": {"sampling": {"steps": 3}, "loss": {"kind": "rpo", "timesteps": 2}, "advantage": {}},
}
SHAPING = {"synergy": {"alpha": 0.5}, "time": {"identity": ["identity"]}}


def rewards() -> list[dict[str, Any]]:
    judges = {"identity": "brightness", "prompt": "redness"}
    return [
        {"name": name, "kind": "python", "options": {"function": f"{JUDGE}:{judge}"}}
        for name, judge in judges.items()
    ]


def recipe(model: Path, subjects: Path, **changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "model": str(model),
        "steps": 2,
        "prompts": {"source": str(subjects), "per_step": 2},
        "rewards": rewards(),
        "exploration": {"kind": "noise", "noises": 4},
        "sampling": {"steps": 3, "noise": "flow_sde"},
        "advantage": SHAPING,
        "loss": {"kind": "clipped"},
        "optimizer": {"lr": 1e-3},
        "lora": {"rank": 4, "alpha": 8},
        "evaluation": {"prompts": 3, "per_prompt": 2},
        "machine": {"device": "cpu", "dtype": "float32"},
        "output": {"checkpoint_every": 1},
    }
    return base | changes


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_a_folder(tmp_path: Path, flux_folder: Path, subjects: Path, method: str) -> None:
    done = pixrl.personalize(recipe(flux_folder, subjects, **METHODS[method]), out=tmp_path / "run", seed=3)
    rows = done.metrics
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        for name in (
            "reward/identity/mean",
            "reward/prompt/mean",
            "group_std",
            "grad_norm",
            "kl",
            "diversity",
        ):
            assert math.isfinite(row[name]), name
        assert {"conflict_share", "reward_correlation"} <= row.keys()
        assert ("advantage_mean" in row) is (method != "rpo") is ("pair_share" not in row)
    folder = RunFolder.open(done.run)
    assert folder.kind == "personalize"
    assert {row.extra["subject"] for row in folder.manifest()} <= {"rex", "tom"}
    gallery = json.loads((done.run / "samples/gallery.json").read_text())
    assert len(gallery) == 6 and all((done.run / entry["reference"]).is_file() for entry in gallery)
    page = done.report.read_text()
    assert "These subjects were trained on" in page and "Do the rewards agree?" in page
    assert "1 picture of each subject" in page
    assert "personalized on rex (dog), tom (cat)</span></h1>" in page
    assert 'alt="reference"' in page and "pixrl personalize" in page
    assert load_recipe(folder.recipe()) == load_recipe(
        recipe(flux_folder, subjects, **METHODS[method], kind="personalize"), seed=3
    )


def test_the_printed_commands_run_as_they_stand(
    tmp_path: Path, flux_folder: Path, subjects: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the folder in which the run was started, whose relative paths the recipe keeps."""
    start = tmp_path / "started here"
    shutil.copytree(subjects / "rex", start / "my_object")
    monkeypatch.chdir(start)
    made = recipe(flux_folder, Path("my_object"), steps=1, evaluation={"prompts": 1})
    page = pixrl.personalize(made, out="runs/mine").report.read_text()
    printed = html.unescape(page.split("<h2>Make it again</h2>")[1].split("<pre>")[1].split("</pre>")[0])
    programs = [shlex.split(line, comments=True) for line in printed.splitlines()]
    assert [words[:2] for words in programs] == [["pixrl", "personalize"], ["pixrl", "selfcheck"]]
    for words in programs:
        steps = ["--steps", "1"] if words[1] == "personalize" else []
        done = CliRunner().invoke(cli.app, [*words[1:], *steps])
        assert done.exit_code == 0, done.output
    assert (start / "runs/mine-again/report.html").is_file()


def test_two_subjects_in_a_picture_are_two_rewards(tmp_path: Path, flux_folder: Path, subjects: Path) -> None:
    """Each compared with its own reference, and the prompt beside them: three rewards shape one advantage."""
    entries = [
        {"prompt": text, "image_paths": ["rex/00.png", "tom/00.png"], "classes": ["dog", "cat"]}
        for text in ("a dog beside a cat", "a dog and a cat in snow")
    ]
    shutil.copytree(subjects, tmp_path / "list")
    (tmp_path / "list/both.json").write_text(json.dumps(entries))
    compared = [
        {
            "name": name,
            "kind": "dino_seg",
            "options": {"model": "toy:identity", "mask": "none", "subject": number},
        }
        for number, name in enumerate(("dog", "cat"))
    ]
    changes = {
        "rewards": [*compared, rewards()[1]],
        "references": {"count": 2},
        "advantage": {"synergy": {"alpha": 0.5}, "time": {"identity": ["dog", "cat"]}},
        "steps": 1,
    }
    done = pixrl.personalize(
        recipe(flux_folder, tmp_path / "list/both.json", **changes), out=tmp_path / "run", seed=3
    )
    (row,) = done.metrics
    assert row["reward/dog/mean"] != row["reward/cat/mean"]
    assert all(row[f"reward/{name}/std"] > 0 for name in ("dog", "cat", "prompt"))
    assert row["grad_norm"] > 0 and math.isfinite(row["loss"])
    first = RunFolder.open(done.run).manifest()[0]
    assert first.scores.keys() == {"dog", "cat", "prompt"}


@pytest.mark.parametrize("command", ["doctor", "selfcheck"])
def test_checks_take_a_subject_as_personalize_does(
    tmp_path: Path, flux_folder: Path, subjects: Path, command: str
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"kind": "personalize", **recipe(flux_folder, tmp_path / "nothing")}))
    run = CliRunner()
    good = run.invoke(cli.app, [command, str(file), "--subject", str(subjects / "rex"), "--json"])
    assert good.exit_code == 0, good.output
    found = json.loads(good.stdout)
    assert found["passed"] if command == "selfcheck" else found["work"]["prompts"] == 3
    bad = run.invoke(cli.app, [command, "--subject", str(tmp_path / "nothing")])
    assert bad.exit_code == {"doctor": 1, "selfcheck": 2}[command] and "nothing" in bad.output
    neither = run.invoke(cli.app, [command])
    assert (neither.exit_code, "--subject FOLDER" in neither.stderr) == (2, True)
    other = run.invoke(cli.app, [command, "toy/e2po", "--subject", str(subjects / "rex")])
    assert (other.exit_code, "pixrl align" in other.stderr) == (2, True)


def test_sft_runs_on_a_list_with_targets(tmp_path: Path, flux_folder: Path, subjects: Path) -> None:
    entries = [
        {"prompt": text, "image_paths": ["rex/00.png"], "image_tgt_path": "rex/01.png"}
        for text in ("a dog in snow", "a red dog")
    ]
    shutil.copytree(subjects / "rex", tmp_path / "rex")
    (tmp_path / "list.json").write_text(json.dumps(entries))
    changes = {"sampling": {"steps": 3}, "loss": {"kind": "sft", "timesteps": 2}, "advantage": {}}
    done = pixrl.personalize(recipe(flux_folder, tmp_path / "list.json", **changes), out=tmp_path / "run")
    assert all(math.isfinite(row["loss"]) for row in done.metrics)


def test_sft_without_targets_is_refused(tmp_path: Path, flux_folder: Path, subjects: Path) -> None:
    changes: dict[str, Any] = {
        "sampling": {"steps": 3},
        "loss": {"kind": "sft", "timesteps": 2},
        "advantage": {},
    }
    wanted = recipe(flux_folder, subjects, **changes)
    with pytest.raises(InputError, match="sft needs a target picture for every prompt"):
        pixrl.personalize(wanted, out=tmp_path / "run")
    with pytest.raises(ConfigError, match="which only subjects have"):
        pixrl.align({**wanted, "prompts": {"source": "toy:geneval"}}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["customized", "e2po-sars", "rpo"])
def test_stopped_and_resumed_ends_the_same(
    tmp_path: Path, flux_folder: Path, subjects: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pixrl.runs.loop import Loop, Step

    config = load_recipe(recipe(flux_folder, subjects, **METHODS[method]), kind="personalize")
    whole = align_job.start(config, tmp_path / "whole")
    train = Loop._train

    def broken(self: Loop[Any, Any], step: int) -> Step[Any, Any]:
        taken = train(self, step)
        if step == 1:
            raise KeyboardInterrupt
        return taken

    monkeypatch.setattr(Loop, "_train", broken)
    with pytest.raises(KeyboardInterrupt):
        align_job.start(config, tmp_path / "cut")
    monkeypatch.setattr(Loop, "_train", train)
    cut = align_job.go_on(tmp_path / "cut")
    assert same(final(whole), final(cut))
    assert [row.model_dump() for row in RunFolder.open(whole).manifest()] == [
        row.model_dump() for row in RunFolder.open(cut).manifest()
    ]


def test_real_identity_and_preference_rewards(tmp_path: Path, flux_folder: Path, subjects: Path) -> None:
    dino, clip = tiny_dino.dino(tmp_path / "dino"), tiny.clip(tmp_path / "clip")
    found = [
        {"name": "identity", "kind": "dino_seg", "options": {"model": str(dino), "mask": "none"}},
        {"name": "prompt", "kind": "preference", "options": {"model": str(clip)}},
        {"name": "clip_image", "held_out": True, "options": {"model": str(clip)}},
        {"name": "clip_text", "held_out": True, "options": {"model": str(clip)}},
    ]
    done = pixrl.personalize(recipe(flux_folder, subjects, rewards=found), out=tmp_path / "run", steps=1)
    (row,) = done.metrics
    assert row["failed_share"] == 0
    assert -1 <= row["reward/identity/mean"] <= 1 and math.isfinite(row["reward/clip_image/mean"])


def test_from_the_command_line(tmp_path: Path, flux_folder: Path) -> None:
    subject = make_subject(tmp_path / "rex")
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(recipe(flux_folder, tmp_path / "nowhere", kind="personalize")))
    run = CliRunner().invoke
    arguments = ["personalize", str(file), "--subject", str(subject), "--steps", "1", "--seed", "4"]
    arguments += ["--set", "advantage.synergy.kind=min", "--out", str(tmp_path / "run")]
    done = run(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run/report.html").is_file()
    kept = RunFolder.open(tmp_path / "run").recipe()
    assert kept["prompts"]["source"] == kept["evaluation"]["source"] == str(subject)
    assert (kept["seed"], kept["advantage"]["synergy"]["kind"]) == (4, "min")
    assert run(cli.app, arguments).exit_code == 1
    assert run(cli.app, [*arguments, "--force"]).exit_code == 0
    assert run(cli.app, ["resume", str(tmp_path / "run"), "--set", "steps=2"]).exit_code == 0
    assert len(RunFolder.open(tmp_path / "run").metrics()) == 2
    assert run(cli.app, ["report", str(tmp_path / "run")]).exit_code == 0
    checked = run(cli.app, ["selfcheck", str(tmp_path / "run/recipe.yaml"), "--json"])
    assert checked.exit_code == 0 and json.loads(checked.stdout)["passed"]
    wrong = run(cli.app, ["align", str(file)])
    assert wrong.exit_code == 2 and "pixrl personalize" in wrong.output


def test_a_finished_run_can_be_measured_and_studied(
    tmp_path: Path, flux_folder: Path, subjects: Path
) -> None:
    done = pixrl.personalize(recipe(flux_folder, subjects), out=tmp_path / "run", steps=1)
    shop = open_run(done.run)
    assert isinstance(shop.policy, FluxPolicy) and len(shop.held_out) == 6
    study = AlignStudyConfig.model_validate(
        {"variants": {name: {"recipe": f"toy/{name}"} for name in STUDIED}, "seeds": [0, 1]}
    )
    study.check()
    assert all(isinstance(study.recipe((name, 0)), PersonalizeConfig) for name in study.names())


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_model_without_references(tmp_path: Path, subjects: Path) -> None:
    sd3 = tiny.sd3(tmp_path / "sd3", card=tiny.SD3_CARD)
    with pytest.raises(ConfigError, match=r"takes no reference pictures.*model=toy:flux"):
        pixrl.personalize(recipe(sd3, subjects), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    policy = models.load(sd3, device="cpu")
    group = Group(0, 0, 0, "a cat", {"shown": [torch.rand(3, 32, 32)]})
    with pytest.raises(InputError, match="takes no reference pictures"):
        prepare(NoiseOnly(), policy, [group])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: [file.unlink() for file in p.glob("*.png")], "has no reference picture"),
        (lambda p: (p / "00.png").write_bytes(b"no picture"), "cannot be read as a picture"),
        (lambda p: (p / "prompts.txt").write_text("a tree in snow\n"), "does not name its class 'dog'"),
        (lambda p: (p / "class.txt").unlink(), "has no class.txt"),
    ],
)
def test_a_subject_that_cannot_be_used(tmp_path: Path, flux_folder: Path, spoil: Any, message: str) -> None:
    subject = make_subject(tmp_path / "rex")
    spoil(subject)
    with pytest.raises(InputError, match=message):
        pixrl.personalize(recipe(flux_folder, tmp_path), subject=subject, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tiny_picture(tmp_path: Path, flux_folder: Path) -> None:
    subject = make_subject(tmp_path / "rex")
    Image.new("RGB", (31, 100)).save(subject / "00.png")
    with pytest.raises(InputError, match="31x100; the shorter side must be at least 32"):
        pixrl.personalize(recipe(flux_folder, tmp_path), subject=subject, out=tmp_path / "run")


def test_alpha_and_rotation_reach_the_model_upright(tmp_path: Path, bare: FluxPolicy) -> None:
    from pixrl.data.subject_prompts import subject_prompts
    from pixrl.data.subjects import load_subjects

    subject = make_subject(tmp_path / "rex", pictures=1)
    image = Image.new("RGBA", (40, 64), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 32, 40, 64))  # the lower half is transparent
    image.save(subject / "00.png")
    turned = Image.new("RGB", (64, 40), "white")
    turned.paste("red", (0, 0, 32, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(subject / "01.png", exif=exif)
    (about,) = {
        id(p.metadata): p.metadata for p in subject_prompts(load_subjects(subject), count=2)[:1]
    }.values()
    alpha, camera = about["shown"]  # type: ignore[misc]
    assert alpha.shape == camera.shape == (3, 64, 40)
    assert torch.allclose(alpha, camera, atol=0.02)


def test_more_references_than_a_subject_has(tmp_path: Path, flux_folder: Path, subjects: Path) -> None:
    with pytest.raises(InputError, match=r"references\.count is 5.*has 2"):
        pixrl.personalize(recipe(flux_folder, subjects, references={"count": 5}), out=tmp_path / "run")


def shown(policy: FluxPolicy, count: int) -> Any:
    """A row with so many references."""
    pictures = [torch.rand(3, 32, 32) for _ in range(count)]
    return prepare(NoiseOnly(), policy, [Group(0, 0, 0, "a cat", {"shown": pictures})]).anchor


def test_too_many_references_for_memory(policy: FluxPolicy) -> None:
    row = partial(shown, policy)
    one, two, five = (kept_bytes(policy, row(count)) for count in (1, 2, 5))
    assert five == pytest.approx(one + 4 * (two - one), rel=0.02)
    require_room(policy, row(5), room=2 * five)
    with pytest.raises(InputError, match=r"5 reference pictures.*3 fit: --set references\.count=3"):
        require_room(policy, row(5), room=one + 2 * (two - one) + (two - one) // 2)
    with pytest.raises(InputError, match="not even one fits"):
        require_room(policy, row(2), room=1000)
    require_room(policy, row(1), room=0)  # nothing to choose: the planner and the machine decide


OUT_OF_MEMORY: dict[str, BaseException] = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "python": MemoryError(),
}


@pytest.mark.parametrize("how", OUT_OF_MEMORY)
@pytest.mark.parametrize(
    ("most", "remedy"), [(1, r"1 fits: --set references\.count=1\."), (0, "not even one fits")]
)
def test_references_that_do_not_even_fit_to_be_measured(
    policy: FluxPolicy, monkeypatch: pytest.MonkeyPatch, how: str, most: int, remedy: str
) -> None:
    real = policy.velocity

    def limited(x_t: torch.Tensor, t_B: torch.Tensor, condition: Any) -> torch.Tensor:
        if len(condition.references) > most:
            raise OUT_OF_MEMORY[how]
        return real(x_t, t_B, condition)

    monkeypatch.setattr(policy, "velocity", limited)
    with pytest.raises(InputError, match=rf"3 reference pictures are too many.*{most + 1} of them.*{remedy}"):
        require_room(policy, shown(policy, 3), room=10**9)
    if most == 1:
        with pytest.raises(InputError, match="not even one fits"):
            require_room(policy, shown(policy, 3), room=1000)


def test_another_error_of_the_measuring_pass_comes_through(
    policy: FluxPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: object) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(policy, "velocity", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        require_room(policy, shown(policy, 2), room=10**9)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(1, 3, 35, 35), r"multiples of 8 pixels, got 35 x 35.*on_square\(picture, 40\)"),
        (torch.rand(1, 3, 36, 36), "multiples of 8 pixels, got 36 x 36"),
        (torch.rand(1, 3, 2, 2), r"got 2 x 2.*on_square\(picture, 8\)"),
        (torch.rand(1, 3, 32, 0), "got 32 x 0"),
        (torch.rand(3, 32, 32), r"got float32 \[3, 32, 32\].*picture\[None\]"),
        (torch.rand(1, 4, 32, 32), r"RGB.*got float32 \[1, 4, 32, 32\].*read_picture"),
        (Image.new("RGB", (32, 32)), "got a Image"),
        (torch.full((1, 3, 32, 32), 255, dtype=torch.uint8), r"got uint8.*images\.float\(\) / 255"),
        (torch.linspace(0, 255, 3 * 32 * 32).view(1, 3, 32, 32), r"in \[0, 1\], got 0 to 255.*images / 255"),
        (
            torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32),
            r"in \[0, 1\], got -1 to 1.*\(images \+ 1\) / 2",
        ),
        (torch.full((1, 3, 32, 32), float("nan")), "not finite"),
        (torch.full((1, 3, 32, 32), float("inf")), "not finite"),
    ],
)
def test_references_that_are_no_pictures(bare: FluxPolicy, images: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        bare.with_references(bare.encode(["a cat"]), [images])


def test_references_must_be_a_list(bare: FluxPolicy) -> None:
    with pytest.raises(InputError, match=r"got float32 \[3, 32, 32\]\. Give a list"):
        bare.with_references(bare.encode(["a cat"]), torch.rand(1, 3, 32, 32))  # type: ignore[arg-type]


def test_references_of_every_allowed_shape_and_precision(bare: FluxPolicy) -> None:
    text = bare.encode(["a cat"])
    pictures = [
        torch.zeros(1, 3, 8, 8),
        torch.ones(1, 3, 16, 40),
        torch.rand(1, 3, 32, 24, dtype=torch.bfloat16),
    ]
    sizes = [list(latents.shape[2:]) for latents in bare.with_references(text, pictures).references]
    assert sizes == [[2, 2], [4, 10], [8, 6]]


def test_a_subject_that_the_segmenter_does_not_find(
    tmp_path: Path, flux_folder: Path, subjects: Path
) -> None:
    """Refused before there is a folder; where failures are allowed, a failed score with its reason: never a 0."""
    dino, segmenter = tiny_dino.dino(tmp_path / "dino"), tiny.segmenter(tmp_path / "segmenter")
    with torch.no_grad():  # it sees background everywhere
        file = segmenter / "model.safetensors"
        from safetensors.torch import load_file

        weights = load_file(file)
        weights["decode_head.classifier.bias"] = torch.tensor([1e4, 0.0, 0.0, 0.0])
        save_file(weights, file, metadata={"format": "pt"})
    identity = {
        "name": "identity",
        "kind": "dino_seg",
        "options": {"model": str(dino), "segmenter": str(segmenter)},
    }
    wanted = recipe(flux_folder, subjects, rewards=[identity, rewards()[1]])
    refused = (
        r"'identity' can judge no picture of \d of \d subject.*no subject found in the reference.*mask: none"
    )
    with pytest.raises(InputError, match=refused):
        pixrl.personalize(wanted, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    lenient = wanted | {"scoring": {"max_failed_share": 1.0}}
    done = pixrl.personalize(lenient, out=tmp_path / "lenient", steps=1)
    assert done.metrics[0]["failed_share"] == 1
    row = RunFolder.open(done.run).manifest()[0]
    assert row.scores["identity"] is None and "no subject found" in str(row.failed)
    notes = json.loads((done.run / "start.json").read_text())["notes"]
    assert [
        note
        for note in notes
        if note.startswith("identity: 4 reference picture(s) of 2 subject(s) show nothing")
    ]


def test_the_card_and_the_recipe_place_references(tmp_path: Path, flux_folder: Path, subjects: Path) -> None:
    folder = tmp_path / "flux"
    shutil.copytree(flux_folder, folder)
    card = json.loads((folder / "pixrl.json").read_text())
    (folder / "pixrl.json").write_text(json.dumps(card | {"position_ids": "kontext"}))
    loaded = models.load(folder, device="cpu")
    assert isinstance(loaded, FluxPolicy) and loaded.preset is Preset.KONTEXT
    (folder / "pixrl.json").write_text(json.dumps(card | {"position_ids": "unno"}))
    with pytest.raises(CheckpointError, match="Did you mean 'uno'"):
        models.load(folder, device="cpu")
    save_file(published(), tmp_path / "lora.safetensors")
    settings = {
        "preset": "kontext",
        "shift": "uno",
        "side": 16,
        "count": 2,
        "lora": str(tmp_path / "lora.safetensors"),
    }
    config = load_recipe(recipe(flux_folder, subjects, references=settings), kind="personalize")
    done = api.run_align(config, tmp_path / "run", live=False)
    shop = open_run(done.run)
    assert isinstance(shop.policy, FluxPolicy)
    assert (shop.policy.preset, shop.policy.reference_side, len(shop.policy.merged)) == ("kontext", 16, 1)
