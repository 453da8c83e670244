"""What an exploration reaches: pictures of the base by perturbed conditions and by noise alone, in two dimensions.

For some held-out prompts the untrained model draws the same number of pictures both ways, from the same noises where
it can. Image features of both together are projected on their two principal axes. `shift` says whether a perturbation
is alive at all: how far a variant's picture is from that of the prompt itself with the same noise.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from pixrl.algorithms.exploration import Exploration, Group, NoiseOnly, prepare
from pixrl.algorithms.sampling import Samples, Schedule, StepPlan, roll_out
from pixrl.data.prompts import Prompt
from pixrl.errors import ShapeError
from pixrl.metrics.diversity import DiversityMeter, distinct_layouts, layouts_of, mean_pairwise_distance
from pixrl.models.slots import Slot
from pixrl.runs.evaluation import spread_evenly
from pixrl.runs.files import write_atomic
from pixrl.runs.folder import png_bytes
from pixrl.runs.loaded import LoadedRun, load_run
from studies.config import RunStudyConfig
from studies.figures import FIGURES
from studies.style import PALETTE, Cloud, Panel, figure, svg

PROJECTION = "projection.json"
FIRST_EPOCH = -1000
"""Epoch of the first round of these pictures' seeds; no other use has it."""
NOTE = "pictures of the base before training, image features on their two principal axes"
GAP = 2
"""Pixels between the pictures of a sheet."""


@dataclass(frozen=True)
class Explored:
    """One prompt's pictures both ways, [S, 3, H, W] each; place k G + g of each round is variant k with noise g."""

    prompt: str
    perturbed_SCHW: Tensor
    noise_SCHW: Tensor


def write_projection(study: RunStudyConfig, out: Path, meter: DiversityMeter) -> None:
    """figures/projection-N.svg, figures/variants-N.png and projection.json, unless they are there."""
    if study.projection is None or (out / PROJECTION).is_file():
        return
    settings = study.projection
    shop = load_run(study.recipe((settings.variant, study.seeds[0])))
    method, place = shop.method, out / FIGURES
    place.mkdir(exist_ok=True)
    found = []
    for number, prompt in enumerate(spread_evenly(shop.held_out, settings.prompts), 1):
        explored = explore(shop, prompt, number, settings.rounds, study.measuring.steps)
        variants = method.exploration.variants
        sheet_CHW = sheet(explored.perturbed_SCHW[: method.group_size], method.noises)
        write_atomic(place / f"variants-{number}.png", png_bytes(sheet_CHW))
        figures, chart = project(explored, meter, method.noises, variants, settings.variant)
        write_atomic(place / f"projection-{number}.svg", svg(chart))
        found.append({"prompt": prompt.text, **figures})
    write_atomic(out / PROJECTION, (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())


def explore(shop: LoadedRun, prompt: Prompt, number: int, rounds: int, steps: int) -> Explored:
    """Pictures of one prompt by the base, by the recipe's exploration and by noise alone."""
    method = shop.method
    epochs = range(FIRST_EPOCH, FIRST_EPOCH - rounds, -1)
    groups = [Group(place, epoch, number, prompt.text, prompt.metadata) for place, epoch in enumerate(epochs)]
    perturbed = _draw(shop, method.exploration, groups, method.noises, steps)
    noise = _draw(shop, NoiseOnly(), groups, method.group_size, steps)
    return Explored(prompt.text, perturbed, noise)


def project(
    explored: Explored, meter: DiversityMeter, noises: int, variants: int, name: str
) -> tuple[dict[str, float], Figure]:
    """Figures of both ways of exploring one prompt, and the chart."""
    perturbed_SE = meter.features(explored.perturbed_SCHW).float()
    noise_SE = meter.features(explored.noise_SCHW).float()
    points_B2, shares_2 = principal_plane(torch.cat([perturbed_SE, noise_SE]))
    first, second = ([(x, y) for x, y in part.tolist()] for part in points_B2.split(len(perturbed_SE)))
    x_label, y_label = (
        f"axis {n}, {share:.0%} of the variance" for n, share in enumerate(shares_2.tolist(), 1)
    )
    clouds = [Cloud("noise alone", second, PALETTE[1]), Cloud(name, first, PALETTE[0])]
    figures = {
        "distance_perturbed": mean_pairwise_distance(perturbed_SE[None]).item(),
        "distance_noise": mean_pairwise_distance(noise_SE[None]).item(),
        "shift": shift(perturbed_SE, noises, variants),
    }
    if meter.detector is not None:
        for way, images in (("perturbed", explored.perturbed_SCHW), ("noise", explored.noise_SCHW)):
            figures[f"layouts_{way}"] = distinct_layouts(layouts_of(meter.detector, images))
    return figures, figure([Panel(x_label, y_label, clouds)], explored.prompt, NOTE)


def principal_plane(features_BE: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates [B, 2] on the two principal axes of features, and the axes' shares of the variance [2].

    Each axis points so that its largest component is positive.

    Raises:
        ShapeError: fewer than three rows or two columns.
    """
    if features_BE.ndim != 2 or features_BE.shape[0] < 3 or features_BE.shape[1] < 2:
        raise ShapeError(f"A plane needs [3 or more, 2 or more] features, got {list(features_BE.shape)}.")
    centred_BE = features_BE.double() - features_BE.double().mean(dim=0)
    _, sizes, axes_EE = torch.linalg.svd(centred_BE, full_matrices=False)
    plane_2E = axes_EE[:2]
    largest_2 = plane_2E.gather(1, plane_2E.abs().argmax(dim=1, keepdim=True))[:, 0]
    plane_2E = plane_2E * torch.where(largest_2 < 0, -1.0, 1.0)[:, None]
    variance = sizes.square()
    return centred_BE @ plane_2E.T, variance[:2] / variance.sum().clamp_min(torch.finfo(variance.dtype).tiny)


def shift(features_SE: Tensor, noises: int, variants: int) -> float:
    """Mean 1 - cosine between each variant's picture and variant 0's with the same noise; 0: perturbations do nothing.

    Args:
        features_SE: unit vectors of whole rounds, place k G + g within each.
    """
    rounds_RKGE = features_SE.view(-1, variants, noises, features_SE.shape[1])
    cosine = (rounds_RKGE[:, 1:] * rounds_RKGE[:, :1]).sum(dim=-1)
    return (1 - cosine).mean().item()


def sheet(images_SCHW: Tensor, columns: int) -> Tensor:
    """Pictures in rows of `columns` with white gaps, one picture [3, H, W]."""
    rows = [_beside(list(part), 2) for part in images_SCHW.split(columns)]
    return _beside(rows, 1)


def _beside(images: Sequence[Tensor], dim: int) -> Tensor:
    shape = list(images[0].shape)
    shape[dim] = GAP
    gap = torch.ones(shape)
    parts = [part for image in images for part in (gap, image)]
    return torch.cat(parts[1:], dim=dim)


def _draw(
    shop: LoadedRun, exploration: Exploration, groups: Sequence[Group], noises: int, steps: int
) -> Tensor:
    samples = Samples.of(groups, noises, exploration.variants, shop.config.seed)
    plan = StepPlan(Schedule.of(shop.policy, steps), shop.config.sampling.solver)
    with shop.policy.slot(Slot.REFERENCE):
        variants = prepare(exploration, shop.policy, groups)
        images, _, _ = roll_out(shop.policy, variants, samples, plan, shop.policy.micro_batch)
    return images
