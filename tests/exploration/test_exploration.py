"""The conditions that samples are drawn from: exact where they must be, and the same after a resume."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.tolerance import MODEL, agree
from torch import Tensor

from pixrl import models
from pixrl.algorithms.e2po import PerturbationSettings, PerturbedEmbeddings
from pixrl.algorithms.exploration import Exploration, NoiseOnly, Variants
from pixrl.equations import variant_weight
from pixrl.errors import CheckpointError, InputError, ShapeError
from pixrl.models.base import Conditioning, FlowPolicy, SamplingSettings
from pixrl.models.flux import FluxPolicy
from pixrl.models.sd3 import SD3Policy

OWL, SNAIL = "an owl", "two green snails"
K = 4


def exploration(cache_bytes: int = 2**20, **given: Any) -> PerturbedEmbeddings:
    quick = {"variants": K, "steps": 10, "lr": 3e-3, "sigma_init": 3e-3, "max_norm": 0.2}
    return PerturbedEmbeddings(PerturbationSettings(**quick | given), cache_bytes=cache_bytes)


def pooled(conditioning: Conditioning) -> Tensor:
    assert conditioning.pooled_BE is not None
    return conditioning.pooled_BE


def equal(a: Conditioning, b: Conditioning) -> bool:
    return torch.equal(a.tokens_BLD, b.tokens_BLD) and torch.equal(pooled(a), pooled(b))


def everything(variants: Variants, t: float) -> Conditioning:
    """All variants of all prompts, prompt by prompt."""
    count = len(variants.anchor)
    prompts = torch.arange(count).repeat_interleave(variants.variants)
    return variants.at(t, prompts, torch.arange(variants.variants).repeat(count))


@pytest.fixture(scope="module")
def two(sd3: SD3Policy) -> Variants:
    return exploration().prepare(sd3, [OWL, SNAIL])


# -- c_k(t) --------------------------------------------------------------------------------------------------


def test_the_anchor_is_the_plain_encoding(sd3: SD3Policy, two: Variants) -> None:
    assert equal(two.anchor, sd3.encode([OWL, SNAIL]))


@pytest.mark.parametrize("t", [0.0, 0.3, 0.6, 0.61, 0.85, 1.0])
def test_variant_0_is_exactly_the_anchor(two: Variants, t: float) -> None:
    rows = torch.tensor([0, 1, 1])
    assert equal(two.at(t, rows, torch.zeros(3, dtype=torch.long)), two.anchor[rows])


@pytest.mark.parametrize("t", [0.0, 0.2, 0.6])
def test_below_the_range_all_variants_are_exactly_the_anchor(two: Variants, t: float) -> None:
    assert equal(everything(two, t), two.anchor[torch.tensor([0] * K + [1] * K)])


def test_at_pure_noise_variants_are_the_encoders_own(two: Variants) -> None:
    found = everything(two, 1.0)
    (part,) = two.perturbed
    assert part.features.tokens_KLD is not None
    perturbed = torch.tensor([1, 2, 3, 5, 6, 7])
    assert torch.equal(found.tokens_BLD[perturbed, :32, :16], part.features.tokens_KLD)
    assert torch.equal(pooled(found)[perturbed, :16], part.features.pooled_KE)
    assert torch.equal(found.tokens_BLD[..., 16:], two.anchor.tokens_BLD[[0] * K + [1] * K][..., 16:])
    assert not torch.equal(found.tokens_BLD[1], found.tokens_BLD[2])


@pytest.mark.parametrize("t", [0.65, 0.8, 0.95])
def test_between_tokens_and_pooled_features_move_by_the_same_weight(two: Variants, t: float) -> None:
    far, here, near = everything(two, 1.0), everything(two, t), everything(two, 0.0)
    weight = variant_weight(t, 0.4)
    assert agree(here.tokens_BLD, near.tokens_BLD.lerp(far.tokens_BLD, weight), 8)
    assert agree(pooled(here), pooled(near).lerp(pooled(far), weight), 8)


def test_a_wider_range_reaches_further_down(sd3: SD3Policy) -> None:
    narrow, wide = (exploration(perturbation_range=tau).prepare(sd3, [OWL]) for tau in (0.4, 1.0))
    assert equal(everything(narrow, 1.0), everything(wide, 1.0))
    assert equal(everything(narrow, 0.5), everything(narrow, 0.0))
    assert not equal(everything(wide, 0.5), everything(wide, 0.0))


def test_the_static_schedule_steers_to_the_end(sd3: SD3Policy, two: Variants) -> None:
    static = exploration(schedule="static").prepare(sd3, [OWL, SNAIL])
    for t in (0.0, 0.5, 1.0):
        assert equal(everything(static, t), everything(two, 1.0))


def test_without_the_anchor_variant_0_is_perturbed_too(sd3: SD3Policy) -> None:
    free = exploration(anchored=False).prepare(sd3, [OWL])
    assert free.variants == K
    at_noise = everything(free, 1.0)
    assert all(not torch.equal(at_noise.tokens_BLD[k], free.anchor.tokens_BLD[0]) for k in range(K))
    assert equal(everything(free, 0.0), free.anchor[[0] * K])
    alone = exploration(anchored=False, variants=1).prepare(sd3, [OWL])
    assert not torch.equal(everything(alone, 1.0).tokens_BLD, alone.anchor.tokens_BLD)
    assert "pairwise_cosine" not in alone.metrics


def test_both_encoders_move_and_t5_does_not(sd3_t5: SD3Policy) -> None:
    both = exploration(encoders="both").prepare(sd3_t5, [OWL])
    moved = everything(both, 1.0).tokens_BLD[1:] != both.anchor.tokens_BLD
    assert moved[:, :32, :16].any() and moved[:, :32, 16:40].any()
    assert not moved[:, 32:].any() and not moved[..., 40:].any()
    moved_pooled = pooled(everything(both, 1.0))[1:] != pooled(both.anchor)
    assert moved_pooled[:, :16].all() and moved_pooled[:, 16:].all()


def test_of_flux_the_pooled_features_alone_move(flux: FluxPolicy) -> None:
    variants = exploration().prepare(flux, ["an owl"])
    found = everything(variants, 1.0)
    assert torch.equal(found.tokens_BLD, variants.anchor.tokens_BLD.expand(K, -1, -1))
    assert (pooled(found)[1:] != pooled(variants.anchor)).all()


def test_rows_follow_their_prompts(sd3: SD3Policy, two: Variants) -> None:
    again = exploration().prepare(sd3, [SNAIL, OWL, SNAIL])
    all_of = everything(two, 1.0)
    turned = everything(again, 1.0)
    assert equal(turned[range(K)], all_of[range(K, 2 * K)])
    assert equal(turned[range(K, 2 * K)], all_of[range(K)])
    assert equal(turned[range(2 * K, 3 * K)], all_of[range(K, 2 * K)])
    mixed = two.at(0.9, torch.tensor([1, 0, 1]), torch.tensor([2, 1, 0]))
    assert equal(mixed, everything(two, 0.9)[[K + 2, 1, K]])


def test_a_variant_changes_the_picture(sd3: SD3Policy) -> None:
    variants = exploration(max_norm=2.0, sigma_init=0.5, steps=0, lr=1e-3).prepare(sd3, [OWL])
    conditions = everything(variants, 1.0)
    noise = sd3.initial_noise([1] * K)
    velocity = sd3.velocity(noise, torch.ones(K), conditions)
    assert all(not agree(velocity[k], velocity[0], MODEL) for k in range(1, K))


def test_wrong_calls(two: Variants) -> None:
    zero, one = torch.tensor([0]), torch.tensor([1])
    for t in (-0.1, 1.01, float("nan")):
        with pytest.raises(InputError, match=r"t must be in \[0, 1\]"):
            two.at(t, zero, zero)
    for prompt, variant, message in (
        (one + 1, zero, r"prompt_B must be in 0 .. 1, got \[2\]"),
        (zero, one + 3, r"variant_B must be in 0 .. 3, got \[4\]"),
        (zero, zero - 1, r"variant_B must be in 0 .. 3"),
    ):
        with pytest.raises(InputError, match=message):
            two.at(0.5, prompt, variant)
    for prompt, variant in ((zero, torch.tensor([0, 1])), (zero[None], zero[None]), (zero.float(), zero)):
        with pytest.raises(ShapeError, match="integers"):
            two.at(0.5, prompt, variant)


# -- figures -------------------------------------------------------------------------------------------------


def test_metrics_say_what_was_reached(sd3: SD3Policy, caplog: pytest.LogCaptureFixture) -> None:
    explorer = exploration(max_norm=1e-3)
    with caplog.at_level(logging.WARNING, "pixrl"):
        first = explorer.prepare(sd3, [OWL, SNAIL, OWL]).metrics
        explorer.prepare(sd3, [OWL])
    assert len(caplog.records) == 1
    assert "2 of 2 newly learned prompts" in caplog.text and "raise exploration.max_norm" in caplog.text
    assert first["learned_prompts"] == 2 and first["in_band_share"] == 0
    assert 0.95 < first["anchor_cosine_min"] <= first["anchor_cosine"] <= 1.0001
    assert first["pairwise_cosine"] < 1
    assert 0 < first["delta_norm_share"] < 1


def test_no_warning_inside_the_band(sd3: SD3Policy, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "pixrl"):
        metrics = exploration(margin=0.9).prepare(sd3, [OWL]).metrics
    assert metrics["in_band_share"] == 1 and not caplog.records


# -- keeping -------------------------------------------------------------------------------------------------


def test_each_prompt_is_learned_once(sd3: SD3Policy) -> None:
    explorer = exploration()
    learned = [
        explorer.prepare(sd3, batch).metrics["learned_prompts"] for batch in ([OWL], [SNAIL, OWL], [OWL])
    ]
    assert learned == [1, 1, 0]


def test_state_goes_through_safetensors(sd3: SD3Policy, tmp_path: Path) -> None:
    explorer = exploration(encoders="both")
    before = explorer.prepare(sd3, [OWL, SNAIL])
    save_file(explorer.state(), tmp_path / "state.safetensors")
    resumed = exploration(encoders="both")
    resumed.load_state(load_file(tmp_path / "state.safetensors"))
    after = resumed.prepare(sd3, [OWL, SNAIL])
    assert after.metrics["learned_prompts"] == 0
    assert equal(everything(after, 0.8), everything(before, 0.8))
    assert {n: x.tolist() for n, x in resumed.state().items()} == {
        n: x.tolist() for n, x in explorer.state().items()
    }


def test_other_settings_or_another_model_learn_anew(sd3: SD3Policy, sd3_t5: SD3Policy) -> None:
    explorer = exploration()
    explorer.prepare(sd3, [OWL])
    other = exploration(seed=1)
    other.load_state(explorer.state())
    assert other.prepare(sd3, [OWL]).metrics["learned_prompts"] == 1
    assert explorer.prepare(sd3_t5, [OWL]).metrics["learned_prompts"] == 1


def test_a_small_cache_learns_the_same_again(sd3: SD3Policy) -> None:
    small, large = exploration(cache_bytes=1), exploration()
    first = [everything(small.prepare(sd3, [prompt]), 1.0) for prompt in (OWL, SNAIL, OWL)]
    assert len(small.state()) == 1
    both = small.prepare(sd3, [OWL, SNAIL])
    expected = large.prepare(sd3, [OWL, SNAIL])
    assert equal(everything(both, 1.0), everything(expected, 1.0))
    assert equal(first[0], first[2])


def test_state_that_is_not_ours(sd3: SD3Policy) -> None:
    for wrong in (
        {"x": torch.zeros(1, 1, 1)},
        {"x/clip_l": torch.zeros(1)},
        {"x/clip_l": torch.zeros(1, 1, 1).half()},
    ):
        with pytest.raises(CheckpointError, match="not a learned perturbation"):
            exploration().load_state(wrong)
    with pytest.raises(CheckpointError, match="NoiseOnly learns nothing"):
        NoiseOnly().load_state({"x/clip_l": torch.zeros(1, 1, 1)})


# -- noise only, and models without CLIP ---------------------------------------------------------------------


def test_noise_only(sd3: SD3Policy) -> None:
    explorer: Exploration = NoiseOnly()
    variants = explorer.prepare(sd3, [OWL, SNAIL])
    assert explorer.variants == variants.variants == 1 and explorer.state() == {} and not variants.metrics
    explorer.load_state({})
    for t in (0.0, 1.0):
        assert equal(variants.at(t, torch.tensor([1, 0]), torch.tensor([0, 0])), sd3.encode([SNAIL, OWL]))
    with pytest.raises(InputError, match=r"variant_B must be in 0 .. 0"):
        variants.at(1.0, torch.tensor([0]), torch.tensor([1]))


class Bare(FlowPolicy):
    """A policy whose text goes through something else than CLIP."""

    name, device, vocabulary = "bare", torch.device("cpu"), None
    settings = SamplingSettings(1, 0.0, 8)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        raise AssertionError("nothing must be encoded before the model is refused")

    def sample(self, conditioning: Conditioning, seeds: Sequence[int]) -> Tensor:
        return torch.zeros(len(seeds), 3, 8, 8)

    def fingerprint(self) -> str:
        return "0"

    def schedule(self, steps: int) -> Tensor:
        return torch.linspace(1, 0, steps + 1)

    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        return torch.zeros(len(seeds), 1, 1, 1)

    def velocity(self, x_t: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        return x_t

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def slot(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()


def test_a_model_without_clip_is_refused_at_once() -> None:
    with pytest.raises(InputError, match=r"bare \(Bare\) has no text encoders.*noise alone"):
        exploration().prepare(Bare(), [OWL])


def test_encoders_in_half_precision(tmp_path: Path) -> None:
    """As on a GPU: perturbations stay in float32, conditions keep the encoders' dtype."""
    policy = models.load(tiny.sd3(tmp_path, card=tiny.SD3_CARD), device="cpu", dtype="float32")
    assert isinstance(policy, SD3Policy)
    for encoder in policy.text_encoders():
        encoder.model.to(torch.bfloat16)
    explorer = exploration()
    variants = explorer.prepare(policy, [OWL])
    assert {delta.dtype for delta in explorer.state().values()} == {torch.float32}
    found = everything(variants, 0.9)
    assert found.tokens_BLD.dtype == pooled(found).dtype == variants.anchor.tokens_BLD.dtype == torch.bfloat16
    assert found.tokens_BLD.isfinite().all() and not torch.equal(found.tokens_BLD[1], found.tokens_BLD[0])
    assert variants.metrics["pairwise_cosine"] < 0.999
