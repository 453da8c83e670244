"""LoRA slots: one backbone, three adapters, and the reference is the backbone to the bit."""

from typing import Any

import pytest
import torch
from tests.tolerance import MODEL, agree
from torch import Tensor

from pixrl.algorithms.exploration import Group, NoiseOnly, prepare
from pixrl.algorithms.sampling import RolloutSettings, Samples, StepPlan, roll_out
from pixrl.device import Precision
from pixrl.errors import CheckpointError, InputError, RunError
from pixrl.models.sd3 import SD3Policy
from pixrl.models.slots import LoraSlots

SLOTS = ("current", "old", "ema", "reference")


def attach(policy: SD3Policy, rank: int = 4) -> LoraSlots:
    return policy.attach_lora(rank=rank, alpha=8)


def velocity(policy: SD3Policy, slot: str) -> Tensor:
    with policy.slot(slot):
        return policy.velocity(
            policy.initial_noise([1, 2]), torch.tensor([0.9, 0.3]), policy.encode(["owl", "snail"])
        )


@torch.no_grad()
def perturb(lora: LoraSlots, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def test_attaching_changes_nothing(sd3: SD3Policy) -> None:
    before = velocity(sd3, "current")
    attach(sd3)
    for slot in SLOTS:
        assert torch.equal(velocity(sd3, slot), before)


def test_only_the_written_slot_changes(sd3: SD3Policy) -> None:
    before = velocity(sd3, "current").detach()
    lora = attach(sd3)
    perturb(lora)
    assert not torch.allclose(velocity(sd3, "current"), before, atol=1e-3)
    for slot in ("old", "ema", "reference"):
        assert torch.equal(velocity(sd3, slot), before)
    lora.blend("old", "current", 0.0)
    assert agree(velocity(sd3, "old"), velocity(sd3, "current"), MODEL)
    assert torch.equal(velocity(sd3, "ema"), before)


def test_blend_is_a_weighted_mean(sd3: SD3Policy) -> None:
    lora = attach(sd3)
    perturb(lora)
    start = lora.state()
    lora.blend("ema", "current", 0.9)
    after = lora.state()
    for name in start:
        slot, _, parameter = name.partition("/")
        if slot == "ema":
            expected = 0.9 * start[name] + 0.1 * start[f"current/{parameter}"]
            assert agree(after[name], expected, 4)
        else:
            assert torch.equal(after[name], start[name])


def test_only_current_is_trained_whatever_is_active(sd3: SD3Policy) -> None:
    lora = attach(sd3)
    trainable = {id(p) for p in lora.parameters()}
    for slot in SLOTS:
        with sd3.slot(slot):
            assert {id(p) for p in sd3.denoiser.parameters() if p.requires_grad} == trainable
        assert velocity(sd3, slot).requires_grad == (slot == "current")


def test_another_slot_between_forward_and_backward_leaves_the_gradient_alone(sd3: SD3Policy) -> None:
    lora = attach(sd3)
    perturb(lora)

    def gradients(*, interleave: bool) -> list[Tensor]:
        loss = velocity(sd3, "current").square().mean()
        if interleave:
            for slot in ("old", "reference"):
                velocity(sd3, slot)
        return list(torch.autograd.grad(loss, lora.parameters()))

    for plain, mixed in zip(gradients(interleave=False), gradients(interleave=True), strict=True):
        assert torch.equal(plain, mixed)
        assert plain.isfinite().all()


def test_a_step_moves_current_alone(sd3: SD3Policy) -> None:
    lora = attach(sd3)
    before = lora.state()
    backbone = {n: p.clone() for n, p in sd3.denoiser.named_parameters() if "lora_" not in n}
    optimizer = torch.optim.AdamW(lora.parameters(), lr=0.1)
    velocity(sd3, "current").square().mean().backward()
    optimizer.step()
    changed = {
        name.partition("/")[0]
        for name, tensor in lora.state().items()
        if not torch.equal(tensor, before[name])
    }
    assert changed == {"current"}
    assert all(torch.equal(p, backbone[n]) for n, p in sd3.denoiser.named_parameters() if n in backbone)


def test_slots_nest_and_survive_errors(sd3: SD3Policy) -> None:
    lora = attach(sd3)
    with sd3.slot("old"):
        with sd3.slot("reference"):
            assert lora.active == "reference"
        assert lora.active == "old"
        with pytest.raises(KeyError), sd3.slot("ema"):
            raise KeyError
        assert lora.active == "old"
    assert lora.active == "current"


@pytest.mark.parametrize("slot", SLOTS)
def test_folded_weights_draw_as_those_beside_them(sd3: SD3Policy, slot: str) -> None:
    lora = attach(sd3)
    perturb(lora)
    lora.blend("old", "current", 0.5)
    weights = {name: x.clone() for name, x in sd3.denoiser.named_parameters() if "lora_" not in name}
    with torch.no_grad():
        beside = velocity(sd3, slot)
        with sd3.slot(slot), sd3.folded():
            assert lora.active == slot
            changed = {
                n
                for n, x in sd3.denoiser.named_parameters()
                if "lora_" not in n and not torch.equal(x, weights[n])
            }
            inside = sd3.velocity(
                sd3.initial_noise([1, 2]), torch.tensor([0.9, 0.3]), sd3.encode(["owl", "snail"])
            )
        again = velocity(sd3, slot)
    assert bool(changed) == (slot in ("current", "old"))
    assert agree(inside, beside, MODEL)
    assert torch.equal(again, beside), "the weights of before are back"
    assert all(torch.equal(x, weights[n]) for n, x in sd3.denoiser.named_parameters() if n in weights)


def test_what_is_folded_follows_the_slot(sd3: SD3Policy) -> None:
    """The sums of `old` are kept, and are never those of weights that it had before."""
    lora = attach(sd3)

    def folded(slot: str) -> Tensor:
        with torch.no_grad(), sd3.slot(slot), sd3.folded():
            return sd3.velocity(sd3.initial_noise([1]), torch.tensor([0.9]), sd3.encode(["owl"]))

    def beside(slot: str) -> Tensor:
        with torch.no_grad(), sd3.slot(slot):
            return sd3.velocity(sd3.initial_noise([1]), torch.tensor([0.9]), sd3.encode(["owl"]))

    for seed in range(2):
        perturb(lora, seed)
        before = folded("old")
        assert torch.equal(folded("old"), before) and agree(before, beside("old"), MODEL)
        lora.blend("old", "current", 0.5)
        assert agree(folded("old"), beside("old"), MODEL)
        assert agree(folded("current"), beside("current"), MODEL)
    start = lora.state()
    folded("old")
    lora.load_state({name: 2 * x for name, x in start.items()})
    assert agree(folded("old"), beside("old"), MODEL)


def test_an_error_within_leaves_the_weights_of_before(sd3: SD3Policy) -> None:
    lora = attach(sd3)
    perturb(lora)
    before = velocity(sd3, "current")
    with pytest.raises(KeyError), sd3.folded():
        raise KeyError
    assert torch.equal(velocity(sd3, "current"), before)
    assert all(p.requires_grad for p in lora.parameters())


def test_another_slot_within_is_refused(sd3: SD3Policy) -> None:
    """It would be computed beside weights that hold the folded one already."""
    lora = attach(sd3)
    perturb(lora)
    before = velocity(sd3, "current")
    refused = pytest.raises(RunError, match="'old' was asked for while 'current' is folded")
    with sd3.folded(), refused, sd3.slot("old"):
        pass
    assert lora.active == "current"
    assert torch.equal(velocity(sd3, "current"), before)


def test_only_full_weights_are_folded(sd3: SD3Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision, and in its autocast, the sum would lose what the slot has learned."""
    perturb(attach(sd3))
    before = {name: x.clone() for name, x in sd3.denoiser.named_parameters()}
    for precision in (Precision(torch.float32, torch.bfloat16), Precision(torch.bfloat16, None)):
        monkeypatch.setattr(sd3, "precision", precision)
        with sd3.folded():
            assert all(torch.equal(x, before[name]) for name, x in sd3.denoiser.named_parameters())


def test_rollouts_are_drawn_with_folded_weights(sd3: SD3Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = attach(sd3)
    perturb(lora)
    seen = []
    predict = sd3.velocity

    def watched(*given: Any) -> Tensor:
        seen.append(all(layer.disable_adapters for layer in lora._layers))
        return predict(*given)

    monkeypatch.setattr(sd3, "velocity", watched)
    plan = StepPlan.make(sd3, RolloutSettings(steps=2), seed=0, step=0)
    group = Group(0, 0, 0, "owl")
    samples = Samples.of([group], 2, 1, 0)
    roll_out(sd3, prepare(NoiseOnly(), sd3, [group]), samples, plan, 2)
    assert seen == [True, True]


def test_state_round_trip(sd3: SD3Policy, sd3_folder: object) -> None:
    lora = attach(sd3)
    perturb(lora)
    lora.blend("ema", "current", 0.5)
    state = lora.state()
    expected = [velocity(sd3, slot).detach() for slot in SLOTS]
    perturb(lora, seed=1)
    lora.load_state(state)
    for slot, tensor in zip(SLOTS, expected, strict=True):
        assert torch.equal(velocity(sd3, slot), tensor)


def test_the_start_is_seeded_and_leaves_the_global_generator_alone(sd3: SD3Policy) -> None:
    before = torch.get_rng_state()
    first = attach(sd3).state()
    assert torch.equal(before, torch.get_rng_state())
    assert any(tensor.abs().max() > 0 for tensor in first.values())


def test_the_fingerprint_follows_current(sd3: SD3Policy) -> None:
    bare = sd3.fingerprint()
    lora = attach(sd3)
    untrained = sd3.fingerprint()
    perturb(lora)
    assert len({bare, untrained, sd3.fingerprint()}) == 3
    assert len(sd3.fingerprint()) == 16


def test_bad_calls(sd3: SD3Policy) -> None:
    with pytest.raises(InputError, match="at least 1"):
        sd3.attach_lora(rank=0)
    lora = attach(sd3)
    with pytest.raises(RunError, match="already has LoRA slots"):
        attach(sd3)
    with pytest.raises(InputError, match="backbone itself"):
        lora.blend("reference", "current", 0.5)
    with pytest.raises(InputError, match=r"in \[0, 1\]"):
        lora.blend("ema", "current", 1.5)
    with pytest.raises(CheckpointError, match="do not fit"):
        lora.load_state({})
    with pytest.raises(CheckpointError, match="do not fit"):
        lora.load_state({name: tensor[:1] for name, tensor in lora.state().items()})
