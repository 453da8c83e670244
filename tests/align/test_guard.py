"""The guard's signals, each by hand, and chance alone."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from scipy import stats

from pixrl.models.memory.estimate import PeakMeter
from pixrl.runs.guard import Looked, MonitorSettings, compare
from pixrl.runs.reading import Signal

P, S = 12, 2


def looked(seed: int = 0) -> Looked:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    features_PSE = torch.nn.functional.normalize(normal(P, S, 20), dim=-1)
    scores = {"trained": normal(P, S), "kept": normal(P, S)}
    return Looked({"brightness": normal(P, S), "colours": normal(P, S)}, scores, features_PSE)


def signals(first: Looked, now: Looked, **settings: Any) -> dict[str, Signal]:
    found = compare(first, now, MonitorSettings(**settings), ["trained"], ["kept"])
    return {one.name: one for one in found}


def moved(first: Looked, seed: int = 9, **by: float) -> Looked:
    """A look at pictures that have changed a little at random, and by so many standard deviations where it is said."""
    generator = torch.Generator().manual_seed(seed)

    def nudged(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: x
            + 0.2 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
            + by.get(name, 0.0) * x.std()
            for name, x in values.items()
        }

    return Looked(nudged(dict(first.statistics)), nudged(dict(first.scores)), first.features_PSE)


def found(signals_by_name: dict[str, Signal]) -> set[str]:
    return {name for name, one in signals_by_name.items() if one.found}


def test_nothing_is_found_in_equal_pictures_nor_in_small_changes() -> None:
    first = looked()
    assert found(signals(first, first)) == set()
    assert found(signals(first, moved(first))) == set()
    assert found(signals(first, moved(first, brightness=0.8, kept=-0.2))) == set()  # past chance, and not far


@pytest.mark.parametrize(
    ("by", "wanted"),
    [
        ({"brightness": 1.5}, {"picture/brightness"}),
        ({"colours": -1.5}, {"picture/colours"}),
        ({"kept": -0.6}, {"reward/kept"}),
        ({"trained": 1.2, "kept": -0.25}, {"disagreement/kept"}),
        ({"trained": 1.2, "kept": 0.0}, set()),  # the held-out reward did not fall
        ({"trained": 2.0, "kept": 0.5}, set()),  # both rose: that is what a run is for
        ({"kept": 0.6}, set()),
    ],
)
def test_each_signal_has_a_direction_and_a_bound(by: dict[str, float], wanted: set[str]) -> None:
    first = looked()
    assert found(signals(first, moved(first, **by))) == wanted


def test_trained_rewards_that_stay_disagree_with_nothing() -> None:
    first = looked()
    fallen = moved(first, kept=-0.25)
    assert found(signals(first, fallen, shift=0.1, fall=9.0)) == set()
    assert "disagreement/kept" in found(
        signals(first, moved(first, trained=0.3, kept=-0.25), shift=0.1, fall=9.0)
    )


def test_a_prompt_counts_once_however_many_pictures_it_has() -> None:
    first = looked()
    now = moved(first, brightness=0.3)
    change_P = (now.statistics["brightness"] - first.statistics["brightness"]).mean(dim=1)
    expected = 2 * stats.ttest_1samp(change_P.numpy(), 0, alternative="greater").pvalue
    assert signals(first, now)["picture/brightness"].p == pytest.approx(expected)


def test_a_far_move_of_few_prompts_is_chance() -> None:
    first = looked()
    now = moved(first)
    now.statistics["brightness"][0] += 40 * first.statistics["brightness"].std()
    seen = signals(first, now)["picture/brightness"]
    assert seen.moved > 1 and not seen.found


def test_diversity_and_distance() -> None:
    first = looked()
    middle = first.features_PSE.mean(dim=1, keepdim=True)
    alike = torch.nn.functional.normalize(0.3 * first.features_PSE + 0.7 * middle, dim=-1)
    seen = signals(first, replace(first, features_PSE=alike), distance=0.05)
    assert seen["diversity"].moved < 0.7 and found(seen) == {"diversity", "distance"}
    cosine = (first.features_PSE * alike).sum(dim=-1).mean()
    assert seen["distance"].moved == pytest.approx(1 - float(cosine))
    assert found(signals(first, replace(first, features_PSE=alike), diversity=0.01)) == set()


def test_scores_that_failed_are_left_out() -> None:
    first = looked()
    now = moved(first, kept=-0.6)
    now.scores["kept"][:3] = math.nan
    seen = signals(first, now)["reward/kept"]
    assert seen.found and math.isfinite(seen.after)
    change_P = (first.scores["kept"] - now.scores["kept"]).mean(dim=1)[3:]
    assert seen.p == pytest.approx(stats.ttest_1samp(change_P.numpy(), 0, alternative="greater").pvalue)
    now.scores["kept"][3:] = math.nan
    assert not signals(first, now)["reward/kept"].found


def test_chance_alone_is_rarely_found() -> None:
    """Bounds of next to nothing leave chance to the test: at most one evaluation in a hundred, give or take."""
    first, loose = looked(), {"shift": 1e-9, "fall": 1e-9}
    share = sum(bool(found(signals(first, moved(first, seed), **loose))) for seed in range(400)) / 400
    assert share <= 0.01 + 3 * math.sqrt(0.01 * 0.99 / 400)


def test_an_evaluation_takes_no_more_memory_than_one_of_its_pictures(tmp_path: Path) -> None:
    """An evaluation at paper scale is larger than the memory: 512 pictures of 1024 x 1024 are 13 GB in float64."""
    folder: Any = SimpleNamespace(samples_dir=tmp_path)
    side, count = 64, 12
    place = tmp_path / "step-000004"
    place.mkdir()
    for number in range(count):
        Image.effect_noise((side, side), 40 + number).convert("RGB").save(place / f"{number:04d}.png")
    with PeakMeter() as meter:
        seen = Looked.of(folder, 4, per_prompt=2)
    assert seen.features_PSE.shape[:2] == (count // 2, 2) and seen.statistics["colours"].std() > 0
    picture = 3 * side**2 * 8
    assert picture < meter.peak < 12 * picture + seen.features_PSE.nbytes * 2
