"""How fast `pixrl align` is, and where its time goes.

    python benchmarks/align.py                   on the toy world: plain, and one thing changed at a time
    python benchmarks/align.py --gpu             SD3.5-Medium-shaped random weights at 512 x 512, LoRA rank 32
    python benchmarks/align.py --gpu --tiny      the same code at toy size, on whatever is here

One update is 128 samples: 16 prompts x 8 noises, 10 sampling steps, 3 trained noise levels each. Figures are medians of
wall time over `--repeats` updates after one that warms up. `--json` prints them as one JSON object.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sd35_shaped
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pixrl import config as recipes
from pixrl.algorithms.loss import Rollouts
from pixrl.algorithms.trainer import Aligner, MicroBatches
from pixrl.models.text import PromptCache
from pixrl.runs.config import AlignConfig
from pixrl.runs.loaded import LoadedRun, load_run, plan_batches
from pixrl.types import Scores

PROMPTS, NOISES, STEPS, LEVELS = 16, 8, 10, 3
SAMPLES = PROMPTS * NOISES
PEAK_SIDE = 8192
"""Side of the matrices that a GPU's bfloat16 peak is measured with."""


@dataclass
class NetworkClock:
    """Adds up the time within networks: the outermost call of any torch module, and every backward pass."""

    seconds: float = 0.0
    _inside: bool = field(default=False, init=False)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it every network of the process is timed."""
        call: Callable[..., Any] = nn.Module.__call__
        backward: Callable[..., Any] = torch.Tensor.backward

        def timed_call(module: nn.Module, *given: Any, **named: Any) -> Any:
            return self._time(lambda: call(module, *given, **named))

        def timed_backward(tensor: torch.Tensor, *given: Any, **named: Any) -> Any:
            return self._time(lambda: backward(tensor, *given, **named))

        nn.Module.__call__, torch.Tensor.backward = timed_call, timed_backward  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.__call__, torch.Tensor.backward = call, backward  # type: ignore[method-assign]

    def _time(self, work: Callable[[], Any]) -> Any:
        if self._inside:
            return work()
        self._inside = True
        begun = time.perf_counter()
        try:
            return work()
        finally:
            synchronize()
            self.seconds += time.perf_counter() - begun
            self._inside = False


@dataclass(frozen=True)
class Update:
    """Seconds of one update's phases."""

    collect: float
    score: float
    update: float

    @property
    def whole(self) -> float:
        return self.collect + self.score + self.update


class Bench:
    """One recipe, ready to update again and again. Every update draws the same prompts."""

    def __init__(self, shop: LoadedRun, micro_batches: MicroBatches, *, scored: bool) -> None:
        """`scored`: by the recipe's rewards; else by random numbers, where weights are random too."""
        self.shop, self.scored = shop, scored
        self.aligner: Aligner = shop.aligner(micro_batches)
        self.groups = shop.prompts.groups(0)

    def update(self) -> Update:
        """One: pictures, scores, learning."""
        begun = _now()
        rollouts = self.aligner.collect(self.groups, 0)
        drawn = _now()
        scores = (
            self.shop.rewards.score(rollouts.samples.batch(rollouts.images_BCHW))
            if self.scored
            else self.random_scores(rollouts)
        )
        scored = _now()
        self.aligner.update(rollouts, scores, self.shop.rewards.weights(0))
        return Update(drawn - begun, scored - drawn, _now() - scored)

    def random_scores(self, rollouts: Rollouts) -> dict[str, Scores]:
        """Different ones, so that there is something to learn."""
        values = torch.rand(len(rollouts), generator=torch.Generator().manual_seed(0))
        reasons = (None,) * len(rollouts)
        return {
            name: Scores(values, reasons, provenance={"model": "random"}) for name in self.shop.rewards.names
        }

    def speed(self, repeats: int) -> dict[str, float]:
        """Medians over some updates."""
        self.update()
        done = [self.update() for _ in range(repeats)]
        collect = statistics.median(one.collect for one in done)
        update = statistics.median(one.update for one in done)
        return {
            "rollout_images_per_second": SAMPLES / collect,
            "train_samples_per_second": SAMPLES / update,
            "seconds_collect": collect,
            "seconds_score": statistics.median(one.score for one in done),
            "seconds_update": update,
            "seconds_whole": statistics.median(one.whole for one in done),
        }

    def share_in_networks(self) -> float:
        """Of one update's wall time."""
        clock = NetworkClock()
        with clock.running():
            whole = self.update().whole
        return clock.seconds / whole


def toy(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The plain run, and the same with one thing changed at a time, each in its turn in this process."""
    del folder
    changes: dict[str, Callable[[], Bench]] = {
        "float32": lambda: _toy_bench("float32"),
        "bfloat16 autocast": lambda: _toy_bench("bfloat16"),
        "bfloat16, fused attention": lambda: _with_fused_attention(_toy_bench("bfloat16")),
        "float32, no prompt cache": lambda: _without_cache(_toy_bench("float32")),
    }
    if not arguments.no_compile:
        changes["float32, torch.compile"] = lambda: _compiled(_toy_bench("float32"))
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "samples": SAMPLES}
    for name, make in changes.items():
        bench = make()
        figures = bench.speed(arguments.repeats)
        if "compile" not in name:  # the clock would stand in the compiler's way
            figures["share_in_networks"] = bench.share_in_networks()
        found[name] = figures | {"peak_megabytes": peak_megabytes()}
    found["note"] = "peak_megabytes is the process's so far: it can only grow from one block to the next"
    return found


def gpu(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Random weights in SD3.5-Medium's shape; scores are random numbers, so that no reward model counts."""
    if not torch.cuda.is_available() and not arguments.tiny:
        return {"skipped": "no CUDA GPU here; --gpu --tiny runs the same code on a CPU, in kilobytes"}
    sizes = sd35_shaped.Sizes.tiny() if arguments.tiny else sd35_shaped.Sizes.full()
    model = sd35_shaped.build(folder / "sd35", sizes)
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"a photo of thing number {n}\n" for n in range(PROMPTS)))
    judge = folder / "judge.py"
    judge.write_text("def judge(images, prompts, metadata):\n    return [0.0] * len(images)\n")
    rewards = [{"name": "python", "options": {"function": f"{judge}:judge"}}]
    settings = {
        "model": str(model),
        "exploration": {"kind": "noise", "noises": NOISES},
        "sampling": {"steps": STEPS, "solver": "dpm"},
        "loss": {"kind": "nft", "timesteps": LEVELS},
        "prompts": {"source": str(prompts), "per_step": PROMPTS},
        "rewards": rewards,
        "lora": {"rank": 32, "alpha": 64},
        "machine": {
            "dtype": "auto",
            "gradient_checkpointing": arguments.checkpointing,
            "rollout_batch": arguments.rollout_batch,
            "train_batch": arguments.train_batch,
        },
    }
    shop = load_run(AlignConfig.model_validate(settings))
    micro_batches, notes = plan_batches(shop)
    bench = Bench(shop, micro_batches, scored=False)
    if arguments.compile:
        bench = _compiled(bench)
    figures = bench.speed(arguments.repeats)
    work, peak = count_flops(bench), peak_flops(shop.policy.device)
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "plan": "; ".join(notes),
        **figures,
        "share_in_networks": bench.share_in_networks(),
        "peak_megabytes": peak_megabytes(),
        "teraflops_of_an_update": work["whole"] / 1e12,
        "bf16_matmul_peak_teraflops": peak / 1e12,
        "fraction_of_peak_rollout": work["collect"] / figures["seconds_collect"] / peak,
        "fraction_of_peak_training": work["update"] / figures["seconds_update"] / peak,
        "fraction_of_peak": work["whole"] / figures["seconds_whole"] / peak,
    }


def count_flops(bench: Bench) -> dict[str, float]:
    """Floating-point operations of an update's two network phases, as torch counts matrix products and attention."""
    with FlopCounterMode(display=False) as drawing:
        rollouts = bench.aligner.collect(bench.groups, 0)
    with FlopCounterMode(display=False) as learning:
        bench.aligner.update(rollouts, bench.random_scores(rollouts), bench.shop.rewards.weights(0))
    collect, update = float(drawing.get_total_flops()), float(learning.get_total_flops())
    return {"collect": collect, "update": update, "whole": collect + update}


def peak_flops(device: torch.device) -> float:
    """Measured operations a second of a large bfloat16 matrix product: the best of several."""
    side = PEAK_SIDE if device.type == "cuda" else 512
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(10):
        begun = _now()
        for _ in range(10):
            a @ b
        best = max(best, 10 * 2 * side**3 / (_now() - begun))
    return best


def peak_megabytes() -> float:
    """GPU memory that torch allocated at most; on a CPU the process's largest resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _now() -> float:
    synchronize()
    return time.perf_counter()


def _toy_bench(dtype: str) -> Bench:
    values = {
        "prompts.per_step": PROMPTS,
        "exploration.noises": NOISES,
        "sampling.steps": STEPS,
        "loss.timesteps": LEVELS,
        "loss.levels": None,
        "advantage.skip_flat": False,
        "machine.dtype": dtype,
    }
    shop = load_run(recipes.load(AlignConfig, "toy/diffusion-nft", values=values, kind="align"))
    return Bench(shop, plan_batches(shop)[0], scored=True)


def _without_cache(bench: Bench) -> Bench:
    policy = bench.shop.policy
    policy._cache = PromptCache(policy._encode_one, limit_bytes=0)
    return bench


def _with_fused_attention(bench: Bench) -> Bench:
    """torch's own choice of kernels in the update too (pixrl.models.pipeline)."""
    bench.shop.policy.quick_backward = nullcontext  # type: ignore[method-assign]
    return bench


def _compiled(bench: Bench) -> Bench:
    bench.shop.policy.denoiser.compile()
    bench.shop.policy.compiled = True
    return bench


def show(figures: dict[str, Any]) -> None:
    """Blocks side by side in one table, then single figures."""
    blocks = {name: block for name, block in figures.items() if isinstance(block, dict)}
    rows = dict.fromkeys(row for block in blocks.values() for row in block)
    if blocks:
        print(" " * 28 + "".join(f"{name:>28}" for name in blocks))
    for row in rows:
        cells = (f"{block[row]:>28.3f}" if row in block else f"{'–':>28}" for block in blocks.values())
        print(f"{row:28}" + "".join(cells))
    for name, value in figures.items():
        if name not in blocks:
            print(f"{name:36} {value if isinstance(value, str | int) else format(value, '.3f')}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--no-compile", action="store_true", help="leave torch.compile out (it needs a compiler)"
    )
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="with --gpu: a checkpoint of kilobytes")
    parser.add_argument("--compile", action="store_true", help="with --gpu: torch.compile the transformer")
    parser.add_argument("--checkpointing", action="store_true", help="with --gpu: gradient checkpointing")
    parser.add_argument("--rollout-batch", type=int, help="with --gpu: in place of the plan's")
    parser.add_argument("--train-batch", type=int, help="with --gpu: in place of the plan's")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="pixrl-bench-", dir=os.environ.get("TMPDIR")))
    try:
        figures = gpu(arguments, folder) if arguments.gpu else toy(arguments, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if arguments.json:
        print(json.dumps(figures, indent=1))
    else:
        show(figures)


if __name__ == "__main__":
    main()
