"""A synthetic world for tests: a picture is a function of the mixed embedding and the seed, a score of the picture.

Nothing here knows the answer: the renderer paints the embedding's projections into 8 x 8 pixels with a little noise,
and the scorer reads them back through another random map. One concept's embedding is larger than the other's, so that
an even mix is out of balance and there is something to learn.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pixrl.fusion.world import FusionWorld
from pixrl.hub import Card, Presence
from pixrl.models.base import Conditioning, Renderer, SamplingSettings
from pixrl.models.text import check_words

TOKENS, COLUMNS, POOLED = 3, 48, 8
WORDS = ("a", "photo", "of", "owl", "snail", "mushroom", "frog", "car")


@dataclass(frozen=True)
class Scored:
    similarities_BN: Tensor
    reasons: tuple[str | None, ...]


class FakeRenderer(Renderer):
    """Pictures of 8 x 8 pixels."""

    name = "fake"
    device = torch.device("cpu")
    settings = SamplingSettings(steps=1, guidance=0.0, resolution=8)
    vocabulary = frozenset(WORDS)

    def __init__(self, noise: float = 0.1, die_after: int | None = None) -> None:
        self.noise = noise
        self.die_after = die_after
        self.rendered = 0
        self.paint = _normal("paint", 3 * 64, COLUMNS) / COLUMNS**0.5

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        check_words(prompts, self.vocabulary, self.name)
        size = {"owl": 1.5, "car": 1.3}
        rows = [
            _normal(prompt, TOKENS, COLUMNS) * size.get(prompt.split()[-1], 1.0)
            + _normal("common", TOKENS, COLUMNS)
            for prompt in prompts
        ]
        pooled = torch.stack([_normal(prompt + "/pooled", POOLED) for prompt in prompts])
        return Conditioning(torch.stack(rows), pooled)

    def sample(self, conditioning: Conditioning, seeds: Sequence[int]) -> Tensor:
        self.rendered += len(seeds)
        if self.die_after is not None and self.rendered > self.die_after:
            raise KeyboardInterrupt
        noise = torch.stack([_seeded(seed, 3 * 64) for seed in seeds]) * self.noise
        drawn = conditioning.tokens_BLD.mean(dim=1) @ self.paint.T + noise
        return torch.sigmoid(drawn).view(-1, 3, 8, 8)

    def fingerprint(self) -> str:
        return "fake"


class FakeScorer:
    """Cosine similarity of random features of the pixels; fails on the pictures whose place is in `broken`."""

    def __init__(self, broken: frozenset[int] = frozenset()) -> None:
        self.read = _normal("read", 3 * 64, 32) / 14
        self.broken = broken
        self.scored = 0
        self.provenance = {"model": "fake (0123456789abcdef)", "licence": "none"}

    def features(self, images_BCHW: Tensor) -> Tensor:
        pixels = (images_BCHW.flatten(1) - 0.5) * 4
        return torch.nn.functional.normalize(torch.tanh(pixels @ self.read), dim=1)

    def exemplar_features(self, images_MCHW: Tensor) -> Tensor:
        return self.features(images_MCHW)

    def similarities(self, images_BCHW: Tensor, exemplars: Sequence[Tensor]) -> Scored:
        found = self.features(images_BCHW)
        similarities_BN = torch.stack([(found @ e.T).mean(dim=1) for e in exemplars], dim=1)
        failed = [self.scored + i in self.broken for i in range(len(found))]
        self.scored += len(found)
        similarities_BN[torch.tensor(failed)] = torch.nan
        return Scored(similarities_BN, tuple("no foreground found" if bad else None for bad in failed))


def fake_world(
    *, noise: float = 0.1, die_after: int | None = None, broken: frozenset[int] = frozenset()
) -> FusionWorld:
    card = Card(exemplar_prompt="a photo of {concept}", presence=Presence(threshold=0.3, balance=0.1))
    return FusionWorld(
        FakeRenderer(noise, die_after), FakeScorer(broken), card, clip="fake", segmenter="fake"
    )


def _normal(name: str, *shape: int) -> Tensor:
    return _seeded(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest()), *shape)


def _seeded(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
