"""The judge of this module says whether a picture shows the background and the accessory that its prompt names.

The judge of `pixrl toy verify flux` is a small network that learns on the spot, from a seed and from drawings of
training subjects alone: never from the held-out subjects, never from a generator's pictures. It looks for accessories
everywhere, since where they sit depends on the kind. Some of its lessons are decoded from roughened latents, and most
are blurred or noisy, so that it also reads pictures that are less crisp than drawings.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from pixrl.models.latents import decode_latents
from pixrl.toy.pictures import drawn
from pixrl.toy.random_scenes import subject_scene, training_subject
from pixrl.toy.scene import Scene
from pixrl.toy.vocabulary import ACCESSORIES, BACKGROUNDS

CHUNK = 32
"""Pictures that go through a network at once."""
ROUGHNESS = 0.5
"""The strongest noise on the latents of decoded lessons, in their standard deviations."""
BLURRED_SHARE = 0.6
"""Of lessons: how many are blurred at all."""
NOISE = 0.06
"""The strongest noise on lessons, of pixels from 0 to 1."""
ADDED_SHARE = 0.8
"""Of lessons: how many wear an accessory besides their subject's own."""


@dataclass(frozen=True)
class JudgeLessons:
    """The lessons say how much the judge learns from: drawings, how many of them decoded, and training steps."""

    drawings: int = 4000
    decoded: int = 800
    steps: int = 600
    batch: int = 48
    lr: float = 4e-3


FULL = JudgeLessons()
QUICK = JudgeLessons(drawings=3000, decoded=400, steps=400, batch=32)


class SceneJudge:
    """A scene judge reads the background and the accessories off pictures [B, 3, 128, 128] in [0, 1]."""

    def __init__(self, network: "_Network") -> None:
        self.network = network

    @classmethod
    def fit(cls, vae: AutoencoderKL, seed: int = 0, lessons: JudgeLessons = FULL) -> "SceneJudge":
        """Return a judge that has learned from drawings of training subjects; the seed fixes everything about it."""
        noise = torch.Generator().manual_seed(seed)
        scenes = []
        for index in range(lessons.drawings):
            # Most subjects wear something, since accessories are what is hard to read.
            rng = np.random.default_rng((seed, 7, index))
            scenes.append(subject_scene(training_subject(rng), rng, added_accessory=ADDED_SHARE))
        images = drawn(scenes)
        images[: lessons.decoded] = reconstruct(vae, images[: lessons.decoded], ROUGHNESS, noise)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            network = _Network()
        # What counts as worn is what the picture shows, whether or not a caption mentions it.
        worn = torch.tensor([[name in s.objects[0].worn for name in ACCESSORIES] for s in scenes])
        _train(network, images, _backgrounds(scenes), worn, lessons, noise)
        return cls(network.eval())

    @torch.inference_mode()
    def reads(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the index of each picture's background [B], and which accessories each picture shows [B, 4]."""
        read = [self.network(part) for part in images.split(CHUNK)]
        return torch.cat([b for b, _ in read]).argmax(-1), torch.cat([a for _, a in read]) > 0

    def right(self, images: Tensor, scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
        """Return whether each picture shows its scene's background, and the accessory that captions name: [B] each."""
        background, shown = self.reads(images)
        asked = torch.tensor([[name == s.objects[0].accessory for name in ACCESSORIES] for s in scenes])
        return background == _backgrounds(scenes), (shown | ~asked).all(-1)

    def follows(self, images: Tensor, scenes: Sequence[Scene]) -> Tensor:
        """Return whether each picture shows both the background and the accessory that its caption mentions [B]."""
        background, accessory = self.right(images, scenes)
        return background & accessory


class _Network(nn.Module):
    """Four convolutions; accessories are read where they are seen most clearly, the background off a 4 x 4 grid."""

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

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the backgrounds [B, 6] and of the accessories [B, 4]."""
        seen = self.body((images * 4 - 2).contiguous(memory_format=torch.channels_last))
        background: Tensor = self.background(F.adaptive_avg_pool2d(seen, 4).flatten(1))
        accessories: Tensor = self.accessories(seen).amax((-2, -1))
        return background, accessories


def _layer(inputs: int, outputs: int, side: int, stride: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, side, stride, padding=side // 2, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU()


def _train(
    network: _Network,
    images: Tensor,
    backgrounds: Tensor,
    worn: Tensor,
    lessons: JudgeLessons,
    noise: torch.Generator,
) -> None:
    """AdamW with one rise and fall of its rate; accessories weigh more, since they are the harder part."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=lessons.lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lessons.lr, total_steps=lessons.steps, pct_start=0.2
    )
    for _ in range(lessons.steps):
        rows = torch.randint(len(images), (lessons.batch,), generator=noise)
        crisp = images[rows]
        # Most of the pictures up to as blurred as at half the resolution, half of them slightly noisy.
        half = F.interpolate(crisp, scale_factor=0.5, mode="bilinear", antialias=True)
        blurred = F.interpolate(half, size=crisp.shape[-2:], mode="bilinear")
        blur, strength, noisy = torch.rand(3, len(crisp), 1, 1, 1, generator=noise)
        blur = (blur - (1 - BLURRED_SHARE)).clamp(min=0) / BLURRED_SHARE
        grain = torch.randn(crisp.shape, generator=noise) * NOISE * strength * (noisy < 0.5)
        background, accessories = network(torch.lerp(crisp, blurred, blur) + grain)
        loss = F.cross_entropy(background, backgrounds[rows])
        loss = loss + 4 * F.binary_cross_entropy_with_logits(accessories, worn[rows].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.inference_mode()
def reconstruct(
    vae: AutoencoderKL, images: Tensor, roughness: float = 0.0, noise: torch.Generator | None = None
) -> Tensor:
    """Return pictures [B, 3, H, W] in [0, 1] after they were encoded and decoded by the autoencoder.

    The latents get noise of up to `roughness` of their standard deviation in between, drawn from `noise`.
    """
    out = []
    for part in images.split(CHUNK):
        latents = vae.encode(part * 2 - 1).latent_dist.mean
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        if roughness:
            strength = roughness * torch.rand(len(part), 1, 1, 1, generator=noise)
            latents = latents + strength * torch.randn(latents.shape, generator=noise)
        out.append(decode_latents(vae, latents))
    return torch.cat(out)


def _backgrounds(scenes: Sequence[Scene]) -> Tensor:
    """The index of each scene's background [B]."""
    return torch.tensor([BACKGROUNDS.index(scene.background) for scene in scenes])
