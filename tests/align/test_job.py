"""Whole runs on a tiny model: folder, resume, command line."""

import json
import math
import re
import signal
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import pixrl
from pixrl import api, cli
from pixrl.cli import options
from pixrl.data.prompts import Prompt, PromptSet
from pixrl.errors import CheckpointError, ConfigError, FailedScoresError, InputError, RunError
from pixrl.jobs import align as align_job
from pixrl.models.base import Renderer
from pixrl.report.align import write_align_report
from pixrl.runs.config import AlignConfig
from pixrl.runs.data import PromptSampler
from pixrl.runs.folder import RunFolder
from pixrl.runs.loaded import load_run, plan_batches
from pixrl.runs.reading import START, comparable_evaluations, evaluations, sample_scores, samples_of
from tests.align.parts import E2PO, GRPO, final, recipe, same, with_reward
from tests.align.test_processes import assert_trained_alike

EVERY_STEP = {
    "step",
    "reward/python/mean",
    "reward/python/std",
    "group_std",
    "zero_std_share",
    "failed_share",
    "kl",
    "grad_norm",
    "lr",
    "diversity",
    "seconds/collect",
    "seconds/score",
    "seconds/update",
    "images_per_second",
}


@pytest.mark.parametrize("method", [{}, GRPO, E2PO, GRPO | E2PO], ids=["nft", "grpo", "e2po", "e2po-grpo"])
def test_a_run_is_a_folder(
    tmp_path: Path, sd3_folder: Path, prompt_file: Path, method: dict[str, Any]
) -> None:
    done = pixrl.align(recipe(sd3_folder, prompt_file, **method), out=tmp_path / "run", seed=5)
    rows = done.metrics
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row.keys() >= EVERY_STEP for row in rows)
    assert all(math.isfinite(row[name]) for row in rows for name in EVERY_STEP)
    if "loss" in method:
        assert all(
            {"ratio_mean", "ratio_min", "ratio_max", "ratio_std", "clip_share"} <= row.keys() for row in rows
        )
    if "exploration" in method:
        assert all({"anchor_cosine"} <= row.keys() for row in rows)
    size = 4 if "exploration" in method else 3
    manifest = RunFolder.open(done.run).manifest()
    assert [row.index for row in manifest] == list(range(3 * 2 * size))
    assert all((done.run / str(row.file)).is_file() for row in manifest)
    assert all(row.prompt and row.failed is None and row.scores["python"] for row in manifest)
    assert [row["step"] for row in done.evaluations] == [0, 3]
    gallery = json.loads((done.run / "samples/gallery.json").read_text())
    for row in done.evaluations:
        assert len(list(samples_of(RunFolder.open(done.run), row["step"]).glob("*.png"))) == len(gallery) == 4
        scores = [x for x in sample_scores(RunFolder.open(done.run), row["step"])["python"] if x is not None]
        assert len(scores) == 4 and row["python/mean"] == pytest.approx(statistics.fmean(scores))
    assert list((done.run / "tensorboard").glob("events.out.tfevents.*"))
    assert yaml.safe_load((done.run / "recipe.yaml").read_text())["seed"] == 5


@pytest.mark.parametrize("method", [{}, GRPO, E2PO], ids=["nft", "grpo", "e2po"])
def test_stopped_and_resumed_ends_the_same(
    tmp_path: Path,
    sd3_folder: Path,
    prompt_file: Path,
    method: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pixrl.runs.loop import Loop, Step

    config = AlignConfig.model_validate(recipe(sd3_folder, prompt_file, **method))
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
    rows = [[row.model_dump() for row in RunFolder.open(run).manifest()] for run in (whole, cut)]
    assert rows[0] == rows[1]
    assert [row["step"] for row in RunFolder.open(cut).metrics()] == [0, 1, 2]
    assert evaluations(whole) == evaluations(cut)


@pytest.mark.parametrize(
    ("presses", "said"),
    [
        (1, "Saved up to step 2; what was begun since is drawn again"),
        (2, "No step is saved yet; the steps logged since (1)"),
    ],
)
def test_a_step_is_ended_and_saved_at_ctrl_c_and_lost_at_a_second_one(
    tmp_path: Path,
    sd3_folder: Path,
    prompt_file: Path,
    presses: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pixrl.runs.loop import Loop, Step

    monkeypatch.setattr(options, "leads", lambda: True)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    file, run = tmp_path / "mine.yaml", tmp_path / "cut"
    settings = recipe(sd3_folder, prompt_file, output={"checkpoint_every": 3})
    file.write_text(json.dumps(settings))
    train = Loop._train

    def pressed(self: Loop[Any, Any], step: int) -> Step[Any, Any]:
        for _ in range(presses if step == 1 else 0):
            signal.raise_signal(signal.SIGINT)
        return train(self, step)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(Loop, "_train", pressed)
            stopped = CliRunner().invoke(cli.app, ["align", str(file), "--out", str(run)])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.exit_code == 130 and said in " ".join(stopped.output.split()), stopped.output
    assert CliRunner().invoke(cli.app, ["resume", str(run)]).exit_code == 0
    whole = pixrl.align(settings, out=tmp_path / "whole").run
    assert same(final(whole), final(run)) and evaluations(whole) == evaluations(run)


def test_the_seed_decides(tmp_path: Path, sd3_folder: Path, prompt_file: Path) -> None:
    runs = [
        pixrl.align(recipe(sd3_folder, prompt_file), steps=1, seed=seed, out=tmp_path / name).run
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert same(final(runs[0]), final(runs[1]))
    assert not same(final(runs[0]), final(runs[2]))


def test_a_changed_recipe_is_refused_unless_told(tmp_path: Path, sd3_folder: Path, prompt_file: Path) -> None:
    run = pixrl.align(recipe(sd3_folder, prompt_file), steps=1, out=tmp_path / "run").run
    file = run / "recipe.yaml"
    file.write_text(file.read_text().replace("lr: 0.001", "lr: 0.002"))
    with pytest.raises(CheckpointError, match=r"optimizer\.lr: 0\.001 when the run began, 0\.002 now"):
        align_job.go_on(run)
    align_job.go_on(run, accept_changes=True)
    assert RunFolder.open(run).recipe()["optimizer"]["lr"] == 0.002
    align_job.go_on(run, overrides=["steps=2"])
    assert [row["lr"] for row in RunFolder.open(run).metrics()] == [0.001, 0.002]


def test_a_rate_falls_over_all_steps_also_of_a_longer_run(
    tmp_path: Path, sd3_folder: Path, prompt_file: Path
) -> None:
    falling = recipe(sd3_folder, prompt_file, optimizer={"lr": 8e-4, "decay_steps": "all"})
    run = pixrl.align(falling, steps=2, out=tmp_path / "run").run
    align_job.go_on(run, overrides=["steps=4"])
    rates = [row["lr"] for row in RunFolder.open(run).metrics()]
    assert rates == pytest.approx([8e-4, 4e-4, 4e-4, 2e-4])
    with pytest.raises(InputError, match=r"has done 4 steps, and steps is 3. .* give 4 or more"):
        align_job.go_on(run, overrides=["steps=3"])
    assert len(RunFolder.open(run).metrics()) == 4 and RunFolder.open(run).recipe()["steps"] == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("evaluation.prompts=1", "prompts and noise: '4 pictures, .*' when the run began, '2 pictures, "),
        ("evaluation.per_prompt=1", "prompts and noise: '4 pictures, .*' when the run began, '2 pictures, "),
        ("seed=9", "prompts and noise: '4 pictures, .*' when the run began, '4 pictures, "),
        ("evaluation.steps=2", r"evaluation\.steps: 4 when the run began, 2 now"),
        ("sampling.steps=2", r"evaluation\.steps: 4 when the run began, 2 now"),
        ("guidance=2.0", r"guidance: None when the run began, 2\.0 now"),
    ],
)
def test_evaluations_of_other_pictures_are_not_compared(
    tmp_path: Path, sd3_folder: Path, prompt_file: Path, change: str, said: str
) -> None:
    evaluation = {"every": 1, "prompts": 2, "per_prompt": 2}
    run = pixrl.align(
        recipe(sd3_folder, prompt_file, evaluation=evaluation), steps=1, out=tmp_path / "run"
    ).run
    assert "before and after" in write_align_report(run).read_text()
    align_job.go_on(run, overrides=["steps=2", change])
    notes = json.loads((run / START).read_text())["notes"]
    assert any(re.search(f"not compared with the base .*{said}", note) for note in notes)
    align_job.go_on(run, overrides=["steps=3"])  # what changed stays so
    assert [row["step"] for row in evaluations(run)] == [0, 1, 2, 3]
    assert [row["step"] for row in comparable_evaluations(RunFolder.open(run))] == [1, 2, 3]
    page = write_align_report(run).read_text()
    assert "From step 1 on the evaluation draws other pictures than it drew of the base" in page
    assert "before and after" not in page and 'class="pair"' not in page and 'badge good">finished' in page


def test_another_model_is_refused(tmp_path: Path, sd3_folder: Path, prompt_file: Path) -> None:
    from tests import tiny

    run = pixrl.align(recipe(sd3_folder, prompt_file), steps=1, out=tmp_path / "run").run
    other = tiny.sd3(tmp_path / "other", seed=1, card=tiny.SD3_CARD)
    with pytest.raises(CheckpointError, match="is another model"):
        align_job.go_on(run, overrides=[f"model={other}"])
    with pytest.raises(CheckpointError, match="do not fit this model"):
        align_job.go_on(run, overrides=["lora.rank=2", "steps=2"])


def test_another_reward_is_refused_unless_told(tmp_path: Path, sd3_folder: Path, prompt_file: Path) -> None:
    """A judge whose file was edited: its provenance holds the file's checksum."""
    judge = tmp_path / "my_judge.py"
    judge.write_text(
        "def f(images, prompts, metadata):\n    return [float(len(prompt)) for prompt in prompts]\n"
    )
    reward = {"name": "mine", "kind": "python", "options": {"function": f"{judge}:f"}}
    run = pixrl.align(recipe(sd3_folder, prompt_file, rewards=[reward]), steps=1, out=tmp_path / "run").run
    began = json.loads((run / "start.json").read_text())["rewards"]["mine"]
    assert began["licence"] and str(judge) in began["model"]
    judge.write_text(judge.read_text().replace("float", "2 * float"))
    with pytest.raises(CheckpointError, match=r"Code that .* was begun with has changed"):
        align_job.go_on(run, overrides=["steps=2"])
    align_job.go_on(run, overrides=["steps=2"], accept_changes=True)
    start = json.loads((run / "start.json").read_text())
    assert start["rewards"]["mine"] != began
    assert any(note.startswith("changed: mine.") for note in start["notes"])


class Still(Renderer):
    """Draws, and cannot be trained."""

    def __init__(self, checkpoint: object, **options: object) -> None:
        self.name = "still"

    encode = sample = fingerprint = Renderer.merge_lora


def test_a_renderer_cannot_be_aligned(tmp_path: Path, sd3_folder: Path, prompt_file: Path) -> None:
    place = Path(f"{__file__}:Still@{sd3_folder}")
    with pytest.raises(ConfigError, match="no velocity and no LoRA slots"):
        pixrl.align(recipe(place, prompt_file), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("raises", "KeyError"),
        ("wrong_length", "1"),
        ("not_a_number", "nan"),
        ("infinite", "inf"),
        ("hangs", "no answer within 0.5 s"),
    ],
)
def test_a_reward_that_fails_stops_the_run_with_its_reason(
    tmp_path: Path, sd3_folder: Path, prompt_file: Path, function: str, reason: str
) -> None:
    scoring = {"scoring": {"time_limit": 0.5}} if function == "hangs" else {}
    settings = recipe(sd3_folder, prompt_file, **with_reward(function), **scoring)
    with pytest.raises(RunError, match="failed for 4 of 4 pictures") as error:
        pixrl.align(settings, out=tmp_path / "run")
    assert reason in str(error.value)


def test_a_run_that_stopped_at_failed_scores_says_how_it_goes_on(
    tmp_path: Path, sd3_folder: Path, prompt_file: Path
) -> None:
    settings = recipe(sd3_folder, prompt_file, **with_reward("some_fail"), scoring={"max_failed_share": 0.1})
    run = tmp_path / "run"
    with pytest.raises(FailedScoresError, match=r"share 0\.1 that scoring\.max_failed_share allows") as error:
        pixrl.align(settings, out=run)
    *_, mend, bear = str(error.value).splitlines()
    assert mend.endswith(f"type: pixrl resume {run}")
    _, _, command = bear.partition(f"pixrl resume {run} --set ")
    assert command == "scoring.max_failed_share=1"
    align_job.go_on(run, overrides=[command])
    assert len(RunFolder.open(run).metrics()) == settings["steps"]


@pytest.mark.parametrize("function", ["some_fail", "all_equal"])
def test_rewards_without_a_signal_poison_nothing(
    tmp_path: Path, sd3_folder: Path, prompt_file: Path, function: str
) -> None:
    done = pixrl.align(recipe(sd3_folder, prompt_file, **with_reward(function)), out=tmp_path / "run")
    assert all(bool(x.isfinite().all()) for x in final(done.run).values())
    row = done.metrics[-1]
    assert (
        row["zero_std_share"] == 1 if function == "all_equal" else row["failed_share"] == pytest.approx(1 / 3)
    )


def test_odd_sizes_simply_work(tmp_path: Path, sd3_folder: Path, prompt_file: Path) -> None:
    settings = recipe(
        sd3_folder,
        prompt_file,
        prompts={"source": str(prompt_file), "per_step": 7},
        exploration={"kind": "perturbed", "noises": 1, "variants": 3, "steps": 2},
        optimizer={"lr": 1e-3, "updates": 4},
        machine={"device": "cpu", "dtype": "float32", "rollout_batch": 5, "train_batch": 2},
        steps=1,
    )
    done = pixrl.align(settings, out=tmp_path / "run")
    manifest = RunFolder.open(done.run).manifest()
    assert len(manifest) == 21
    assert len({(row.prompt, row.seed) for row in manifest}) == 7  # 5 prompts, 2 of them in two epochs


def test_the_command_line(tmp_path: Path, sd3_folder: Path, prompt_file: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(yaml.safe_dump({"kind": "align", **recipe(sd3_folder, prompt_file, **GRPO)}))
    run = tmp_path / "run"
    options = ["--steps", "1", "--seed", "3", "--out", str(run), "--set", "optimizer.updates=2"]
    done = CliRunner().invoke(cli.app, ["align", str(file), *options])
    assert done.exit_code == 0, done.output
    assert str(run) in done.output
    again = CliRunner().invoke(cli.app, ["align", str(file), *options])
    assert again.exit_code != 0
    assert "pixrl resume" in again.output
    resumed = CliRunner().invoke(cli.app, ["resume", str(run), "--set", "steps=2"])
    assert resumed.exit_code == 0, resumed.output
    assert len(RunFolder.open(run).metrics()) == 2
    checked = CliRunner().invoke(cli.app, ["selfcheck", str(file), "--json"])
    report = json.loads(checked.stdout)
    assert checked.exit_code == 0
    assert report["passed"] is True
    assert {row["dtype"] for row in report["deviations"]} == {"float32", "bfloat16"}
    assert report["gradient_disagreement"] == 0


def test_settings_by_dotted_name(sd3_folder: Path, prompt_file: Path) -> None:
    config = api.load(recipe(sd3_folder, prompt_file), settings={"optimizer.lr": 0.5}, steps=9)
    assert (config.optimizer.lr, config.steps) == (0.5, 9)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path, sd3_folder: Path, prompt_file: Path) -> None:
    machine = {"device": "cpu", "dtype": "float32", "gradient_checkpointing": True}
    plain = pixrl.align(recipe(sd3_folder, prompt_file), steps=1, out=tmp_path / "a").run
    frugal = pixrl.align(recipe(sd3_folder, prompt_file, machine=machine), steps=1, out=tmp_path / "b").run
    assert_trained_alike(plain, frugal)


def test_a_loss_that_is_never_finite_stops_the_run(
    tmp_path: Path, sd3_folder: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pixrl.algorithms import nft

    monkeypatch.setattr(nft, "NFT_SCALE", torch.nan)
    settings = recipe(sd3_folder, prompt_file, optimizer={"max_skipped": 1, "lr": 1e-3})
    with pytest.raises(RunError, match="no finite loss and gradient"):
        pixrl.align(settings, out=tmp_path / "run")
    weights = final(tmp_path / "run")
    assert all(bool(x.isfinite().all()) for x in weights.values())


def test_an_evaluation_on_training_prompts_is_told(
    tmp_path: Path, sd3_folder: Path, prompt_file: Path
) -> None:
    """In the plan that the log begins with, in start.json and in the report."""
    done = pixrl.align(recipe(sd3_folder, prompt_file), steps=1, out=tmp_path / "run")
    start = json.loads((done.run / "start.json").read_text())
    assert start["trained_on"] == 2
    (note,) = [note for note in start["notes"] if note.startswith("evaluation:")]
    assert "all 2 prompts are trained on too" in note and "evaluation.source" in note
    page = done.report.read_text()
    assert "all 2 prompts are trained on too" in page
    assert "These prompts were trained on." in page and "Held-out prompts" not in page


@pytest.mark.parametrize(("lines", "seen"), [("a red owl\na dog\n", 1), ("a dog\na bird\n", 0)])
def test_another_file_may_still_overlap(
    tmp_path: Path, sd3_folder: Path, prompt_file: Path, lines: str, seen: int
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(lines)
    settings = recipe(sd3_folder, prompt_file, evaluation={"source": str(other), "prompts": 2})
    shop = load_run(AlignConfig.model_validate(settings))
    _, notes = plan_batches(shop)
    told = [note for note in notes if "evaluation: 1 of 2 prompts are trained on too" in note]
    assert (shop.trained_on(), len(told)) == (seen, seen)


def test_a_subject_is_trained_on_by_its_pictures_whatever_it_is_called(
    sd3_folder: Path, prompt_file: Path
) -> None:
    shop = load_run(AlignConfig.model_validate(recipe(sd3_folder, prompt_file)))

    def subject(text: str, name: str, brightness: float) -> PromptSet:
        picture = torch.full((3, 4, 4), brightness)
        return PromptSet("subjects", (Prompt(text, {"subject": name, "reference": [picture]}),))

    shop = replace(shop, prompts=PromptSampler(subject("a red owl", "owl_01", 0.2), per_step=1, seed=0))
    for held_out, seen in (
        (subject("a red owl", "owl_01", 0.2), 1),
        (subject("an owl in snow", "a copy", 0.2), 1),  # other words, another folder, the same owl
        (subject("a red owl", "owl_01", 0.7), 0),  # another owl by that name
    ):
        assert replace(shop, held_out=held_out).trained_on() == seen
