"""CLIP similarities: picture to picture, picture to text, and RMLer's similarity of masked objects.

Each is the plain cosine of projected embeddings, without logit scale or softmax, normalized and multiplied in float32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from pixrl.errors import ConfigError, InputError, ShapeError
from pixrl.rewards.base import DifferentiableReward, Options, Read
from pixrl.rewards.encoders import ClipSimilarity, PictureEncoder
from pixrl.rewards.references import ReferenceReward, References, choice
from pixrl.rewards.segmentation import WHITE, Colour, Foreground, MaskFunction
from pixrl.rewards.weights import part
from pixrl.types import RewardBatch, Scores

DREAMBENCH_CLIP = "openai/clip-vit-base-patch32"
"""The encoder of DreamBench's published figures and of Customized-GRPO's."""
A_CLIP = Read(kinds=("clip",))
PROMPT = "{prompt}"
"""What stands for a sample's prompt in a template."""


@dataclass(frozen=True)
class Similarities:
    """The similarities of pictures to N concepts; nan with a reason where there is none."""

    similarities_BN: Tensor
    reasons: tuple[str | None, ...]
    provenance: Mapping[str, str] = field(default_factory=dict)


class FusionScorer:
    """RMLer's similarity S_n: the cosine between the masked picture and the masked exemplars of concept n.

    Both are cut out by the same foreground model and put on the same background before CLIP sees them.
    """

    def __init__(self, clip: PictureEncoder, foreground: Foreground, background: Colour = WHITE) -> None:
        self.clip = clip
        self.foreground = foreground
        self.background = background
        self.provenance: Mapping[str, str] = {
            **clip.provenance,
            **part("foreground", foreground.provenance),
            "background": str(tuple(background)),
        }

    def exemplar_features(self, images_MCHW: Tensor) -> Tensor:
        """Return unit vectors [M, E]; a row is nan where the exemplar has no foreground."""
        features, found = self._masked_features(images_MCHW)
        return torch.where(found[:, None], features, torch.nan)

    def similarities(self, images_BCHW: Tensor, exemplars: Sequence[Tensor]) -> Similarities:
        """Return mean cosines [B, N] over each concept's usable exemplars; nan where a picture has no foreground.

        Args:
            images_BCHW: float [B, 3, H, W] in [0, 1].
            exemplars: for each concept, what `exemplar_features` gave [M_n, E].

        Raises:
            ShapeError: a concept's exemplars are not [M, E], or there are none.
            InputError: none of a concept's exemplars has a foreground.
        """
        means = []
        for concept, rows_ME in enumerate(exemplars):
            if rows_ME.ndim != 2 or not len(rows_ME):
                raise ShapeError(
                    f"Exemplars of concept {concept} must be [M, E] with M >= 1, got {list(rows_ME.shape)}."
                )
            kept = rows_ME[rows_ME.isfinite().all(dim=1)]
            if not len(kept):
                raise InputError(
                    f"None of the {len(rows_ME)} exemplars of concept {concept} has a foreground. "
                    "Draw them with other seeds."
                )
            # the mean of cosines is the cosine with the mean of unit vectors, not renormalized
            means.append(kept.mean(dim=0))
        features, found = self._masked_features(images_BCHW)
        means_NE = torch.stack(means)
        similarities_BN = torch.where(found[:, None], features @ means_NE.T, torch.nan)
        reasons = tuple(None if ok else "no foreground found" for ok in found.tolist())
        return Similarities(similarities_BN, reasons, self.provenance)

    def _masked_features(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        masks = self.foreground.masks(images_BCHW)
        composed = self.foreground.composite(images_BCHW, masks, self.background)
        return self.clip.image_features(composed), self.foreground.is_present(masks)


class PromptCosineReward(DifferentiableReward):
    """The cosine between the picture and its prompt, times a factor; the base of the CLIPs below, PickScore and HPSv2.

    Args:
        clip: the encoder.
        factor: what the cosine is multiplied by.
        clamp: whether a cosine below 0 counts as 0.
        template: the text that the picture is compared with, in which {prompt} stands for the prompt.
        provenance: further entries beside the encoder's.
    """

    def __init__(
        self,
        clip: ClipSimilarity,
        *,
        factor: float = 1.0,
        clamp: bool = False,
        template: str = PROMPT,
        provenance: Mapping[str, str] | None = None,
    ) -> None:
        self.clip = clip
        self.factor = factor
        self.clamp = clamp
        self.template = template
        self.provenance: Mapping[str, str] = {**clip.provenance, **(provenance or {})}

    def score(self, batch: RewardBatch) -> Scores:
        scores_B = self._scores(self.clip.image_features(batch.images_BCHW), batch.prompts)
        return Scores.checked(scores_B, [None] * len(scores_B), self.provenance)

    def differentiable_scores(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]] = ()
    ) -> Tensor:
        scores_B = self._scores(self.clip.differentiable_features(images_BCHW), prompts)
        return scores_B.to(images_BCHW.device)

    def _scores(self, images_BE: Tensor, prompts: Sequence[str]) -> Tensor:
        # cloned: autograd cannot keep a tensor of inference mode
        texts = [self.template.replace(PROMPT, prompt) for prompt in prompts]
        texts_BE = self.clip.text_features(texts).clone().to(images_BE.device)
        cosines_B = (images_BE * texts_BE).sum(dim=1)
        return self.factor * (cosines_B.clamp_min(0) if self.clamp else cosines_B)


class ClipTextReward(PromptCosineReward):
    """The cosine between the picture and its prompt, or a text made of it.

    Args:
        model: `toy:clip`, a folder or a hub id of a CLIPModel.
        clamp: whether a cosine below 0 counts as 0, as Customized-GRPO's evaluation has it.
        template: the text that the picture is compared with: "{prompt} in the snow" teaches a model that draws anything
            to draw it there.

    Raises:
        ConfigError: the template does not hold {prompt}.
        CheckpointError: the checkpoint is missing, half written or not a CLIPModel.
    """

    name = "clip_text"
    examples: ClassVar[Mapping[str, object]] = {"model": "toy:clip"}

    def __init__(
        self,
        model: str | Path,
        clamp: bool = False,
        template: str = PROMPT,
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        if PROMPT not in template:
            raise ConfigError(
                f"The template of {self.name!r} needs {PROMPT}, which stands for a sample's prompt, got {template!r}. "
                f'Type, for example: template: "{PROMPT} in the snow"'
            )
        clip = ClipSimilarity(model, device=device, dtype=dtype)
        below = {"below_0": "counts as 0" if clamp else "kept"}
        asked = {} if template == PROMPT else {"template": template}
        super().__init__(clip, clamp=clamp, template=template, provenance=below | asked)

    @classmethod
    def reads(cls, options: Options) -> Mapping[str, Read]:
        return {"model": A_CLIP}


class ClipImageReward(ReferenceReward):
    """The mean cosine between the picture and its references, metadata["reference"] (see `rewards.references`).

    Args:
        model: `toy:clip`, a folder or a hub id of a CLIPModel.
        segmenter: with it, picture and references are cut out and put on `background` first; a checkpoint, or a
            function [B, 3, H, W] -> masks [B, H, W]. No gradient passes through its masks.
        background: what surrounds a cut-out picture.
        references: `all` (the mean over them) or `first` (that one alone).

    Raises:
        ConfigError: an unknown choice of references.
        CheckpointError: a checkpoint is missing, half written or of another class.
    """

    name = "clip_image"
    examples: ClassVar[Mapping[str, object]] = {"model": "toy:clip"}

    def __init__(
        self,
        model: str | Path,
        segmenter: str | Path | MaskFunction | None = None,
        background: Colour = WHITE,
        references: str = References.ALL,
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        which = choice(self.name, "references", references, References)
        super().__init__(ClipSimilarity(model, device=device, dtype=dtype), which)
        self.background = background
        self._foreground = None if segmenter is None else Foreground(segmenter, device=device)
        cut_out = {} if self._foreground is None else part("segmenter", self._foreground.provenance)
        self.provenance = {
            **self.encoder.provenance,
            **cut_out,
            "background": str(tuple(background)) if cut_out else "kept",
            "references": self.references.value,
        }

    @classmethod
    def reads(cls, options: Options) -> Mapping[str, Read]:
        return {"model": A_CLIP, "segmenter": Read()}

    def cuts_out(self, of_reference: bool) -> bool:
        return self._foreground is not None

    def _masks(self, images_BCHW: Tensor, kinds: Sequence[object]) -> Tensor:
        assert self._foreground is not None
        return self._foreground.masks(images_BCHW)


class ClipIReward(ClipImageReward):
    """DreamBench's CLIP-I (Ruiz et al. 2023): `clip_image` of whole pictures with DreamBench's encoder.

    The mean cosine between a picture and all real pictures of its subject. Customized-GRPO compares with one picture of
    each subject (`references: first`).
    """

    name = "clip_i"

    def __init__(
        self,
        model: str | Path = DREAMBENCH_CLIP,
        references: str = References.ALL,
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        super().__init__(model, references=references, device=device, dtype=dtype)

    @classmethod
    def reads(cls, options: Options) -> Mapping[str, Read]:
        return {"model": A_CLIP}


class ClipTReward(ClipTextReward):
    """DreamBench's CLIP-T (Ruiz et al. 2023): `clip_text` with DreamBench's encoder.

    Customized-GRPO counts a negative cosine as 0 (`clamp: true`; real pictures have none). With ViT-L/14 it is about
    0.05 lower than with ViT-B/32, so a figure without its encoder says little: the provenance names it.
    """

    name = "clip_t"

    def __init__(
        self,
        model: str | Path = DREAMBENCH_CLIP,
        clamp: bool = False,
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        super().__init__(model, clamp=clamp, device=device, dtype=dtype)
