"""The judge of this module says whether a picture shows the background and the accessory that its prompt names.

`pixrl toy verify flux` asks it. It has learned from drawings of training subjects alone (`toy_build/judge.py`): never
from the held-out subjects, never from a generator's pictures. It looks for accessories everywhere, since where they sit
depends on the kind.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from pixrl.toy.scene import Scene
from pixrl.toy.vocabulary import ACCESSORIES, BACKGROUNDS

CHUNK = 32
"""Pictures that go through the network at once."""
WEIGHTS = "model.safetensors"


class SceneJudge(nn.Module):
    """A scene judge reads the background and the accessories off pictures [B, 3, 128, 128] in [0, 1].

    Accessories are read where they are seen most clearly, the background off a grid of 4 x 4.
    """

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_layer(3, width // 2, side=5, stride=2),
            *_layer(width // 2, width, side=3, stride=2),
            *_layer(width, width, side=3, stride=1),
            *_layer(width, width, side=3, stride=1),
        )
        self.accessories = nn.Conv2d(width, len(ACCESSORIES), 1)
        self.background = nn.Linear(width * 16, len(BACKGROUNDS))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @classmethod
    def load(cls, folder: Path) -> "SceneJudge":
        """Return the judge whose weights are in the folder."""
        judge = cls()
        judge.load_state_dict(load_file(folder / WEIGHTS))
        return judge.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of the backgrounds [B, 6] and of the accessories [B, 4]."""
        seen = self.body((images * 4 - 2).contiguous(memory_format=torch.channels_last))
        background: Tensor = self.background(F.adaptive_avg_pool2d(seen, 4).flatten(1))
        accessories: Tensor = self.accessories(seen).amax((-2, -1))
        return background, accessories

    @torch.inference_mode()
    def reads(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the index of each picture's background [B], and which accessories each picture shows [B, 4]."""
        read = [self(part) for part in images.split(CHUNK)]
        return torch.cat([b for b, _ in read]).argmax(-1), torch.cat([a for _, a in read]) > 0

    def right(self, images: Tensor, scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
        """Return whether each picture shows its scene's background, and the accessory that captions name: [B] each."""
        background, shown = self.reads(images)
        asked = torch.tensor([[name == s.objects[0].accessory for name in ACCESSORIES] for s in scenes])
        return background == backgrounds(scenes), (shown | ~asked).all(-1)

    def follows(self, images: Tensor, scenes: Sequence[Scene]) -> Tensor:
        """Return whether each picture shows both the background and the accessory that its caption mentions [B]."""
        background, accessory = self.right(images, scenes)
        return background & accessory


def backgrounds(scenes: Sequence[Scene]) -> Tensor:
    """Return the index of each scene's background [B]."""
    return torch.tensor([BACKGROUNDS.index(scene.background) for scene in scenes])


def _layer(inputs: int, outputs: int, side: int, stride: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, side, stride, padding=side // 2, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU()
