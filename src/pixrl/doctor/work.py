"""How long a step takes: as an earlier run measured it, or no less than its arithmetic takes on this machine."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from pixrl.device import Precision
from pixrl.doctor.diagnosis import run_name
from pixrl.errors import PixrlError
from pixrl.runs.config import KINDS, AlignConfig, kind_of
from pixrl.runs.environment import describe
from pixrl.runs.folder import RunFolder
from pixrl.runs.place import ENVIRONMENT, RECIPE

_SAME = ("model", "guidance", "resolution", "exploration", "sampling", "loss", "lora", "machine", "rewards")
"""Sections of a recipe on which the time of a step depends."""
SIDE, TRIES = 1024, 6
"""Of the matrix product that measures this machine's speed; the best of several counts."""
_PHASE = "seconds/"


def measured(config: AlignConfig, runs: Path) -> tuple[float | None, str | None]:
    """Mean seconds a step of the newest earlier run with the same work on the same machine, and which it is."""
    folders = [path.parent for path in runs.glob(f"*/{RECIPE}")]
    wanted = config.model_dump(mode="json")
    for path in sorted(folders, key=lambda folder: folder.stat().st_mtime, reverse=True):
        try:
            folder = RunFolder.open(path, allow_changed=True)
            if (
                folder.kind not in KINDS
                or folder.kind != kind_of(config)
                or not _same(folder.recipe(), wanted)
            ):
                continue
            rows = folder.metrics()[1:]  # the first step also warms up and checks itself
        except PixrlError:
            continue  # a damaged run says nothing about this one
        seconds = [sum(x for name, x in row.items() if name.startswith(_PHASE)) for row in rows]
        if seconds and _same_machine(folder):
            return fmean(seconds), run_name(path)
    return None, None


def _same(recipe: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    per_step = recipe.get("prompts", {}).get("per_step") == wanted["prompts"]["per_step"]
    return per_step and all(recipe.get(name) == wanted[name] for name in _SAME)


def _same_machine(folder: RunFolder) -> bool:
    """Whether a run's processor and GPUs are those of here."""
    environment = json.loads((folder.path / ENVIRONMENT).read_text(encoding="utf-8"))
    here = json.loads(describe(None, ""))["machine"]
    return all(environment["machine"][name] == here[name] for name in ("cpu", "cores", "gpus"))


def lower_bound(operations: int, device: torch.device, precision: Precision) -> tuple[float, str]:
    """Seconds that so many operations take at the speed of large matrix products here; measured in a moment."""
    rate = _rate(device, precision.autocast or precision.weights)
    return operations / rate, f"drawing alone, at {rate / 1e9:.0f} GFLOP/s"


def _rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations a second.

    Of a CPU: what one thread does in a second that it really computes, times the threads. Other programs that keep the
    machine busy change little of it, and threads that get in each other's way make it no smaller.
    """
    if device.type == "cpu" and dtype is torch.float16:
        dtype = torch.float32
    x = torch.ones(SIDE, SIDE, device=device, dtype=dtype)
    if device.type != "cpu":
        return max(2 * SIDE**3 / _product_seconds(x, time.perf_counter) for _ in range(TRIES))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        return threads * max(2 * SIDE**3 / _product_seconds(x, time.thread_time) for _ in range(TRIES))
    finally:
        torch.set_num_threads(threads)


def _product_seconds(x: torch.Tensor, clock: Callable[[], float]) -> float:
    begun = clock()
    (x @ x)[0, 0].item()  # waits for a GPU
    return clock() - begun
