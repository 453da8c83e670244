"""The spectrum of the denoising path: when do coarse structure and fine detail of a picture come about?

At step i of T the model predicts the finished picture from x_t: x0_i = x_t - t v, decoded to pixels. Its channels are
taken apart by frequency (2-D discrete Fourier transform F over H x W pixels, frequencies f in cycles a pixel, |f| the
length of (row, column)):

    E_band(i) = mean over channels of  sum over f in band of |F(f)|^2 / (H W)^2
    low: 0 < |f| <= cut        high: |f| > cut

The mean colour (f = 0) belongs to neither, so that E_low + E_high is the variance of the pixels. The figure shows both
as shares of the finished picture's, E_band(i) / E_band(T), of means over pictures. Equal energy need not be the same
content, so beside it stands how far each band still is from the finished picture's:

    D_band(i) = E_band of (x0_i - x0_T)  /  E_band(T)

Source: the analysis of Customized-GRPO's Fig. 4, which gives no formula; the cut and the normalization are ours.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from pixrl.algorithms.exploration import Group, NoiseOnly, prepare
from pixrl.algorithms.sampling import ODESolver, Samples, Schedule, StepPlan
from pixrl.data.prompts import Prompt
from pixrl.equations import predict_x0
from pixrl.errors import InputError
from pixrl.metrics.intervals import student
from pixrl.models.base import Conditioning, FlowPolicy
from pixrl.models.pipeline import chunks
from pixrl.models.slots import Slot
from pixrl.runs.files import write_atomic
from pixrl.runs.folder import png_bytes
from pixrl.runs.loaded import load_run
from studies.config import (
    PersonalizeStudyConfig,
    SpectrumSettings,
    spread_over_subjects,
)
from studies.figures import FIGURES
from studies.projection import sheet
from studies.style import PALETTE, Curve, Panel, figure, svg

SPECTRUM = "spectrum.json"
EPOCH = -7
"""Epoch of these pictures' seeds; no other use has it."""
BANDS = ("low", "high")
COLUMNS = 9
"""Steps that the picture of the path shows, the first and the last among them."""
REACHED = 0.9
"""The share of the finished picture's energy that counts as there."""


@dataclass(frozen=True)
class Spectrum:
    """Of some pictures at every step of their path, float64 [T, B] by band."""

    energy: dict[str, Tensor]
    """E_band of the predicted picture."""
    distance: dict[str, Tensor]
    """E_band of its difference to the finished picture."""

    def shares(self, band: str) -> Tensor:
        """E_band(i) / E_band(T) of means over pictures, [T]."""
        mean_T = self.energy[band].mean(dim=1)
        return mean_T / mean_T[-1]

    def distances(self, band: str) -> Tensor:
        """D_band(i), of means over pictures, [T]."""
        return self.distance[band].mean(dim=1) / self.energy[band][-1].mean()


def band_energies(images_BCHW: Tensor, cut: float) -> dict[str, Tensor]:
    """E_low and E_high of pictures, float64 [B] each; their sum is the mean over channels of the pixels' variance.

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
    """The finished picture as the model predicts it at each step, [T, B, 3, H, W] on the CPU, one path a prompt.

    By Euler steps with the active slot; the last prediction is the finished picture itself.
    """
    groups = [Group(n, EPOCH, n, prompt.text, prompt.metadata) for n, prompt in enumerate(prompts)]
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
    """The predicted clean latents [B, C, h, w] at every step."""
    x, solver = policy.initial_noise(seeds), ODESolver(plan)
    for number, sigma in enumerate(plan.schedule.sigmas[:-1]):
        t_B = x.new_full((len(x),), sigma)
        velocity = policy.velocity(x, t_B, condition)
        yield predict_x0(x, velocity, t_B)
        x = solver.step(x, velocity, number)


def spectrum_of(path_TBCHW: Tensor, cut: float) -> Spectrum:
    """Of predictions at every step, the finished pictures last."""
    energies = [band_energies(images, cut) for images in path_TBCHW]
    distances = [band_energies(images - path_TBCHW[-1], cut) for images in path_TBCHW]
    energy, distance = (
        {band: torch.stack([one[band] for one in found]) for band in BANDS} for found in (energies, distances)
    )
    return Spectrum(energy, distance)


def write_spectrum(study: PersonalizeStudyConfig, out: Path) -> None:
    """figures/spectrum.svg, figures/denoising.png and spectrum.json of the base, unless they are there."""
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
    write_atomic(place / "denoising.png", png_bytes(_path_sheet(path, settings.shown)))
    write_atomic(place / "spectrum.svg", svg(spectrum_figure(spectrum, settings)))
    write_atomic(out / SPECTRUM, (json.dumps(spectrum_record(spectrum, settings), indent=1) + "\n").encode())


def spectrum_record(spectrum: Spectrum, settings: SpectrumSettings) -> dict[str, Any]:
    """Everything that the figure shows, and the first step at which each band has most of its energy."""
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
    """Energy and distance of both bands at every step, side by side, with 95 % intervals over pictures."""
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
    """The ratio of two means over the same pictures with its 95 % interval.

    The interval is that of the mean of part - ratio x whole (the delta method), so that pictures which have more of
    both do not widen it; it is empty where both are the same.
    """
    mean = whole_B.mean()
    ratio = part_B.mean() / mean
    error = student(((part_B - ratio * whole_B) / mean).tolist())
    return ratio.item(), ratio.item() + error.low, ratio.item() + error.high


def _path_sheet(path_TBCHW: Tensor, shown: int) -> Tensor:
    """A row a picture: its prediction at some steps, the last one included."""
    steps = len(path_TBCHW)
    places = sorted({round(n * (steps - 1) / (COLUMNS - 1)) for n in range(COLUMNS)})
    chosen = path_TBCHW[places, :shown]
    return sheet(chosen.transpose(0, 1).flatten(0, 1), len(places))
