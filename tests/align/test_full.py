"""All weights are trained: copies in float32, the plain loop that it is, and learning. Runs: test_full_runs.py."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from pixrl import models
from pixrl.algorithms import LOSSES, make_loss
from pixrl.algorithms.advantages import AdvantageSettings, GroupAdvantage
from pixrl.algorithms.exploration import NoiseOnly
from pixrl.algorithms.grpo import GRPOSettings
from pixrl.algorithms.loss import LossSettings
from pixrl.algorithms.nft import NFTSettings
from pixrl.algorithms.sampling import RolloutSettings
from pixrl.algorithms.trainer import Aligner, Method, MicroBatches, OptimizerSettings
from pixrl.errors import CheckpointError, InputError, RunError
from pixrl.models.sd3 import SD3Policy
from pixrl.models.slots import Slot
from pixrl.runs.config import load_recipe
from tests.align.parts import groups, scored
from tests.reference import plain
from tests.reference.nft import self_weighted
from tests.tolerance import GRADIENT, MODEL, agree, agree_after_adam

ALL = (Slot.OLD, Slot.EMA, Slot.REFERENCE)
OWL = "a red owl"


def load(ref: Path | str, **options: Any) -> SD3Policy:
    found = models.load(ref, device="cpu", dtype="float32", **options)
    assert isinstance(found, SD3Policy)
    return found


@pytest.fixture
def bare(sd3_folder: Path) -> SD3Policy:
    return load(sd3_folder)


def velocity(policy: SD3Policy, slot: str) -> Tensor:
    with policy.slot(slot):
        return policy.velocity(
            policy.initial_noise([1, 2]), torch.tensor([0.9, 0.3]), policy.encode([OWL, "a cat"])
        )


@torch.no_grad()
def move(policy: SD3Policy, share: float = 0.1) -> None:
    assert policy.slots is not None
    drawer = torch.Generator().manual_seed(3)
    for parameter in policy.slots.parameters():
        parameter.add_(share * parameter.std() * torch.randn(parameter.shape, generator=drawer))


def slots_of(state: Mapping[str, Tensor], slot: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{slot}/"): x for name, x in state.items() if name.startswith(f"{slot}/")}


def test_slots_are_copies_of_which_one_is_trained(bare: SD3Policy) -> None:
    before = velocity(bare, "current")
    slots = bare.attach_full(ALL)
    for slot in Slot:
        assert agree(velocity(bare, slot), before, MODEL)
        assert velocity(bare, slot).requires_grad is (slot is Slot.CURRENT)
    assert {id(x) for x in slots.parameters()} == {id(x) for x in bare.pipeline.transformer.parameters()}
    move(bare)
    after = velocity(bare, "current")
    assert not torch.allclose(after, before, atol=1e-3)
    for slot in ALL:
        assert agree(velocity(bare, slot), before, MODEL)
    slots.blend("old", "current", 0.0)
    assert agree(velocity(bare, "old"), after, MODEL)
    assert all(agree(velocity(bare, slot), before, MODEL) for slot in ("ema", "reference"))
    with pytest.raises(InputError, match="backbone itself"):
        slots.blend("reference", "current", 0.5)


def test_another_slot_between_forward_and_backward_leaves_the_gradient_alone(bare: SD3Policy) -> None:
    slots = bare.attach_full(ALL)
    move(bare)
    found = []
    for others in ((), ALL):
        loss = velocity(bare, "current").square().mean()
        for slot in others:
            velocity(bare, slot)
        found.append(torch.autograd.grad(loss, slots.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert any(x.abs().max() > 0 for x in found[0])


def test_masters_are_float32_whatever_the_model_was_loaded_in(bare: SD3Policy) -> None:
    """As on a GPU: weights in bfloat16, in which neither the update nor the average below would move anything."""
    bare.denoiser.bfloat16()
    loaded = {name: x.clone() for name, x in bare.denoiser.state_dict().items()}
    slots = bare.attach_full(ALL)
    for denoiser in slots.modules:
        assert {x.dtype for x in denoiser.state_dict().values()} == {torch.float32}
        assert all(torch.equal(x.bfloat16(), loaded[name]) for name, x in denoiser.state_dict().items())
    start = slots.state()
    with torch.no_grad():
        for parameter in slots.parameters():
            parameter.mul_(1 + 2**-10)
    slots.blend("ema", "current", 0.75)
    end = slots.state()
    moved = [name for name, x in start.items() if x.abs().max() > 0 and not name.startswith("old/")]
    assert moved and all(torch.all((end[name] != start[name]) | (start[name] == 0)) for name in moved)
    kept, current = slots_of(start, "ema"), slots_of(end, "current")
    for name, x in slots_of(end, "ema").items():
        assert agree(x, 0.75 * kept[name] + 0.25 * current[name], 4)


def test_only_what_the_method_reads_is_copied_and_what_comes_back_must_fit(bare: SD3Policy) -> None:
    slots = bare.attach_full([Slot.REFERENCE])
    assert len(slots.modules) == 2
    with pytest.raises(RunError, match=r"no copy of the weights for the slot 'old'.*current, reference"):
        velocity(bare, "old")
    move(bare)
    state, expected = slots.state(), velocity(bare, "current")
    assert {name.partition("/")[0] for name in state} == {"current"}
    assert slots.state(keep=False) == {}
    move(bare)
    slots.load_state(state)
    assert torch.equal(velocity(bare, "current"), expected)
    for wrong in ({}, {name: x[:1] for name, x in state.items()}):
        with pytest.raises(CheckpointError, match="whole-weight slots do not fit"):
            slots.load_state(wrong)
    for attach in (lambda: bare.attach_full(()), lambda: bare.attach_lora(rank=2)):
        with pytest.raises(RunError, match="already has whole-weight slots"):
            attach()


def test_a_method_has_an_old_policy_where_it_says_how_that_follows() -> None:
    known = {"nft": True, "clipped": False, "draft": False, "dpo": False, "sft": False, "rpo": False}
    assert {name: LOSSES.find(name).has_old_policy() for name in known} == known
    rewards = [{"name": "clip_text", "options": {"model": "toy:clip"}}]
    made = {"kind": "align", "train": "full", "rewards": rewards}
    assert load_recipe(made).copies == (Slot.REFERENCE, Slot.OLD, Slot.EMA)
    clipped = {"loss": {"kind": "clipped"}, "sampling": {"steps": 4, "noise": "flow_sde"}}
    assert load_recipe(made | clipped | {"optimizer": {"ema": None}}).copies == (Slot.REFERENCE,)


def trainer(policy: SD3Policy, loss: LossSettings, sampling: RolloutSettings, **optimizer: Any) -> Aligner:
    assert policy.slots is not None
    return Aligner(
        policy,
        policy.slots,
        Method(
            NoiseOnly(),
            sampling,
            GroupAdvantage(AdvantageSettings()),
            make_loss(loss),
            OptimizerSettings(**optimizer),
            4,
        ),
        MicroBatches(4, 3),
        seed=7,
    )


def test_nft_is_a_plain_loop_over_all_weights(sd3_folder: Path) -> None:
    """Two steps, so that the trained, old, averaged and reference policies all differ; one sample at a time."""
    kl, beta, decay, ema = 0.3, 0.7, 0.4, 0.8
    policy = load(sd3_folder, guidance=1.0)
    policy.attach_full(ALL)
    net = load(sd3_folder).denoiser
    base = {name: x.detach().clone() for name, x in net.named_parameters()}
    current = {name: x.clone().requires_grad_() for name, x in base.items()}
    old, average = dict(base), dict(base)
    adam = plain.AdamW(current, lr=2e-3, eps=1e-3, weight_decay=0.1, ema=ema)
    settings = NFTSettings(timesteps=2, kl=kl, beta=beta, old_policy="constant", old_decay=decay)
    found = trainer(policy, settings, RolloutSettings(steps=4), lr=2e-3, eps=1e-3, weight_decay=0.1, ema=ema)
    for step in range(2):
        rollouts = found.collect(groups(2, epoch=step), step)
        values = [[0.1, 0.9, 0.4, 0.2], [0.5, 0.3, 0.35, 0.8]]
        found.update(rollouts, scored(torch.tensor(values).flatten()), {"r": 1.0})
        table, losses = plain.advantages({"r": values}, {"r": 1.0}, 4), []
        for p, group in enumerate(groups(2, epoch=step)):
            c = policy.encode([group.prompt])

            def v(weights: Mapping[str, Tensor], x: Tensor, t: float, c: Any = c) -> Tensor:
                given = {"encoder_hidden_states": c.tokens_BLD, "pooled_projections": c.pooled_BE}
                given |= {"hidden_states": x, "timestep": torch.tensor([1000 * t]), "return_dict": False}
                made: Tensor = functional_call(net, dict(weights), kwargs=given)[0]
                return made

            for s in range(4):
                x0 = rollouts.x0_B[p * 4 + s][None]
                stream = plain.key(7, group.epoch, group.index, s)
                order = torch.randperm(4, generator=plain.drawer(stream, 3, 0, 0)).tolist()
                for part in range(2):
                    t = rollouts.schedule.sigmas[order[part]]
                    x_t = (1 - t) * x0 + t * policy.initial_noise([plain.key(stream, 2, part, 0)])
                    with torch.no_grad():
                        v_old, v_ref = v(old, x_t, t), v(base, x_t, t)
                    v_new = v(adam.weights, x_t, t)
                    r = 0.5 + 0.5 * min(1.0, max(-1.0, table[order[part]][p][s] / settings.certain))
                    good = x_t - t * ((1 - beta) * v_old + beta * v_new)
                    bad = x_t - t * ((1 + beta) * v_old - beta * v_new)
                    loss = 5 / beta * (r * self_weighted(good, x0) + (1 - r) * self_weighted(bad, x0))
                    losses.append(loss + kl * ((v_new - v_ref) ** 2).mean())
        adam.descend(step, losses)
        old, average = plain.blended(old, adam.weights, decay), plain.blended(average, adam.weights, ema)
    assert policy.slots is not None
    state = policy.slots.state()
    for slot, wanted in (("current", adam.weights), ("old", old), ("ema", average)):
        expected = {name: x.detach() for name, x in wanted.items()}
        assert agree_after_adam(slots_of(state, slot), expected, base, GRADIENT), slot


@pytest.mark.learning
@pytest.mark.parametrize("name", ["nft", "grpo"])
def test_the_reward_rises_on_the_toy_world(name: str) -> None:
    losses: dict[str, tuple[LossSettings, dict[str, Any]]] = {
        "nft": (NFTSettings(timesteps=2, certain=1.5, old_policy="constant", old_decay=0.3), {}),
        "grpo": (GRPOSettings(clip=1e-2, kl=0.01), {"noise": "flow_sde"}),
    }
    loss, sampling = losses[name]
    policy = load("toy:sd3", resolution=32, guidance=1.0)
    policy.attach_full(ALL)
    found = trainer(policy, loss, RolloutSettings(steps=4, **sampling), lr=5e-4)

    def rewards() -> Tensor:
        """Of the same noises each time: the mean of the first latent channel."""
        return found.collect(groups(2, epoch=99), 0).x0_B[:, 0].mean(dim=(1, 2))

    before = rewards()
    for step in range(6):
        rollouts = found.collect(groups(2, epoch=step), step)
        found.update(rollouts, scored(rollouts.x0_B[:, 0].mean(dim=(1, 2))), {"r": 1.0})
    gains = rewards() - before
    assert gains.mean() > before.view(2, -1).std(dim=1).mean()
