"""DINO features of pictures: the class token of a DINOv2 (or DINO v1) encoder, as unit vectors.

Every number depends on how the picture is made ready. `dreambench` is the transform of published DINO figures;
`checkpoint` is what the folder's preprocessor_config.json says, which for facebook/dino-vits16 is another one.

`dino_seg` is Customized-GRPO's identity reward: the cosine of the subject's features in the generated picture and in
its references, the subject cut out of both.
  1. The paper's code cuts out the reference alone, offline; here `mask: both` is the default, as the paper says.
  2. Its scores are 100 x the cosine; ours are the cosine, which group normalization makes the same.
"""

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor

from pixrl.device import choose_device, choose_precision, quiet_loading
from pixrl.errors import CheckpointError, ConfigError, did_you_mean
from pixrl.hub import Layout, folder, read_json
from pixrl.rewards.base import DifferentiableReward
from pixrl.rewards.clip import flag_failures
from pixrl.rewards.encoder import PictureEncoder
from pixrl.rewards.preprocess import Preprocessing, require_images
from pixrl.rewards.references import (
    KEY,
    SUBJECTS,
    FeatureCache,
    References,
    choice,
    chosen,
    of_subject,
    references_of,
)
from pixrl.rewards.segmentation import WHITE, Colour, Foreground, MaskFunction, Segmenter, load_back_end
from pixrl.rewards.sources import describe
from pixrl.types import RewardBatch, Scores

BATCH = 64


Encode = Callable[[Tensor], Tensor]
"""Pictures [B, 3, H, W] to unit vectors [B, E]."""


class Transform(StrEnum):
    """How a picture is resized, cropped and normalized."""

    CHECKPOINT = "checkpoint"
    """As the checkpoint's preprocessor_config.json says."""
    DREAMBENCH = "dreambench"
    """`Preprocessing.dreambench`: of DINO v1 on DreamBench, and of DINOv2."""


class DinoEncoder(PictureEncoder):
    """A transformers Dinov2Model or ViTModel with its preprocessing, from `toy:identity`, a folder or a hub id.

    Raises:
        CheckpointError: the folder is missing, half written or of another class.
    """

    def __init__(
        self,
        ref: str | Path,
        *,
        device: str = "auto",
        dtype: str = "float32",
        batch: int = BATCH,
        transform: Transform = Transform.CHECKPOINT,
    ) -> None:
        path = folder(ref, Layout.TRANSFORMERS)
        self.name = str(ref)
        self.device = choose_device(device)
        self.precision = choose_precision(self.device, dtype)
        self.batch = batch
        if transform is Transform.DREAMBENCH:
            self.preprocess = Preprocessing.dreambench()
        else:
            self.preprocess = Preprocessing.from_folder(path, square=False)
        # DINO v1 was published without a pooler, and one with random weights would be made for it
        options = (
            {"add_pooling_layer": False} if read_json(path / "config.json").get("model_type") == "vit" else {}
        )
        with quiet_loading():
            from transformers import AutoModel

            try:
                model = AutoModel.from_pretrained(
                    path, dtype=self.precision.weights, local_files_only=True, **options
                )
            except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
                raise CheckpointError(f"{path} could not be loaded as a DINO encoder: {error}") from error
        self.model = model.requires_grad_(False).eval().to(self.device)
        self.provenance: Mapping[str, str] = {
            **describe(ref, path),
            "preprocessing": self.preprocess.describe(),
        }

    def _output(self, pixels_BCHW: Tensor) -> Tensor:
        states_BLD: Tensor = self.model(pixel_values=pixels_BCHW).last_hidden_state
        return states_BLD[:, 0]


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


class DinoSegReward(DifferentiableReward):
    """Mean cosine in [-1, 1] of DINO class tokens: the generated subject against its references.

    The references are in metadata["reference"]: [3, H, W], [M, 3, H, W] or a list of pictures of any sizes. A sample
    fails, with the reason, where it has no reference or where no subject is found in the picture or in any of its
    references; a reference without a subject is left out of the mean.

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
        self.references = choice(self.name, "references", references, References)
        _check_options(self.mask, self.region, segmenter, background)
        self.encoder = DinoEncoder(
            model, device=device, dtype=dtype, transform=choice(self.name, "transform", transform, Transform)
        )
        self.background: Colour = WHITE if background is None else background
        self.provenance: Mapping[str, str] = {
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
                "segmenter": self._foreground.provenance["model"],
                "segmenter_licence": self._foreground.provenance["licence"],
                "region": self.region.value,
                "background": str(tuple(self.background)),
            }
        self._cache = FeatureCache()

    @torch.no_grad()
    def score(self, batch: RewardBatch) -> Scores:
        values_B, reasons = self._judge(batch.images_BCHW, batch.metadata, self.encoder.image_features)
        return flag_failures(values_B, reasons, self.provenance)

    def differentiable_scores(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]] = ()
    ) -> Tensor:
        values_B, _ = self._judge(images_BCHW, metadata, self.encoder.differentiable_features)
        return values_B.to(images_BCHW.device)

    def _judge(
        self, images_BCHW: Tensor, metadata: Sequence[Mapping[str, object]], encode: Encode
    ) -> tuple[Tensor, list[str | None]]:
        """Scores [B], nan with a reason where there is none."""
        require_images(images_BCHW)
        entries = [of_subject(entry, self.subject) for entry in metadata or [{}] * len(images_BCHW)]
        kinds = [entry.get("class") for entry in entries]
        features_BE = self._features(images_BCHW, kinds, encode, cut_out=self.mask is Mask.BOTH)
        finite = images_BCHW.isfinite().flatten(1).all(dim=1).tolist()
        judged = [
            self._compare(feature_E, entry)
            if ok
            else (feature_E.new_tensor(torch.nan), "the picture is not finite")
            for entry, feature_E, ok in zip(entries, features_BE, finite, strict=True)
        ]
        return torch.stack([value for value, _ in judged]), [reason for _, reason in judged]

    def _compare(self, feature_E: Tensor, metadata: Mapping[str, object]) -> tuple[Tensor, str | None]:
        """One picture's score, or nan and the reason."""
        nothing = feature_E.new_tensor(torch.nan)
        pictures, kind = references_of(metadata), metadata.get("class")
        reason = self._unknown(kind) if pictures else self._no_reference()
        if reason is not None:
            return nothing, reason
        subject = "no subject found" if self.region is Region.FOREGROUND else f"no {kind} found"
        if not feature_E.isfinite().all():
            return nothing, f"{subject} in the picture"
        rows_ME = torch.cat([self._reference(picture, kind) for picture in chosen(pictures, self.references)])
        usable = rows_ME[rows_ME.isfinite().all(dim=1)]
        if not len(usable):
            return nothing, f"{subject} in the reference"
        return (usable.to(feature_E.device) @ feature_E).mean(), None

    def _no_reference(self) -> str:
        where = repr(KEY) if self.subject is None else f"{SUBJECTS!r}, number {self.subject}"
        return f"no reference picture in the metadata (under {where})"

    def _reference(self, image_BCHW: Tensor, kind: object) -> Tensor:
        """[1, E] of one reference, the same however it is batched."""
        cut_out = self.mask is not Mask.NONE
        return self._cache.get(
            image_BCHW,
            str(kind),
            lambda: self._features(image_BCHW, [kind], self.encoder.image_features, cut_out=cut_out),
        )

    def _features(self, images_BCHW: Tensor, kinds: list[object], encode: Encode, *, cut_out: bool) -> Tensor:
        """Unit vectors [B, E]; a row of nan where nothing was found to cut out."""
        if not cut_out:
            return encode(images_BCHW)
        # cloned: autograd cannot keep a tensor of inference mode
        masks_BHW = self._masks(images_BCHW.detach(), kinds).clone()
        composed = Foreground.composite(images_BCHW.float().cpu(), masks_BHW, self.background)
        features_BE = encode(composed)
        found_B = self._foreground.is_present(masks_BHW).to(features_BE.device)
        return torch.where(found_B[:, None], features_BE, torch.nan)

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
