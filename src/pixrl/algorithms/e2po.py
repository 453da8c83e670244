"""E2PO: a prompt's samples differ in their noise and in the prompt's embedding.

E2PO: Embedding-perturbed Exploration Preference Optimization, section 4 and Table 3. A prompt's variants are learned
(section 4.2): spread from each other, at a set distance from the prompt. Pictures are drawn from them while it is noisy
(section 4.3); every loss then learns from the group, conditioned on the prompt itself.

| paper                               | here                                                              |
|-------------------------------------|-------------------------------------------------------------------|
| exploration set, Eq. 8              | every noise with every variant 0 .. `variants` - 1                |
| c_0                                 | `Variants.anchor`, which the update is conditioned on             |
| c_k(t), lambda(t), Eq. 13           | `Variants.at`, `equations.variant_weight`                         |
| reference anchor kept in the set    | variant 0 is c_0 (`anchored`)                                     |
| delta_k ~ N(0, sigma_init^2), Eq. 9 | `_Texts.delta_KPLD`, zero but for the content tokens; `sigma_init` |
| perturbed input, Eq. 10             | `equations.perturb`                                               |
| h_k, h_0                            | `_Texts.pooled_KPE`: pooled features of the perturbed encoders    |
| L_div, L_anchor, Eqs. 11 and 12     | `equations.perturbation_objective`                                |
| 300 steps, AdamW                    | `steps`, `lr`                                                     |
| max norm clip 0.05                  | `max_norm`, `norm`, after every step and at the start             |

Deviations, all of them decisions where the paper's text is silent:

1. h is "the global semantic embedding": CLIP's pooled output at the end token, with its projection where the pipeline
   uses it. Both encoders perturbed: their pooled features one after the other, as SD3 itself concatenates them. Of a
   language model: what the pipeline takes of the first token after the prompt, which sees all of it.
2. Only tokens up to the first end token go through the encoder while learning; later ones cannot reach h (causal mask).
3. Each prompt starts from a generator keyed by (seed, encoder, prompt text) and has an objective of its own: its
   variants depend neither on the batch that it is asked in, nor on the number of processes, nor on what was learned
   before. With `prompts_at_once: 1` that holds to the last bit; more at once is faster and changes the rounding.
4. Learning is in float32; an encoder in half precision rounds the perturbed embeddings on the way in.
5. AdamW's decoupled weight decay is torch's default, 0.01.
6. The rate falls to zero over the last fifth of the steps; at a constant one variants hover about their band's border.
"""

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.optim.lr_scheduler import LambdaLR

from pixrl.algorithms.exploration import Exploration, ExplorationSettings, GroupSize, Perturbed, Variants
from pixrl.config import MOST, Count, Seed, Settings
from pixrl.equations import diversity_loss, perturb, perturbation_objective, project_delta
from pixrl.errors import CheckpointError, InputError, RunError
from pixrl.models.base import FlowPolicy
from pixrl.models.text import LANGUAGE, PerturbableText, PromptText, TextEncoder, TextFeatures

SETTLING = 0.2  # of the learning steps, over which the rate falls to zero
CACHE_BYTES = 2**28
"""The bytes of perturbations that are kept. One that was dropped is learned again, to the same values."""

_log = logging.getLogger("pixrl")

_SAMPLING = ("variants", "perturbation_range", "schedule", "anchored")
"""The settings that the perturbations themselves do not depend on."""


class VariantSchedule(StrEnum):
    """The schedule lambda(t) by which variants steer the sampler (Eq. 13)."""

    NOISE_AWARE = "noise_aware"
    STATIC = "static"


class Encoders(StrEnum):
    """The text encoders whose input embeddings are perturbed."""

    CLIP_L = "clip_l"
    BOTH = "both"
    LANGUAGE = LANGUAGE


class NormBound(StrEnum):
    """The bound on a token's perturbation: `max_norm` itself, or that share of the token's own norm."""

    ABSOLUTE = "absolute"
    RELATIVE = "relative"


class PerturbationSettings(Settings):
    """The settings of E2PO's perturbations (Table 3); `lr` and `sigma_init` are ours, the paper's text lost them."""

    variants: int = Field(4, ge=1, le=4096)
    """K, the anchor among them: 6, 4 and 3 in the paper's settings."""
    perturbation_range: float = Field(0.4, gt=0, le=1)
    """tau: variants steer while t > 1 - tau."""
    schedule: VariantSchedule = VariantSchedule.NOISE_AWARE
    """static: variants steer to the end (the paper's ablation)."""
    anchored: bool = True
    """False: variant 0 is perturbed too (the paper's ablation without the reference anchor)."""
    encoders: Encoders = Encoders.CLIP_L
    """both: CLIP-G too (the paper's failing ablation). language: the language model of a model without CLIP."""
    target: float = Field(0.80, gt=0, lt=1)
    """Wanted cosine similarity of a variant to the anchor (Eq. 12)."""
    margin: float = Field(0.01, ge=0, lt=1)
    """Half width of the band around `target` without loss."""
    weight: float = Field(50.0, gt=0)
    weighted: Literal["diversity", "anchor"] = "diversity"
    """The term that `weight` multiplies (open in the paper)."""
    steps: int = Field(300, ge=0, le=MOST)
    """0: the perturbations stay as they were drawn."""
    lr: float = Field(1e-3, gt=0)
    sigma_init: float = Field(1e-3, gt=0)
    max_norm: float = Field(0.05, gt=0)
    """The largest norm of a token's perturbation: in embedding units, or a share of the token's norm."""
    norm: NormBound = NormBound.ABSOLUTE
    seed: Seed = 0
    prompts_at_once: Count = 1
    """Prompts that are learned in one batch: more is faster; 1 is the same to the last bit in any batch."""

    @property
    def learned(self) -> int:
        """The number of perturbations of a prompt: K, or K - 1 beside the anchor."""
        return self.variants - int(self.anchored)

    @model_validator(mode="after")
    def _all_options_count(self) -> "PerturbationSettings":
        if self.learned < 1:
            raise ValueError(
                "variants: 1 with the anchor leaves nothing perturbed; give 2 or more, or explore with noise alone"
            )
        cases = (
            (self.schedule is VariantSchedule.STATIC, "schedule: static", ("perturbation_range",)),
            (self.steps == 0, "steps: 0", ("lr", "weight", "weighted")),
            (self.learned == 1, "a single perturbation, which has no pairs,", ("weight", "weighted")),
        )
        for holds, reason, names in cases:
            idle = [name for name in names if self._changed(name)] if holds else []
            if idle:
                raise ValueError(f"{' and '.join(idle)} would have no effect with {reason}; leave it out")
        return self

    def _changed(self, name: str) -> bool:
        return bool(self.__dict__[name] != type(self).model_fields[name].default)

    def learning_key(self) -> str:
        """Return what the perturbations depend on, as text; sampling options are not part of it."""
        return self.model_dump_json(exclude={*_SAMPLING, "prompts_at_once"}) + f"x{self.learned}"


class PerturbedExploration(ExplorationSettings, PerturbationSettings):
    """The settings of E2PO's exploration set: G noises times K semantic variants of each prompt (Eq. 8)."""

    kind: Literal["perturbed"] = "perturbed"
    noises: GroupSize = 4
    """G: noises of each variant."""

    @property
    def per_noise(self) -> int:
        return self.variants

    def perturbation(self) -> PerturbationSettings:
        """Return the settings without G."""
        names = PerturbationSettings.model_fields
        return PerturbationSettings(**{name: self.__dict__[name] for name in names})

    def describe(self) -> str:
        until = (
            "to the end"
            if self.schedule is VariantSchedule.STATIC
            else f"down to t = {1 - self.perturbation_range:g}"
        )
        anchor = "with the prompt itself" if self.anchored else "without the prompt itself"
        return (
            f"{self.noises} noises × {self.variants} semantic variants {anchor}, {until}, on {self.encoders.value}, "
            f"weight {self.weight:g} on {self.weighted}"
        )


def chosen_encoders(model: PerturbableText, name: str, choice: Encoders) -> tuple[TextEncoder, ...]:
    """Return the encoders that are perturbed.

    Raises:
        InputError: the model has no such encoders.
    """
    found = model.text_encoders()
    has_language = found[0].name == LANGUAGE
    if (choice is Encoders.LANGUAGE) != has_language:
        reads = "a language model, not with CLIP" if has_language else "CLIP, not with a language model"
        right = LANGUAGE if has_language else Encoders.CLIP_L.value
        raise InputError(f"{name} reads prompts with {reads}. Give encoders: {right}.")
    if choice is not Encoders.BOTH:
        return found[:1]
    if len(found) < 2:
        raise InputError(
            f"{name} has one CLIP text encoder, {found[0].name}; encoders: both needs two. Give encoders: clip_l."
        )
    return found


@dataclass
class _Texts:
    """P prompts in one encoder, cut after the last end token, and their perturbations."""

    encoder: TextEncoder
    ids_PL: Tensor
    content_PL: Tensor
    embeddings_PLD: Tensor
    delta_KPLD: Tensor

    def pooled_KPE(self, delta_KPLD: Tensor) -> Tensor:
        """Return the global embeddings h_k of the variants with these perturbations."""
        embeddings = perturb(self.embeddings_PLD, delta_KPLD, self.content_PL)
        ids = self.ids_PL.expand(len(delta_KPLD), -1, -1)
        pooled_BE = self.encoder.pooled(ids.flatten(0, 1), embeddings.flatten(0, 1))
        return pooled_BE.view(*ids.shape[:2], -1)

    @torch.no_grad()
    def project(self, max_norm: float, norm: NormBound) -> None:
        """Shrink each token's perturbation to the bound, in place."""
        own = self.embeddings_PLD.flatten(0, 1) if norm is NormBound.RELATIVE else None
        shrunk = project_delta(self.delta_KPLD.flatten(1, 2), max_norm, own)
        self.delta_KPLD.copy_(shrunk.view_as(self.delta_KPLD))

    def result(self, prompt: int) -> Tensor:
        """Return one prompt's perturbations [K, N, D] of its content tokens, on the CPU."""
        return self.delta_KPLD[:, prompt, self.content_PL[prompt]].detach().cpu()


def perturbed_embeddings(text: PromptText, delta_KND: Tensor) -> Tensor:
    """Return a prompt's K perturbed inputs [K, L, D] (Eq. 10) from perturbations [K, N, D] of its N content tokens."""
    return perturb(text.embeddings_LD, _everywhere(text, delta_KND), text.content_L)


def learn(
    encoders: Sequence[TextEncoder], prompts: Sequence[str], settings: PerturbationSettings
) -> list[Mapping[str, Tensor]]:
    """Learn the perturbations of some prompts in one batch.

    Args:
        encoders: those to perturb.
        prompts: one or more.
        settings: those of the objective (Eqs. 9 to 12) and of its optimizer.

    Returns:
        For each prompt, encoder name -> float32 `[learned, N, D]` on the CPU, N content tokens; every token within the
        norm bound.

    Raises:
        InputError: a prompt has no content token.
        RunError: the perturbations became nan or infinite.

    Source: E2PO section 4.2.
    """
    with torch.inference_mode(False), torch.enable_grad():
        parts = [_start(encoder, prompts, settings) for encoder in encoders]
        # down every prompt's own objective (Eqs. 11 and 12), back within the bound after each step
        s = settings
        objective = partial(
            perturbation_objective, weight=s.weight, weighted=s.weighted, target=s.target, margin=s.margin
        )
        with torch.no_grad():
            h0_PD = torch.cat(
                [part.pooled_KPE(torch.zeros_like(part.delta_KPLD[:1]))[0] for part in parts], dim=1
            )
        optimizer = torch.optim.AdamW([part.delta_KPLD for part in parts], lr=s.lr)
        settling = LambdaLR(optimizer, lambda step: min(1.0, (1 - step / max(s.steps, 1)) / SETTLING))
        for _ in range(s.steps):
            h_KPD = torch.cat([part.pooled_KPE(part.delta_KPLD) for part in parts], dim=2)
            loss_P = torch.vmap(objective, in_dims=(1, 0))(h_KPD, h0_PD)
            optimizer.zero_grad()
            loss_P.sum().backward()
            optimizer.step()
            settling.step()
            for part in parts:
                part.project(s.max_norm, s.norm)
        found = [{part.encoder.name: part.result(place) for part in parts} for place in range(len(prompts))]
    for prompt, deltas in zip(prompts, found, strict=True):
        if not all(bool(delta.isfinite().all()) for delta in deltas.values()):
            raise RunError(
                f"Learning the variants of {prompt!r} gave nan or infinity. Lower the exploration's lr "
                f"(it is {settings.lr:g}), or run the text encoders in float32 or bfloat16."
            )
    return list(found)


def _start(encoder: TextEncoder, prompts: Sequence[str], settings: PerturbationSettings) -> _Texts:
    """Return the perturbations as they are drawn (Eq. 9), within the bound."""
    texts = [encoder.read(prompt) for prompt in prompts]
    cut = max(text.end for text in texts) + 1
    drawn = [
        _everywhere(text, _draw(encoder, prompt, text, settings))
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    start = _Texts(
        encoder,
        torch.stack([text.ids_L for text in texts])[:, :cut],
        torch.stack([text.content_L for text in texts])[:, :cut],
        torch.stack([text.embeddings_LD for text in texts])[:, :cut],
        torch.stack(drawn, dim=1)[:, :, :cut].contiguous(),
    )
    start.project(settings.max_norm, settings.norm)
    start.delta_KPLD.requires_grad_()
    return start


def _draw(encoder: TextEncoder, prompt: str, text: PromptText, settings: PerturbationSettings) -> Tensor:
    """Draw delta_k ~ N(0, sigma_init^2) (Eq. 9), [K, N, D], from the prompt's own generator."""
    key = f"{settings.seed}/{encoder.name}/{prompt}".encode()
    number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1
    shape = (settings.learned, int(text.content_L.sum()), text.embeddings_LD.shape[1])
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(number))
    return settings.sigma_init * drawn.to(text.embeddings_LD.device)


def _everywhere(text: PromptText, delta_KND: Tensor) -> Tensor:
    """Return perturbations [K, L, D] that are zero but for the content tokens."""
    length, columns = text.embeddings_LD.shape
    everywhere = delta_KND.new_zeros(len(delta_KND), length, columns)
    everywhere[:, text.content_L] = delta_KND
    return everywhere


class PerturbedEmbeddings(Exploration):
    """E2PO's exploration: variants learned once a prompt, kept, and written over the encoders' part of c_0.

    On SD3 token and pooled features vary; T5's part and, with `encoders: clip_l`, CLIP-G's stay those of the prompt.
    FLUX takes pooled CLIP features alone, so there nothing else varies. Z-Image's captions vary as a whole.
    """

    Settings = PerturbedExploration
    settings: PerturbationSettings

    def __init__(
        self, settings: PerturbationSettings | None = None, *, cache_bytes: int = CACHE_BYTES
    ) -> None:
        super().__init__(settings or PerturbationSettings())
        self.variants = self.settings.variants
        self._limit = cache_bytes
        self._learned: OrderedDict[str, Mapping[str, Tensor]] = OrderedDict()
        self._bytes = 0

    @classmethod
    def make(cls, settings: PerturbedExploration) -> Self:
        return cls(settings.perturbation())

    def prepare(self, policy: FlowPolicy, prompts: Sequence[str]) -> Variants:
        """Return the variants of some prompts; those that are new are learned first.

        Raises:
            InputError: the model does not have the text encoders that are wanted, or a prompt has no content token.
            RunError: learning gave nan.
        """
        if not isinstance(policy, PerturbableText):
            raise InputError(
                f"{policy.name} ({type(policy).__name__}) has no text encoders whose embeddings could be "
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
                TextFeatures.cat([found[prompt].features[place] for prompt in prompts]),
                self.settings.learned,
            )
            for place, encoder in enumerate(encoders)
        )
        self._warn({prompt: found[prompt] for prompt in new})
        static = self.settings.schedule is VariantSchedule.STATIC
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
        """Take up perturbations; those learned with other settings are kept apart by their key and never used."""
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
        self, encoders: Sequence[TextEncoder], keys: Mapping[str, str]
    ) -> tuple[dict[str, Mapping[str, Tensor]], list[str]]:
        """Return the perturbations of each prompt (prompt -> key), kept or learned now, and which were learned now."""
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
        """Return which variants' similarity to the anchor is out of the band, bool [K]."""
        return (one.anchor_cosine_K - self.settings.target).abs() > self.settings.margin + 1e-3

    def _warn(self, new: Mapping[str, "_PromptVariants"]) -> None:
        """Warn once a batch of how many newly learned prompts missed the band."""
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
        """Return the log's means over the prompts' variants."""
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
    """One prompt's encoded variants, and how far their learning came."""

    features: tuple[TextFeatures, ...]
    anchor_cosine_K: Tensor
    pairwise_cosine: float | None
    norm_share: float


@torch.no_grad()
def _encode(
    encoders: Sequence[TextEncoder], texts: Sequence[PromptText], deltas: Mapping[str, Tensor]
) -> _PromptVariants:
    """Encode one prompt's variants, all in one batch."""
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


def _key(settings: str, prompt: str, texts: Sequence[PromptText]) -> str:
    """Return the key of a prompt's perturbations: a hash of settings, text and the embeddings that are perturbed."""
    total = hashlib.blake2b(f"{settings}\n{prompt}\n".encode(), digest_size=16)
    for text in texts:
        total.update(text.embeddings_LD[text.content_L].cpu().numpy().tobytes())
    return total.hexdigest()


def _size(deltas: Mapping[str, Tensor]) -> int:
    return sum(delta.nbytes for delta in deltas.values())
