"""The spectrum of pictures, against waves whose energy is known."""

import math
from itertools import pairwise

import pytest
import torch
from tests.tolerance import PICTURE, agree

from pixrl.algorithms.exploration import Group, NoiseOnly, prepare
from pixrl.algorithms.sampling import Samples
from pixrl.data.prompts import Prompt
from pixrl.errors import InputError
from pixrl.models.flux import FluxPolicy
from studies.config import SpectrumSettings
from studies.pictures import (
    SPECTRUM_EPOCH,
    band_energies,
    predicted_pictures,
    share_of,
    spectrum_of,
    spectrum_record,
)


def wave(cycles_down: int, cycles_across: int, amplitude: float, side: int = 32) -> torch.Tensor:
    """[1, 3, side, side], a grey wave around one half."""
    place = torch.arange(side, dtype=torch.float64) / side
    phase = 2 * math.pi * (cycles_down * place[:, None] + cycles_across * place[None, :])
    return (0.5 + amplitude * phase.cos()).expand(1, 3, side, side)


def test_a_wave_lies_in_one_band_with_half_its_square_amplitude() -> None:
    for cycles, band, other in (((0, 2), "low", "high"), ((8, 0), "high", "low"), ((3, 3), "high", "low")):
        found = band_energies(
            wave(*cycles, 0.2), cut=0.125
        )  # 4 cycles over 32 pixels; (3, 3) has length 4.24
        assert found[band].item() == pytest.approx(0.2**2 / 2) and found[other].item() == pytest.approx(
            0, abs=1e-12
        )
    edge = band_energies(wave(0, 4, 0.2), cut=0.125)
    assert edge["low"].item() == pytest.approx(0.02)  # the cut itself is low


def test_both_bands_are_the_variance_whatever_the_mean() -> None:
    images = torch.rand(3, 3, 20, 32, generator=torch.Generator().manual_seed(0))
    found = band_energies(images, cut=0.2)
    variance = images.double().var(dim=(2, 3), correction=0).mean(dim=1)
    assert agree(found["low"] + found["high"], variance, 64, dtype=torch.float32)
    brighter = band_energies(images + 3, cut=0.2)
    assert agree(brighter["low"], found["low"], 64, dtype=torch.float32)
    with pytest.raises(InputError, match=r"between 0 and 0\.5"):
        band_energies(images, cut=0.5)


def test_a_path_whose_detail_comes_late() -> None:
    coarse, fine = wave(0, 2, 0.3) - 0.5, wave(10, 0, 0.1) - 0.5
    steps = [
        0.5 + low * coarse + high * fine for low, high in ((0.5, 0.0), (1.0, 0.2), (1.0, 0.5), (1.0, 1.0))
    ]
    spectrum = spectrum_of(torch.stack(steps), cut=0.125)
    for found, expected in (
        (spectrum.shares("low"), [0.25, 1, 1, 1]),
        (spectrum.shares("high"), [0, 0.04, 0.25, 1]),
        (spectrum.distances("high"), [1, 0.64, 0.25, 0]),
    ):
        assert agree(found, torch.tensor(expected, dtype=torch.float64), 64, dtype=torch.float32)
    record = spectrum_record(spectrum, SpectrumSettings(steps=4))
    assert (record["low"]["step_of_0.9"], record["high"]["step_of_0.9"]) == (1, 3)


def test_equal_energy_at_another_place_is_far_from_the_end() -> None:
    path = torch.stack([wave(0, 2, 0.2).roll(8, dims=-1), wave(0, 2, 0.2)])  # half a wave on: the opposite
    spectrum = spectrum_of(path, cut=0.125)
    assert spectrum.shares("low")[0].item() == pytest.approx(1)
    assert spectrum.distances("low")[0].item() == pytest.approx(4)


def test_the_interval_of_a_share_is_of_what_differs_between_pictures() -> None:
    whole = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    assert share_of(whole, whole) == pytest.approx((1, 1, 1))
    assert share_of(whole / 2, whole) == pytest.approx((0.5, 0.5, 0.5))
    part = torch.tensor(
        [1.0, 1.0, 1.0], dtype=torch.float64
    )  # ratio 1/3; part - whole / 3 is 2/3, 1/3 and -1
    ratio, low, high = share_of(part, whole)
    half = 4.302653 * math.sqrt((4 / 9 + 1 / 9 + 1) / 2 / 3) / 3
    assert ratio == pytest.approx(1 / 3) and (low, high) == pytest.approx(
        (1 / 3 - half, 1 / 3 + half), abs=1e-6
    )


def test_a_path_ends_in_the_picture_that_sampling_gives(policy: FluxPolicy) -> None:
    prompts = [Prompt(f"a {word}", {"shown": [torch.rand(3, 40, 32)]}) for word in ("cat", "dog", "owl")]
    with policy.slot("reference"):
        path = predicted_pictures(policy, prompts, steps=3, seed=5, micro_batch=2)
    groups = [Group(n, SPECTRUM_EPOCH, n, one.text, one.metadata) for n, one in enumerate(prompts)]
    assert path.shape == (3, 3, 3, 32, 32)
    seeds = Samples.of(groups, 1, 1, 5).seeds
    condition = prepare(NoiseOnly(), policy, groups).anchor
    x = policy.initial_noise(seeds)
    levels = policy.schedule(3).tolist()
    with torch.no_grad(), policy.slot("reference"):
        for here, after in pairwise(levels):
            x = x + (after - here) * policy.velocity(x, torch.full((3,), here), condition)
        wanted = policy.decode(x)
    assert agree(path[-1], wanted, PICTURE)
    assert not agree(path[0], wanted, PICTURE)
