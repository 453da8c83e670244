"""What the three generators share: pictures as latents, alignment with what `clip` and the drawings know, and saving.

Representation alignment (REPA, Yu et al. 2024): while a generator trains, a small head reads the image tokens of a
middle layer and predicts, for each token's 16 x 16 pixels, what `clip` sees there in the clean picture and which parts
are there. The head is thrown away after training.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from pixrl.fusion.world import calibrate_presence, load_world
from pixrl.hub import CARD_FILE
from pixrl.toy.language import WORDS
from pixrl.toy.scene import PART_CLASSES, SIDE
from pixrl.toy.vocabulary import KINDS
from toy_build.clip import PATCH, WIDTH, normalize
from toy_build.pictures import Pictures
from toy_build.training import Build, Draw, kept_rows, save_half
from toy_build.vae import encode

GRID = SIDE // PATCH
"""Rows and columns of aligned tokens."""
FEATURE_WEIGHT, PART_WEIGHT = 0.5, 0.25
DROPPED_CAPTIONS = 0.08
"""Share of training pictures shown without their caption, so that the empty prompt means something."""


@dataclass(frozen=True)
class Latents:
    """A set of pictures as a generator learns from them: encoded when first asked for, and kept on disk beside them."""

    build: Build
    data: Pictures

    @cached_property
    def latents(self) -> Tensor:
        """Scaled latent means [N, 16, 16, 16], half precision."""
        vae = load_vae(self.build)
        return self._kept("latents", lambda rows: encode(self.build, vae, self.data.tensor(rows)))

    @cached_property
    def patches(self) -> Tensor:
        """What `clip` sees of every patch [N, 64, WIDTH], half precision."""
        clip = load_clip(self.build)
        return self._kept("patches", lambda rows: clip_patches(self.build, clip, self.data.tensor(rows)))

    def _kept(self, what: str, make: Callable[[range], Tensor]) -> Tensor:
        name = f"{self.data.what}-{self.data.seed}-{len(self.data)}-{what}.npy"
        return kept_rows(self.build.work / "encoded" / name, len(self.data), make)


def load_vae(build: Build) -> AutoencoderKL:
    """The shared autoencoder, frozen."""
    vae = AutoencoderKL.from_pretrained(build.out / "vae", torch_dtype=torch.float32).eval().to(build.device)
    return vae.requires_grad_(False)


def load_clip(build: Build) -> CLIPVisionModelWithProjection:
    """The vision tower of `clip`."""
    return (
        CLIPVisionModelWithProjection.from_pretrained(build.out / "clip", dtype=torch.float32)
        .eval()
        .to(build.device)
    )


@torch.inference_mode()
def clip_patches(build: Build, clip: CLIPVisionModelWithProjection, images: Tensor) -> Tensor:
    """What `clip`'s last layer but one sees of every patch of pictures [B, 3, 128, 128], [B, 64, WIDTH]."""
    with build.autocast():
        states = clip(
            pixel_values=normalize(images.to(build.device)), output_hidden_states=True
        ).hidden_states
    found: Tensor = states[-2][:, 1:].float().cpu()
    return found


def part_shares(classes: Tensor) -> Tensor:
    """Maps of part classes [B, 128, 128] as the share of each class in every patch [B, 64, PART_CLASSES]."""
    blocks = (
        classes.view(-1, GRID, PATCH, GRID, PATCH)
        .permute(0, 1, 3, 2, 4)
        .reshape(len(classes), GRID * GRID, -1)
    )
    shares = torch.zeros(len(classes), GRID * GRID, PART_CLASSES)
    return shares.scatter_add_(2, blocks, torch.full(blocks.shape, 1 / PATCH**2))


class Aligned(nn.Module):
    """A network and the head that reads the tokens that one of its layers gives out."""

    def __init__(self, network: nn.Module, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.network = network
        self.head = nn.Sequential(
            nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, WIDTH + PART_CLASSES)
        )
        self._tokens: Tensor | None = None
        self._hook = layer.register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: object, output: Any) -> None:
        self._tokens = output[1] if isinstance(output, tuple) else output

    def release(self) -> None:
        """Leave the network alone from now on."""
        self._hook.remove()

    def loss(self, patches: Tensor, shares: Tensor) -> Tensor:
        """Of the last forward pass, against the clean pictures' patch features and parts."""
        assert self._tokens is not None
        tokens = self._tokens.flatten(2).transpose(1, 2) if self._tokens.ndim == 4 else self._tokens
        predicted = self.head(tokens[:, : GRID * GRID]).float()
        far = 1 - F.cosine_similarity(predicted[..., :WIDTH], patches.float(), dim=-1).mean()
        wrong = F.cross_entropy(predicted[..., WIDTH:].flatten(0, 1), shares.flatten(0, 1))
        self._tokens = None
        return FEATURE_WEIGHT * far + PART_WEIGHT * wrong


def logit_normal(draw: Draw, batch: int) -> Tensor:
    """Noise levels [B], the middle ones most often (Esser et al. 2024)."""
    return torch.sigmoid(draw.normal(batch))


def dropped(captions: list[str], draw: Draw) -> list[str]:
    """The captions, a few of them empty."""
    return ["" if draw.rng.random() < DROPPED_CAPTIONS else text for text in captions]


def save_pipeline(
    pipeline: DiffusionPipeline, folder: Path, parts: dict[str, str | None], settings: dict[str, Any]
) -> None:
    """The published layout in half precision, and the settings that this checkpoint was trained for.

    `parts` are those with weights, and where among the checkpoints those lie that several pipelines share: a link leads
    there, so that they are stored once and plain `from_pretrained` works.
    """
    shutil.rmtree(folder, ignore_errors=True)  # or what is saved would go through an older build's links
    pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index.pop("_name_or_path", None)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for part, shared in parts.items():
        if shared is None:
            save_half(pipeline.components[part], folder / part)
        else:
            shutil.rmtree(folder / part)
            (folder / part).symlink_to(Path("..") / shared, target_is_directory=True)
    card = settings | {
        "resolution": SIDE,
        "vocabulary": list(WORDS),
        "clip": "toy:clip",
        "segmenter": "toy:segmenter",
        "parts": "toy:parts",
    }
    (folder / CARD_FILE).write_text(json.dumps(card, indent=1) + "\n")


def calibrate(build: Build, name: str) -> None:
    """Store the thresholds of `pixrl fuse` with the generator: they come from its own pictures of every kind."""
    world = load_world(*(str(build.out / part) for part in (name, "clip", "segmenter")))
    card = build.out / name / CARD_FILE
    settings = json.loads(card.read_text()) | {"presence": calibrate_presence(world, KINDS).to_card()}
    card.write_text(json.dumps(settings, indent=1) + "\n")
