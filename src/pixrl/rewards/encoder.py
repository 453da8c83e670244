"""What every picture encoder does alike: batches of preprocessed pictures to unit vectors, with or without a graph."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from pixrl.device import Precision
from pixrl.rewards.preprocess import InputPreprocessing, batches, require_images


class PictureEncoder(ABC):
    """A frozen model whose output, as a unit vector, stands for a picture. Normalized in float32."""

    device: torch.device
    precision: Precision
    batch: int
    preprocess: InputPreprocessing
    provenance: Mapping[str, str]

    @abstractmethod
    def _output(self, pixels_BCHW: Tensor) -> Tensor:
        """What the model says of preprocessed pictures, [B, E]."""

    @torch.inference_mode()
    def image_features(self, images_BCHW: Tensor) -> Tensor:
        """Unit vectors [B, E], float32 on the CPU."""
        require_images(images_BCHW)
        parts = batches(images_BCHW, self.batch)
        return torch.cat([self.embed(self.preprocess(part.to(self.device))).cpu() for part in parts])

    def differentiable_features(self, images_BCHW: Tensor) -> Tensor:
        """Unit vectors [B, E], float32 on the device, with a graph back to the pictures."""
        require_images(images_BCHW)
        parts = batches(images_BCHW, self.batch)
        return torch.cat([self.embed(self.preprocess.differentiable(part.to(self.device))) for part in parts])

    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        """Unit vectors of preprocessed pictures, on the device and differentiable."""
        with self.precision.context(self.device):
            output = self._output(pixels_BCHW.to(self.precision.weights))
        return F.normalize(output.float(), dim=-1)
