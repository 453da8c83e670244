"""DINO features of pictures: the class token of a DINOv2 (or DINO v1) encoder, as unit vectors.

`dino_seg` is Customized-GRPO's identity reward: the cosine of the subject's features in the generated picture and in
its references, the subject cut out of both.
  1. The paper's code cuts out the reference alone, offline; here `mask: both` is the default, as the paper says.
  2. Its scores are 100 x the cosine; ours are the cosine, which group normalization makes the same.
"""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pixrl.device import choose_device, choose_precision, quiet_loading
from pixrl.errors import CheckpointError, ConfigError, did_you_mean
from pixrl.hub import Layout, fingerprint, folder
from pixrl.rewards.base import Reward
from pixrl.rewards.clip import flag_failures
from pixrl.rewards.preprocess import Preprocessing, require_images
from pixrl.rewards.references import KEY, SUBJECTS, FeatureCache, of_subject, references_of
from pixrl.rewards.segmentation import WHITE, Colour, Foreground, MaskFunction, Segmenter
from pixrl.types import RewardBatch, Scores

BATCH = 64


class DinoEncoder:
    """A transformers Dinov2Model or ViTModel with its preprocessing, from `toy:identity`, a folder or a hub id.

    Raises:
        CheckpointError: the folder is missing, half written or of another class.
    """

    def __init__(
        self, ref: str | Path, *, device: str = "auto", dtype: str = "float32", batch: int = BATCH
    ) -> None:
        path = folder(ref, Layout.TRANSFORMERS)
        self.name = str(ref)
        self.device = choose_device(device)
        self.precision = choose_precision(self.device, dtype)
        self.batch = batch
        self.preprocess = Preprocessing.from_folder(path, square=False)
        with quiet_loading():
            from transformers import AutoModel

            try:
                model = AutoModel.from_pretrained(path, dtype=self.precision.weights, local_files_only=True)
            except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
                raise CheckpointError(f"{path} could not be loaded as a DINO encoder: {error}") from error
        self.model = model.requires_grad_(False).eval().to(self.device)
        self.provenance: Mapping[str, str] = {
            "model": f"{self.name} ({fingerprint(path)})",
            "preprocessing": self.preprocess.describe(),
        }

    @torch.inference_mode()
    def image_features(self, images_BCHW: Tensor) -> Tensor:
        """Unit vectors [B, E], float32 on the CPU."""
        parts = images_BCHW.split(self.batch)
        return torch.cat([self.embed(self.preprocess(part.to(self.device))).cpu() for part in parts])

    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        """Unit vectors of preprocessed pictures, on the device and differentiable."""
        with self.precision.context(self.device):
            states = self.model(pixel_values=pixels_BCHW.to(self.precision.weights)).last_hidden_state
        return F.normalize(states[:, 0].float(), dim=-1)


class Mask(StrEnum):
    """Where the subject is cut out and put on the background."""

    BOTH = "both"
    REFERENCE = "reference"
    NONE = "none"


class Region(StrEnum):
    """What is cut out."""

    FOREGROUND = "foreground"
    """Everything that is not background."""
    CLASS = "class"
    """The pixels of metadata["class"], one of the segmenter's classes; for several subjects in a picture.

    A subject that the segmenter takes for another class is not found: with the toy one, about one in ten pictures.
    """


class References(StrEnum):
    """Which of a sample's references are compared: the mean over all, or the first alone."""

    ALL = "all"
    FIRST = "first"


class DinoSegReward(Reward):
    """Mean cosine in [-1, 1] of DINO class tokens: the generated subject against its references.

    The references are in metadata["reference"]: [3, H, W], [M, 3, H, W] or a list of pictures of any sizes. A sample
    fails, with the reason, where it has no reference or where no subject is found in the picture or in any of its
    references; a reference without a subject is left out of the mean.

    Args:
        model: `toy:identity`, a folder or a hub id (facebook/dinov2-large in the paper).
        segmenter: a semantic segmentation checkpoint, or a function [B, 3, H, W] -> masks [B, H, W].
        mask: see `Mask`; `none` compares whole pictures and takes no segmenter.
        region: see `Region`.
        references: see `References`.
        background: what surrounds a cut-out subject; white where it is not given.
        subject: which of several subjects in a picture is judged, from 0: class and reference then come from
            metadata["subjects"][subject]. One reward a subject; use region class.

    Raises:
        ConfigError: an unknown choice, or options that contradict each other.
        CheckpointError: a checkpoint is missing, half written or of another class.
    """

    name = "dino_seg"

    def __init__(
        self,
        model: str | Path,
        segmenter: str | Path | MaskFunction | None = None,
        mask: str = Mask.BOTH,
        region: str = Region.FOREGROUND,
        references: str = References.ALL,
        background: Colour | None = None,
        subject: int | None = None,
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        if subject is not None and subject < 0:
            raise ConfigError(f"dino_seg: subject counts from 0, got {subject}.")
        self.subject = subject
        self.mask, self.region = _choice("mask", mask, Mask), _choice("region", region, Region)
        self.references = _choice("references", references, References)
        _check_options(self.mask, self.region, segmenter, background)
        self.encoder = DinoEncoder(model, device=device, dtype=dtype)
        self.background: Colour = WHITE if background is None else background
        self.provenance: Mapping[str, str] = {
            **self.encoder.provenance,
            "mask": self.mask.value,
            "references": self.references.value,
            **({} if subject is None else {"subject": str(subject)}),
        }
        if segmenter is not None:
            loaded = Segmenter(segmenter, device=device) if isinstance(segmenter, str | Path) else segmenter
            self._segmenter = loaded if isinstance(loaded, Segmenter) else None
            self._foreground = Foreground(loaded)
            self.provenance = {
                **self.provenance,
                "segmenter": self._foreground.provenance["model"],
                "region": self.region.value,
                "background": str(tuple(self.background)),
            }
        self._cache = FeatureCache()

    def score(self, batch: RewardBatch) -> Scores:
        require_images(batch.images_BCHW)
        given = batch.metadata or [{}] * len(batch.images_BCHW)
        metadata = [of_subject(entry, self.subject) for entry in given]
        kinds = [entry.get("class") for entry in metadata]
        features_BE = self._features(batch.images_BCHW, kinds, cut_out=self.mask is Mask.BOTH)
        finite = batch.images_BCHW.isfinite().flatten(1).all(dim=1).tolist()
        values, reasons = [], []
        for entry, feature_E, ok in zip(metadata, features_BE, finite, strict=True):
            value, reason = (
                self._compare(feature_E, entry) if ok else (torch.nan, "the picture is not finite")
            )
            values.append(value)
            reasons.append(reason)
        return flag_failures(torch.tensor(values), reasons, self.provenance)

    def _compare(self, feature_E: Tensor, metadata: Mapping[str, object]) -> tuple[float, str | None]:
        pictures = references_of(metadata)
        if not pictures:
            where = repr(KEY) if self.subject is None else f"{SUBJECTS!r}, number {self.subject}"
            return torch.nan, f"no reference picture in the metadata (under {where})"
        kind = metadata.get("class")
        unknown = self._unknown(kind)
        if unknown:
            return torch.nan, unknown
        subject = "no subject found" if self.region is Region.FOREGROUND else f"no {kind} found"
        if not feature_E.isfinite().all():
            return torch.nan, f"{subject} in the picture"
        chosen = pictures[:1] if self.references is References.FIRST else pictures
        rows_ME = torch.cat([self._reference(picture, kind) for picture in chosen])
        usable = rows_ME[rows_ME.isfinite().all(dim=1)]
        if not len(usable):
            return torch.nan, f"{subject} in the reference"
        return float((usable @ feature_E).mean()), None

    def _reference(self, image_BCHW: Tensor, kind: object) -> Tensor:
        """[1, E] of one reference, the same however it is batched."""
        cut_out = self.mask is not Mask.NONE
        return self._cache.get(
            image_BCHW, str(kind), lambda: self._features(image_BCHW, [kind], cut_out=cut_out)
        )

    def _features(self, images_BCHW: Tensor, kinds: list[object], *, cut_out: bool) -> Tensor:
        """Unit vectors [B, E]; a row of nan where nothing was found to cut out."""
        if not cut_out:
            return self.encoder.image_features(images_BCHW)
        masks_BHW = self._masks(images_BCHW, kinds)
        composed = Foreground.composite(images_BCHW.float().cpu(), masks_BHW, self.background)
        found_B = self._foreground.is_present(masks_BHW)
        return torch.where(found_B[:, None], self.encoder.image_features(composed), torch.nan)

    def _masks(self, images_BCHW: Tensor, kinds: list[object]) -> Tensor:
        if self.region is Region.FOREGROUND or self._segmenter is None:
            return self._foreground.masks(images_BCHW)
        return self._segmenter.class_masks(images_BCHW.float(), kinds).cpu()

    def _unknown(self, kind: object) -> str | None:
        """Why the segmenter cannot look for that class, or None."""
        if self.region is Region.FOREGROUND or self._segmenter is None:
            return None
        if not isinstance(kind, str):
            return "no class in the metadata"
        labels = self._segmenter.labels
        return None if kind in labels else f"the segmenter knows no {kind!r}.{did_you_mean(kind, labels)}"


ChoiceT = TypeVar("ChoiceT", bound=StrEnum)


def _choice(option: str, given: str, choices: type[ChoiceT]) -> ChoiceT:
    if given not in list(choices):
        raise ConfigError(
            f"dino_seg: unknown {option} {given!r}.{did_you_mean(str(given), choices)} Use {', '.join(choices)}."
        )
    return choices(given)


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
