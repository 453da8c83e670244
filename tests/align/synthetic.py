"""A run folder as an align run leaves it, without a model: what reports are tested on."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixrl.runs.config import AlignConfig
from pixrl.runs.folder import EVALUATIONS, JsonLines, ManifestRow, RunFolder, png_bytes
from pixrl.runs.reading import GALLERY, START

Draw = Callable[[str, int], Tensor]
"""Prompt and seed -> [3, H, W]."""
PROMPTS = (
    "a red owl",
    "two blue snails",
    "a cat left of a tree",
    "three cups",
    "a green fish",
    "a black house",
)


def noise(prompt: str, seed: int) -> Tensor:
    return torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(seed))


def settings(**changes: Any) -> AlignConfig:
    base: dict[str, Any] = {
        "steps": 40,
        "prompts": {"source": "toy:geneval", "per_step": 2},
        "rewards": [
            {"name": "geneval", "options": {"segmenter": "toy:segmenter", "clip": "toy:clip"}},
            {"name": "preference", "options": {"model": "toy:preference"}, "held_out": True},
        ],
        "exploration": {"kind": "perturbed", "noises": 4, "variants": 3},
    }
    return AlignConfig.model_validate(base | changes)


def run_folder(
    path: Path, config: AlignConfig, *, done: int, evaluated: tuple[int, ...], draw: Draw = noise
) -> RunFolder:
    """`done` steps of a run that was evaluated before the steps `evaluated`."""
    folder = RunFolder.create(path, kind="align", recipe=config)
    start = {"recipe": {}, "model": config.model, "fingerprint": "abc123", "notes": ["rollout: 2 x 12"]}
    (path / START).write_text(json.dumps(start))
    gallery = [
        {"number": n, "prompt": prompt, "seed": 100 + n}
        for n, prompt in enumerate(p for p in PROMPTS for _ in range(config.evaluation.per_prompt))
    ]
    (path / GALLERY).write_text(json.dumps(gallery))
    for step in evaluated:
        _evaluate(folder, config, step, gallery, draw)
    for step in range(done):
        _step(folder, config, step, draw)
    return folder


def _evaluate(
    folder: RunFolder, config: AlignConfig, step: int, gallery: list[dict[str, Any]], draw: Draw
) -> None:
    gained = 1 - math.exp(-step / 15)
    figures = {"geneval/mean": 0.4 + 0.3 * gained, "preference/mean": 20.0 - 0.4 * gained}
    row = {"step": step, **figures, "geneval/failed_share": 0.0, "diversity": 0.3 - 0.1 * gained}
    JsonLines(folder.path / EVALUATIONS, folder.path).append([row])
    place = folder.samples_dir / f"step-{step:06d}"
    place.mkdir()
    for entry in gallery:
        image = draw(entry["prompt"], entry["seed"] + step)
        (place / f"{entry['number']:04d}.png").write_bytes(png_bytes(image))


def _step(folder: RunFolder, config: AlignConfig, step: int, draw: Draw) -> None:
    generator = torch.Generator().manual_seed(step)
    wiggle = torch.randn(12, generator=generator).tolist()
    gained = 1 - math.exp(-step / 15)
    folder.log(
        step,
        {
            "reward/geneval/mean": 0.42 + 0.3 * gained + 0.04 * wiggle[0],
            "reward/geneval/std": 0.2 - 0.05 * gained,
            "reward/preference/mean": 20 - 0.4 * gained + 0.1 * wiggle[1],
            "reward/preference/std": 0.8,
            "group_std": 0.15 - 0.06 * gained + 0.01 * wiggle[2],
            "zero_std_share": max(0.0, 0.3 * gained + 0.05 * wiggle[3]),
            "failed_share": 0.0,
            "kl": 0.02 * gained,
            "old_distance": 0.001 * (1 + abs(wiggle[4])),
            "grad_norm": 0.5 + 0.1 * abs(wiggle[5]),
            "anchor_cosine": 0.8,
            "pairwise_cosine": 0.62,
            "diversity": 0.3 - 0.1 * gained + 0.01 * wiggle[6],
            "lr": 3e-4,
            "seconds/collect": 4.0,
            "seconds/score": 0.6,
            "seconds/update": 6.5,
            "seconds/diversity": 0.05,
            "images_per_second": 2.2,
        },
    )
    noises, variants = config.exploration.noises, 3
    size = noises * variants
    rows = []
    for place in range(2 * size):
        index = step * 2 * size + place
        prompt = PROMPTS[(2 * step + place // size) % len(PROMPTS)]
        keep = step % 10 == 0
        file = folder.save_image(index, draw(prompt, 1000 + place)) if keep else None
        failed = "geneval: no GenEval metadata" if index == 3 else None
        scores = {"geneval": math.nan if failed else 0.5 + 0.1 * (place % 3), "preference": 20.0}
        rows.append(
            ManifestRow(
                index=index,
                step=step,
                prompt=prompt,
                seed=1000 + place % noises,
                variant=place % size // noises,
                scores=scores,
                failed=failed,
                file=file,
            )
        )
    folder.append_manifest(rows)
