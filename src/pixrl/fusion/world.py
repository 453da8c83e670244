"""The generator, the scorer and the exemplars of a fusion, loaded once a process, and their calibration.

RMLer's thresholds, 0.63 for presence and 0.05 for balance, are published for CLIP ViT-H/14 on photographs; another
encoder has another scale. `calibrate_presence` finds those of a generator and an encoder from single concepts:

* presence: the lowest threshold at which at most `false_passes` of the pictures of one concept alone are taken for a
  mix: of it and another one (unmixed), and of two others (unrelated).
* balance: 0.05 is 21.8 % of the imbalance that the paper measures on unmixed prompts (0.2380 and 0.2205, Table 2),
  where one parent is simply missing. The same share is taken of the same imbalance here: the median similarity to
  the own concept minus the median similarity to another one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pixrl.algorithms import MIXINGS, make_mixing
from pixrl.algorithms.fusion.base import FusionTask
from pixrl.algorithms.fusion.mixing import Mixing
from pixrl.algorithms.fusion.policy import UNMIXED
from pixrl.data.pairs import is_wordless
from pixrl.data.pictures import as_floats, opened, to_levels
from pixrl.equations.fusion import BALANCE
from pixrl.errors import ConfigError, InputError, RunError, ShapeError
from pixrl.fusion.config import FuseConfig, FusionMemory, FusionReward
from pixrl.hub import Card, read_card
from pixrl.hub_check import Layout
from pixrl.metrics.true_fusion import Fusion, FusionTruth
from pixrl.models.base import Conditioning, Mixture, ReferencePolicy, Renderer, on_canvas
from pixrl.models.pipeline import chunks
from pixrl.types import sample_seed

EXEMPLAR_SEED = 42
"""The published exemplars' seed; it does not change with the run's, so all runs compare with the same pictures."""
PUBLISHED_CLIP = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PUBLISHED_SEGMENTER = "ZhengPeng7/BiRefNet"


class Scored(Protocol):
    """The similarities of B pictures to N concepts; nan with a reason where scoring failed."""

    @property
    def similarities_BN(self) -> Tensor: ...

    @property
    def reasons(self) -> Sequence[str | None]: ...


class Scorer(Protocol):
    """The interface of a scorer, which `pixrl.rewards.clip.FusionScorer` has."""

    @property
    def provenance(self) -> Mapping[str, str]: ...

    def exemplar_features(self, images_MCHW: Tensor) -> Tensor: ...

    def similarities(self, images_BCHW: Tensor, exemplars: Sequence[Tensor]) -> Scored: ...


@dataclass(frozen=True)
class Exemplars:
    """The pictures of one concept alone, and their features [M, E]."""

    concept: str
    prompt: str
    seeds: tuple[int, ...]
    images_MCHW: Tensor
    features_ME: Tensor


class FusionWorld:
    """A frozen generator and a scorer, with the exemplars that they have made."""

    def __init__(
        self,
        renderer: Renderer,
        scorer: Scorer,
        card: Card,
        *,
        clip: str = "",
        segmenter: str = "",
        at_once: int | None = None,
        truth: FusionTruth | None = None,
    ) -> None:
        """Keep them.

        Args:
            renderer, scorer, card: the generator, what scores its pictures, and its card.
            clip, segmenter: the references of the scorer's models.
            at_once: pictures that go through the generator at a time; None: as many as it takes by itself.
            truth: what tells true fusions; None: nothing does.
        """
        self.renderer = renderer
        self.at_once = at_once
        self.scorer = scorer
        self.card = card
        self.clip = clip
        self.segmenter = segmenter
        self.truth = truth
        self._exemplars: dict[tuple[str, int, str | None], Exemplars] = {}

    def prompt(self, concept: str) -> str:
        """Return the prompt of one concept, for its exemplars and for the embeddings that are mixed."""
        return prompt_of(self.card, concept)

    def exemplars(self, concept: str, count: int, picture: str | None = None) -> Exemplars:
        """Return the exemplars of a concept, which are the same for every run, seed and sampler.

        Those of a picture are the picture itself, as the generator would draw it: on white, nothing cut off.
        """
        key = (concept, count, picture)
        if key not in self._exemplars:
            prompt, settings = self.prompt(concept), self.renderer.settings
            if picture is None:
                seeds = tuple(sample_seed(EXEMPLAR_SEED, 0, 0, i) for i in range(count))
                images_MCHW = self.draw(self.renderer.encode([prompt] * count), seeds)
                which, ways = (
                    f"any of the {count} exemplars of {concept!r} ({prompt!r})",
                    "more with --exemplars, ",
                )
            else:
                seeds = ()
                images_MCHW = on_canvas(read_concept(picture), settings.width, settings.height)[None]
                which, ways = f"the picture {picture}", ""
            features_ME = self.scorer.exemplar_features(images_MCHW)
            found = ~features_ME.isnan().any(dim=1)
            if not bool(found.any()):
                raise RunError(
                    f"No foreground was found in {which}, so nothing can be compared with it. Try {ways}another "
                    f"--set segmenter=REF, or another {'word' if picture is None else 'picture'}."
                )
            self._exemplars[key] = Exemplars(concept, prompt, seeds, images_MCHW, features_ME[found])
        return self._exemplars[key]

    def draw(self, source: Conditioning | Mixture, seeds: Sequence[int]) -> Tensor:
        """Draw the pictures [B, 3, H, W] of a source's rows, so many at a time as may go through the generator."""
        if self.at_once is None:
            return draw(self.renderer, source, seeds)
        size = max(1, self.at_once // (len(source.parts) if isinstance(source, Mixture) else 1))
        return torch.cat(
            [draw(self.renderer, source[rows], seeds[rows]) for rows in chunks(len(seeds), size)]
        )

    def mixing(self, config: FuseConfig) -> Mixing[Any]:
        """Return the mixing of the recipe's concepts.

        Raises:
            UnknownWordError: a concept is outside the generator's vocabulary.
            InputError: the mixing does not fit the generator.
        """
        return mixing_of(self.renderer, self.card, config)

    def truth_for(self, config: FuseConfig) -> FusionTruth | None:
        """Return what tells true fusions of the recipe's concepts; None where nothing does.

        Raises:
            ConfigError: the recipe learns from true fusions, which nothing tells.
            InputError: the recipe asks for the truth, and one of its concepts is none of the kinds.
        """
        require_reward(config, self.truth is not None)
        if self.truth is None:
            return None
        try:
            self.truth.parents(config.concepts)
        except InputError:
            if asks_for_truth(config):
                raise
            return None
        return self.truth


def judges_of(
    card: Card, clip: str | None, segmenter: str | None, truth: str | None
) -> tuple[str, str, str | None]:
    """Return the CLIP and the segmenter that score a checkpoint's pictures, and what tells true fusions, if anything.

    They are those given, else its card's.
    """
    return (
        clip or card.clip or PUBLISHED_CLIP,
        segmenter or card.segmenter or PUBLISHED_SEGMENTER,
        truth or card.parts,
    )


def asks_for_truth(config: FuseConfig) -> bool:
    """Return whether the recipe itself wants to know which children are true fusions."""
    return config.truth is not None or config.reward is FusionReward.TRUE_FUSION


def require_reward(config: FuseConfig, is_told: bool) -> None:
    """Raise ConfigError where a recipe learns from true fusions and nothing tells them."""
    if config.reward is FusionReward.TRUE_FUSION and not is_told:
        raise ConfigError(
            f"reward={config.reward.value} needs a segmentation of parts, and {config.model} names none: add "
            "--set truth=FOLDER, or leave the reward out."
        )


@lru_cache(maxsize=2)
def load_world(
    model: str,
    clip: str | None = None,
    segmenter: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    memory: FusionMemory | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    resolution: int | str | None = None,
    truth: str | None = None,
) -> FusionWorld:
    """Load the world of a checkpoint; a second call in one process returns the same one."""
    from pixrl.models import load
    from pixrl.rewards.clip import FusionScorer
    from pixrl.rewards.encoders import ClipSimilarity
    from pixrl.rewards.segmentation import Foreground

    card = read_card(model, Layout.PIPELINE)
    clip, segmenter, truth = judges_of(card, clip, segmenter, truth)
    scorer = FusionScorer(ClipSimilarity(clip, device=device), Foreground(segmenter, device=device))
    drawing: dict[str, Any] = {"guidance": guidance, "negative_prompt": negative_prompt}
    renderer = load(model, device=device, dtype=dtype, plan=memory, resolution=resolution, **drawing)
    at_once = None if memory is None else memory.rollout_batch
    judge = None if truth is None else FusionTruth(truth, device=device)
    return FusionWorld(renderer, scorer, card, clip=clip, segmenter=segmenter, at_once=at_once, truth=judge)


def mixing_of(renderer: Renderer, card: Card, config: FuseConfig) -> Mixing[Any]:
    """Return the mixing of the recipe's concepts by a generator; raises as `FusionWorld.mixing` does."""
    config = config.with_mixing(card.mixing)
    require_mixing(type(renderer), renderer.name, config)
    prompts = [prompt_of(card, concept) for concept in config.concepts]
    sources = renderer.encode(prompts)
    if config.pictures:
        assert isinstance(renderer, ReferencePolicy)  # require_mixing
        rows = [sources[[place]] for place in range(len(prompts))]
        for place, concept in enumerate(config.concepts):
            if concept in config.pictures:
                (shown,) = renderer.laid_out([read_concept(config.pictures[concept])])
                rows[place] = renderer.show(rows[place], [shown[None]], [prompts[place]])
        sources = Conditioning.cat(rows)
    return make_mixing(config.mixed_by, sources, renderer.settings.steps, config.pooled)


def prompt_of(card: Card, concept: str) -> str:
    """Return the prompt of one concept; that of a picture without words is empty."""
    return "" if is_wordless(concept) else card.exemplar_prompt.format(concept=concept)


def read_concept(file: str) -> Tensor:
    """Read the picture that stands for a concept, float32 [3, H, W].

    Raises:
        InputError: there is no such file, or it cannot be read as a picture.
    """
    return as_floats(to_levels(opened(Path(file))))


def require_mixing(adapter: type[Renderer], name: str, config: FuseConfig) -> None:
    """Raise InputError where a model of this adapter, called `name`, cannot draw by the recipe's mixing or pictures."""
    mixing = MIXINGS.find(config.mixed_by.kind)
    if mixing.needs_regions:
        adapter.require_regions(name)
    if not config.pictures:
        return
    if not mixing.takes_pictures:
        able = " or ".join(kind for kind in MIXINGS.names() if MIXINGS.find(kind).takes_pictures)
        raise InputError(
            f"mixing={config.mixed_by.kind} mixes what the model makes of words, where {', '.join(config.pictures)} "
            f"has no place: take --mixing {able}, or leave the mixing out."
        )
    adapter.require_pictures(name)
    for file in config.pictures.values():
        read_concept(file)


def render(renderer: Renderer, mixing: Mixing[Any], coefficients_BND: Tensor, seeds: Sequence[int]) -> Tensor:
    """Draw the pictures [B, 3, H, W] of mixed concepts."""
    return draw(renderer, mixing.mix(coefficients_BND), seeds)


def draw(renderer: Renderer, source: Conditioning | Mixture, seeds: Sequence[int]) -> Tensor:
    """Draw the pictures [B, 3, H, W] of a source's rows."""
    if isinstance(source, Mixture):
        return renderer.sample_mixture(source, seeds)
    return renderer.sample(source, seeds)


class FusionSession:
    """One set of concepts in a world, which mixes their embeddings, renders and scores."""

    def __init__(self, world: FusionWorld, config: FuseConfig) -> None:
        self.world = world
        self.config = config
        self.mixing = world.mixing(config)
        self.truth = world.truth_for(config)
        self.exemplars = tuple(
            world.exemplars(concept, config.exemplars, config.pictures.get(concept))
            for concept in config.concepts
        )

    def task(self) -> FusionTask:
        """Return what the sampler sees: the concepts' features, one column for each coefficient of the mixing."""
        return FusionTask(
            self.mixing.features_ND, self.config.seed, self.config.learning_images, self.config.batch
        )

    def render(self, coefficients_BND: Tensor, seeds: Sequence[int]) -> Tensor:
        """Render the pictures of a proposal, [B, 3, H, W]."""
        return self.world.draw(self.mixing.mix(coefficients_BND), seeds)

    def passes(self, coefficients_BND: Tensor) -> int:
        """Count the passes of pictures through the generator's network that a proposal costs."""
        source = self.mixing.mix(coefficients_BND)
        return source.passes if isinstance(source, Mixture) else len(source) * self.mixing.steps

    def score(self, images_BCHW: Tensor) -> tuple[Tensor, tuple[str | None, ...]]:
        """Return the similarity to each concept, [B, N] on the CPU, and the reason of each row that has none."""
        scored = self.world.scorer.similarities(images_BCHW, [e.features_ME for e in self.exemplars])
        similarities_BN = scored.similarities_BN.detach().float().cpu()
        expected = (images_BCHW.shape[0], len(self.exemplars))
        if similarities_BN.shape != expected:
            raise ShapeError(f"similarities_BN is {list(similarities_BN.shape)}, not {list(expected)}.")
        finite_B = similarities_BN.isfinite().all(dim=1)
        reasons = tuple(
            reason or (None if finite else "the similarity is not finite")
            for reason, finite in zip(scored.reasons, finite_B.tolist(), strict=True)
        )
        failed_B = torch.tensor([reason is not None for reason in reasons])
        return similarities_BN.masked_fill(failed_B[:, None], torch.nan), reasons

    def judge(self, images_BCHW: Tensor) -> tuple[Fusion, ...]:
        """Return the truth about each picture; () where nothing tells it."""
        return () if self.truth is None else self.truth.judge(images_BCHW, self.config.concepts)


PROBE_SEED = 43
"""The seed of the calibration's pictures: not the exemplars', so that no picture is compared with itself."""
BALANCE_SHARE = BALANCE / UNMIXED
"""The published balance threshold as a share of the imbalance of unmixed prompts."""


@dataclass(frozen=True)
class Calibration:
    """The calibrated thresholds, and the similarities behind them."""

    threshold: float
    balance: float
    unmixed_passes: float
    """Share of the pictures of one concept that pass as a mix of it and another one, over all such pairs."""
    unrelated_passes: float
    """Share of them that pass as a mix of two others; nan where there are no two others."""
    same_median: float
    same_low: float
    """5 % of the pictures are less similar to their own concept than this."""
    different_median: float
    different_high: float
    """5 % of the pictures are more similar to another concept than this."""
    recognized: float
    """Share of the pictures whose own concept is above the threshold."""
    concepts: int
    exemplars: int
    probes: int

    def to_card(self) -> dict[str, Any]:
        """Return the entry `presence` of a checkpoint's pixrl.json."""
        return {name: round(x, 4) if isinstance(x, float) else x for name, x in asdict(self).items()}


def calibrate_presence(
    world: FusionWorld,
    concepts: Sequence[str],
    *,
    exemplars: int = 4,
    probes: int = 8,
    false_passes: float = 0.01,
) -> Calibration:
    """Measure thresholds from `probes` pictures of each concept against `exemplars` pictures of every concept.

    Raises:
        InputError: fewer than two concepts, or a share of false passes outside [0, 1).
        RunError: nothing could be scored.
    """
    if len(set(concepts)) < 2:
        raise InputError(f"calibrate_presence needs two or more different concepts, got {list(concepts)!r}.")
    if not 0 <= false_passes < 1:
        raise InputError(f"false_passes must be at least 0 and below 1, got {false_passes}.")
    features = [world.exemplars(concept, exemplars).features_ME for concept in concepts]
    seeds = [sample_seed(PROBE_SEED, 0, 0, i) for i in range(probes)]
    rows = []
    for concept in concepts:
        conditioning = world.renderer.encode([world.prompt(concept)] * probes)
        images_PCHW = world.renderer.sample(conditioning, seeds)
        rows.append(world.scorer.similarities(images_PCHW, features).similarities_BN)
    similarities_NPN = torch.stack(rows)
    own = torch.eye(len(concepts), dtype=torch.bool)[:, None].expand_as(similarities_NPN)
    same, different = _finite(similarities_NPN[own]), _finite(similarities_NPN[~own])
    if not len(same) or not len(different):
        raise RunError(
            f"No foreground was found in any picture of {', '.join(concepts)}: nothing to calibrate from."
        )
    balance = max(BALANCE_SHARE * float(same.median() - different.median()), 0.0)
    # the smaller similarity of every picture to every pair of concepts, minus infinity where they are unbalanced: first
    # to pairs with the picture's own concept, then to pairs of others
    first, second = torch.triu_indices(len(concepts), len(concepts), offset=1)
    a, b = similarities_NPN[..., first], similarities_NPN[..., second]
    weaker = torch.minimum(a, b).masked_fill((a - b).abs() >= balance, -torch.inf)
    shown = torch.arange(len(concepts))[:, None, None].expand_as(weaker)
    is_own = (shown == first) | (shown == second)
    unmixed, unrelated = (values[~values.isnan()] for values in (weaker[is_own], weaker[~is_own]))
    threshold = float(different.median())  # below the median of other concepts nothing is present
    for values in (unmixed, unrelated):
        if len(values):  # the lowest that at most `false_passes` of them exceed
            lowest = values.sort().values[math.ceil((1 - false_passes) * len(values)) - 1]
            threshold = max(threshold, float(lowest))
    return Calibration(
        threshold=threshold,
        balance=balance,
        unmixed_passes=float((unmixed > threshold).float().mean()),
        unrelated_passes=float((unrelated > threshold).float().mean()),
        same_median=float(same.median()),
        same_low=float(same.quantile(0.05)),
        different_median=float(different.median()),
        different_high=float(different.quantile(0.95)),
        recognized=float((same > threshold).float().mean()),
        concepts=len(concepts),
        exemplars=exemplars,
        probes=probes,
    )


def _finite(values: Tensor) -> Tensor:
    return values[values.isfinite()]
