"""Where a group's samples differ: in their noise alone, or also in the prompt's embedding (E2PO).

| paper                                | here                                                        |
|--------------------------------------|-------------------------------------------------------------|
| exploration set, Eq. 8               | every noise with every variant 0 .. `variants` - 1          |
| c_0                                  | `Variants.anchor`, which the update is conditioned on       |
| c_k(t), lambda(t), Eq. 13            | `Variants.at`, `equations.variant_weight`                   |
| reference anchor kept in the set     | variant 0 is c_0 (`anchored`)                               |
| learned perturbations, Eqs. 9 to 12  | `perturbation_learning.learn`                               |

The loop asks `prepare` once a batch of prompts and `at` once a sampling step.
"""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from pixrl.algorithms.e2po import (
    PerturbationSettings,
    Schedule,
    chosen_encoders,
    learn,
    perturbed_embeddings,
)
from pixrl.algorithms.fusion.base import NoSettings
from pixrl.config import Settings
from pixrl.equations import diversity_loss, variant_weight
from pixrl.errors import CheckpointError, InputError, ShapeError
from pixrl.models.base import Conditioning, FlowPolicy
from pixrl.models.text import ClipEncoder, ClipFeatures, ClipText, PerturbableText

CACHE_BYTES = 2**28
"""Perturbations kept, in bytes. One that was dropped is learned again, to the same values."""

_log = logging.getLogger("pixrl")


@dataclass(frozen=True)
class Perturbed:
    """One encoder's features of all perturbed variants, row prompt * `per_prompt` + place."""

    encoder: ClipEncoder
    features: ClipFeatures
    per_prompt: int


@dataclass(frozen=True)
class Variants:
    """The conditions of P prompts, K variants each."""

    anchor: Conditioning
    """c_0, one row a prompt."""
    variants: int = 1
    """K."""
    perturbed: tuple[Perturbed, ...] = ()
    """Empty: every variant is c_0."""
    perturbation_range: float | None = None
    """tau of the noise-aware schedule; None: static, the variants' own conditions at every t."""
    metrics: Mapping[str, float] = field(default_factory=dict)

    def at(self, t: float, prompt_B: Tensor, variant_B: Tensor) -> Conditioning:
        """c_k(t) = lambda(t) c_k + (1 - lambda(t)) c_0, one row a sample; tokens and pooled features alike.

        Args:
            t: the flow's time, 1 is noise; the noise level of the step that is about to be taken.
            prompt_B: row of `anchor` of each sample, integers `[B]`.
            variant_B: k of each sample, integers `[B]`, 0 .. K - 1. An anchored variant 0 is exactly c_0.

        Raises:
            InputError: `t` is outside [0, 1], or an index out of range.
            ShapeError: the indices are not two integer tensors `[B]`.

        Source: E2PO Eq. 13.
        """
        if not 0 <= t <= 1:
            raise InputError(f"t must be in [0, 1], 1 is noise; got {t}.")
        weight = 1.0 if self.perturbation_range is None else variant_weight(float(t), self.perturbation_range)
        self._require(prompt_B, variant_B)
        condition = self.anchor[prompt_B]
        for part in self.perturbed:
            place_B = variant_B - (self.variants - part.per_prompt)
            rows = prompt_B * part.per_prompt + place_B.clamp(min=0)
            features = part.features[rows.to(part.features.pooled_KE.device)]
            condition = part.encoder.blend(condition, features, weight * (place_B >= 0))
        return condition

    def _require(self, prompt_B: Tensor, variant_B: Tensor) -> None:
        whole = not (prompt_B.is_floating_point() or variant_B.is_floating_point())
        if prompt_B.ndim != 1 or prompt_B.shape != variant_B.shape or not whole:
            raise ShapeError(
                "prompt_B and variant_B must be integers [B], got "
                f"{prompt_B.dtype} {list(prompt_B.shape)} and {variant_B.dtype} {list(variant_B.shape)}."
            )
        for name, index_B, count in (
            ("prompt_B", prompt_B, len(self.anchor)),
            ("variant_B", variant_B, self.variants),
        ):
            if len(index_B) and not 0 <= int(index_B.min()) <= int(index_B.max()) < count:
                raise InputError(f"{name} must be in 0 .. {count - 1}, got {index_B.tolist()}.")


class Exploration(ABC):
    """Gives each prompt the conditions that its samples are drawn from."""

    settings_type: ClassVar[type[Settings]] = NoSettings
    variants: int
    """K; 1 for noise alone."""

    @abstractmethod
    def prepare(self, policy: FlowPolicy, prompts: Sequence[str]) -> Variants:
        """The conditions of some prompts, one row each in `Variants.anchor`, in order."""

    def state(self) -> dict[str, Tensor]:
        """What was learned, for a checkpoint: names and contiguous CPU tensors."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes up what `state` gave.

        Raises:
            CheckpointError: it is not this exploration's state.
        """
        if state:
            raise CheckpointError(
                f"{type(self).__name__} learns nothing, but the checkpoint holds {sorted(state)[0]!r}. "
                "Resume with the exploration that the run began with."
            )


class NoiseOnly(Exploration):
    """Samples of a prompt differ in their noise alone."""

    variants = 1

    def __init__(self, settings: NoSettings | None = None) -> None:
        self.settings = settings or NoSettings()

    def prepare(self, policy: FlowPolicy, prompts: Sequence[str]) -> Variants:
        return Variants(policy.encode(prompts))


class PerturbedEmbeddings(Exploration):
    """E2PO's variants: learned once a prompt, kept, and written over the CLIP encoders' part of the condition.

    On SD3 token and pooled features vary; T5's part and, with `encoders: clip_l`, CLIP-G's stay those of the prompt.
    FLUX takes pooled CLIP features alone, so there nothing else varies.
    """

    settings_type = PerturbationSettings

    def __init__(
        self, settings: PerturbationSettings | None = None, *, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self.settings = settings or PerturbationSettings()
        self.variants = self.settings.variants
        self._limit = cache_bytes
        self._learned: OrderedDict[str, Mapping[str, Tensor]] = OrderedDict()
        self._bytes = 0

    def prepare(self, policy: FlowPolicy, prompts: Sequence[str]) -> Variants:
        """The variants of some prompts; those that are new are learned first.

        Raises:
            InputError: the model has no CLIP text encoders (or not both, where both are wanted), or a prompt has no
                content token.
            RunError: learning gave nan.
        """
        if not isinstance(policy, PerturbableText):
            raise InputError(
                f"{policy.name} ({type(policy).__name__}) has no CLIP text encoders whose embeddings could be "
                "perturbed. Explore with noise alone, or give an SD3 or FLUX model."
            )
        encoders = chosen_encoders(policy, policy.name, self.settings.encoders)
        anchor = policy.encode(prompts)
        texts = {prompt: tuple(one.read(prompt) for one in encoders) for prompt in dict.fromkeys(prompts)}
        keys = {prompt: _key(self.settings.learning_key(), prompt, texts[prompt]) for prompt in texts}
        deltas, new = self._find(encoders, keys)
        found = {prompt: _encode(encoders, texts[prompt], deltas[prompt]) for prompt in texts}
        perturbed = tuple(
            Perturbed(
                encoder,
                ClipFeatures.cat([found[prompt].features[place] for prompt in prompts]),
                self.settings.learned,
            )
            for place, encoder in enumerate(encoders)
        )
        self._warn({prompt: found[prompt] for prompt in new})
        static = self.settings.schedule is Schedule.STATIC
        return Variants(
            anchor=anchor,
            variants=self.variants,
            perturbed=perturbed,
            perturbation_range=None if static else self.settings.perturbation_range,
            metrics=self._metrics(list(found.values())) | {"learned_prompts": float(len(new))},
        )

    def state(self) -> dict[str, Tensor]:
        return {
            f"{key}/{encoder}": delta_KND.contiguous()
            for key, deltas in self._learned.items()
            for encoder, delta_KND in deltas.items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes up perturbations; those learned with other settings are kept apart by their key and never used."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, delta_KND in state.items():
            key, _, encoder = name.partition("/")
            if not encoder or delta_KND.ndim != 3 or delta_KND.dtype is not torch.float32:
                raise CheckpointError(
                    f"{name!r} ({delta_KND.dtype} {list(delta_KND.shape)}) is not a learned perturbation. "
                    "Resume from a checkpoint of a run with this exploration."
                )
            found.setdefault(key, {})[encoder] = delta_KND.cpu()
        self._learned, self._bytes = OrderedDict(), 0
        for key, deltas in found.items():
            self._keep(key, deltas)

    def _find(
        self, encoders: Sequence[ClipEncoder], keys: Mapping[str, str]
    ) -> tuple[dict[str, Mapping[str, Tensor]], list[str]]:
        """The perturbations of each prompt (prompt -> key), kept or learned now, and which were learned now."""
        found = {prompt: self._learned[key] for prompt, key in keys.items() if key in self._learned}
        for prompt in found:
            self._learned.move_to_end(keys[prompt])
        new = [prompt for prompt in keys if prompt not in found]
        for start in range(0, len(new), self.settings.prompts_at_once):
            batch = new[start : start + self.settings.prompts_at_once]
            for prompt, deltas in zip(batch, learn(encoders, batch, self.settings), strict=True):
                found[prompt] = deltas
                self._keep(keys[prompt], deltas)
        return found, new

    def _keep(self, key: str, deltas: Mapping[str, Tensor]) -> None:
        self._learned[key] = deltas
        self._bytes += _size(deltas)
        while self._bytes > self._limit and len(self._learned) > 1:
            self._bytes -= _size(self._learned.popitem(last=False)[1])

    def _outside(self, one: "_PromptVariants") -> Tensor:
        """Which variants' similarity to the anchor is out of the band, bool [K]."""
        slack = 1e-3
        return (one.anchor_cosine_K - self.settings.target).abs() > self.settings.margin + slack

    def _warn(self, new: Mapping[str, "_PromptVariants"]) -> None:
        """Says once a batch how many newly learned prompts missed the band."""
        missed = {prompt: one for prompt, one in new.items() if bool(self._outside(one).any())}
        if not missed:
            return
        prompt, first = next(iter(missed.items()))
        s = self.settings
        _log.warning(
            "%d of %d newly learned prompts have variants whose cosine similarity to the prompt is outside "
            "%g ± %g; %r: %s. Too high: raise exploration.max_norm (%g, %s), lr (%g) or steps (%d); too low: lower "
            "max_norm or weight, or set weighted: anchor.",
            len(missed), len(new), s.target, s.margin, prompt,
            [round(value, 3) for value in first.anchor_cosine_K.tolist()],
            s.max_norm, s.norm.value, s.lr, s.steps,
        )  # fmt: skip

    def _metrics(self, found: Sequence["_PromptVariants"]) -> dict[str, float]:
        """Means over the prompts' variants."""
        anchor_PK = torch.stack([one.anchor_cosine_K for one in found])
        outside_PK = torch.stack([self._outside(one) for one in found])
        metrics = {
            "anchor_cosine": anchor_PK.mean().item(),
            "anchor_cosine_min": anchor_PK.min().item(),
            "in_band_share": 1 - outside_PK.float().mean().item(),
            "delta_norm_share": sum(one.norm_share for one in found) / len(found),
        }
        pairs = [one.pairwise_cosine for one in found if one.pairwise_cosine is not None]
        if pairs:
            metrics["pairwise_cosine"] = sum(pairs) / len(pairs)
        return metrics


@dataclass(frozen=True)
class _PromptVariants:
    """One prompt's encoded variants and what was reached."""

    features: tuple[ClipFeatures, ...]
    anchor_cosine_K: Tensor
    pairwise_cosine: float | None
    norm_share: float


@torch.no_grad()
def _encode(
    encoders: Sequence[ClipEncoder], texts: Sequence[ClipText], deltas: Mapping[str, Tensor]
) -> _PromptVariants:
    """One prompt's variants through the encoders, all in one batch."""
    features, anchors, shares = [], [], []
    for encoder, text in zip(encoders, texts, strict=True):
        delta_KND = deltas[encoder.name].to(text.embeddings_LD.device)
        embeddings_KLD = perturbed_embeddings(text, delta_KND)
        features.append(encoder.features(text.ids_L.expand(len(delta_KND), -1), embeddings_KLD))
        anchors.append(encoder.pooled(text.ids_L[None], text.embeddings_LD[None]))
        shares.append(delta_KND.norm(dim=2) / text.embeddings_LD[text.content_L].norm(dim=1))
    h_KD = torch.cat([one.pooled_KE.float() for one in features], dim=1)
    return _PromptVariants(
        tuple(features),
        cosine_similarity(h_KD, torch.cat(anchors, dim=1), dim=1).cpu(),
        diversity_loss(h_KD).item() if len(h_KD) > 1 else None,
        torch.cat([share.flatten() for share in shares]).mean().item(),
    )


def _key(settings: str, prompt: str, texts: Sequence[ClipText]) -> str:
    """Names a prompt's perturbations: settings, text, and the embeddings that are perturbed (so: which model)."""
    total = hashlib.blake2b(f"{settings}\n{prompt}\n".encode(), digest_size=16)
    for text in texts:
        total.update(text.embeddings_LD[text.content_L].cpu().numpy().tobytes())
    return total.hexdigest()


def _size(deltas: Mapping[str, Tensor]) -> int:
    return sum(delta.nbytes for delta in deltas.values())
