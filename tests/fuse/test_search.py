"""Bisection and CMA-ES, against shares worked out by hand and a function whose best point is known."""

import pytest
import torch

from pixrl.algorithms.fusion.base import Feedback
from pixrl.algorithms.fusion.search import Bisection, EvolutionStrategy
from pixrl.fusion.trainer import FusionTrainer
from pixrl.fusion.world import FusionSession
from pixrl.runs.loop import take_step
from tests.fuse.test_job import config
from tests.fuse.test_samplers import sampler_of, task, told
from tests.fuse.world import fake_world
from tests.tolerance import agree

BATCH = 8


def tipping(shares_B: torch.Tensor, points_B: torch.Tensor) -> Feedback:
    """The first concept is the more similar one where its share is above the noise's own point."""
    above_B = torch.sigmoid(50 * (shares_B - points_B))
    return Feedback.of(torch.stack((above_B, 1 - above_B), dim=1), 5.0)


def test_bisection_finds_the_point_of_every_noise() -> None:
    sampler = sampler_of("bisect", task(), depth=10)
    assert isinstance(sampler, Bisection)
    points_B = torch.linspace(0.05, 0.95, BATCH)
    for step in range(10):
        proposal = sampler.ask(BATCH, step)
        shares_B = proposal.coefficients_BND[:, 0, 0]
        assert agree(proposal.coefficients_BND[:, 0], shares_B[:, None].expand(-1, 20), 1)
        assert float((shares_B - points_B).abs().max()) <= 2.0 ** -(step + 1)
        sampler.tell(proposal, tipping(shares_B, points_B))


def test_bisection_takes_new_noises_when_it_is_through() -> None:
    sampler = sampler_of("bisect", task(), depth=2)
    asked = []
    for step in range(5):
        proposal = sampler.ask(BATCH, step)
        assert proposal.noises_B is not None
        asked.append(proposal.noises_B.tolist())
        even = bool((proposal.coefficients_BND == 0.5).all())
        assert even == (step % 2 == 0)
        sampler.tell(proposal, tipping(proposal.coefficients_BND[:, 0, 0], torch.full((BATCH,), 0.3)))
    first, second, third = list(range(8)), list(range(8, 16)), list(range(16, 24))
    assert asked == [first, first, second, second, third]


def test_bisection_of_three_concepts_takes_from_the_most_similar_one() -> None:
    sampler = sampler_of("bisect", task(concepts=3))
    similarities_BN = torch.tensor([[0.9, 0.2, 0.5]]).repeat(BATCH, 1)
    sampler.tell(sampler.ask(BATCH, 0), Feedback.of(similarities_BN, 5.0))
    third = 1 / 3
    expected = torch.tensor([third - 0.25, third + 0.25, third])
    assert agree(sampler.ask(BATCH, 1).coefficients_BND[:, :, 0], expected.expand(BATCH, 3), 8)
    sampler.tell(sampler.ask(BATCH, 1), Feedback.of(similarities_BN, 5.0))
    left = torch.tensor([0.0, 2 * third, third])  # no share below 0
    assert agree(sampler.ask(BATCH, 2).coefficients_BND[:, :, 0], left.expand(BATCH, 3), 16)


def test_a_picture_without_a_score_is_tried_again_where_it_stands() -> None:
    sampler = sampler_of("bisect", task())
    proposal = sampler.ask(BATCH, 0)
    feedback = tipping(proposal.coefficients_BND[:, 0, 0], torch.full((BATCH,), 0.3))
    feedback.similarities_BN[2] = torch.nan
    sampler.tell(proposal, feedback)
    shares = sampler.ask(BATCH, 1).coefficients_BND[:, 0, 0].tolist()
    assert shares == [0.25, 0.25, 0.5, *[0.25] * 5]


def test_a_run_by_bisection_draws_the_same_noises_again() -> None:
    settings = config(sampler="bisect", options={"depth": 2}, budget=32, batch=8, noise="run")
    trainer = FusionTrainer(FusionSession(fake_world(), settings), settings)
    seeds = [take_step(trainer, step).rollouts.seeds for step in range(4)]
    assert seeds[0] == seeds[1] and seeds[2] == seeds[3]
    assert len({*seeds[0], *seeds[2]}) == 16


def test_cmaes_comes_near_the_best_balance() -> None:
    """The reward is highest where the first concept has 0.8 of every column; the start is at 0.5."""
    sampler = sampler_of("cmaes", task(budget=320, batch=16))
    assert isinstance(sampler, EvolutionStrategy)
    for step in range(20):
        proposal = sampler.ask(16, step)
        distance_B = (proposal.coefficients_BND[:, 0] - 0.8).square().mean(dim=1)
        if step == 0:
            first = float(distance_B.mean())
        sampler.tell(proposal, told(-distance_B))
    assert float(distance_B.mean()) < first / 20


def test_cmaes_goes_on_exactly_where_it_was_broken_off() -> None:
    whole, broken = sampler_of("cmaes", task()), sampler_of("cmaes", task())
    for step in range(5):
        if step == 3:
            state = {name: x.clone() for name, x in broken.tensors().items()}
            broken = sampler_of("cmaes", task())
            broken.restore(state, {})
        proposals = [sampler.ask(BATCH, step) for sampler in (whole, broken)]
        assert torch.equal(proposals[0].coefficients_BND, proposals[1].coefficients_BND)
        rewards_B = torch.rand(BATCH, generator=torch.Generator().manual_seed(step))
        rewards_B[step] = torch.nan
        for sampler, proposal in zip((whole, broken), proposals, strict=True):
            sampler.tell(proposal, told(rewards_B))


@pytest.mark.parametrize(
    ("rewards", "learns"), [([torch.nan] * 8, False), ([0.1] * 5, False), ([0.1] * 8, True)]
)
def test_cmaes_learns_from_whole_generations_with_a_score(rewards: list[float], learns: bool) -> None:
    sampler = sampler_of("cmaes", task())
    assert isinstance(sampler, EvolutionStrategy)
    sampler.tell(sampler.ask(len(rewards), 0), told(torch.tensor(rewards)))
    assert bool(len(sampler.losses_TB)) == learns


def test_ppo_differs_from_rmler_in_its_critic_alone() -> None:
    """RMLer's Table 1."""
    rmler, ppo = sampler_of("rmler", task()).settings, sampler_of("ppo", task()).settings
    own = {"baseline", "gamma", "lam", "value_lr"}
    assert {k: v for k, v in dict(rmler).items() if k not in own} == {
        k: v for k, v in dict(ppo).items() if k not in own
    }
