"""Where the time of `pixrl align` goes, by kind of operation, on the toy world.

    python benchmarks/profiling.py [--dtype float32] [--recipe toy/diffusion-nft]

One training step is drawn and learned from to warm up, the next is recorded by torch's profiler with one thread. The
table has each kind's share of the processor time within operators, for drawing and for the update, and the seconds of a
step without the profiler. (Not called profile.py: that would hide Python's module of this name from torch.compile.)
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as recorded

from align import LEVELS, NOISES, PROMPTS, STEPS, Bench
from pixrl import config as recipes
from pixrl.runs.config import AlignConfig
from pixrl.runs.loaded import load_run, plan_batches

KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "mkldnn_linear"),
    "convolutions": ("convolution", "mkldnn_convolution", "thnn_conv"),
    "attention": ("flash_attention", "scaled_dot_product", "softmax"),
    "activations": ("gelu", "silu", "sigmoid", "tanh"),
    "norms": ("layer_norm", "rms_norm", "rsqrt", "pow", "mean", "group_norm"),
    "copies": ("copy_", "cat", "clone", "contiguous", "stack", "_to_copy", "fill_", "zero_", "repeat"),
    "sums and products of elements": ("add", "mul", "sub", "div", "lerp", "sum", "addcmul", "neg", "clamp"),
}
"""A kind -> words in an operator's name; the first kind that fits counts."""


def kind_of(operator: str) -> str:
    """The kind of an operator such as aten::addmm."""
    name = operator.removeprefix("aten::").removesuffix("_backward")
    exact = [kind for kind, words in KINDS.items() if name in words or name.rstrip("_") in words]
    within = [kind for kind, words in KINDS.items() if any(len(word) > 3 and word in name for word in words)]
    return (exact + within + ["the rest"])[0]


def shares(work: Callable[[], object]) -> tuple[dict[str, float], float]:
    """Each kind's seconds within operators, and all of the processor's seconds."""
    begun = time.process_time()
    work()
    whole = time.process_time() - begun
    with recorded(activities=[ProfilerActivity.CPU]) as record:
        work()
    found: defaultdict[str, float] = defaultdict(float)
    for row in record.key_averages():
        if row.key.startswith("aten::"):
            found[kind_of(row.key)] += row.self_cpu_time_total / 1e6
    return dict(found), whole


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--recipe", default="toy/diffusion-nft")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the recipe"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    values: dict[str, Any] = {
        "prompts.per_step": PROMPTS,
        "exploration.noises": NOISES,
        "sampling.steps": STEPS,
    }
    values |= {"loss.timesteps": LEVELS, "loss.levels": None, "machine.dtype": arguments.dtype}
    config = recipes.load(AlignConfig, arguments.recipe, arguments.set, values=values, kind="align")
    run = load_run(config)
    bench = Bench(run, plan_batches(run)[0], scored=False)
    rollouts = bench.aligner.collect(bench.groups, 0)
    scores, weights = bench.random_scores(rollouts), run.rewards.weights(0)
    bench.aligner.update(rollouts, scores, weights)
    phases = {
        "drawing": shares(lambda: bench.aligner.collect(bench.groups, 0)),
        "update": shares(lambda: bench.aligner.update(rollouts, scores, weights)),
    }
    print(f"{'':32}" + "".join(f"{name:>12}" for name in phases))
    learned, drawn = phases["update"][0], phases["drawing"][0]
    for kind in sorted(learned.keys() | drawn.keys(), key=lambda kind: -learned.get(kind, 0)):
        cells = (found.get(kind, 0) / sum(found.values()) for found, _ in phases.values())
        print(f"{kind:32}" + "".join(f"{cell:12.1%}" for cell in cells))
    print(f"{'seconds, one thread':32}" + "".join(f"{whole:12.2f}" for _, whole in phases.values()))


if __name__ == "__main__":
    main()
