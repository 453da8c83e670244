"""One step of the toy world's own run: GenEval and preference are trained on together, CLIP is held out."""

import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

import pixrl
from pixrl.runs.folder import RunFolder

REWARDS: list[dict[str, Any]] = [
    {"name": "geneval", "options": {"segmenter": "toy:segmenter", "clip": "toy:clip", "graded": True}},
    {"name": "preference", "options": {"model": "toy:preference"}},
    {"name": "clip_text", "options": {"model": "toy:clip"}, "held_out": True},
]


def test_geneval_and_preference_are_trained_on_and_clip_is_logged(tmp_path: Path) -> None:
    settings = {
        "model": "toy:sd3",
        "steps": 1,
        "prompts": {"source": "toy:geneval", "per_step": 2},
        "rewards": REWARDS,
        "exploration": {"kind": "noise", "noises": 2},
        "sampling": {"steps": 4, "solver": "dpm"},
        "loss": {"kind": "nft", "timesteps": 2},
        "lora": {"rank": 4, "alpha": 8},
        "evaluation": {"prompts": 2},
        "machine": {"device": "cpu", "dtype": "float32"},
    }
    done = pixrl.align(settings, seed=0, out=tmp_path / "run")
    rows = RunFolder.open(done.run).manifest()
    assert len(rows) == 4 and all(row.failed is None for row in rows)
    (logged,) = done.metrics
    for one in REWARDS:
        scores = [row.scores[one["name"]] for row in rows]
        assert logged[f"reward/{one['name']}/mean"] == pytest.approx(fmean(scores), rel=1e-4)
        assert all(math.isfinite(row[f"{one['name']}/mean"]) for row in done.evaluations)
        assert all(row[f"{one['name']}/failed_share"] == 0 for row in done.evaluations)
    assert all(0 <= row.scores["geneval"] <= 1 for row in rows)
    both = [row.scores["geneval"] + row.scores["preference"] for row in rows]
    spreads = [abs(both[first] - both[first + 1]) / 2 for first in (0, 2)]  # of two samples a prompt
    assert logged["group_std"] == pytest.approx(fmean(spreads), rel=1e-4)
    assert logged["failed_share"] == 0 and logged["grad_norm"] > 0
