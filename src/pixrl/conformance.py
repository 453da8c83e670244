"""Checks that an adapter keeps what its interface promises, for adapters in the tables and for your own.

`check_renderer`, `check_policy` and `check_reward` return nothing, or raise a ConformanceError that names the property.
They draw a dozen pictures, so they run in seconds on a small model.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from pixrl.errors import InputError, PixrlError, RunError, UnknownWordError
from pixrl.models.base import Conditioning, FlowPolicy, ReferencePolicy, Renderer
from pixrl.rewards.base import Reward
from pixrl.types import RewardBatch, Scores

PROMPTS = ("a photo of an owl", "a photo of a snail")
PICTURE_TOLERANCE = 0.01
"""The largest mean difference of a picture that counts as rounding."""
SCORE_TOLERANCE = 1e-4
NO_DIFFERENCE = 1e-5
"""The mean difference below which an input had no effect."""
HIGHEST_LEVEL = 0.9
"""The least first noise level: diffusion models begin a little short of pure noise (SDXL at 0.936)."""
_STRANGE_WORD = "zyxwvut"


class ConformanceError(PixrlError, AssertionError):
    """An error for an adapter that breaks a promise of its interface, which `check` names."""

    def __init__(self, subject: str, check: str, message: str) -> None:
        self.check = check
        super().__init__(f"{subject} fails the check {check!r}: {message}")


class _Checks:
    """The checks of one adapter, of which the first that fails is raised."""

    def __init__(self, subject: str) -> None:
        self.subject = subject

    def require(self, holds: bool, check: str, message: str) -> None:
        if not holds:
            raise ConformanceError(self.subject, check, message)

    def same_pictures(self, a: Tensor, b: Tensor, check: str, message: str, tolerance: float) -> None:
        worst = (a - b).abs().flatten(1).mean(dim=1).max().item()
        self.require(
            worst <= tolerance, check, f"{message} (mean difference {worst:.3g}, allowed {tolerance:g})"
        )

    def refuses(self, error: type[Exception], act: Callable[[], object], check: str, message: str) -> None:
        try:
            act()
        except error:
            return
        raise ConformanceError(self.subject, check, message)


def check_renderer(
    renderer: Renderer, prompts: Sequence[str] = PROMPTS, tolerance: float = PICTURE_TOLERANCE
) -> None:
    """Check encoding, pictures, seeds, batches and mixing of a renderer.

    Args:
        renderer: the adapter to check.
        prompts: two different prompts that it understands.
        tolerance: largest mean difference of a picture that is rounding.

    Raises:
        ConformanceError: a property does not hold.
        InputError: `prompts` are not two different ones.
    """
    if len(prompts) != 2 or prompts[0] == prompts[1]:
        raise InputError(f"check_renderer needs two different prompts, got {list(prompts)}.")
    checks = _Checks(f"The renderer {renderer.name!r}")
    both = _check_encoding(checks, renderer, prompts)
    _check_pictures(checks, renderer, both, tolerance)
    rows, seeds = [0, 1, 1, 0], [11, 12, 13, 14]
    images = renderer.sample(both[rows], seeds)
    alone = torch.cat([renderer.sample(both[[row]], [seed]) for row, seed in zip(rows, seeds, strict=True)])
    checks.same_pictures(
        images, alone, "batch_invariance", "a picture depends on the batch it is drawn in", tolerance
    )
    turned = renderer.sample(both[rows[::-1]], seeds[::-1]).flip(0)
    checks.same_pictures(images, turned, "order", "pictures do not follow their rows and seeds", tolerance)
    if both.mask_BL is not None:
        other = both.tokens_BLD.masked_fill(~both.mask_BL[:, :, None], 1.0)
        checks.same_pictures(
            images,
            renderer.sample(replace(both, tokens_BLD=other)[rows], seeds),
            "padding",
            "a picture depends on tokens that the mask calls padding",
            tolerance,
        )
    fingerprint = renderer.fingerprint()
    stable = bool(fingerprint) and fingerprint == renderer.fingerprint()
    checks.require(stable, "fingerprint", "the fingerprint is empty or changes")
    weights = torch.eye(2, device=both.tokens_BLD.device, dtype=both.tokens_BLD.dtype)
    mixed = Conditioning.cat([both.mix(weights[0]), both.mix(weights[1])])
    checks.same_pictures(
        renderer.sample(both, [21, 22]),
        renderer.sample(mixed, [21, 22]),
        "one_hot_mix",
        "mixing with all the weight on one concept is not that concept",
        tolerance,
    )
    if renderer.reads_regions:
        tokens = both.tokens_BLD.flatten(0, 1).expand(2, -1, -1)
        whole = torch.eye(2, device=tokens.device)[:, :, None, None].expand(2, 2, 8, 8)
        checks.same_pictures(
            renderer.sample(both, [41, 42]),
            renderer.sample(Conditioning(tokens, both.pooled_BE, regions_BNHW=whole), [41, 42]),
            "one_region",
            "a prompt whose region is the whole picture does not draw its own",
            tolerance,
        )
    if renderer.reads_pictures:
        assert isinstance(renderer, ReferencePolicy), "what takes pictures is derived from ReferencePolicy"
        (white,) = renderer.laid_out([torch.ones(3, 64, 64)])
        shown = [renderer.show(both[[0]], [white[None]], prompts[:1]), both[[1]]]
        checks.same_pictures(
            renderer.sample(Conditioning.cat(shown), [51, 52]),
            torch.cat([renderer.sample(row, [seed]) for row, seed in zip(shown, (51, 52), strict=True)]),
            "pictures",
            "a prompt beside one that is shown a picture does not draw what it draws alone",
            tolerance,
        )


def check_policy(
    policy: FlowPolicy, prompts: Sequence[str] = PROMPTS, tolerance: float = PICTURE_TOLERANCE
) -> None:
    """Check all of `check_renderer`, and the schedule, velocity, decoder and slots of a trainable policy.

    Raises:
        ConformanceError: a property does not hold.
    """
    check_renderer(policy, prompts, tolerance)
    checks = _Checks(f"The policy {policy.name!r}")
    both = policy.encode(prompts)
    for steps in (1, 4, policy.settings.steps):
        sigmas = policy.schedule(steps)
        good = list(sigmas.shape) == [steps + 1] and sigmas.dtype is torch.float32
        checks.require(good, "schedule_shape", f"schedule({steps}) is {sigmas.dtype} {list(sigmas.shape)}")
        ends = HIGHEST_LEVEL <= sigmas[0].item() < 1 + 1e-3 and sigmas[-1].item() == 0
        falls = bool((sigmas.diff() < 0).all())
        checks.require(
            ends and falls, "schedule", f"must fall from 1, or just below it, to 0, got {sigmas.tolist()}"
        )
    noise = policy.initial_noise([1, 2, 1])
    good = noise.ndim == 4 and len(noise) == 3 and noise.dtype is torch.float32
    checks.require(
        good, "noise_shape", f"must be float32 [3, C, h, w], got {noise.dtype} {list(noise.shape)}"
    )
    by_seed = torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    alone = torch.equal(noise[[1]], policy.initial_noise([2]))
    checks.require(by_seed and alone, "noise_seeds", "noise does not depend on the seed alone")
    spread = noise.std().item()
    checks.require(
        0.8 < spread < 1.2, "noise_scale", f"its standard deviation must be near 1, got {spread:.3g}"
    )
    _check_velocity(checks, policy, both)
    if policy.draws_by_euler:
        seeds, sigmas = [31, 32], policy.schedule(policy.settings.steps)
        with torch.no_grad():
            x = sigmas[0].item() * policy.initial_noise(seeds)
            for sigma, after in pairwise(sigmas):
                t = sigma.expand(2).to(x.device)
                x = x + (after - sigma).item() * policy.velocity(x, t, both)
            checks.same_pictures(
                policy.sample(both, seeds),
                policy.decode(x).float().cpu(),
                "euler",
                "Euler steps by hand do not give the picture that sample() gives",
                tolerance,
            )
    latents = (0.1 * policy.initial_noise([41])).requires_grad_()
    image = policy.decode(latents)
    inside = bool(image.isfinite().all()) and image.min().item() >= 0 and image.max().item() <= 1
    checks.require(inside, "decode_range", "decoded pictures must be finite and in [0, 1]")
    (gradient,) = torch.autograd.grad(image.sum(), latents)
    useful = bool(gradient.isfinite().all()) and bool(gradient.abs().max() > 0)
    checks.require(useful, "decode_gradient", "decode has no finite, non-zero gradient")
    _check_slots(checks, policy, both)


def check_reward(reward: Reward, batch: RewardBatch, tolerance: float = SCORE_TOLERANCE) -> None:
    """Check shapes, failures, order, batching and provenance of a reward.

    Args:
        reward: the reward to check.
        batch: at least two pictures that it can be asked about; some may fail.
        tolerance: largest difference of a score that is rounding.

    Raises:
        ConformanceError: a property does not hold.
        InputError: the batch is too small.
    """
    count = len(batch.images_BCHW)
    if count < 2:
        raise InputError(f"check_reward needs at least two pictures, got {count}.")
    checks = _Checks(f"The reward {reward.name!r}")
    before = batch.images_BCHW.clone()
    scores = reward.score(batch)
    values = scores.values_B
    good = list(values.shape) == [count] and values.dtype is torch.float32
    checks.require(good, "score_shape", f"must be float32 [{count}], got {values.dtype} {list(values.shape)}")
    checks.require(
        len(scores.reasons) == count, "reasons", f"{len(scores.reasons)} reasons for {count} scores"
    )
    for value, reason in zip(values.tolist(), scores.reasons, strict=True):
        failed = value != value
        checks.require(
            failed == bool(reason),
            "nan_and_reason",
            f"score {value} with reason {reason!r}: nan needs one, others none",
        )
        checks.require(failed or abs(value) != float("inf"), "score_finite", "a score is infinite")
    shapes_right = all(list(detail.shape) == [count] for detail in scores.detail.values())
    checks.require(shapes_right, "detail_shape", f"every detail must be [{count}]")
    named = "model" in scores.provenance and all(scores.provenance.values())
    checks.require(named, "provenance", f"must name the model, got {dict(scores.provenance)}")
    checks.require(torch.equal(before, batch.images_BCHW), "read_only", "scoring changed the pictures")
    images = batch.images_BCHW.clone()
    images[0] = torch.nan
    broken = reward.score(replace(batch, images_BCHW=images))
    checks.require(
        bool(broken.values_B[0].isnan()) and bool(broken.reasons[0]),
        "broken_picture",
        f"a picture of nan scores {broken.values_B[0].item()} instead of failing",
    )

    def same(other: Scores, expected: Tensor, check: str, message: str) -> None:
        equal = torch.allclose(other.values_B, expected, rtol=0, atol=tolerance, equal_nan=True)
        checks.require(equal, check, f"{message}: {other.values_B.tolist()} and {expected.tolist()}")

    same(reward.score(batch), scores.values_B, "determinism", "scoring twice gives two results")
    backwards = list(reversed(range(count)))
    turned = reward.score(_rows(batch, backwards))
    same(
        turned,
        scores.values_B[backwards],
        "order",
        "scores do not follow their pictures when the order changes",
    )
    for row in range(count):
        alone = reward.score(_rows(batch, [row]))
        same(alone, scores.values_B[[row]], "batch_invariance", f"picture {row} alone scores differently")


def _check_encoding(checks: _Checks, renderer: Renderer, prompts: Sequence[str]) -> Conditioning:
    first, second = prompts
    both = renderer.encode(prompts)
    tokens = both.tokens_BLD
    checks.require(
        tokens.ndim == 3 and len(tokens) == 2 and tokens.is_floating_point(),
        "encoding_shape",
        f"tokens_BLD must be float [2, L, D], got {tokens.dtype} {list(tokens.shape)}",
    )
    parts = [tokens, *([] if both.pooled_BE is None else [both.pooled_BE]), *both.references]
    checks.require(all(len(part) == 2 for part in parts), "encoding_shape", "a part has not one row a prompt")
    mask = both.mask_BL
    checks.require(
        mask is None
        or (mask.dtype is torch.bool and mask.shape == tokens.shape[:2] and bool(mask.any(dim=1).all())),
        "encoding_mask",
        f"mask_BL must be bool {list(tokens.shape[:2])} and true on a token of each prompt, "
        f"got {mask if mask is None else [mask.dtype, list(mask.shape)]}",
    )
    checks.require(
        not tokens[~both.own_BL].any(), "encoding_mask", "tokens that the mask calls padding are not zeros"
    )
    checks.require(
        all(bool(p.isfinite().all()) for p in parts), "encoding_finite", "embeddings are not finite"
    )
    checks.require(
        not torch.equal(tokens[0], tokens[1]), "encoding_differs", "two prompts have equal embeddings"
    )
    again = renderer.encode([second, first, second])
    expected = both[[1, 0, 1]]
    rows_equal = torch.equal(again.tokens_BLD, expected.tokens_BLD)
    rows_equal = rows_equal and torch.equal(again.own_BL, expected.own_BL)
    if again.pooled_BE is not None and expected.pooled_BE is not None:
        rows_equal = rows_equal and torch.equal(again.pooled_BE, expected.pooled_BE)
    checks.require(
        rows_equal, "encoding_rows", "a prompt's row depends on what else it is encoded with, or when"
    )
    if renderer.vocabulary is not None:
        checks.refuses(
            UnknownWordError,
            lambda: renderer.encode([f"{first} {_STRANGE_WORD}"]),
            "vocabulary",
            "it has a vocabulary, but encodes a word outside it",
        )
    return both


def _check_pictures(checks: _Checks, renderer: Renderer, both: Conditioning, tolerance: float) -> None:
    state = torch.get_rng_state()
    images = renderer.sample(both[[0, 0, 1]], [1, 2, 1])
    size = [renderer.settings.height, renderer.settings.width]
    checks.require(
        list(images.shape) == [3, 3, *size] and images.dtype is torch.float32 and images.device.type == "cpu",
        "picture_shape",
        f"pictures must be float32 {[3, 3, *size]} on the CPU, "
        f"got {images.dtype} {list(images.shape)} on {images.device}",
    )
    checks.require(bool(images.isfinite().all()), "picture_finite", "pictures are not finite")
    low, high = images.min().item(), images.max().item()
    checks.require(
        low >= 0 and high <= 1, "picture_range", f"values must be in [0, 1], got {low:.3g} to {high:.3g}"
    )
    untouched = torch.equal(state, torch.get_rng_state())
    checks.require(untouched, "global_random_state", "sampling draws from torch's global random state")
    again = renderer.sample(both[[0, 0, 1]], [1, 2, 1])
    checks.same_pictures(images, again, "determinism", "the same seeds give other pictures", tolerance)
    for check, other, what in (("seeds", 1, "seed"), ("prompts", 2, "prompt")):
        difference = (images[0] - images[other]).abs().mean().item()
        checks.require(difference > NO_DIFFERENCE, check, f"another {what} gives the same picture")


def _check_velocity(checks: _Checks, policy: FlowPolicy, both: Conditioning) -> None:
    x = policy.initial_noise([1, 2]).requires_grad_()
    t = torch.full((2,), 0.7, device=x.device)
    velocity = policy.velocity(x, t, both)
    good = velocity.shape == x.shape and velocity.dtype is torch.float32
    checks.require(
        good, "velocity_shape", f"got {velocity.dtype} {list(velocity.shape)} for x {list(x.shape)}"
    )
    checks.require(bool(velocity.isfinite().all()), "velocity_finite", "the velocity is not finite")
    (gradient,) = torch.autograd.grad(velocity.square().mean(), x)
    useful = bool(gradient.isfinite().all()) and bool(gradient.abs().max() > 0)
    checks.require(useful, "velocity_gradient", "the velocity has no finite, non-zero gradient")
    with torch.no_grad():
        at_other_time = policy.velocity(x, t / 2, both)
        of_other_prompt = policy.velocity(x, t, both[[1, 0]])
    for check, other in (("velocity_time", at_other_time), ("velocity_prompt", of_other_prompt)):
        difference = (velocity.detach() - other).abs().mean().item()
        checks.require(difference > NO_DIFFERENCE, check, "the velocity does not depend on it")


def _check_slots(checks: _Checks, policy: FlowPolicy, both: Conditioning) -> None:
    checks.refuses(
        InputError, lambda: policy.slot("newest").__enter__(), "slot_names", "it accepts the slot 'newest'"
    )
    x = policy.initial_noise([51, 52])
    t = torch.full((2,), 0.5, device=x.device)
    before = policy.velocity(x, t, both)
    for name in ("old", "ema", "reference"):
        try:
            context = policy.slot(name)
        except RunError:
            continue  # slots before LoRA is attached
        with context:
            inside = policy.velocity(x, t, both)
        checks.require(not inside.requires_grad, "slot_gradient", f"the slot {name!r} is trainable")
        checks.require(
            torch.equal(before, policy.velocity(x, t, both)),
            "slot_restored",
            f"{name!r} stays active after its block",
        )


def _rows(batch: RewardBatch, rows: Sequence[int]) -> RewardBatch:
    return RewardBatch(
        batch.images_BCHW[list(rows)],
        [batch.prompts[row] for row in rows],
        [batch.metadata[row] for row in rows] if batch.metadata else (),
    )
