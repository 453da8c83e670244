"""An exported LoRA draws, in a fresh pipeline, what the run's own slot draws; its card says what was measured."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from markdown_it import MarkdownIt
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

import pixrl
from pixrl import cli, hub, models
from pixrl.errors import ConfigError, InputError, RunError
from pixrl.fusion.config import FuseConfig
from pixrl.models.sd3 import SD3Policy
from pixrl.models.slots import Slot
from pixrl.report.export import Format, export, parse_format
from pixrl.report.figures import Change
from pixrl.report.model_card import Facts, artefacts, shown_pairs, write_card
from pixrl.runs import checkpoint
from pixrl.runs.config import read_config
from pixrl.runs.folder import ManifestRow, RunFolder
from tests import published, tiny
from tests.align.parts import recipe
from tests.tolerance import PICTURE, agree

OWL, SNAIL = "a red owl", "two blue snails"
TARGETS = [
    "attn.to_q",
    "attn.to_v",
    "attn2.to_k",
    "attn2.to_out.0",
    "attn.add_k_proj",
    "attn.to_add_out",
    "ff.net.2",
]


@pytest.fixture(scope="module")
def dual_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sd3(tmp_path_factory.mktemp("dual") / "sd3", card=tiny.SD3_CARD, dual=True)


@pytest.fixture(scope="module")
def run(dual_folder: Path, prompt_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps with a large learning rate, so that every slot differs from the base."""
    made = recipe(
        dual_folder,
        prompt_file,
        steps=2,
        optimizer={"lr": 0.05, "ema": 0.5},
        lora={"rank": 3, "alpha": 12, "targets": TARGETS},
    )
    return pixrl.align(made, out=tmp_path_factory.mktemp("runs") / "bright").run


def pictures(policy: SD3Policy) -> Tensor:
    return policy.sample(policy.encode([OWL, SNAIL]), [1, 2])


def fresh(folder: Path) -> SD3Policy:
    found = models.load(folder, device="cpu", dtype="float32")
    assert isinstance(found, SD3Policy)
    return found


def pictures_of_slot(folder: Path, run: Path, slot: str) -> Tensor:
    policy = fresh(folder)
    slots = policy.attach_lora(rank=3, alpha=12, targets=tuple(TARGETS))
    saved = checkpoint.latest(run)
    assert saved is not None
    tensors, _ = checkpoint.load(saved)
    slots.load_state({k.removeprefix("slots/"): x for k, x in tensors.items() if k.startswith("slots/")})
    with policy.slot(slot):
        return pictures(policy)


@pytest.mark.parametrize("slot", ["current", "ema"])
def test_diffusers_draws_the_slots_pictures(slot: str, run: Path, dual_folder: Path, tmp_path: Path) -> None:
    done = export(run, out=tmp_path, slot=Slot(slot))
    base = pictures(fresh(dual_folder))
    policy = fresh(dual_folder)
    policy.pipeline.load_lora_weights(str(tmp_path), weight_name=done.file.name)
    drawn, expected = pictures(policy), pictures_of_slot(dual_folder, run, slot)
    assert agree(drawn, expected, PICTURE)
    assert (drawn - base).abs().mean() > 10 * (drawn - expected).abs().mean()
    with safe_open(done.file, "pt") as file:
        assert file.metadata()["slot"] == slot


def test_the_published_weights_plus_comfyuis_file_draw_them_too(
    run: Path, dual_folder: Path, tmp_path: Path
) -> None:
    file = load_file(export(run, out=tmp_path, layout=Format.COMFYUI, slot=Slot.CURRENT).file)
    weights = published.sd3_transformer(published.part(dual_folder, "transformer"))
    prefix = "model.diffusion_model."
    known = {key.removeprefix(prefix).removesuffix(".weight").replace(".", "_"): key for key in weights}
    modules = {key.rsplit(".lora_", 1)[0] for key in file if ".lora_" in key}
    assert len(modules) > 6
    for module in modules:  # what ComfyUI does with every pair it finds
        down, up = file[f"{module}.lora_down.weight"], file[f"{module}.lora_up.weight"]
        key = known[module.removeprefix("lora_unet_")]
        weights[key] = weights[key] + file[f"{module}.alpha"] / len(down) * (up @ down)
    policy = fresh(dual_folder)
    policy.denoiser.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(dict(weights)))
    assert agree(pictures(policy), pictures_of_slot(dual_folder, run, "current"), PICTURE)


def test_the_card_says_what_was_done_and_measured(run: Path, dual_folder: Path, tmp_path: Path) -> None:
    done = export(run, out=tmp_path)
    assert (done.slot, done.step) == (Slot.EMA, 2)
    card = done.card.read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "diffusers"
    assert "base_model" not in front  # a folder on this machine is no name that others know
    for text in (
        "# bright",
        "LoRA of rank 3",
        "averaged (ema) weights after 2 of 2 steps",
        "## Before and after",
        "## Gains and losses",
        "| python | trained on | ",
        "In brackets 95 % over prompts. One seed: another one may end elsewhere.",
        "## Known artefacts",
        "nft, beta 1",
        "noise alone, 3 samples a prompt",
        "judge.py:brightness",
        "prompts.txt",
        "## Licences",
        f"| `{dual_folder}` | base model; this LoRA derives from it | not stated: see the model's page |",
        "| of the reward python | ",
        'pipeline.load_lora_weights("FOLDER", weight_name="pytorch_lora_weights.safetensors")',
        "kind: align",
    ):
        assert text in card, text
    shown = [line for line in card.splitlines() if "![before]" in line]
    assert 1 <= len(shown) <= 6
    for line in shown:
        for name in (part.split(")")[0] for part in line.split("(")[1:]):
            assert (tmp_path / name).is_file()


def test_a_card_hides_no_loss(run: Path) -> None:
    def said(*changes: Change) -> str:
        return artefacts(RunFolder.open(run), changes)

    fell, steady = Change("strict", "never trained on", 0.75, 0.67), Change("other", "never trained on", 1, 1)
    trained, spread = Change("geneval", "trained on", 0.86, 0.82), Change("diversity", "spread", 0.3, 0.3)
    losses = said(trained, fell, spread)
    assert "geneval (trained on) fell from 0.86 to 0.82" in losses
    assert "strict (never trained on) fell from 0.75 to 0.67" in losses and "None was detected" not in losses
    assert "no figure above fell" in said(steady, spread) and "not measured" not in said(steady, spread)
    assert "not measured: evaluation.per_prompt is 1" in said(steady)
    hacked = said(Change("geneval", "trained on", 0.8, 0.9), fell, spread)
    assert hacked.count("strict") == 1


def code_of(card: Path, **filled: object) -> str:
    """The code in a card's section on use, with what the reader fills in."""
    code = card.read_text().split("## Use")[1].split("```python\n")[1].split("```")[0]
    for name, value in filled.items():
        assert f'"{name}"' in code
        code = code.replace(f'"{name}"', f'"{value}"')
    return code


def trained_briefly(model: str | Path, prompt_file: Path, out: Path) -> Path:
    made = recipe(
        model,
        prompt_file,
        steps=1,
        optimizer={"lr": 0.05, "ema": None},
        lora={"rank": 3, "alpha": 12, "targets": TARGETS[:2]},
        evaluation={"prompts": 1},
    )
    return pixrl.align(made, out=out).run


@pytest.mark.parametrize("single_file", [False, True])
def test_the_cards_code_draws_the_runs_pictures(
    single_file: bool, dual_folder: Path, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a folder with diffusers alone, for a single file whose text encoders lie elsewhere through pixrl."""
    model = str(dual_folder)
    if single_file:
        model = f"{published.sd3(dual_folder, tmp_path / 'model.safetensors')}@{dual_folder}"
    run = trained_briefly(model, prompt_file, tmp_path / "run")
    variables: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    card = export(run).card
    assert ("draws with its own sampler" in card.read_text()) is not single_file
    exec(code_of(card, FOLDER=run / "export/diffusers", PROMPT=OWL), variables)
    assert (tmp_path / "picture.png").is_file()
    pipeline = variables["model"].pipeline if single_file else variables["pipeline"]
    loaded = SD3Policy(hub.Checkpoint(dual_folder), device="cpu", dtype="float32", pipeline=pipeline)
    expected = fresh(dual_folder)
    expected.pipeline.load_lora_weights(
        str(run / "export/diffusers"), weight_name="pytorch_lora_weights.safetensors"
    )
    assert agree(pictures(loaded), pictures(expected), PICTURE)
    assert (pictures(loaded) - pictures(fresh(dual_folder))).abs().mean() > 1e-3


def test_the_cards_code_loads_a_toy(
    prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers does not know the name toy:sd3."""
    monkeypatch.chdir(tmp_path)
    run = trained_briefly("toy:sd3", prompt_file, tmp_path / "run")
    card = export(run).card
    assert 'from_pretrained("toy:' not in card.read_text()
    variables: dict[str, Any] = {}
    exec(code_of(card, FOLDER=run / "export/diffusers", PROMPT=OWL), variables)
    assert variables["model"].settings.steps == recipe(".", prompt_file)["sampling"]["steps"]
    base = models.load("toy:sd3", steps=variables["model"].settings.steps)
    assert (variables["images"] - base.sample(base.encode([OWL]), [0])).abs().mean() > 1e-3


def test_a_card_names_a_published_base_and_its_licence(run: Path, tmp_path: Path) -> None:

    folder = RunFolder.open(run)
    config = read_config(folder).model_copy(update={"model": "stabilityai/stable-diffusion-3.5-medium@main"})
    facts = Facts("x.safetensors", "current", 1, "diffusers", "StableDiffusion3Pipeline")
    card = write_card(folder, config, facts, [])
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "stabilityai/stable-diffusion-3.5-medium"
    assert (front["license"], front["license_name"]) == ("other", "Stability AI Community License")
    assert 'from_pretrained("stabilityai/stable-diffusion-3.5-medium", revision="main")' in card


def test_a_card_names_every_part_of_a_reward_and_its_licence(run: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "copied"))
    start = json.loads((copied / "start.json").read_text())
    start["rewards"] = {
        "looks": {
            "model": "v25 (0123456789abcdef)",
            "licence": "AGPL-3.0",
            "encoder": "e",
            "encoder_licence": "MIT",
        }
    }
    (copied / "start.json").write_text(json.dumps(start))
    folder = RunFolder.open(copied)
    facts = Facts("x.safetensors", "current", 1, "diffusers", "StableDiffusion3Pipeline")
    card = write_card(folder, read_config(folder), facts, [])
    assert "| `v25 (0123456789abcdef)` | of the reward looks | AGPL-3.0 |" in card
    assert "| `e` | of the reward looks | MIT |" in card


def test_what_others_wrote_is_mere_text_in_the_card(run: Path, tmp_path: Path) -> None:
    nasty = "a | b `c` **d** [e](http://evil.org) ![f](http://evil.org) <script>g</script>\n\n# h\n```\n~~i~~"
    copied = Path(shutil.copytree(run, tmp_path / "# a | `b` <i>[c](d)"))
    start = json.loads((copied / "start.json").read_text())
    start["notes"] = [nasty]
    start["rewards"] = {nasty: {"model": nasty, "licence": nasty}}
    (copied / "start.json").write_text(json.dumps(start))
    gallery = copied / "samples" / "gallery.json"
    gallery.write_text(json.dumps([one | {"prompt": nasty} for one in json.loads(gallery.read_text())]))
    folder = RunFolder.open(copied)
    folder.append_manifest([ManifestRow(index=10**6, step=9, seed=0, failed=nasty)])
    facts = Facts("x.safetensors", "current", 1, "diffusers", "StableDiffusion3Pipeline")
    card = write_card(folder, read_config(folder), facts, shown_pairs(folder))
    reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    tokens = [part for token in reader.parse(card) for part in (token, *(token.children or []))]
    kinds = {token.type for token in tokens}
    assert not kinds & {"html_block", "html_inline", "link_open", "s_open", "strong_open", "em_open"}
    assert all(str(token.attrs["src"]).startswith("images/") for token in tokens if token.type == "image")
    headings = [tokens[at + 1].content for at, token in enumerate(tokens) if token.type == "heading_open"]
    assert len(headings) == len(set(headings)) and not any(heading == "h" for heading in headings)
    rows: list[int] = []
    for token in tokens:
        if token.type == "tr_open":
            rows.append(0)
        elif token.type in ("td_open", "th_open"):
            rows[-1] += 1
    assert set(rows) == {3, 5}
    texts = " ".join(token.content for token in tokens if token.type in ("inline", "code_inline", "text"))
    assert texts.count("evil.org") >= 5 and "http://evil" in texts


def test_what_cannot_be_exported(run: Path, dual_folder: Path, prompt_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--slot current or --slot ema"):
        export(run, slot=Slot.OLD)
    with pytest.raises(
        ConfigError, match=r"one of FLUX, and this is a LoRA of sd3\. Type: --format diffusers"
    ):
        export(run, layout=Format.UNO)
    with pytest.raises(InputError, match="Did you mean 'diffusers'"):
        parse_format("difusers")
    bare = Path(shutil.copytree(run, tmp_path / "bare"))
    shutil.rmtree(bare / "checkpoints")
    with pytest.raises(RunError, match=r"no checkpoint yet\. Type: pixrl resume"):
        export(bare)
    made = recipe(dual_folder, prompt_file, steps=1, optimizer={"lr": 1e-3, "ema": None})
    plain = pixrl.align(made, out=tmp_path / "plain").run
    with pytest.raises(ConfigError, match=r"no averaged weights.*--slot current"):
        export(plain, slot=Slot.EMA)
    assert export(plain).slot is Slot.CURRENT


def test_a_folder_takes_one_format(run: Path, tmp_path: Path) -> None:
    card = export(run, out=tmp_path, layout=Format.COMFYUI).card
    before = card.read_text()
    with pytest.raises(
        InputError, match="holds an export of format comfyui, whose card would be overwritten"
    ):
        export(run, out=tmp_path, layout=Format.DIFFUSERS)
    assert card.read_text() == before and not (tmp_path / "pytorch_lora_weights.safetensors").exists()
    assert export(run, out=tmp_path, layout=Format.COMFYUI).card == card


def test_each_format_keeps_its_own_card(run: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    cards = [export(copied, layout=layout).card for layout in (Format.DIFFUSERS, Format.COMFYUI)]
    assert cards == [copied / "export" / name / "README.md" for name in ("diffusers", "comfyui")]
    assert "load_lora_weights" in cards[0].read_text() and "ComfyUI/models/loras" in cards[1].read_text()
    for line in cards[1].read_text().splitlines():
        for name in (part.split(")")[0] for part in line.split("](")[1:]):
            assert (cards[1].parent / name).is_file(), name


def test_the_command(run: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        cli.app, ["export", str(run), "--format", "comfyui", "--out", str(tmp_path / "out")]
    )
    assert done.exit_code == 0, done.output
    assert "comfyui_lora.safetensors" in done.stdout.replace("\n", "")
    assert "ComfyUI/models/loras" in (tmp_path / "out/README.md").read_text()
    absent = CliRunner().invoke(cli.app, ["export", str(tmp_path / "nowhere")])
    assert (absent.exit_code, absent.stderr) == (
        1,
        f"Error: There is no run folder {tmp_path / 'nowhere'}. To make a run that can be exported, type: "
        "pixrl align RECIPE --out DIR, or pixrl personalize RECIPE --out DIR\n",
    )
    fusion = tmp_path / "fusion"
    RunFolder.create(fusion, kind="fuse", recipe=FuseConfig(concepts=("owl", "snail")))
    unfinished = CliRunner().invoke(cli.app, ["export", str(fusion)])
    assert (unfinished.exit_code, f"Type: pixrl resume {fusion}" in unfinished.stderr) == (1, True)
    RunFolder.create(tmp_path / "pairs", kind="fuse-pairs", recipe=FuseConfig(concepts=("owl", "snail")))
    none = CliRunner().invoke(cli.app, ["export", str(tmp_path / "pairs")])
    assert none.exit_code == 1
    assert "'fuse-pairs', which trains no LoRA" in none.stderr and "pixrl align RECIPE" in none.stderr
    wrong = CliRunner().invoke(cli.app, ["export", str(run), "--slot", "emma"])
    assert (wrong.exit_code, "There are current, old, ema" in wrong.stderr) == (2, True)
