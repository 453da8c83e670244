"""Rewards of DINO features: the class token of a DINOv2 (or DINO v1) encoder, as unit vectors.

Every number depends on the preprocessing. `dreambench` is the transform of published DINO figures; `checkpoint` is
that of the folder's preprocessor_config.json, which for facebook/dino-vits16 is another one.

`dino_seg` is Customized-GRPO's identity reward: the cosine of the subject's features in the generated picture and in
its references, the subject cut out of both.
  1. The paper's code cuts out the reference alone, offline; here `mask: both` is the default, as the paper says.
  2. Its scores are 100 x the cosine; ours are the cosine, which group normalization makes the same.
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from pixrl.errors import ConfigError, did_you_mean
from pixrl.rewards.base import Options, Read
from pixrl.rewards.encoders import DinoEncoder, Transform
from pixrl.rewards.references import ReferenceReward, References, choice
from pixrl.rewards.segmentation import WHITE, Colour, Foreground, MaskFunction, Segmenter, load_back_end
from pixrl.rewards.weights import part

DREAMBENCH_DINO = "facebook/dino-vits16"
"""The encoder of DreamBench's published DINO figures."""


class Mask(StrEnum):
    """The pictures in which the subject is cut out and put on the background."""

    BOTH = "both"
    REFERENCE = "reference"
    NONE = "none"


class Region(StrEnum):
    """The part of a picture that is cut out."""

    FOREGROUND = "foreground"
    """All pixels that are not background."""
    CLASS = "class"
    """The pixels of metadata["class"], one of the segmenter's classes; for several subjects in a picture.

    A subject that the segmenter takes for another class is not found: with the toy one, about one in ten pictures.
    """


class DinoSegReward(ReferenceReward):
    """The mean cosine in [-1, 1] of DINO class tokens between the generated subject and its references.

    The references are in metadata["reference"]: [3, H, W], [M, 3, H, W] or a list of pictures of any sizes. Masks of
    the user's own, in metadata["mask"], cut the subject out of them in place of the segmenter. What fails, and that a
    reference without a subject is left out of the mean, is as in `ReferenceReward`.

    Args:
        model: `toy:identity`, a folder or a hub id (facebook/dinov2-large in the paper).
        segmenter: a semantic segmentation or BiRefNet checkpoint, or a function [B, 3, H, W] -> masks [B, H, W]. No
            gradient passes through its masks.
        mask: see `Mask`; `none` compares whole pictures and takes no segmenter.
        region: see `Region`.
        references: `all` (the mean over them) or `first` (that one alone).
        transform: see `Transform`.
        background: what surrounds a cut-out subject; white where it is not given.
        subject: which of several subjects in a picture is judged, from 0: class and reference then come from
            metadata["subjects"][subject]. One reward a subject; use region class.

    Raises:
        ConfigError: an unknown choice, or options that contradict each other.
        CheckpointError: a checkpoint is missing, half written or of another class.
    """

    name = "dino_seg"
    examples: ClassVar[Mapping[str, object]] = {"model": "toy:identity"}

    def __init__(
        self,
        model: str | Path,
        segmenter: str | Path | MaskFunction | None = None,
        mask: str = Mask.BOTH,
        region: str = Region.FOREGROUND,
        references: str = References.ALL,
        background: Colour | None = None,
        subject: int | None = None,
        transform: str = Transform.CHECKPOINT,
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        if subject is not None and subject < 0:
            raise ConfigError(f"dino_seg: subject counts from 0, got {subject}.")
        self.subject = subject
        self.mask = choice(self.name, "mask", mask, Mask)
        self.region = choice(self.name, "region", region, Region)
        which = choice(self.name, "references", references, References)
        _check_options(self.mask, self.region, segmenter, background)
        if subject is not None and self.mask is not Mask.NONE and self.region is not Region.CLASS:
            raise ConfigError(
                "dino_seg: subject is one of several in a picture, and region foreground would cut out all of them "
                "together. Take region: class"
            )
        chosen = choice(self.name, "transform", transform, Transform)
        super().__init__(DinoEncoder(model, device=device, dtype=dtype, transform=chosen), which)
        self.background: Colour = WHITE if background is None else background
        self.provenance = {
            **self.encoder.provenance,
            "mask": self.mask.value,
            "references": self.references.value,
            **({} if subject is None else {"subject": str(subject)}),
        }
        if segmenter is not None:
            loaded = load_back_end(segmenter, device=device)
            self._segmenter = loaded if isinstance(loaded, Segmenter) else None
            if self.region is Region.CLASS and self._segmenter is None:
                raise ConfigError(f"dino_seg: {segmenter} knows no classes. Take region: foreground")
            self._foreground = Foreground(loaded)
            self.provenance = {
                **self.provenance,
                **part("segmenter", self._foreground.provenance),
                "region": self.region.value,
                "background": str(tuple(self.background)),
            }

    @classmethod
    def reads(cls, options: Options) -> Mapping[str, Read]:
        return {"model": Read(), "segmenter": Read()}

    def cuts_out(self, of_reference: bool) -> bool:
        return self.mask is Mask.BOTH or (self.mask is Mask.REFERENCE and of_reference)

    def _masks(self, images_BCHW: Tensor, kinds: Sequence[object]) -> Tensor:
        assert self._foreground is not None
        if self.region is Region.FOREGROUND or self._segmenter is None:
            return self._foreground.masks(images_BCHW)
        return self._segmenter.class_masks(images_BCHW.float(), kinds).cpu()

    def _nothing(self, kind: object) -> str:
        return "no subject found" if self.region is Region.FOREGROUND else f"no {kind} found"

    def kind_problem(self, kind: object) -> str | None:
        if self.region is Region.FOREGROUND or self._segmenter is None:
            return None
        if not isinstance(kind, str):
            return "no class in the metadata"
        labels = self._segmenter.labels
        return None if kind in labels else f"the segmenter knows no {kind!r}.{did_you_mean(kind, labels)}"


def _check_options(mask: Mask, region: Region, segmenter: object, background: Colour | None) -> None:
    if mask is Mask.NONE:
        unused = {"segmenter": segmenter is not None, "background": background is not None}
        unused["region"] = region is not Region.FOREGROUND
        for option, given in unused.items():
            if given:
                raise ConfigError(
                    f"dino_seg: mask none compares whole pictures, so {option} would have no effect. Take it out."
                )
    elif segmenter is None:
        raise ConfigError(
            f"dino_seg: mask {mask} needs a segmenter, for example segmenter: toy:segmenter. "
            "To compare whole pictures: mask: none"
        )
    if region is Region.CLASS and not isinstance(segmenter, str | Path):
        raise ConfigError("dino_seg: region class needs a segmentation checkpoint, which knows classes.")


class DinoReward(DinoSegReward):
    """DreamBench's DINO (Ruiz et al. 2023): `dino_seg` of whole pictures with DreamBench's encoder and transform.

    The mean cosine between a picture and all real pictures of its subject; facebook/dinov2-base (or -large) gives the
    DINOv2 figure. Customized-GRPO compares with one picture of each subject (`references: first`).
    """

    name = "dino"

    def __init__(
        self,
        model: str | Path = DREAMBENCH_DINO,
        references: str = References.ALL,
        transform: str = Transform.DREAMBENCH,
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        super().__init__(
            model, mask=Mask.NONE, references=references, transform=transform, device=device, dtype=dtype
        )

    @classmethod
    def reads(cls, options: Options) -> Mapping[str, Read]:
        return {"model": Read()}
