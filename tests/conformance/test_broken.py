"""Each check fails on an adapter that breaks just its promise: none of them is empty."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pixrl.conformance import ConformanceError, check_policy, check_renderer, check_reward
from pixrl.errors import InputError, PixrlError, RunError, UnknownWordError
from pixrl.models.base import Conditioning, FlowPolicy, SamplingSettings
from pixrl.rewards.base import Reward
from pixrl.types import RewardBatch, Scores


class Good(FlowPolicy):
    """The smallest policy that keeps every promise: a linear velocity and a squashing decoder."""

    name = "good"
    device = torch.device("cpu")
    settings = SamplingSettings(steps=3, guidance=0.0, resolution=4)
    vocabulary: frozenset[str] | None = frozenset(["a", "photo", "of", "an", "owl", "snail"])

    def __init__(self) -> None:
        self.weight = torch.ones(1, requires_grad=True)
        self.active = "current"

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        for word in " ".join(prompts).split():
            if self.vocabulary is not None and word not in self.vocabulary:
                raise UnknownWordError(word)
        rows = [torch.randn(3, 2, generator=torch.Generator().manual_seed(len(p))) for p in prompts]
        return Conditioning(torch.stack(rows), torch.stack([row.mean(0) for row in rows]))

    def sample(self, conditioning: Conditioning, seeds: Sequence[int]) -> Tensor:
        x, sigmas = self.initial_noise(seeds), self.schedule(self.settings.steps)
        with torch.no_grad():
            for sigma, after in pairwise(sigmas.unbind()):
                x = x + (after - sigma) * self.velocity(x, sigma.expand(len(x)), conditioning)
            return self.decode(x)

    def fingerprint(self) -> str:
        return "00ff"

    def schedule(self, steps: int) -> Tensor:
        return torch.linspace(1, 0, steps + 1)

    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        return torch.stack([torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(s)) for s in seeds])

    def velocity(self, x_t: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        shift = conditioning.tokens_BLD.mean(dim=(1, 2)) + t_B
        weight = self.weight if self.active == "current" else self.weight.detach()
        return weight * 0.5 * x_t + shift.view(-1, 1, 1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        return latents.sigmoid()

    def slot(self, name: str) -> AbstractContextManager[None]:
        if name not in ("current", "old", "ema", "reference"):
            raise InputError(name)
        return self._use(name)

    @contextmanager
    def _use(self, name: str) -> Iterator[None]:
        before, self.active = self.active, name
        yield
        self.active = before


class Overriding:
    """`good` with one method replaced; the replacement gets the good policy first."""

    def __init__(self, **changes: Callable[..., object]) -> None:
        self.changes = changes

    def build(self) -> Good:
        good, broken = Good(), Good()
        for name, change in self.changes.items():
            broken.__dict__[name] = lambda *args, change=change, **kw: change(good, *args, **kw)
        return broken


def encode_by_order(good: Good, prompts: Sequence[str]) -> Conditioning:
    both = good.encode(prompts)
    return replace(both, tokens_BLD=both.tokens_BLD + 0.1 * torch.arange(len(prompts)).view(-1, 1, 1))


def encode_everything(good: Good, prompts: Sequence[str]) -> Conditioning:
    return good.encode([p.replace("zyxwvut", "owl") for p in prompts])


def noisy_sample(good: Good, conditioning: Conditioning, seeds: Sequence[int]) -> Tensor:
    unseeded = torch.Generator()
    unseeded.seed()
    pictures = good.sample(conditioning, seeds)
    return (pictures + 0.2 * torch.rand(pictures.shape, generator=unseeded)).clamp(0, 1)


def sample_with_global_noise(good: Good, conditioning: Conditioning, seeds: Sequence[int]) -> Tensor:
    torch.rand(1)
    return good.sample(conditioning, seeds)


def sample_with_one_generator(good: Good, conditioning: Conditioning, seeds: Sequence[int]) -> Tensor:
    """What happens when a batch is drawn from its first seed's generator."""
    generator = torch.Generator().manual_seed(seeds[0])
    pictures = good.sample(conditioning, seeds)
    return (pictures + 0.2 * torch.rand(pictures.shape, generator=generator)).clamp(0, 1)


def sample_centred(good: Good, conditioning: Conditioning, seeds: Sequence[int]) -> Tensor:
    pictures = good.sample(conditioning, seeds)
    return (pictures - pictures.mean(0) + 0.5).clamp(0, 1)


def sample_sorted(good: Good, conditioning: Conditioning, seeds: Sequence[int]) -> Tensor:
    return good.sample(conditioning, sorted(seeds) if len(seeds) > 3 else seeds)


def encode_padded(good: Good, prompts: Sequence[str]) -> Conditioning:
    """The last of three tokens is padding, which `velocity` looks at all the same."""
    plain = good.encode(prompts)
    mask_BL = torch.tensor([[True, True, False]]).expand(len(prompts), -1)
    return replace(plain, tokens_BLD=plain.tokens_BLD * mask_BL[:, :, None], mask_BL=mask_BL)


def encode_with_references(good: Good, prompts: Sequence[str]) -> Conditioning:
    return replace(good.encode(prompts), references=(torch.ones(1, 2),))


def times(factor: float) -> Callable[..., Tensor]:
    return lambda good, conditioning, seeds: good.sample(conditioning, seeds) * factor


RENDERERS: dict[str, tuple[Overriding, str]] = {
    "tokens without a length": (
        Overriding(
            encode=lambda good, p: replace(good.encode(p), tokens_BLD=good.encode(p).tokens_BLD[:, 0])
        ),
        "encoding_shape",
    ),
    "a reference for all": (Overriding(encode=encode_with_references), "encoding_shape"),
    "nan embeddings": (
        Overriding(
            encode=lambda good, p: replace(good.encode(p), tokens_BLD=good.encode(p).tokens_BLD * torch.nan)
        ),
        "encoding_finite",
    ),
    "one embedding for all": (
        Overriding(encode=lambda good, p: good.encode(["owl"] * len(p))),
        "encoding_differs",
    ),
    "rows by position": (Overriding(encode=encode_by_order), "encoding_rows"),
    "a mask of numbers": (
        Overriding(encode=lambda good, p: replace(good.encode(p), mask_BL=torch.ones(len(p), 3))),
        "encoding_mask",
    ),
    "a prompt of padding alone": (
        Overriding(encode=lambda good, p: replace(good.encode(p), mask_BL=torch.zeros(len(p), 3).bool())),
        "encoding_mask",
    ),
    "padding that is no zeros": (
        Overriding(
            encode=lambda good, p: replace(encode_padded(good, p), tokens_BLD=good.encode(p).tokens_BLD)
        ),
        "encoding_mask",
    ),
    "padding that counts": (Overriding(encode=encode_padded), "padding"),
    "any word": (Overriding(encode=encode_everything), "vocabulary"),
    "half precision": (Overriding(sample=lambda good, c, s: good.sample(c, s).half()), "picture_shape"),
    "channels last": (
        Overriding(sample=lambda good, c, s: good.sample(c, s).permute(0, 2, 3, 1)),
        "picture_shape",
    ),
    "nan pictures": (Overriding(sample=times(torch.nan)), "picture_finite"),
    "bytes": (Overriding(sample=times(255)), "picture_range"),
    "minus one to one": (Overriding(sample=lambda good, c, s: good.sample(c, s) * 2 - 1), "picture_range"),
    "global noise": (Overriding(sample=sample_with_global_noise), "global_random_state"),
    "unseeded noise": (Overriding(sample=noisy_sample), "determinism"),
    "no seed": (Overriding(initial_noise=lambda good, s: good.initial_noise([0] * len(s))), "seeds"),
    "no prompt": (
        Overriding(velocity=lambda good, x, t, c: good.velocity(x, t, c[[0] * len(c)])),
        "prompts",
    ),
    "one generator a batch": (Overriding(sample=sample_with_one_generator), "batch_invariance"),
    "batch statistics": (Overriding(sample=sample_centred), "batch_invariance"),
    "sorted seeds": (Overriding(sample=sample_sorted), "order"),
    "no fingerprint": (Overriding(fingerprint=lambda good: ""), "fingerprint"),
}


class ReadsTheSum(Good):
    """Says that it attends by region, and draws from all of a row's prompts together."""

    reads_regions = True


def test_a_renderer_that_does_not_attend_by_region_as_it_says() -> None:
    with pytest.raises(ConformanceError, match="whose region is the whole picture") as caught:
        check_renderer(ReadsTheSum(), tolerance=1e-4)
    assert caught.value.check == "one_region"


@pytest.mark.parametrize("name", RENDERERS)
def test_broken_renderers(name: str) -> None:
    broken, check = RENDERERS[name]
    with pytest.raises(ConformanceError, match="good") as caught:
        check_renderer(broken.build(), tolerance=1e-4)
    assert caught.value.check == check


def test_a_conditioning_that_cannot_mix() -> None:
    class Unmixable(Conditioning):
        def mix(self, weights: Tensor) -> Conditioning:
            return super().mix(torch.full_like(weights, 0.5))

    def encode(good: Good, prompts: Sequence[str]) -> Conditioning:
        plain = good.encode(prompts)
        return Unmixable(plain.tokens_BLD, plain.pooled_BE)

    with pytest.raises(ConformanceError) as caught:
        check_renderer(Overriding(encode=encode).build(), tolerance=1e-4)
    assert caught.value.check == "one_hot_mix"


def test_the_good_one_passes() -> None:
    check_policy(Good(), tolerance=1e-4)
    open_vocabulary = Good()
    open_vocabulary.vocabulary = None
    check_policy(open_vocabulary, tolerance=1e-4)


def forgets_to_leave(good: Good, name: str) -> AbstractContextManager[None]:
    good.slot(name).__enter__() if name == "current" else None
    return nullcontext()


def detached(good: Good, x: Tensor, t: Tensor, c: Conditioning) -> Tensor:
    return good.velocity(x, t, c).detach() + 0 * x


POLICIES: dict[str, tuple[Overriding, str]] = {
    "no last step": (Overriding(schedule=lambda good, n: torch.linspace(1, 0, n + 2)[:-1]), "schedule"),
    "backwards": (Overriding(schedule=lambda good, n: torch.linspace(0, 1, n + 1)), "schedule"),
    "double": (
        Overriding(
            sample=lambda good, c, s: good.sample(c, s), schedule=lambda good, n: good.schedule(n).double()
        ),
        "schedule_shape",
    ),
    "noise of a row less": (
        Overriding(
            sample=lambda good, c, s: good.sample(c, s),
            initial_noise=lambda good, s: good.initial_noise(s)[0],
        ),
        "noise_shape",
    ),
    "one noise a batch": (
        Overriding(
            sample=lambda good, c, s: good.sample(c, s),
            initial_noise=lambda good, s: good.initial_noise([s[0] + n for n in range(len(s))]),
        ),
        "noise_seeds",
    ),
    "loud noise": (Overriding(initial_noise=lambda good, s: 3 * good.initial_noise(s)), "noise_scale"),
    "half velocity": (
        Overriding(velocity=lambda good, x, t, c: good.velocity(x, t, c).half()),
        "velocity_shape",
    ),
    "no gradient": (Overriding(velocity=detached), "velocity_gradient"),
    "no time": (Overriding(velocity=lambda good, x, t, c: good.velocity(x, t * 0, c)), "velocity_time"),
    "velocity of the wrong sign": (
        Overriding(
            sample=lambda good, c, s: good.sample(c, s),
            velocity=lambda good, x, t, c: -good.velocity(x, t, c),
        ),
        "euler",
    ),
    "another schedule": (
        Overriding(
            sample=lambda good, c, s: good.sample(c, s), schedule=lambda good, n: good.schedule(n) ** 2
        ),
        "euler",
    ),
    "open range": (
        Overriding(sample=lambda good, c, s: good.sample(c, s).clamp(0.1, 0.9), decode=lambda good, x: x),
        "euler",
    ),
    "loud decoder": (
        Overriding(decode=lambda good, x: good.decode(x) + 0.6 * (x.abs().mean() < 0.2) * (x.abs() >= 0)),
        "decode_range",
    ),
    "stiff decoder": (
        Overriding(decode=lambda good, x: good.decode(x).detach() + 0 * x),
        "decode_gradient",
    ),
    "any slot": (Overriding(slot=lambda good, name: nullcontext()), "slot_names"),
}


@pytest.mark.parametrize("name", POLICIES)
def test_broken_policies(name: str) -> None:
    broken, check = POLICIES[name]
    with pytest.raises(ConformanceError) as caught:
        check_policy(broken.build(), tolerance=1e-4)
    assert caught.value.check == check


class SlotsThatTrain(Good):
    def velocity(self, x_t: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        before, self.active = self.active, "current"
        try:
            return super().velocity(x_t, t_B, conditioning)
        finally:
            self.active = before


class SlotsThatStay(Good):
    @contextmanager
    def _use(self, name: str) -> Iterator[None]:
        self.weight = (self.weight * 2).detach().requires_grad_()
        self.active = name
        yield
        self.active = "current"


class NoLora(Good):
    def slot(self, name: str) -> AbstractContextManager[None]:
        if name in ("old", "ema"):
            raise RunError("no slots yet")
        return super().slot(name)


def test_slots() -> None:
    for policy, check in ((SlotsThatTrain(), "slot_gradient"), (SlotsThatStay(), "slot_restored")):
        with pytest.raises(ConformanceError) as caught:
            check_policy(policy, tolerance=1e-4)
        assert caught.value.check == check
    check_policy(NoLora(), tolerance=1e-4)


# --- rewards ---------------------------------------------------------------------------------------------------------


class Brightness(Reward):
    """The smallest reward that keeps every promise; its second picture in four fails when `metadata` says so."""

    name = "brightness"

    def score(self, batch: RewardBatch) -> Scores:
        values = batch.images_BCHW.mean(dim=(1, 2, 3))
        skipped = [bool(m.get("skip")) for m in batch.metadata] or [False] * len(values)
        failed = torch.tensor(skipped) | values.isnan()
        reasons = tuple("not scored" if bad else None for bad in failed.tolist())
        return Scores(
            values.masked_fill(failed, torch.nan), reasons, {"twice": 2 * values}, {"model": "mean"}
        )


def changed(change: Callable[[Scores, RewardBatch], Scores]) -> Reward:
    class Broken(Brightness):
        def score(self, batch: RewardBatch) -> Scores:
            return change(super().score(batch), batch)

    return Broken()


def zeros_for_failures(scores: Scores, batch: RewardBatch) -> Scores:
    return replace(scores, values_B=scores.values_B.nan_to_num(0.0), reasons=(None,) * len(scores.reasons))


def centred(scores: Scores, batch: RewardBatch) -> Scores:
    return replace(scores, values_B=scores.values_B - scores.values_B.nanmean())


def by_rank(scores: Scores, batch: RewardBatch) -> Scores:
    return replace(scores, values_B=scores.values_B + torch.arange(len(scores.values_B)))


def jittered(scores: Scores, batch: RewardBatch) -> Scores:
    return replace(scores, values_B=scores.values_B + torch.rand(len(scores.values_B)))


def painted(scores: Scores, batch: RewardBatch) -> Scores:
    batch.images_BCHW.mul_(0.5)
    return scores


REWARDS: dict[str, tuple[Callable[[Scores, RewardBatch], Scores], str]] = {
    "a column": (lambda s, b: replace(s, values_B=s.values_B[:, None]), "score_shape"),
    "double": (lambda s, b: replace(s, values_B=s.values_B.double()), "score_shape"),
    "one reason": (lambda s, b: replace(s, reasons=s.reasons[:1]), "reasons"),
    "nan without a reason": (lambda s, b: replace(s, reasons=(None,) * len(s.reasons)), "nan_and_reason"),
    "a reason without nan": (lambda s, b: replace(s, reasons=("why",) * len(s.reasons)), "nan_and_reason"),
    "infinite": (
        lambda s, b: replace(s, values_B=torch.where(s.values_B.isnan(), s.values_B, torch.inf)),
        "score_finite",
    ),
    "short detail": (lambda s, b: replace(s, detail={"x": torch.zeros(1)}), "detail_shape"),
    "no provenance": (lambda s, b: replace(s, provenance={}), "provenance"),
    "no model": (lambda s, b: replace(s, provenance={"background": "white"}), "provenance"),
    "paints": (painted, "read_only"),
    "failures score 0": (zeros_for_failures, "broken_picture"),
    "random": (jittered, "determinism"),
    "by place": (by_rank, "order"),
    "batch statistics": (centred, "batch_invariance"),
}


@pytest.fixture
def batch() -> RewardBatch:
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    metadata: list[Mapping[str, object]] = [{}, {"skip": True}, {}, {}]
    return RewardBatch(images, ["a", "b", "c", "d"], metadata)


@pytest.mark.parametrize("name", REWARDS)
def test_broken_rewards(name: str, batch: RewardBatch) -> None:
    change, check = REWARDS[name]
    with pytest.raises(ConformanceError) as caught:
        check_reward(changed(change), batch)
    assert caught.value.check == check


def test_the_good_reward_passes(batch: RewardBatch) -> None:
    check_reward(Brightness(), batch)
    check_reward(Brightness(), replace(batch, metadata=()))


def test_errors_are_both_assertions_and_pixrl_errors() -> None:
    error = ConformanceError("The reward 'x'", "order", "why")
    assert isinstance(error, AssertionError)
    assert isinstance(error, PixrlError)
    assert str(error) == "The reward 'x' fails the check 'order': why"


def test_bad_calls(batch: RewardBatch) -> None:
    with pytest.raises(InputError, match="two different prompts"):
        check_renderer(Good(), ["a photo of an owl"])
    with pytest.raises(InputError, match="at least two pictures"):
        check_reward(Brightness(), RewardBatch(batch.images_BCHW[:1], ["a"]))
