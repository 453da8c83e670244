"""Style features by CSD: OpenAI's CLIP picture tower with a projection that was trained to tell styles apart.

Somepalli et al. 2024 (Measuring Style Similarity in Diffusion Models); `tomg-group-umd/CSD-ViT-L`, MIT. Two files hold
it: the training checkpoint, whose names begin with `module.`, and the hub's. Both keep the tower under OpenAI's names
(`backbone.`) and the style projection as `last_layer_style`; the content projection is not read.
"""

import re
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pixrl.device import choose_device, choose_precision, quiet_loading
from pixrl.errors import CheckpointError
from pixrl.rewards.encoders import to_transformers
from pixrl.rewards.preprocess import OPENAI_MEAN, OPENAI_STD, Preprocessing, batches, require_images
from pixrl.rewards.weights import build, origin, published_folder, read_weights, weight_shards

BATCH = 64
HEAD_WIDTH = 64
"""The width of an attention head in OpenAI's CLIP: a tower of width W has W / 64 heads."""
TOWER, STYLE = "backbone.", "last_layer_style"
FILES = ("*.safetensors", "*.bin", "*.pth", "*.json")
SUFFIXES = (".bin", ".pt", ".pth", ".safetensors")
LICENCE = "MIT"


class StyleEncoder:
    """CSD's style encoder, from a file of its weights, a folder, or a hub id.

    Raises:
        CheckpointError: the weights are missing, cut short, or not CSD's.
    """

    def __init__(
        self, ref: str | Path, *, device: str = "auto", dtype: str = "float32", batch: int = BATCH
    ) -> None:
        self.name = str(ref)
        self.device = choose_device(device)
        self.precision = choose_precision(self.device, dtype)
        self.batch = batch
        named = Path(self.name).expanduser()
        is_file = named.suffix in SUFFIXES
        folder = named.parent if is_file else published_folder(ref, FILES)
        files = [named] if is_file else weight_shards(folder)
        if not all(file.is_file() for file in files):
            raise CheckpointError(
                f"There is no file {self.name!r}. Give CSD's weights, their folder, or a hub id."
            )
        weights = {name.removeprefix("module."): x for name, x in read_weights(files).items()}
        if STYLE not in weights or f"{TOWER}conv1.weight" not in weights:
            raise CheckpointError(
                f"{files[0]} is not CSD's: it has no {STYLE} beside a {TOWER.rstrip('.')}. Its first tensors are "
                f"{', '.join(list(weights)[:3])}. The published weights are tomg-group-umd/CSD-ViT-L."
            )
        tower = {
            f"visual.{name.removeprefix(TOWER)}": x for name, x in weights.items() if name.startswith(TOWER)
        }
        # no config is published: the tower's sizes are read off its tensors
        width, _, _, patch = tower["visual.conv1.weight"].shape
        found = [re.match(r"visual\.transformer\.resblocks\.(\d+)\.", name) for name in tower]
        with quiet_loading():
            from transformers import CLIPVisionConfig, CLIPVisionModel

            config = CLIPVisionConfig(
                hidden_size=width,
                intermediate_size=len(tower["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
                num_hidden_layers=1 + max(int(match[1]) for match in found if match),
                num_attention_heads=width // HEAD_WIDTH,
                image_size=patch * isqrt(len(tower["visual.positional_embedding"]) - 1),
                patch_size=patch,
                hidden_act="quick_gelu",
            )
            tensors = to_transformers(tower, files[0])
            model: Any = build(CLIPVisionModel, config, tensors, self.precision.weights, files[0])
        self.model = model.to(self.device)
        self.projection = weights[STYLE].float().to(self.device)
        side = int(self.model.config.image_size)
        self.preprocess = Preprocessing(side, None, (side, side), OPENAI_MEAN, OPENAI_STD, "bicubic")
        self.provenance: Mapping[str, str] = {
            **origin(ref, folder, files, LICENCE),
            "preprocessing": self.preprocess.describe(),
        }

    @torch.inference_mode()
    def image_features(self, images_BCHW: Tensor) -> Tensor:
        """Return unit vectors [B, E], float32 on the CPU."""
        require_images(images_BCHW)
        parts = batches(images_BCHW, self.batch)
        return torch.cat([self.embed(self.preprocess(part.to(self.device))).cpu() for part in parts])

    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the unit vectors [B, E] of preprocessed pictures, on the device and differentiable."""
        with self.precision.context(self.device):
            output = self.model(pixel_values=pixels_BCHW.to(self.precision.weights))
        return F.normalize(output.pooler_output.float() @ self.projection, dim=-1)
