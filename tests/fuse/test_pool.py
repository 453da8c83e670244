"""The pool: when a policy has learned, its best state draws pictures, learns no more, and the selection is there."""

import copy
from pathlib import Path

import pytest
import torch

from pixrl.fusion.trainer import FusionTrainer
from pixrl.fusion.world import FusionSession
from pixrl.jobs.fuse import open_run, select_again, start
from pixrl.runs.folder import RunFolder
from pixrl.runs.log import load_coefficients
from pixrl.runs.loop import take_step
from tests.fuse.test_job import config
from tests.fuse.world import fake_world

LEARNING, POOL = 4, 2
"""Steps."""
SETTINGS = {"budget": 48, "batch": 8, "pool": 16, "seed": 3}
"""With this seed every policy's third batch is the best, by 0.3 and more: neither the first nor the last."""


def trained(steps: int, **changes) -> FusionTrainer:
    settings = config(**SETTINGS, **changes)
    trainer = FusionTrainer(FusionSession(fake_world(), settings), settings)
    for step in range(steps):
        take_step(trainer, step)
    return trainer


@pytest.mark.parametrize("sampler", ["rmler", "ppo", "grpo"])
def test_the_pool_is_drawn_by_the_state_that_drew_the_best_batch(sampler: str) -> None:
    trainer = trained(0, sampler=sampler)
    states, rewards = [], []
    for step in range(LEARNING):
        states.append({name: x.detach().clone() for name, x in trainer.sampler.tensors().items()})
        rewards.append(take_step(trainer, step).metrics["reward/fusion/mean"])
    best = max(range(LEARNING), key=lambda step: rewards[step])
    assert best == 2
    for step in range(LEARNING, LEARNING + POOL):
        taken = take_step(trainer, step)
        assert taken.metrics["pool/from_step"] == best
        other = trained(0, sampler=sampler)
        other.sampler.restore({k: v for k, v in states[best].items() if ".optimizer/" not in k}, {})
        assert torch.equal(
            taken.rollouts.proposal.coefficients_BND, other.sampler.ask(8, step).coefficients_BND
        )


def test_nothing_learns_in_the_pool() -> None:
    trainer = trained(LEARNING + 1)
    before = {name: x.clone() for name, x in trainer.sampler.tensors().items()}
    noises = copy.deepcopy(trainer.noise.state())
    taken = take_step(trainer, LEARNING + 1)
    after = trainer.sampler.tensors()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if name != "seen_N")
    assert torch.equal(after["seen_N"], taken.scores.feedback.similarities_BN.mean(dim=0))
    assert trainer.noise.state() == noises
    assert not any("clip" in name or "grad" in name for name in taken.metrics)


def test_pictures_that_were_learned_from_are_not_selected(tmp_path: Path) -> None:
    run = start(config(**SETTINGS, keep=16, presence=-0.9, balance=9.0), tmp_path / "run", world=fake_world())
    assert sorted(run.selection.indices) == list(range(32, 48))
    assert run.selection.images == 16 and run.selection.pool
    assert "of 16 pictures of the pool are candidates" in run.selection.summary()
    everywhere = select_again(run.folder.path, keep=48, everywhere=True).selection
    assert sorted(everywhere.indices) == list(range(48)) and not everywhere.pool
    assert run.folder.metrics()[-1]["pool/from_step"] < LEARNING
    assert load_coefficients(run.folder, LEARNING).shape[0] == 8


def test_a_sampler_without_a_policy_searches_with_all_of_the_budget(tmp_path: Path) -> None:
    run = start(
        config(**SETTINGS, sampler="search", keep=48, presence=-0.9, balance=9.0),
        tmp_path / "run",
        world=fake_world(),
    )
    assert len(run.selection.indices) == 48
    assert all("elites" in row and "pool/from_step" not in row for row in run.folder.metrics())


def test_a_resumed_run_draws_its_pool_from_the_same_state() -> None:
    whole = trained(LEARNING + POOL)
    for stop in (1, LEARNING, LEARNING + 1):
        first = trained(stop)
        second = trained(0)
        second.restore({name: x.clone() for name, x in first.tensors().items()}, copy.deepcopy(first.state()))
        for step in range(stop, LEARNING + POOL):
            taken = take_step(second, step)
        assert whole.best is not None and second.best is not None
        assert second.best.step == whole.best.step
        last = whole.sampler.ask(8, LEARNING + POOL - 1).coefficients_BND
        assert torch.equal(taken.rollouts.proposal.coefficients_BND, last)


def test_a_run_of_before_there_was_a_pool_selects_among_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(config(**{**SETTINGS, "pool": 0}), tmp_path / "run", world=fake_world())
    recipe = {name: value for name, value in run.folder.recipe().items() if name != "pool"}
    monkeypatch.setattr(RunFolder, "recipe", lambda folder: recipe)
    assert open_run(run.folder.path)[1].pool_images == 0
    assert select_again(run.folder.path).selection.images == 48


@pytest.mark.learning
def test_the_pool_is_better_than_what_was_drawn_first() -> None:
    """Its mean reward over 5 seeds: above the first batch's by more than twice the standard error of the difference."""
    gains = []
    for seed in range(5):
        settings = config(budget=288, batch=16, pool=32, noise="image", seed=seed)
        trainer = FusionTrainer(FusionSession(fake_world(), settings), settings)
        steps = [take_step(trainer, step).scores.feedback.rewards_B for step in range(settings.steps)]
        gains.append(float(torch.cat(steps[settings.learning_steps :]).mean() - steps[0].mean()))
    gain = torch.tensor(gains)
    assert float(gain.mean()) > 2 * float(gain.std()) / len(gains) ** 0.5
