"""What several processes gain: efficiency of two against one, bytes that they move, a projection to 8 and 64 cards.

    python benchmarks/scaling.py [--repeats 5] [--json FILE]

Two gloo processes with one thread each take turns in one run: one does all groups of a step while the other waits, then
both share them. Efficiency is t(1) / (2 t(2)), of wall time and of CPU time, which does not see other programs on the
machine. The bytes are those handed to collectives, with LoRA whole on every process and with LoRA sharded like its
block. The projection is arithmetic on the published shapes; it prints what it assumes.
"""

import argparse
import json
import math
import os
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

from pixrl.algorithms.trainer import Aligner, MicroBatches
from pixrl.algorithms.world import Alone, World
from pixrl.models.memory.sharding import shard, sharded_bytes
from pixrl.models.slots import KNOWN_TARGETS, slot_sizes
from pixrl.runs.config import AlignConfig
from pixrl.runs.loaded import LoadedRun, load_run
from pixrl.types import Scores

RANK = 32
"""LoRA's, as the recipes have it."""
GATHERS = ("all_gather_single", "all_gather_into_tensor", "reduce_scatter_single", "reduce_scatter_tensor")
"""The collectives of FSDP2, by the names that torch 2.13 and older ones have for them."""


class Counting:
    """A process group that counts the bytes of its sums and of the objects it gathers."""

    def __init__(self, world: World) -> None:
        self.world, self.summed, self.gathered = world, 0, 0
        self.rank, self.size = world.rank, world.size

    def sum(self, values: Tensor) -> Tensor:
        self.summed += values.nbytes
        return self.world.sum(values)

    def gather(self, value: Any) -> list[Any]:
        self.gathered += len(pickle.dumps(value))
        return self.world.gather(value)


@contextmanager
def counting_shards() -> Iterator[dict[str, int]]:
    """Count the bytes that FSDP gathers (whole tensors) and scatters while it is open."""
    counts, before = {"bytes": 0}, {name: vars(dist)[name] for name in GATHERS if name in vars(dist)}

    def counted(name: str) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            tensors = [x for x in (*given, *named.values()) if isinstance(x, Tensor)]
            counts["bytes"] += max(x.nbytes for x in tensors)
            return before[name](*given, **named)

        return call

    try:
        for name in before:
            setattr(dist, name, counted(name))
        yield counts
    finally:
        for name, own in before.items():
            setattr(dist, name, own)


def settings(groups: int) -> AlignConfig:
    return AlignConfig.model_validate(
        {
            "model": "toy:sd3",
            "prompts": {"source": "toy:geneval", "per_step": groups},
            "rewards": [{"name": "clip_text", "options": {"model": "toy:clip"}}],
            "exploration": {"kind": "noise", "noises": 4},
            "sampling": {"steps": 4, "solver": "dpm"},
            "loss": {"kind": "nft", "timesteps": 2},
            "lora": {"rank": RANK, "alpha": 64},
            "machine": {"device": "cpu", "dtype": "float32"},
        }
    )


@dataclass(frozen=True)
class Cost:
    """Seconds of a step on this process."""

    wall: float
    cpu: float


def step(run: LoadedRun, aligner: Aligner, *, whole: bool) -> Cost:
    """Draw, score at random and learn from the groups of a step: all of them, or this process's."""
    start = aligner.slots.state()
    wall, cpu = time.perf_counter(), time.process_time()
    rollouts = aligner.collect(run.prompts.groups(0) if whole else run.groups(0), 0)
    values_B = torch.tensor([(stream % 1000) / 1000 for stream in rollouts.samples.streams])
    scores = {"clip_text": Scores(values_B, (None,) * len(values_B), provenance={"model": "random"})}
    aligner.update(rollouts, scores, {"clip_text": 1.0})
    taken = Cost(time.perf_counter() - wall, time.process_time() - cpu)
    aligner.slots.load_state(start)
    return taken


def efficiency(run: LoadedRun, repeats: int) -> dict[str, Any]:
    """Return efficiencies of two processes against one, and the bytes of an update."""
    team = run.team
    alone, counting = run.aligner(MicroBatches(8, 8)), Counting(team)
    alone.world = Alone()
    together = run.aligner(MicroBatches(8, 8))
    together.world = counting
    ratios: list[tuple[float, float, float]] = []
    for number in range(repeats + 1):
        team.wait()
        single = step(run, alone, whole=True) if team.leads else Cost(0.0, 0.0)
        team.wait()
        counting.summed = counting.gathered = 0
        costs = team.gather(step(run, together, whole=False))
        if number:  # the first one warms up
            one = team.gather(single)[0]
            wall, cpu = max(cost.wall for cost in costs), sum(cost.cpu for cost in costs)
            ratios.append((one.wall / (team.size * wall), one.cpu / cpu, one.wall))
    lora = 4 * sum(x.numel() for x in run.slots.parameters())
    return {
        "processes": team.size,
        "efficiency_wall": statistics.median(wall for wall, _, _ in ratios),
        "efficiency_wall_of_each": [round(wall, 3) for wall, _, _ in ratios],
        "efficiency_cpu": statistics.median(cpu for _, cpu, _ in ratios),
        "efficiency_cpu_of_each": [round(cpu, 3) for _, cpu, _ in ratios],
        "seconds_of_one_process": statistics.median(wall for _, _, wall in ratios),
        "lora_bytes": lora,
        "bytes_summed_an_update": counting.summed,
        "bytes_gathered_an_update": counting.gathered,
    }


def sharded(run: LoadedRun, repeats: int) -> list[dict[str, Any]]:
    """Return bytes and seconds of a forward and a backward pass: whole, LoRA whole, and LoRA sharded with its block."""
    rows = []
    for name in ("whole", "base sharded, LoRA whole", "base and LoRA sharded"):
        other = load_run(settings(2))
        policy, slots = other.policy, other.policy.lora
        assert slots is not None
        if name != "whole":
            shard(policy.denoiser, run.team.mesh(), slots.all_parameters() if "whole" in name else ())
        x = policy.initial_noise(range(4))
        condition = policy.encode([prompt.text for prompt in other.prompts.prompts][:4])
        seconds: list[float] = []
        with counting_shards() as counts:
            for number in range(repeats + 1):
                run.team.wait()
                counts["bytes"] = 0
                begun = time.process_time()
                policy.velocity(x, x.new_full((4,), 0.5), condition).square().mean().backward()
                seconds += [time.process_time() - begun] if number else []
        held = sum(
            (p.to_local() if isinstance(p, DTensor) else p).nbytes for p in policy.denoiser.parameters()
        )
        summed = 4 * sum(p.numel() for p in slots.parameters()) if name != "base and LoRA sharded" else 0
        rows.append(
            {
                "what": name,
                "weights_and_lora_held": held,
                "bytes_of_a_pass_and_its_gradient": counts["bytes"],
                "bytes_summed_an_update": summed,
                "cpu_seconds_of_both": statistics.median(seconds),
            }
        )
    return rows


@dataclass(frozen=True)
class Cards:
    """What the projection assumes: a card's speed and links."""

    flops: float = 989e12
    """Dense bf16 of an H100 SXM, by its data sheet."""
    share: float = 0.4
    """Of that, what the networks attain: assumed."""
    host: int = 8
    inside: float = 450e9
    """Bytes a second of a card to others of its host, one way: NVLink 4, data sheet."""
    outside: float = 50e9
    """Bytes a second of a card to other hosts: one 400 Gb/s adapter a card, as in a DGX H100."""
    attained: float = 0.7
    """Of either, what collectives attain: assumed."""
    latency: float = 20e-6
    """Seconds of one message: assumed."""


@dataclass(frozen=True)
class Work:
    """What the projection assumes of a run: DiffusionNFT's at the papers' scale."""

    groups: int = 64
    pictures: int = 24
    steps: int = 10
    levels: int = 6
    batch: int = 8
    """Pictures that go through the model at a time."""


def published() -> dict[str, tuple[nn.Module, Callable[[nn.Module], Any]]]:
    """Return transformers of the published shapes without content, and a pass of one 512 x 512 picture through each."""
    with torch.device("meta"):
        sd35 = SD3Transformer2DModel(
            sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
            num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536,
            pooled_projection_dim=2048, pos_embed_max_size=384, dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        )  # fmt: skip
        flux = FluxTransformer2DModel(guidance_embeds=True)

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, device="meta", dtype=torch.bfloat16)

    def pass_sd35(model: nn.Module) -> Any:
        return model(
            hidden_states=empty(1, 16, 64, 64), timestep=empty(1), encoder_hidden_states=empty(1, 333, 4096),
            pooled_projections=empty(1, 2048), return_dict=False,
        )  # fmt: skip

    def pass_flux(model: nn.Module) -> Any:
        return model(
            hidden_states=empty(1, 1024, 64), timestep=empty(1), encoder_hidden_states=empty(1, 512, 4096),
            pooled_projections=empty(1, 768), img_ids=empty(1024, 3), txt_ids=empty(512, 3), guidance=empty(1),
            return_dict=False,
        )  # fmt: skip

    return {"SD3.5-M": (sd35.bfloat16(), pass_sd35), "FLUX.1-dev": (flux.bfloat16(), pass_flux)}


def projection(cards: Cards, work: Work) -> list[dict[str, Any]]:
    """Return seconds of a training step, efficiency and weights a card, for 1, 8 and 64 cards of each shape."""
    rows = []
    for name, (model, one_pass) in published().items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            one_pass(model)
        seconds_of_pass = counter.get_total_flops() / (cards.flops * cards.share)
        lora = 4 * sum(slot_sizes(model, KNOWN_TARGETS, RANK))
        weights = sum(x.numel() * x.element_size() for x in model.parameters())
        # a picture: its drawing; at each level the old and the trained policy forwards, and twice that backwards
        passes = work.steps + 4 * work.levels
        gathers = work.steps + 3 * work.levels  # one each pass; the backward pass gathers once
        base: dict[bool, float] = {}
        for count in (1, 8, 64):
            link = (cards.inside if count <= cards.host else cards.outside) * cards.attained
            pictures = math.ceil(work.groups / count) * work.pictures
            computing = pictures * passes * seconds_of_pass
            summing = 2 * (count - 1) / count * lora / link + 2 * (count - 1) * cards.latency * (count > 1)
            for is_sharded in (False, True) if count > 1 else (False,):
                micro = pictures / work.batch
                parts = min(count, cards.host)  # a copy on each host: algorithms/world.py, `sharers`
                moved = weights * (parts - 1) / parts if is_sharded else 0.0
                gathering = micro * gathers * moved / (cards.inside * cards.attained)
                seconds = max(computing, gathering) + summing
                base.setdefault(False, seconds)
                rows.append(
                    {
                        "model": name, "cards": count, "sharded": is_sharded,
                        "gigabytes_of_weights": (sharded_bytes(model, parts) if is_sharded else weights) / 1e9,
                        "lora_megabytes": lora / 1e6, "seconds_a_step": seconds,
                        "seconds_summing": summing, "seconds_gathering": gathering,
                        "efficiency": base[False] / (count * seconds),
                    }
                )  # fmt: skip
    return rows


def worker(repeats: int, out: Path) -> None:
    torch.set_num_threads(1)
    run = load_run(settings(8))
    found = {"two_against_one": efficiency(run, repeats), "sharding": sharded(run, repeats)}
    if run.team.leads:
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("build/scaling.json"))
    given = parser.parse_args()
    if "WORLD_SIZE" in os.environ:
        worker(given.repeats, given.json)
        return
    given.json.parent.mkdir(parents=True, exist_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, *launcher, __file__, *sys.argv[1:]], env=environment, check=True)
    found = json.loads(given.json.read_text())
    cards, work = Cards(), Work()
    found["projection"] = {"assumes": asdict(cards) | asdict(work), "rows": projection(cards, work)}
    given.json.write_text(json.dumps(found, indent=1))
    show(found)


def show(found: dict[str, Any]) -> None:
    """Print what was found."""
    for name, value in found["two_against_one"].items():
        print(f"{name:<28}{value}")
    print("projection, assuming", found["projection"]["assumes"])
    for row in (*found["sharding"], *found["projection"]["rows"]):
        values = (f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values())
        print("  ".join(f"{name} {value}" for name, value in zip(row, values, strict=True)))


if __name__ == "__main__":
    main()
