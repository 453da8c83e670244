"""BiRefNet's foreground without remote code: ZhengPeng7/BiRefNet (MIT) and briaai/RMBG-2.0 (non-commercial).

Zheng et al. 2024 (Bilateral Reference for High-Resolution Dichotomous Image Segmentation). The network is in
`birefnet_model.py`; the sizes of its Swin backbone are read off the weights, so that large and lite checkpoints load.

The picture is scaled to 1024 x 1024 with ImageNet's statistics, whatever its ratio. The mask becomes 8-bit levels, as
the published code has them, and is scaled back bicubically.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from pixrl.device import choose_device, choose_precision, quiet_loading
from pixrl.errors import CheckpointError
from pixrl.hub import folder, read_card
from pixrl.hub_check import Layout, read_json
from pixrl.rewards.preprocess import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
    batches,
    require_images,
    resize_8_bit,
)
from pixrl.rewards.weights import describe, read_weights, weight_shards

ARCHITECTURE = "BiRefNet"
SIDE = 1024
"""The rows and columns that the network sees; a card's `resolution` overrides it."""
MULTIPLE = 32
"""The number that the network's side must be a multiple of."""
BATCH = 4


def is_birefnet(path: Path) -> bool:
    """Return whether a folder's config.json names BiRefNet, as RMBG-2.0's does too."""
    named = read_json(path / "config.json").get("architectures")
    return isinstance(named, list) and ARCHITECTURE in named


class BiRefNetForeground:
    """BiRefNet's foreground masks of pictures, from a folder or a hub id.

    Raises:
        CheckpointError: the folder is missing, half written, or holds other weights.
    """

    licences: ClassVar[Mapping[str, str]] = {
        "ZhengPeng7/BiRefNet": "MIT",
        "ZhengPeng7/BiRefNet_lite": "MIT",
    }

    def __init__(
        self, ref: str | Path, *, device: str = "auto", dtype: str = "float32", batch: int = BATCH
    ) -> None:
        from pixrl.rewards.zoo.birefnet_model import load

        path = folder(ref, Layout.REWARD)
        self.name = str(ref)
        self.device = choose_device(device)
        self.precision = choose_precision(self.device, dtype)
        self.batch = batch
        side = read_card(path).resolution or SIDE
        if side % MULTIPLE:
            raise CheckpointError(
                f"{path}: BiRefNet's resolution must be a multiple of {MULTIPLE}, got {side}."
            )
        self.preprocess = Preprocessing(None, (side, side), None, IMAGENET_MEAN, IMAGENET_STD, "bilinear")
        with quiet_loading():
            model = load(read_weights(weight_shards(path)), path)
        self.model = model.to(self.device, self.precision.weights)
        self.provenance: Mapping[str, str] = {
            **describe(ref, path, self.licences),
            "preprocessing": self.preprocess.describe(),
        }

    @torch.inference_mode()
    def foreground(self, images_BCHW: Tensor) -> Tensor:
        """Return P(foreground) [B, H, W] on 256 levels, float32 on the CPU."""
        require_images(images_BCHW)
        return torch.cat([self._masks(part).cpu() for part in batches(images_BCHW, self.batch)])

    def _masks(self, images_BCHW: Tensor) -> Tensor:
        pixels = self.preprocess(images_BCHW.to(self.device)).to(self.precision.weights)
        with self.precision.context(self.device):
            logits_B1HW = self.model(pixels)
        # the published code cuts off, it does not round
        levels: Tensor = (logits_B1HW.float().sigmoid() * 255).floor() / 255
        rows, columns = images_BCHW.shape[-2:]
        # PIL's order: columns first, 8 bits after each pass
        for size in ((levels.shape[-2], columns), (rows, columns)):
            if size != tuple(levels.shape[-2:]):
                levels = resize_8_bit(levels, size, "bicubic")
        return levels[:, 0]
