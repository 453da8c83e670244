"""What a study draws once all of its cells are there: the projection, the spectrum and the gallery.

**The projection** shows what an exploration reaches. For some held-out prompts the untrained model draws the same
number of pictures by perturbed conditions and by noise alone, from the same noises where it can. Image features of both
together are projected on their two principal axes. `shift` says whether a perturbation is alive at all: how far a
variant's picture is from that of the prompt itself with the same noise.

**The spectrum** shows when coarse structure and fine detail of a picture come about. At step i of T the model predicts
the finished picture from x_t: x0_i = x_t - t v, decoded to pixels. Its channels are taken apart by frequency (2-D
discrete Fourier transform F over H x W pixels, frequencies f in cycles a pixel, |f| the length of (row, column)):

    E_band(i) = mean over channels of  sum over f in band of |F(f)|^2 / (H W)^2
    low: 0 < |f| <= cut        high: |f| > cut

The mean colour (f = 0) belongs to neither, so that E_low + E_high is the variance of the pixels. The figure shows both
as shares of the finished picture's, E_band(i) / E_band(T), of means over pictures. Equal energy need not be the same
content, so beside it stands how far each band still is from the finished picture's:

    D_band(i) = E_band of (x0_i - x0_T)  /  E_band(T)

Source: the analysis of Customized-GRPO's Fig. 4, which gives no formula; the cut and the normalization are ours.

**The gallery** shows subjects side by side: the reference, then each variant's picture of the same prompt from the same
noise. Which subjects and prompts are shown is fixed by their numbers, not chosen by hand.
"""

import io
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from pixrl.algorithms.exploration import Exploration, Group, NoiseOnly, prepare, shown_pictures
from pixrl.algorithms.sampling import ODESolver, Samples, Schedule, StepPlan, roll_out
from pixrl.data.prompts import Prompt
from pixrl.equations import predict_x0
from pixrl.errors import InputError, RunError, ShapeError
from pixrl.metrics.diversity import DiversityMeter, distinct_layouts, layouts_of, mean_pairwise_distance
from pixrl.metrics.intervals import student
from pixrl.models.base import Conditioning, FlowPolicy, on_square
from pixrl.models.pipeline import chunks
from pixrl.models.slots import Slot
from pixrl.report.page import SMALL
from pixrl.runs.evaluation import spread_evenly
from pixrl.runs.files import write_atomic
from pixrl.runs.folder import png_bytes
from pixrl.runs.loaded import LoadedRun, load_run
from pixrl.runs.measure import Drawing, draw, evaluated_slot, open_run
from studies.config import (
    BASE,
    PersonalizeStudyConfig,
    RunStudyConfig,
    SpectrumSettings,
    spread_over_subjects,
)
from studies.figures import FIGURES
from studies.grid import Record
from studies.style import PALETTE, Cloud, Curve, Panel, figure, svg

PROJECTION, SPECTRUM, GALLERY = "projection.json", "spectrum.json", "gallery.png"
PROJECTION_EPOCH, SPECTRUM_EPOCH = -1000, -7
"""Epochs of the seeds of these pictures, the first round's of the projection; no other use has them."""
PROJECTED = "pictures of the base before training, image features on their two principal axes"
BANDS = ("low", "high")
COLUMNS = 9
"""Steps that the picture of the denoising path shows, the first and the last among them."""
REACHED = 0.9
"""The share of the finished picture's energy that counts as there."""
MOSAIC_GAP = 2
"""Pixels between the pictures of a mosaic."""
TILE, GAP, HEAD, WORDS = 192, 8, 30, 220
"""The gallery's pixels of a picture, between pictures, of the headings, and of the column of prompts."""
LETTERS = 30
"""Letters in a line of the gallery's prompts."""
REFERENCE = "reference"


@dataclass(frozen=True)
class Explored:
    """One prompt's pictures both ways, [S, 3, H, W] each; place k G + g of each round is variant k with noise g."""

    prompt: str
    perturbed_SCHW: Tensor
    noise_SCHW: Tensor


def write_projection(study: RunStudyConfig, out: Path, meter: DiversityMeter) -> None:
    """Write figures/projection-N.svg, figures/variants-N.png and projection.json, unless they are there."""
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
        mosaic_CHW = mosaic(explored.perturbed_SCHW[: method.group_size], method.noises)
        write_atomic(place / f"variants-{number}.png", png_bytes(mosaic_CHW))
        figures, chart = project(explored, meter, method.noises, variants, settings.variant)
        write_atomic(place / f"projection-{number}.svg", svg(chart))
        found.append({"prompt": prompt.text, **figures})
    write_atomic(out / PROJECTION, (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())


def explore(shop: LoadedRun, prompt: Prompt, number: int, rounds: int, steps: int) -> Explored:
    """Draw pictures of one prompt by the base, by the recipe's exploration and by noise alone."""
    method = shop.method
    epochs = range(PROJECTION_EPOCH, PROJECTION_EPOCH - rounds, -1)
    groups = [Group(place, epoch, number, prompt.text, prompt.metadata) for place, epoch in enumerate(epochs)]
    perturbed = _draw(shop, method.exploration, groups, method.noises, steps)
    noise = _draw(shop, NoiseOnly(), groups, method.group_size, steps)
    return Explored(prompt.text, perturbed, noise)


def project(
    explored: Explored, meter: DiversityMeter, noises: int, variants: int, name: str
) -> tuple[dict[str, float], Figure]:
    """Measure both ways of exploring one prompt: what projection.json says, and the figure."""
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
    return figures, figure([Panel(x_label, y_label, clouds)], explored.prompt, PROJECTED)


def principal_plane(features_BE: Tensor) -> tuple[Tensor, Tensor]:
    """Return coordinates [B, 2] on the two principal axes of features, and the axes' shares of the variance [2].

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
    """Return how far variants move a picture: the mean 1 - cosine to variant 0 with the same noise, 0 if not at all.

    Args:
        features_SE: unit vectors of whole rounds, place k G + g within each.
    """
    rounds_RKGE = features_SE.view(-1, variants, noises, features_SE.shape[1])
    cosine = (rounds_RKGE[:, 1:] * rounds_RKGE[:, :1]).sum(dim=-1)
    return (1 - cosine).mean().item()


def mosaic(images_SCHW: Tensor, columns: int) -> Tensor:
    """Put pictures in rows of `columns` with white gaps; return one picture [3, H, W]."""
    rows = [_beside(list(part), 2) for part in images_SCHW.split(columns)]
    return _beside(rows, 1)


def _beside(images: Sequence[Tensor], dim: int) -> Tensor:
    shape = list(images[0].shape)
    shape[dim] = MOSAIC_GAP
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


@dataclass(frozen=True)
class Spectrum:
    """The energies of some pictures by band at every step of their path, float64 [T, B]."""

    energy: dict[str, Tensor]
    """E_band of the predicted pictures."""
    distance: dict[str, Tensor]
    """E_band of their difference to the finished pictures."""

    def shares(self, band: str) -> Tensor:
        """Return E_band(i) / E_band(T) of means over pictures, [T]."""
        mean_T = self.energy[band].mean(dim=1)
        return mean_T / mean_T[-1]

    def distances(self, band: str) -> Tensor:
        """Return D_band(i) of means over pictures, [T]."""
        return self.distance[band].mean(dim=1) / self.energy[band][-1].mean()


def band_energies(images_BCHW: Tensor, cut: float) -> dict[str, Tensor]:
    """Return E_low and E_high of pictures, float64 [B] each; their sum is the pixels' variance, a mean over channels.

    Raises:
        InputError: the cut is no frequency between 0 and 0.5 cycles a pixel.
    """
    if not 0 < cut < 0.5:
        raise InputError(f"cut is a frequency between 0 and 0.5 cycles a pixel, got {cut:g}.")
    rows, columns = images_BCHW.shape[-2:]
    fy, fx = (torch.fft.fftfreq(side, dtype=torch.float64) for side in (rows, columns))
    length_HW = (fy[:, None].square() + fx[None, :].square()).sqrt()
    power = torch.fft.fft2(images_BCHW.double()).abs().square().mean(dim=1) / (rows * columns) ** 2
    low_HW = (length_HW > 0) & (length_HW <= cut)
    return {"low": power[:, low_HW].sum(dim=1), "high": power[:, length_HW > cut].sum(dim=1)}


@torch.no_grad()
def predicted_pictures(
    policy: FlowPolicy, prompts: Sequence[Prompt], *, steps: int, seed: int, micro_batch: int
) -> Tensor:
    """Predict the finished picture at each step, [T, B, 3, H, W] on the CPU, one path a prompt.

    By Euler steps with the active slot; the last prediction is the finished picture itself.
    """
    groups = [Group(n, SPECTRUM_EPOCH, n, prompt.text, prompt.metadata) for n, prompt in enumerate(prompts)]
    seeds = Samples.of(groups, 1, 1, seed).seeds
    anchor = prepare(NoiseOnly(), policy, groups).anchor
    plan = StepPlan(Schedule.of(policy, steps))
    parts = []
    for rows in chunks(len(groups), micro_batch):
        path = _path(policy, plan, anchor[rows], seeds[rows])
        parts.append(torch.stack([policy.decode(x0).float().cpu() for x0 in path]))
    return torch.cat(parts, dim=1)


def _path(
    policy: FlowPolicy, plan: StepPlan, condition: Conditioning, seeds: Sequence[int]
) -> Iterator[Tensor]:
    """Yield the predicted clean latents [B, C, h, w] at every step."""
    x, solver = plan.schedule.sigmas[0] * policy.initial_noise(seeds), ODESolver(plan)
    for number, sigma in enumerate(plan.schedule.sigmas[:-1]):
        t_B = x.new_full((len(x),), sigma)
        velocity = policy.velocity(x, t_B, condition)
        yield predict_x0(x, velocity, t_B)
        x = solver.step(x, velocity, number)


def spectrum_of(path_TBCHW: Tensor, cut: float) -> Spectrum:
    """Return the spectrum of predictions [T, B, C, H, W] at every step, the finished pictures last."""
    energies = [band_energies(images, cut) for images in path_TBCHW]
    distances = [band_energies(images - path_TBCHW[-1], cut) for images in path_TBCHW]
    energy, distance = (
        {band: torch.stack([one[band] for one in found]) for band in BANDS} for found in (energies, distances)
    )
    return Spectrum(energy, distance)


def write_spectrum(study: PersonalizeStudyConfig, out: Path) -> None:
    """Write figures/spectrum.svg, figures/denoising.png and spectrum.json of the base, unless they are there."""
    if study.spectrum is None or (out / SPECTRUM).is_file():
        return
    settings, seed = study.spectrum, study.seeds[0]
    shop = load_run(next(iter(study.configs().values())))
    prompts = spread_over_subjects(shop.held_out, None, settings.per_subject)
    with shop.policy.slot(Slot.REFERENCE):
        path = predicted_pictures(
            shop.policy, prompts, steps=settings.steps, seed=seed, micro_batch=shop.policy.micro_batch
        )
    spectrum = spectrum_of(path, settings.cut)
    place = out / FIGURES
    place.mkdir(exist_ok=True)
    places = sorted({round(n * (settings.steps - 1) / (COLUMNS - 1)) for n in range(COLUMNS)})
    rows = path[places, : settings.shown].transpose(0, 1).flatten(0, 1)  # a row a picture
    write_atomic(place / "denoising.png", png_bytes(mosaic(rows, len(places))))
    write_atomic(place / "spectrum.svg", svg(spectrum_figure(spectrum, settings)))
    write_atomic(out / SPECTRUM, (json.dumps(spectrum_record(spectrum, settings), indent=1) + "\n").encode())


def spectrum_record(spectrum: Spectrum, settings: SpectrumSettings) -> dict[str, Any]:
    """Return the lines of the figure, and the first step at which each band has most of its energy."""
    record: dict[str, Any] = settings.model_dump()
    for band in BANDS:
        shares_T = spectrum.shares(band)
        reached = (shares_T >= REACHED).nonzero().flatten().tolist()
        record[band] = {
            "energy": spectrum.energy[band].mean(dim=1).tolist(),
            "share": shares_T.tolist(),
            "distance": spectrum.distances(band).tolist(),
            f"step_of_{REACHED:g}": reached[0] if reached else None,
        }
    return record


def spectrum_figure(spectrum: Spectrum, settings: SpectrumSettings) -> Figure:
    """Plot energy and distance of both bands at every step, side by side, with 95 % intervals over pictures."""
    bands = {
        "low": f"low frequencies (waves of {1 / settings.cut:g} pixels and longer)",
        "high": "high frequencies (shorter waves)",
    }
    shown = {
        "energy, as a share of the finished picture's": spectrum.energy,
        "distance to the finished picture": spectrum.distance,
    }
    panels = []
    for y_label, found in shown.items():
        curves = []
        for colour, (band, label) in zip((PALETTE[1], PALETTE[0]), bands.items(), strict=True):
            shares = [share_of(row_B, spectrum.energy[band][-1]) for row_B in found[band]]
            line = [(step, share) for step, (share, _, _) in enumerate(shares)]
            shaded = [(step, low, high) for step, (_, low, high) in enumerate(shares)]
            curves.append(Curve(label, line, colour, shaded))
        panels.append(Panel("step", y_label, curves))
    count = spectrum.energy["low"].shape[1]
    note = f"base; the predicted picture at each of {settings.steps} steps, {count} pictures; shaded: 95 % intervals"
    return figure(panels, "Spectrum of the denoising path", note)


def share_of(part_B: Tensor, whole_B: Tensor) -> tuple[float, float, float]:
    """Return the ratio of two means over the same pictures with its 95 % interval.

    The interval is that of the mean of part - ratio x whole (the delta method), so that pictures which have more of
    both do not widen it; it is empty where both are the same.
    """
    mean = whole_B.mean()
    ratio = part_B.mean() / mean
    error = student(((part_B - ratio * whole_B) / mean).tolist())
    return ratio.item(), ratio.item() + error.low, ratio.item() + error.high


def write_gallery(study: PersonalizeStudyConfig, records: Sequence[Record], out: Path) -> None:
    """Write figures/gallery.png of the first seed, unless it is there.

    Raises:
        RunError: a run whose pictures it shows is gone.
    """
    place = out / FIGURES / GALLERY
    if study.gallery is None or place.is_file():
        return
    columns: dict[str, Sequence[Tensor]] = {}
    prompts: tuple[Prompt, ...] = ()
    for name in study.gallery.variants:
        shop, slot = _opened(study, records, out, name)
        prompts = spread_over_subjects(shop.held_out, study.gallery.subjects, 1)
        m = study.measuring
        drawing = Drawing(1, m.steps, m.solver, study.seeds[0], shop.policy.micro_batch)
        columns[name] = list(draw(shop.policy, slot, prompts, drawing).images_BCHW)
    references = [on_square(shown_pictures(prompt.metadata)[0], TILE) for prompt in prompts]
    picture = gallery_sheet({REFERENCE: references, **columns}, [prompt.text for prompt in prompts])
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    place.parent.mkdir(exist_ok=True)
    write_atomic(place, buffer.getvalue())


def _opened(
    study: PersonalizeStudyConfig, records: Sequence[Record], out: Path, name: str
) -> tuple[LoadedRun, Slot]:
    """Open a variant's model and its trained slot, or the model itself as the base."""
    seed = study.seeds[0]
    if name == BASE:
        return load_run(study.recipe((name, seed))), Slot.REFERENCE
    runs = [record["run"] for record in records if (record["variant"], record["seed"]) == (name, seed)]
    if not runs or not (out / runs[0]).is_dir():
        raise RunError(
            f"The gallery needs the run of {name!r} with seed {seed}, and its folder is gone. Put it back, or "
            "start the study in a new folder."
        )
    shop = open_run(out / runs[0])
    return shop, evaluated_slot(shop.config)


def gallery_sheet(columns: Mapping[str, Sequence[Tensor]], prompts: Sequence[str]) -> Image.Image:
    """Return a picture with a heading a column, and a row a prompt with its words on the left.

    Args:
        columns: heading -> pictures [3, H, W], one a prompt.
        prompts: one a row.
    """
    size = WORDS + len(columns) * (TILE + GAP), HEAD + len(prompts) * (TILE + GAP)
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    for row, prompt in enumerate(prompts):
        words = textwrap.fill(prompt.removeprefix("a photo of "), LETTERS)
        pen.text((GAP, HEAD + row * (TILE + GAP) + GAP), words, fill="black", font_size=14)
    for column, (heading, pictures) in enumerate(columns.items()):
        left = WORDS + column * (TILE + GAP)
        pen.text((left, GAP), heading, fill="black", font_size=15)
        for row, picture_CHW in enumerate(pictures):
            with Image.open(io.BytesIO(png_bytes(picture_CHW))) as picture:
                # small pictures are enlarged in blocks, as on the pages; large ones are scaled down
                way = Image.Resampling.NEAREST if max(picture.size) <= SMALL else Image.Resampling.LANCZOS
                tile = picture.convert("RGB").resize((TILE, TILE), way)
            image.paste(tile, (left, HEAD + row * (TILE + GAP)))
    return image
