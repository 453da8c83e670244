"""Shared noise: who shares it, that it resumes, and that rewards are compared within a noise."""

import pytest
import torch

from pixrl.algorithms.fusion.base import Feedback
from pixrl.fusion.config import FuseConfig
from pixrl.fusion.noise import Noise, NoisePlan
from pixrl.jobs.fuse import go_on, start
from tests.fuse.test_job import same_run
from tests.fuse.test_samplers import sampler_of, task
from tests.fuse.world import fake_world
from tests.tolerance import agree


@pytest.mark.parametrize(
    ("noise", "distinct"), [(Noise.IMAGE, 64), (Noise.GROUP, 16), (Noise.BATCH, 4), (Noise.RUN, 1)]
)
def test_noise_is_shared_as_asked(noise, distinct):
    plan = NoisePlan(noise, 0, 8)
    seeds = [seed for step in range(4) for seed in plan.seeds(step, 16)]
    assert len(set(seeds)) == distinct
    assert seeds != [seed for step in range(4) for seed in NoisePlan(noise, 1, 8).seeds(step, 16)]


def test_narrow_keeps_the_best_noises_of_the_first_half_in_turn():
    plan = NoisePlan(Noise.NARROW, 0, 4)
    first, second = plan.seeds(0, 16), plan.seeds(1, 16)
    assert len({*first, *second}) == 32
    plan.tell(first, [float(i) for i in range(15)] + [float("nan")])
    plan.tell(second, [-1.0] * 15 + [99.0])
    third = plan.seeds(2, 16)
    assert set(third) == {*first[12:15], second[15]}
    assert all(third.count(seed) == 4 for seed in set(third))
    other = NoisePlan(Noise.NARROW, 0, 4)
    other.restore(plan.state())
    assert other.seeds(2, 16) == third


def test_narrow_with_no_score_yet_draws_new_noises():
    plan = NoisePlan(Noise.NARROW, 0, 2)
    plan.tell(plan.seeds(0, 4), [float("nan")] * 4)
    assert len(set(plan.seeds(1, 4))) == 4


@pytest.mark.parametrize("noise", [Noise.NARROW, Noise.GROUP])
def test_a_broken_off_run_resumes_with_the_same_noises(tmp_path, noise):
    config = FuseConfig(concepts=("owl", "snail"), budget=32, batch=8, exemplars=1, noise=noise)
    start(config, tmp_path / "whole", world=fake_world())
    with pytest.raises(KeyboardInterrupt):
        start(config, tmp_path / "broken", world=fake_world(die_after=20))
    go_on(tmp_path / "broken", world=fake_world())
    same_run(tmp_path / "whole", tmp_path / "broken")


def test_rewards_stand_in_the_row_of_their_noise_and_lone_ones_together():
    similarities_BN = torch.tensor([[0.1, 0.1], [0.2, 0.2], [0.3, 0.3], [0.4, 0.4], [0.5, 0.5]])
    rows = Feedback.of(similarities_BN, 5.0, seeds=[7, 9, 7, 8, 5]).by_noise()
    found = [[round(x, 3) for x in row[~row.isnan()].tolist()] for row in rows]
    assert found == [[0.2, 0.6], [0.4, 0.8, 1.0]]


def test_a_difference_between_noises_is_no_advantage():
    sampler = sampler_of("rmler", task())
    proposal = sampler.ask(8, 0)
    luck = torch.tensor([1.0, 1.0, 1.0, 1.0, 9.0, 9.0, 9.0, 9.0])
    own = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.1, 0.2, 0.3, 0.4])
    noise_B = torch.tensor([0, 0, 0, 0, 4, 4, 4, 4])
    advantages_B = sampler.advantages(proposal, Feedback(torch.zeros(8, 2), luck + own, noise_B))
    assert agree(advantages_B[:4], advantages_B[4:], 64, scale=9 / own.std().item())
    assert advantages_B[0] < advantages_B[1] < 0 < advantages_B[2] < advantages_B[3]
