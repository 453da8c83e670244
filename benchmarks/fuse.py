"""How fast `pixrl fuse` is, and where its time goes.

    python benchmarks/fuse.py                    on the toy world: start-up, 128 pictures, share inside the networks
    python benchmarks/fuse.py --gpu              SDXL-shaped random weights at 512 x 512 against a plain diffusers loop
    python benchmarks/fuse.py --gpu --tiny       the same code at toy size, on whatever is here

Figures are wall time. `--json` prints them as one JSON object.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sdxl_shaped import Sizes, build
from torch import Tensor

from pixrl.fusion.config import FuseConfig
from pixrl.fusion.world import FusionWorld, Scored, load_world
from pixrl.jobs import fuse as fuse_job
from pixrl.models.base import Conditioning, Renderer

CONCEPTS = ("owl", "snail")


class Clock:
    """Adds up the time spent inside the networks."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def run(self, name: str, function: Any, *given: Any) -> Any:
        begun = time.perf_counter()
        result = function(*given)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun
        return result


class TimedRenderer(Renderer):
    """A renderer whose calls are timed."""

    def __init__(self, inner: Renderer, clock: Clock) -> None:
        self.inner, self.clock = inner, clock
        self.name, self.device, self.settings = inner.name, inner.device, inner.settings
        self.vocabulary = inner.vocabulary

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        found: Conditioning = self.clock.run("model", self.inner.encode, prompts)
        return found

    def sample(self, conditioning: Conditioning, seeds: Sequence[int]) -> Tensor:
        found: Tensor = self.clock.run("model", self.inner.sample, conditioning, seeds)
        return found

    def fingerprint(self) -> str:
        return self.inner.fingerprint()


class TimedScorer:
    """A scorer whose calls are timed."""

    def __init__(self, inner: Any, clock: Clock) -> None:
        self.inner, self.clock, self.provenance = inner, clock, inner.provenance

    def exemplar_features(self, images_MCHW: Tensor) -> Tensor:
        found: Tensor = self.clock.run("reward", self.inner.exemplar_features, images_MCHW)
        return found

    def similarities(self, images_BCHW: Tensor, exemplars: Sequence[Tensor]) -> Scored:
        found: Scored = self.clock.run("reward", self.inner.similarities, images_BCHW, exemplars)
        return found


def timed(world: FusionWorld) -> tuple[FusionWorld, Clock]:
    """The same world without exemplars, and the clock that its networks run on."""
    clock = Clock()
    renderer, scorer = TimedRenderer(world.renderer, clock), TimedScorer(world.scorer, clock)
    return FusionWorld(renderer, scorer, world.card, clip=world.clip, segmenter=world.segmenter), clock


def measure_run(config: FuseConfig, out: Path, repeats: int) -> dict[str, float]:
    """Whole runs in this process after start-up, folders included: the median of several."""
    world = load_world(config.model, config.clip, config.segmenter, config.device)
    fuse_job.start(config.model_copy(update={"budget": config.batch}), out / "warm-up", world=world)
    walls, shares, models, rewards = [], [], [], []
    for number in range(repeats):
        clocked, clock = timed(world)
        begun = time.perf_counter()
        fuse_job.start(config, out / f"run-{number}", world=clocked)
        walls.append(time.perf_counter() - begun)
        shares.append(sum(clock.seconds.values()) / walls[-1])
        models.append(clock.seconds["model"] / walls[-1])
        rewards.append(clock.seconds["reward"] / walls[-1])
    wall = statistics.median(walls)
    return {
        "seconds": wall,
        "images_per_second": config.budget / wall,
        "share_in_networks": statistics.median(shares),
        "share_in_model": statistics.median(models),
        "share_in_rewards": statistics.median(rewards),
    }


def measure_command(model: str, budget: int, out: Path) -> dict[str, float]:
    """The command as a person runs it: from Enter to the first picture on the disk, and to the end."""
    command = [sys.executable, "-m", "pixrl", "fuse", *CONCEPTS, "--model", model, "--budget", str(budget)]
    begun = time.perf_counter()
    process = subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    first = None
    while process.poll() is None:
        if first is None and any((out / "rollouts" / "images").glob("*.png")):
            first = time.perf_counter() - begun
        time.sleep(0.01)
    if process.returncode != 0 or first is None:
        assert process.stderr is not None
        raise SystemExit(f"{' '.join(command)} failed:\n{process.stderr.read().decode()}")
    return {"command_first_picture": first, "command_whole": time.perf_counter() - begun}


def toy(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The toy world: the goals of docs/fuse.md."""
    config = FuseConfig(concepts=CONCEPTS, model=arguments.model, budget=arguments.budget)
    figures = measure_command(arguments.model, arguments.budget, folder / "command")
    return {"threads": torch.get_num_threads(), **figures, **measure_run(config, folder, arguments.repeats)}


def gpu(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Random weights in SDXL's shape: `pixrl fuse` against a loop over one picture at a time."""
    sizes = Sizes.tiny() if arguments.tiny else Sizes.full()
    checkpoints = build(folder, sizes)
    config = FuseConfig(
        concepts=CONCEPTS,
        model=str(checkpoints["sdxl"]),
        clip=str(checkpoints["clip"]),
        segmenter=str(checkpoints["segmenter"]),
        budget=arguments.budget,
        presence=0.5,
        max_failed_share=0.99,
    )
    ours = measure_run(config, folder, arguments.repeats)
    world = load_world(config.model, config.clip, config.segmenter, config.device)
    plain = plain_loop(checkpoints["sdxl"], world, arguments.plain, batch=1, score=False)
    published = plain_loop(checkpoints["sdxl"], world, arguments.plain, batch=1, score=True)
    batched = plain_loop(checkpoints["sdxl"], world, arguments.plain, batch=config.batch, score=False)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "device": device,
        **ours,
        "plain_images_per_second": plain,
        "published_style_images_per_second": published,
        "plain_batched_images_per_second": batched,
        "ratio_to_plain": ours["images_per_second"] / plain,
        "ratio_to_published_style": ours["images_per_second"] / published,
        "ratio_to_plain_batched": ours["images_per_second"] / batched,
    }


def plain_loop(path: Path, world: FusionWorld, count: int, *, batch: int, score: bool) -> float:
    """Pictures a second of diffusers' own pipeline called in a loop; with `score`, each picture is scored in turn.

    Pictures come out as PIL images, as a caller gets them. The pipeline is loaded anew, as diffusers loads it.
    """
    from diffusers import StableDiffusionXLPipeline

    device = world.renderer.device
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    pipeline = StableDiffusionXLPipeline.from_pretrained(path, torch_dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    width, height = world.renderer.settings.width, world.renderer.settings.height
    sources = world.renderer.encode([world.prompt(concept) for concept in CONCEPTS])
    exemplars = [world.exemplars(concept, 4).features_ME for concept in CONCEPTS]
    assert sources.pooled_BE is not None
    pooled = sources.pooled_BE.mean(dim=0, keepdim=True).to(device, dtype).repeat(batch, 1)

    def once(seed: int) -> None:
        a = torch.rand(
            batch, 1, sources.tokens_BLD.shape[2], generator=torch.Generator().manual_seed(seed)
        ).to(device)
        tokens = sources.tokens_BLD[:1] * a + sources.tokens_BLD[1:] * (1 - a)
        images = pipeline(
            prompt_embeds=tokens.to(dtype),
            pooled_prompt_embeds=pooled,
            num_inference_steps=world.renderer.settings.steps,
            guidance_scale=0.0,
            height=height,
            width=width,
            generator=torch.Generator(device).manual_seed(seed),
        ).images
        if score:
            pixels = [torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8) for i in images]
            stacked = torch.stack([p.view(height, width, 3).permute(2, 0, 1).float() / 255 for p in pixels])
            world.scorer.similarities(stacked, exemplars)

    for seed in range(2):
        once(seed)
    rounds = max(1, count // batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begun = time.perf_counter()
    for seed in range(rounds):
        once(seed)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    rate = rounds * batch / (time.perf_counter() - begun)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return rate


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="toy:sd3")
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="with --gpu: a checkpoint of kilobytes")
    parser.add_argument("--plain", type=int, default=64, help="with --gpu: pictures of the plain loop")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="pixrl-bench-", dir=os.environ.get("TMPDIR")))
    try:
        figures = gpu(arguments, folder) if arguments.gpu else toy(arguments, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if arguments.json:
        print(json.dumps(figures, indent=1))
        return
    for name, value in figures.items():
        print(f"{name:36} {value if isinstance(value, str | int) else format(value, '.3f')}")


if __name__ == "__main__":
    main()
