"""Representation alignment: while it trains, a generator's middle features must say what is where in the clean picture.

After REPA (Yu et al. 2024, "Representation Alignment for Generation"): a small head reads the image tokens after a
middle block and predicts, for each token's 8 x 8 pixels, the features that `clip` gives the clean picture there and
the share of every kind in them. The head is thrown away after training.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from pixrl.toy.pictures import SIDE
from pixrl.toy.vocabulary import KINDS
from toy_build.first_edition.clip import WIDTH, normalize
from toy_build.first_edition.pictures import DrawnPictures
from toy_build.first_edition.workshop import Workshop

PATCH = 8
CLASSES = len(KINDS) + 1
FEATURE_WEIGHT = 0.5
KIND_WEIGHT = 0.25


def clip_patches(shop: Workshop, data: DrawnPictures, name: str) -> Tensor:
    """What `clip`'s last layer sees of every patch of every picture, half precision: [N, 64, 128]."""
    model = CLIPVisionModelWithProjection.from_pretrained(shop.out / "clip", dtype=torch.float32).eval()
    model = model.to(shop.device)

    def make() -> dict[str, Tensor]:
        out = []
        with torch.inference_mode(), shop.autocast():
            for start in range(0, len(data), 256):
                images = data.tensor(range(start, min(start + 256, len(data)))).to(shop.device)
                states = model(pixel_values=normalize(images), output_hidden_states=True).hidden_states
                out.append(states[-2][:, 1:].half().cpu())
        return {"patches": torch.cat(out)}

    return shop.cached(f"{name}-patches", model, make)["patches"]


def kind_shares(labels: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]") -> Tensor:
    """Label maps [B, 64, 64] as the share of each class in every patch, [B, 64, 25]."""
    n = SIDE // PATCH
    blocks = torch.from_numpy(np.array(labels)).long().view(-1, n, PATCH, n, PATCH)
    blocks = blocks.permute(0, 1, 3, 2, 4).reshape(-1, n * n, PATCH * PATCH)
    return F.one_hot(blocks, CLASSES).float().mean(dim=2)


class Aligned(nn.Module):
    """A transformer and the head that reads its tokens after one of its blocks."""

    def __init__(self, transformer: nn.Module, block: nn.Module, width: int) -> None:
        super().__init__()
        self.transformer = transformer
        self.head = nn.Sequential(
            nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, WIDTH + CLASSES)
        )
        self._tokens: Tensor | None = None
        block.register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: object, output: tuple[Tensor, Tensor]) -> None:
        self._tokens = output[1]

    def loss(self, patches: Tensor, shares: Tensor) -> Tensor:
        """Of the last forward pass, against the clean pictures' patch features and kinds."""
        assert self._tokens is not None
        tokens = self._tokens[:, : patches.shape[1]]
        predicted = self.head(tokens).float()
        far = 1 - F.cosine_similarity(predicted[..., :WIDTH], patches.float(), dim=-1).mean()
        wrong = F.cross_entropy(predicted[..., WIDTH:].flatten(0, 1), shares.flatten(0, 1))
        self._tokens = None
        return FEATURE_WEIGHT * far + KIND_WEIGHT * wrong
