"""Are E2PO's perturbations semantically alive: does a variant change the picture, as a noise does or less?

    python benchmarks/e2po_alive.py --out /tmp/alive                 the grid below on toy:sd3
    python benchmarks/e2po_alive.py --out /tmp/alive --only 2 --prompts "a photo of two red cars"

For each setting of the grid every prompt's variants are learned and drawn from one noise; the same prompts are drawn
from as many noises without perturbation. Distances are means over pairs of pictures of one prompt: `pixels` is the mean
absolute difference, `clip` 1 - cosine of CLIP image features. Their ratio to the noises' distance says how much
exploration variants add; `fit` is the drop in CLIP's cosine of picture and prompt, what they cost. Where the checkpoint
names a segmentation of parts, three more say what changes: `parts`, the share of what either picture draws that is
another part there, or none; `layout`, 1 - the overlap of the two figures; `background`, the mean absolute difference
where neither draws anything.
`OUT/NN.png`: a row a prompt, variant 0 (the plain prompt) first; `OUT/noises.png`: the same prompts, noise by noise;
`OUT/NN-grid.png`: variants from left to right against three noises from top to bottom, for the first four prompts.
"""

import argparse
import json
import math
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
from pixrl.hub import read_card
from pixrl.models.pipeline import FlowPipelinePolicy, chunks
from pixrl.rewards.encoders import ClipSimilarity
from pixrl.rewards.segmentation import Segmenter
from pixrl.types import sample_seed

PROMPTS = (
    "a photo of an owl",
    "a photo of two red cars",
    "a photo of a blue cat",
    "a photo of a green house",
    "a photo of a pig left of a lamp",
    "a photo of three snails",
)
RECIPE = {
    "weighted": "anchor", "norm": "relative", "max_norm": 1.0, "target": 0.6, "margin": 0.03, "steps": 100, "lr": 4e-3,
    "encoders": "both",
}  # fmt: skip
"""The exploration of `recipes/toy/e2po.yaml`."""
GRID: tuple[dict[str, Any], ...] = (
    {"weighted": "diversity", "norm": "absolute", "max_norm": 0.05},
    {"weighted": "diversity", "norm": "relative", "max_norm": 0.5},
    {"weighted": "anchor", "norm": "relative", "max_norm": 0.5},
    RECIPE | {"encoders": "clip_l"},
    RECIPE,
    RECIPE | {"target": 0.8},
    RECIPE | {"target": 0.3},
    RECIPE | {"schedule": "static"},
    {"steps": 0, "sigma_init": 1e-2, "norm": "relative", "max_norm": 0.5, "encoders": "both"},
)
GRID_PROMPTS, GRID_NOISES, GAP = 4, 3, 6
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


def part_distances(images_PKCHW: Tensor, parts_PKHW: Tensor) -> dict[str, float]:
    """What differs between two pictures of a prompt, meant over prompts and pairs."""
    first, second = torch.triu_indices(parts_PKHW.shape[1], parts_PKHW.shape[1], offset=1)
    a, b = parts_PKHW[:, first], parts_PKHW[:, second]
    either, both, neither = (a > 0) | (b > 0), (a > 0) & (b > 0), (a == 0) & (b == 0)
    change = (images_PKCHW[:, first] - images_PKCHW[:, second]).abs().mean(2)

    def share(of: Tensor, within: Tensor) -> float:
        return (of.float().sum((-2, -1)) / within.sum((-2, -1)).clamp(min=1)).mean().item()

    return {
        "parts": share((a != b) & either, either),
        "layout": 1 - share(both, either),
        "background": share(change * neither, neither),
    }


class Measure:
    """One set of prompts on one model."""

    def __init__(self, model: str, clip: str, prompts: Sequence[str], count: int, seed: int) -> None:
        policy = models.load(model)
        if not isinstance(policy, FlowPipelinePolicy):
            raise InputError(f"{model} is not a flow model; give an SD3 or FLUX one.")
        self.policy, self.prompts, self.count = policy, list(prompts), count
        self.clip = ClipSimilarity(clip)
        parts = read_card(model).parts
        self.parts = Segmenter(parts) if parts else None
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
        found = {
            "pixels": distances(images_BCHW.reshape(shape), cosine=False),
            "clip": distances(features, cosine=True),
            "fit": fit_PK[:, 1:].mean().item(),
            "fit_first": fit_PK[:, 0].mean().item(),
        }
        if self.parts is not None:
            maps = self.parts.classes(images_BCHW)
            found |= part_distances(*(part.unflatten(0, shape[:2]) for part in (images_BCHW, maps)))
        return found

    def run(self, given: dict[str, Any], seed: int) -> tuple[dict[str, float], Tensor, Tensor]:
        """One setting's row, its pictures, and variants against noises of the first prompts [P, N, K, 3, H, W]."""
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
        }
        for name in ("parts", "layout", "background"):
            if name in found:
                row |= {name: found[name], f"{name}/noise": found[name] / self.reference[name]}
        row["cpu_s/prompt"] = seconds
        return row, images, self._against_noises(variants)

    def _against_noises(self, variants: Variants) -> Tensor:
        prompts, noises = min(len(self.prompts), GRID_PROMPTS), min(self.count, GRID_NOISES)
        places = [(p, n, k) for p in range(prompts) for n in range(noises) for k in range(self.count)]
        rows, ks = (torch.tensor([place[axis] for place in places]) for axis in (0, 2))
        images = draw(self.policy, variants, rows, ks, [self.seeds[p][n] for p, n, _ in places])
        return images.view(prompts, noises, self.count, *images.shape[1:])

    def sheet(self, images_BCHW: Tensor, path: Path) -> None:
        """A row a prompt."""
        _, channels, height, width = images_BCHW.shape
        grid = images_BCHW.view(len(self.prompts), self.count, channels, height, width)
        pixels = grid.permute(0, 3, 1, 4, 2).reshape(len(self.prompts) * height, self.count * width, channels)
        Image.fromarray((pixels * 255).round().byte().numpy()).quantize(256).save(path, optimize=True)


def save_grid(images_PNKCHW: Tensor, path: Path) -> None:
    """Two prompts a row, each a block of noises by variants."""
    prompts, noises, count, channels, height, width = images_PNKCHW.shape
    blocks = images_PNKCHW.permute(0, 1, 4, 2, 5, 3).reshape(
        prompts, noises * height, count * width, channels
    )
    tall, wide = noises * height + GAP, count * width + GAP
    sheet = torch.ones(math.ceil(prompts / 2) * tall - GAP, 2 * wide - GAP, channels)
    for number, block in enumerate(blocks):
        top, left = number // 2 * tall, number % 2 * wide
        sheet[top : top + block.shape[0], left : left + block.shape[1]] = block
    Image.fromarray((sheet * 255).round().byte().numpy()).quantize(256).save(path, optimize=True)


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
        row, images, against_noises = measure.run(GRID[number], given.seed)
        if not rows:
            print(f"| # | setting | {' | '.join(row)} |\n|{'---|' * (len(row) + 2)}")
        print(line(str(number), row, GRID[number]), flush=True)
        measure.sheet(images, given.out / f"{number:02d}.png")
        save_grid(against_noises, given.out / f"{number:02d}-grid.png")
        rows.append({"number": number, "setting": GRID[number], **row})
    table = {"model": given.model, "prompts": given.prompts, "noises": reference, "rows": rows}
    (given.out / "table.json").write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
