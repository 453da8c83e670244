"""Evaluation of a slot: the same noise for all, nan left out and counted, tasks apart."""

import math
from pathlib import Path

import pytest
import torch

from pixrl.algorithms.sampling import Solver
from pixrl.data.prompts import Prompt
from pixrl.metrics.diversity import DiversityMeter, pixel_features
from pixrl.models.sd3 import SD3Policy
from pixrl.models.slots import Slot
from pixrl.rewards.set import RewardSet
from pixrl.rewards.settings import RewardSetting
from pixrl.runs.measure import Drawing, draw, evaluate, open_run, reward_figures
from pixrl.types import Scores
from tests.align.parts import JUDGE
from tests.tolerance import PICTURE, agree

PROMPTS = (
    Prompt("a red owl", {"tag": "colors"}),
    Prompt("two blue snails", {"tag": "counting"}),
    Prompt("a cat", {"tag": "counting"}),
)
DRAWING = Drawing(per_prompt=2, steps=3, solver=Solver.EULER, seed=4, micro_batch=4)


def rewards(**failing: str) -> RewardSet:
    settings = [
        RewardSetting(name="bright", kind="python", options={"function": f"{JUDGE}:brightness"}),
        RewardSetting(name="some", kind="python", options={"function": f"{JUDGE}:some_fail"}, held_out=True),
    ]
    return RewardSet(settings, time_limit=None, max_failed_share=0.9)


def train_a_little(policy: SD3Policy) -> None:
    assert policy.lora is not None
    for parameter in policy.lora.parameters():
        parameter.data.add_(0.3)


def test_slots_share_their_noise_and_untrained_ones_are_the_base(policy: SD3Policy) -> None:
    base = draw(policy, Slot.REFERENCE, PROMPTS, DRAWING)
    assert torch.equal(base.images_BCHW, draw(policy, Slot.EMA, PROMPTS, DRAWING).images_BCHW)
    train_a_little(policy)
    trained = draw(policy, Slot.CURRENT, PROMPTS, DRAWING)
    assert trained.samples.seeds == base.samples.seeds and len(set(base.samples.seeds)) == 6
    assert not torch.equal(base.images_BCHW, trained.images_BCHW)
    assert torch.equal(base.images_BCHW, draw(policy, Slot.REFERENCE, PROMPTS, DRAWING).images_BCHW)


def test_a_prompts_pictures_do_not_depend_on_the_others_nor_on_the_micro_batch(policy: SD3Policy) -> None:
    whole = draw(policy, Slot.REFERENCE, PROMPTS, DRAWING).images_BCHW
    fewer = draw(policy, Slot.REFERENCE, PROMPTS[:1], Drawing(2, 3, Solver.EULER, 4, 1)).images_BCHW
    assert agree(whole[:2], fewer, PICTURE)


def test_an_evaluation_holds_every_reward_and_the_diversity(policy: SD3Policy) -> None:
    meter = DiversityMeter(pixel_features)
    found = evaluate(policy, Slot.REFERENCE, PROMPTS, DRAWING, rewards(), meter)
    again = evaluate(policy, Slot.EMA, PROMPTS, DRAWING, rewards(), meter)
    assert found.figures() == again.figures()
    assert (found.rewards["bright"].held_out, found.rewards["some"].held_out) == (False, True)
    assert (found.rewards["bright"].failed, found.rewards["some"].failed) == (0, 2)
    images = draw(policy, Slot.REFERENCE, PROMPTS, DRAWING).images_BCHW
    assert found.rewards["bright"].mean == pytest.approx(images.mean().item(), abs=0.5 / 255)
    assert found.figures()["diversity"] == pytest.approx(
        meter.measure(images, torch.arange(3).repeat_interleave(2)).distance
    )
    assert found.figures()["layouts"] is None and found.to_json()["layouts"] is None


def test_means_leave_nan_out_and_tasks_count_alike_worked_out_by_hand() -> None:
    values = torch.tensor([1.0, 0.0, torch.nan, 1.0, torch.nan, torch.nan])
    reasons = tuple("broken" if x != x else None for x in values.tolist())
    found = reward_figures(Scores(values, reasons), ["colors", "counting", "counting"], True)
    assert (found.mean, found.failed) == (pytest.approx(2 / 3), 3)
    assert found.tasks == {"colors": 0.5, "counting": 1.0}
    assert found.task_mean == 0.75
    assert found.prompt_means[:2] == (0.5, 1.0) and math.isnan(found.prompt_means[2])
    nothing = reward_figures(Scores(values, reasons), [None] * 3, True)
    assert not nothing.tasks and math.isnan(nothing.task_mean)


def test_a_finished_run_is_opened_with_its_trained_slots(
    tmp_path: Path, sd3_folder: Path, prompt_file: Path
) -> None:
    from pixrl.jobs import align as align_job
    from pixrl.runs.config import AlignConfig
    from tests.align.parts import final, recipe

    config = AlignConfig.model_validate(recipe(sd3_folder, prompt_file, steps=1))
    run = align_job.start(config, tmp_path / "run")
    state = open_run(run).slots.state()
    saved = final(run)
    assert all(torch.equal(x, saved[f"slots/{name}"]) for name, x in state.items())
