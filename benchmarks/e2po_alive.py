"""Are E2PO's perturbations semantically alive: does a variant change the picture, as a noise does or less?

    python benchmarks/e2po_alive.py --out /tmp/alive                 the grid below on toy:sd3
    python benchmarks/e2po_alive.py --out /tmp/alive --only 2 --prompts "a photo of two red cars"

For each setting of the grid every prompt's variants are learned and drawn from one noise; the same prompts are drawn
from as many noises without perturbation. Distances are means over pairs of pictures of one prompt: `pixels` is the mean
absolute difference, `clip` 1 - cosine of CLIP image features. Their ratio to the noises' distance says how much
exploration variants add; `fit` is the drop in CLIP's cosine of picture and prompt, what they cost.
`OUT/NN.png`: a row a prompt, variant 0 (the plain prompt) first; `OUT/noises.png`: the same prompts, noise by noise.
"""

import argparse
import json
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pixrl import models
from pixrl.algorithms.e2po import PerturbationSettings, PerturbedEmbeddings
from pixrl.algorithms.exploration import NoiseOnly, Variants
from pixrl.errors import InputError
from pixrl.models.pipeline import FlowPipelinePolicy, chunks
from pixrl.rewards.encoders import ClipSimilarity
from pixrl.types import sample_seed

PROMPTS = (
    "a photo of an owl",
    "a photo of two red cars",
    "a photo of a blue cat",
    "a photo of a green house",
    "a photo of a pig left of a lamp",
    "a photo of three snails",
)
REACHING = {"weighted": "anchor", "norm": "relative", "max_norm": 0.5}
"""The setting under which the toy's anchor cosine ends in its band."""
GRID: tuple[dict[str, Any], ...] = (
    {"weighted": "diversity", "norm": "absolute", "max_norm": 0.05},
    {"weighted": "diversity", "norm": "relative", "max_norm": 0.05},
    {"weighted": "diversity", "norm": "relative", "max_norm": 0.5},
    {"weighted": "anchor", "norm": "absolute", "max_norm": 0.05},
    REACHING,
    REACHING | {"max_norm": 1.0},
    REACHING | {"lr": 1e-2},
    REACHING | {"lr": 1e-4},
    REACHING | {"sigma_init": 1e-2},
    REACHING | {"max_norm": 0.1, "norm": "absolute"},
    REACHING | {"schedule": "static"},
    REACHING | {"perturbation_range": 0.8},
    REACHING | {"encoders": "both"},
    {"steps": 0, "sigma_init": 1e-2, "norm": "relative", "max_norm": 0.5},
)
PREPARE = ("anchor_cosine", "pairwise_cosine", "in_band_share", "delta_norm_share")


def draw(
    policy: FlowPipelinePolicy, variants: Variants, rows: Tensor, ks: Tensor, seeds: list[int]
) -> Tensor:
    """Euler pictures [B, 3, H, W]: prompt `rows[b]`, variant `ks[b]`, noise `seeds[b]`."""
    sigmas = policy.schedule(policy.settings.steps)
    pictures = []
    with torch.inference_mode():
        for part in chunks(len(seeds), policy.micro_batch):
            x = policy.initial_noise(seeds[part])
            for sigma, sigma_next in pairwise(sigmas.tolist()):
                condition = variants.at(min(sigma, 1.0), rows[part], ks[part])
                x = x + (sigma_next - sigma) * policy.velocity(x, torch.full((len(x),), sigma), condition)
            pictures.append(policy.decode(x).float().cpu())
    return torch.cat(pictures)


def distances(values_PKD: Tensor, cosine: bool) -> float:
    """Mean over prompts and pairs."""
    first, second = torch.triu_indices(values_PKD.shape[1], values_PKD.shape[1], offset=1)
    a, b = values_PKD[:, first], values_PKD[:, second]
    found = 1 - (a * b).sum(2) if cosine else (a - b).abs().mean(2)
    return found.mean().item()


class Measure:
    """One set of prompts on one model."""

    def __init__(self, model: str, clip: str, prompts: Sequence[str], count: int, seed: int) -> None:
        policy = models.load(model)
        if not isinstance(policy, FlowPipelinePolicy):
            raise InputError(f"{model} is not a flow model; give an SD3 or FLUX one.")
        self.policy, self.prompts, self.count = policy, list(prompts), count
        self.clip = ClipSimilarity(clip)
        self.rows = torch.arange(len(prompts)).repeat_interleave(count)
        self.ks = torch.arange(count).repeat(len(prompts))
        self.seeds = [[sample_seed(seed, 0, p, n) for n in range(count)] for p in range(len(prompts))]
        self.texts_PE = self.clip.text_features(self.prompts)
        plain = NoiseOnly().prepare(policy, self.prompts)
        everywhere = [one for own in self.seeds for one in own]
        self.noises = draw(policy, plain, self.rows, torch.zeros_like(self.ks), everywhere)
        self.reference = self.figures(self.noises)

    def figures(self, images_BCHW: Tensor) -> dict[str, float]:
        """Distances among each prompt's pictures, and how well they fit the prompt."""
        shape = (len(self.prompts), self.count, -1)
        features = self.clip.image_features(images_BCHW).view(shape)
        fit_PK = (features * self.texts_PE[:, None]).sum(2)
        return {
            "pixels": distances(images_BCHW.reshape(shape), cosine=False),
            "clip": distances(features, cosine=True),
            "fit": fit_PK[:, 1:].mean().item(),
            "fit_first": fit_PK[:, 0].mean().item(),
        }

    def run(self, given: dict[str, Any], seed: int) -> tuple[dict[str, float], Tensor]:
        """One setting's row and its pictures."""
        settings = PerturbationSettings(
            variants=self.count, seed=seed, prompts_at_once=len(self.prompts), **given
        )
        begun = time.process_time()
        variants = PerturbedEmbeddings(settings).prepare(self.policy, self.prompts)
        seconds = (time.process_time() - begun) / len(self.prompts)
        one_noise = [own[0] for own in self.seeds for _ in own]
        images = draw(self.policy, variants, self.rows, self.ks, one_noise)
        found = self.figures(images)
        row = {name: variants.metrics[name] for name in PREPARE} | {
            "pixels": found["pixels"],
            "pixels/noise": found["pixels"] / self.reference["pixels"],
            "clip": found["clip"],
            "clip/noise": found["clip"] / self.reference["clip"],
            "fit": found["fit"] - found["fit_first"],
            "cpu_s/prompt": seconds,
        }
        return row, images

    def sheet(self, images_BCHW: Tensor, path: Path) -> None:
        """A row a prompt."""
        _, channels, height, width = images_BCHW.shape
        grid = images_BCHW.view(len(self.prompts), self.count, channels, height, width)
        pixels = grid.permute(0, 3, 1, 4, 2).reshape(len(self.prompts) * height, self.count * width, channels)
        Image.fromarray((pixels * 255).round().byte().numpy()).save(path, optimize=True)


def line(number: str, row: dict[str, float], given: dict[str, Any]) -> str:
    cells = [f"{row[name]:.3f}" if name in row else "" for name in row]
    named = ", ".join(f"{name} {value}" for name, value in given.items())
    return " | ".join(["", number, named, *cells, ""]).strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for pictures and table.json")
    parser.add_argument("--model", default="toy:sd3")
    parser.add_argument("--clip", default="toy:clip", help="a CLIP that measures pictures")
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS))
    parser.add_argument("--variants", type=int, default=6, help="K, and the number of noises")
    parser.add_argument(
        "--only", type=int, nargs="+", default=list(range(len(GRID))), help="settings of the grid"
    )
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    measure = Measure(given.model, given.clip, given.prompts, given.variants, given.seed)
    measure.sheet(measure.noises, given.out / "noises.png")
    reference = measure.reference
    print(
        f"{given.model} ({measure.policy.fingerprint()}), {len(given.prompts)} prompts, {given.variants} variants; "
        f"between noises: pixels {reference['pixels']:.4f}, clip {reference['clip']:.4f}, fit {reference['fit']:.4f}",
        flush=True,
    )
    rows: list[dict[str, Any]] = []
    for number in given.only:
        row, images = measure.run(GRID[number], given.seed)
        if not rows:
            print(f"| # | setting | {' | '.join(row)} |\n|{'---|' * (len(row) + 2)}")
        print(line(str(number), row, GRID[number]), flush=True)
        measure.sheet(images, given.out / f"{number:02d}.png")
        rows.append({"number": number, "setting": GRID[number], **row})
    table = {"model": given.model, "prompts": given.prompts, "noises": reference, "rows": rows}
    (given.out / "table.json").write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
