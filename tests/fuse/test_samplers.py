"""Properties of every sampler: equal budgets, coefficients on the simplex, determinism, exact resume."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pixrl import algorithms
from pixrl.algorithms.fusion.base import Feedback, FusionTask, Sampler
from pixrl.algorithms.fusion.baselines import BASS, BASSSettings, GoldenSection, uniform_simplex
from pixrl.fusion.config import FuseConfig, resolve_options
from pixrl.fusion.trainer import FusionTrainer
from pixrl.fusion.world import FusionSession
from pixrl.runs.loop import take_step
from tests.fuse.world import fake_world
from tests.tolerance import agree

PROPERTY = settings(deadline=None, max_examples=15, derandomize=True)
TRIPLE = ("owl", "snail", "frog")


def task(concepts=2, columns=20, seed=0, budget=64, batch=8):
    features = torch.randn(concepts, columns, generator=torch.Generator().manual_seed(seed + 99))
    return FusionTask(features, seed, budget, batch)


def sampler_of(name, the_task, **options):
    return algorithms.SAMPLERS.find(name)(the_task, resolve_options(name, options))


SAMPLERS = tuple(algorithms.SAMPLERS.entries)


def told(rewards_B):
    return Feedback(torch.zeros(len(rewards_B), 2), rewards_B, torch.arange(len(rewards_B)))


def scores(count, concepts, step):
    generator = torch.Generator().manual_seed(step)
    return Feedback.of(torch.rand(count, concepts, generator=generator), 5.0)


def test_the_table_and_the_names_agree():
    assert all(issubclass(algorithms.SAMPLERS.find(name), Sampler) for name in SAMPLERS)
    assert [FuseConfig(sampler=name).sampler for name in SAMPLERS] == [*SAMPLERS]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("concepts", [2, 3])
def test_coefficients_lie_on_the_simplex_in_every_column(name, concepts):
    sampler = sampler_of(name, task(concepts))
    for step in range(4):
        proposal = sampler.ask(8, step)
        assert proposal.coefficients_BND.shape == (8, concepts, 20)
        assert proposal.coefficients_BND.dtype == torch.float32
        assert bool((proposal.coefficients_BND >= 0).all())
        assert bool((proposal.coefficients_BND <= 1).all())
        assert agree(proposal.coefficients_BND.sum(dim=1), torch.ones(8, 20), 16)
        sampler.tell(proposal, scores(8, concepts, step))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(("budget", "batch"), [(32, 16), (40, 16), (16, 16)])
def test_every_sampler_makes_exactly_its_budget(name, budget, batch):
    world = fake_world()
    config = FuseConfig(concepts=("owl", "snail"), sampler=name, budget=budget, batch=batch, exemplars=1)
    session = FusionSession(world, config)
    before = world.renderer.rendered
    trainer = FusionTrainer(session, config)
    made = [len(take_step(trainer, number).rollouts) for number in range(config.steps)]
    assert sum(made) == budget == world.renderer.rendered - before


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_same_seed_gives_the_same_coefficients_and_another_seed_others(name):
    def run(seed):
        sampler = sampler_of(name, task(seed=seed))
        rows = []
        for step in range(3):
            proposal = sampler.ask(8, step)
            again = sampler.ask(8, step)
            assert torch.equal(proposal.coefficients_BND, again.coefficients_BND)
            rows.append(proposal.coefficients_BND)
            sampler.tell(proposal, scores(8, 2, step))
        return torch.cat(rows)

    assert torch.equal(run(3), run(3))
    if name not in ("mean", "golden", "bisect"):
        assert not torch.equal(run(3), run(4))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("concepts", [2, 3])
def test_a_restored_sampler_goes_on_exactly(name, concepts):
    whole = sampler_of(name, task(concepts))
    for step in range(3):
        proposal = whole.ask(8, step)
        whole.tell(proposal, scores(8, concepts, step))
    tensors = {key: value.detach().clone() for key, value in whole.tensors().items()}
    fresh = sampler_of(name, task(concepts))
    fresh.restore(tensors, whole.state())
    for step in range(3, 6):
        expected, found = whole.ask(8, step), fresh.ask(8, step)
        assert torch.equal(expected.coefficients_BND, found.coefficients_BND)
        assert whole.tell(expected, scores(8, concepts, step)) == fresh.tell(found, scores(8, concepts, step))


@pytest.mark.parametrize("name", SAMPLERS)
def test_failed_pictures_are_left_out_and_nothing_becomes_nan(name):
    sampler = sampler_of(name, task())
    for step, failed in enumerate([[0, 3], [], list(range(8)), [7]]):
        proposal = sampler.ask(8, step)
        similarities_BN = scores(8, 2, step).similarities_BN.clone()
        similarities_BN[failed] = torch.nan
        figures = sampler.tell(proposal, Feedback.of(similarities_BN, 5.0))
        assert all(value == value for value in figures.values())
    assert bool(sampler.ask(8, 9).coefficients_BND.isfinite().all())


@PROPERTY
@given(st.integers(2, 5), st.integers(0, 1000))
def test_uniform_coefficients_have_the_simplex_mean(concepts, seed):
    coefficients = uniform_simplex(200, task(concepts), torch.Generator().manual_seed(seed))
    assert coefficients.mean(dim=(0, 2)).sub(1 / concepts).abs().max() < 0.03


def test_golden_section_closes_in_on_the_best_weight():
    sampler = sampler_of("golden", task())
    assert isinstance(sampler, GoldenSection)
    for step in range(12):
        proposal = sampler.ask(8, step)
        weight = proposal.coefficients_BND[:, 0, 0]
        rewards_B = -((weight - 0.31) ** 2)
        sampler.tell(proposal, told(rewards_B))
    assert sampler.low[0] <= 0.31 <= sampler.high[0]
    assert sampler.high[0] - sampler.low[0] < 0.01


def test_golden_section_searches_each_of_several_concepts():
    sampler = sampler_of("golden", task(3))
    target = torch.tensor([0.5, 0.3, 0.2])
    for step in range(60):
        proposal = sampler.ask(8, step)
        rewards_B = -(proposal.coefficients_BND[:, :, 0] - target).square().sum(dim=1)
        sampler.tell(proposal, told(rewards_B))
    best = (proposal.coefficients_BND[:, :, 0] - target).abs().max()
    assert best < 0.12


def test_agswap_hands_columns_to_the_weaker_concept():
    sampler = sampler_of("agswap", task())
    before = sampler.ask(8, 0)
    strong_first = torch.tensor([[0.9, 0.5]]).repeat(8, 1)
    sampler.tell(before, Feedback.of(strong_first, 5.0))
    after = sampler.ask(8, 1)
    assert bool((after.coefficients_BND[:, 0].sum(1) < before.coefficients_BND[:, 0].sum(1)).all())


def test_swap_samplers_take_each_column_whole():
    for name in ("bass", "agswap"):
        coefficients = sampler_of(name, task(3)).ask(8, 0).coefficients_BND
        assert set(coefficients.unique().tolist()) == {0.0, 1.0}


def test_bass_passes_on_the_balanced_and_near_ones_only():
    similarities_BN = torch.tensor([[0.8, 0.79], [0.9, 0.2], [0.3, 0.3], [torch.nan, torch.nan]])
    assert BASS.shortlist(BASSSettings(quantile=0.5), similarities_BN).tolist() == [True, False, False, False]


def test_search_stays_near_the_best_it_has_seen():
    sampler = sampler_of("search", task(budget=256), std=0.2)
    target = 0.8
    for step in range(25):
        proposal = sampler.ask(8, step)
        rewards_B = -(proposal.coefficients_BND[:, 0] - target).square().mean(dim=1)
        sampler.tell(proposal, told(rewards_B))
        if step == 0:
            first = float(rewards_B.mean())
    assert float(rewards_B.mean()) > first + 0.03
