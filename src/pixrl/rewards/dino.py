"""DINO features of pictures: the class token of a DINOv2 (or DINO v1) encoder, as unit vectors."""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pixrl.device import choose_device, choose_precision, quiet_loading
from pixrl.errors import CheckpointError
from pixrl.hub import Layout, fingerprint, folder
from pixrl.rewards.preprocess import Preprocessing

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
