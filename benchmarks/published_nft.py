"""pixrl's DiffusionNFT beside the loop of its paper, side by side in one process.

    python benchmarks/published_nft.py [--dtype float32] [--compile] [--rounds 5]

The published loop is written here plainly from the paper (Zheng et al. 2025, DiffusionNFT, algorithm 1 and section 4)
on diffusers' transformer and peft's adapters: pictures by the second-order multistep solver with the adapter `old`,
then for every micro-batch and noise level the old policy's velocity, the trained one's and the reference's, the loss
and its gradient, and one step of AdamW. Both sides have the same model, LoRA, prompts, noises, steps, noise levels,
micro-batches, dtype and a KL weight above 0; neither is scored here. Rounds alternate, and what counts is processor
time, so that other programs disturb both alike. Prints the medians and the ratio published / pixrl of each phase.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

from align import LEVELS, NOISES, PROMPTS, SAMPLES, STEPS, Bench
from pixrl import config as recipes
from pixrl import models
from pixrl.device import Precision
from pixrl.models.sd3 import SD3Policy
from pixrl.models.slots import KNOWN_TARGETS
from pixrl.runs.config import AlignConfig
from pixrl.runs.loaded import load_run, plan_batches

Result = TypeVar("Result")
BETA, KL = 1.0, 1e-4
RANK, ALPHA = 16, 32


class PublishedLoop:
    """DiffusionNFT as published, without anything of pixrl's but the loaded pipeline."""

    def __init__(self, prompts: list[str], micro_batch: int, precision: Precision) -> None:
        loaded = models.load("toy:sd3", device="cpu", dtype="float32")
        assert isinstance(loaded, SD3Policy)
        self.pipeline, self.precision, self.micro_batch = loaded.pipeline, precision, micro_batch
        self.transformer = self.pipeline.transformer.requires_grad_(False)
        lora = LoraConfig(
            r=RANK, lora_alpha=ALPHA, init_lora_weights="gaussian", target_modules=list(KNOWN_TARGETS)
        )
        for name in ("default", "old"):
            inject_adapter_in_model(lora, self.transformer, name)
        self.layers = [module for module in self.transformer.modules() if isinstance(module, LoraLayer)]
        self.use("default")
        self.parameters = [p for p in self.transformer.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=3e-4, weight_decay=1e-4)
        with torch.no_grad():
            self.tokens, _, self.pooled, _ = self.pipeline.encode_prompt(
                prompt=prompts, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False,
                max_sequence_length=loaded.text_length,
            )  # fmt: skip
        self.sigmas = torch.as_tensor(loaded.schedule(STEPS))
        self.shape = tuple(loaded.initial_noise([0]).shape[1:])

    def use(self, name: str | None) -> None:
        """Switch to an adapter; None: none of them."""
        for layer in self.layers:
            layer.enable_adapters(name is not None)
            if name is not None:
                layer.set_adapter(name)

    def velocity(self, x: Tensor, t: Tensor, rows: slice) -> Tensor:
        """The transformer's prediction, noise - data."""
        with self.precision.context(x.device):
            found: Tensor = self.transformer(
                hidden_states=x, timestep=t * 1000, encoder_hidden_states=self.tokens[rows],
                pooled_projections=self.pooled[rows], return_dict=False,
            )[0]  # fmt: skip
        return found.float()

    def micro_batches(self) -> list[slice]:
        """Rows of one pass after another."""
        return [slice(k, min(k + self.micro_batch, SAMPLES)) for k in range(0, SAMPLES, self.micro_batch)]

    @torch.no_grad()
    def draw(self) -> Tensor:
        """Latents of all samples, and their pictures, by the second-order multistep solver on sigmas (DPM++ 2M)."""
        self.use("old")
        drawn, images = [], []
        for rows in self.micro_batches():
            x, before = torch.randn(rows.stop - rows.start, *self.shape), None
            for k in range(STEPS):
                s, to = self.sigmas[k], self.sigmas[k + 1]
                clean = x - s * self.velocity(x, s.expand(len(x)), rows)
                if to == 0:
                    x = clean
                    break
                direction = clean
                if before is not None:
                    gap, last = (
                        half_log_snr(to) - half_log_snr(s),
                        half_log_snr(s) - half_log_snr(self.sigmas[k - 1]),
                    )
                    direction = clean + gap / (2 * last) * (clean - before)
                growth = torch.expm1(-(half_log_snr(to) - half_log_snr(s)))
                x, before = to / s * x - (1 - to) * growth * direction, clean
            drawn.append(x)
            vae = self.pipeline.vae
            latents = x / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
            images.append((vae.decode(latents, return_dict=False)[0] / 2 + 0.5).clamp(0, 1))
        self.images = torch.cat(images)
        return torch.cat(drawn)

    def update(self, x0: Tensor, good: Tensor) -> None:
        """One optimizer step over all samples at `LEVELS` noise levels each."""
        order = torch.stack([torch.randperm(STEPS)[:LEVELS] for _ in range(SAMPLES)])
        self.optimizer.zero_grad()
        for level in range(LEVELS):
            for rows in self.micro_batches():
                data, r = x0[rows], good[rows].view(-1, 1, 1, 1)
                t = self.sigmas[order[rows, level]]
                wide = t.view(-1, 1, 1, 1)
                x = (1 - wide) * data + wide * torch.randn_like(data)
                with torch.no_grad():
                    self.use("old")
                    old = self.velocity(x, t, rows)
                self.use("default")
                new = self.velocity(x, t, rows)
                with torch.no_grad():
                    self.use(None)
                    reference = self.velocity(x, t, rows)
                self.use("default")
                plus, minus = (1 - BETA) * old + BETA * new, (1 + BETA) * old - BETA * new
                error = r * weighted(x - wide * plus, data) + (1 - r) * weighted(x - wide * minus, data)
                loss = error.mean() * 5 / BETA + KL * (new - reference).square().mean()
                (loss / (LEVELS * len(self.micro_batches()))).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()


def half_log_snr(sigma: Tensor) -> Tensor:
    """log(alpha / sigma), the time of the solver."""
    return ((1 - sigma) / sigma).clamp(min=1e-6).log()


def weighted(predicted: Tensor, data: Tensor) -> Tensor:
    """The squared error of x0 divided by its own mean magnitude, without a gradient through that."""
    with torch.no_grad():
        scale = (predicted - data).abs().double().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-5)
    return (predicted - data).square() / scale.float()


def ours(dtype: str, compiled: bool) -> Bench:
    """The same method by pixrl, from a recipe."""
    values = {
        "prompts.per_step": PROMPTS, "exploration.noises": NOISES, "sampling.steps": STEPS, "loss.timesteps": LEVELS,
        "loss.levels": None, "loss.kl": KL, "advantage.skip_flat": False, "machine.dtype": dtype,
        "lora.rank": RANK, "lora.alpha": ALPHA,
    }  # fmt: skip
    if compiled:
        values["machine.compile"] = "inductor"
    run = load_run(recipes.load(AlignConfig, "toy/diffusion-nft", values=values, kind="align"))
    return Bench(run, plan_batches(run)[0], scored=False)


def timed(work: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds of processor time, and what the work returned."""
    begun = time.process_time()
    done = work()
    return time.process_time() - begun, done


def one_round(published: PublishedLoop, bench: Bench, good: Tensor) -> dict[str, float]:
    """Seconds of each side's drawing and update, one after another."""
    found = {}
    found["published draw"], x0 = timed(published.draw)
    found["pixrl draw"], rollouts = timed(lambda: bench.aligner.collect(bench.groups, 0))
    found["published update"], _ = timed(lambda: published.update(x0, good))
    scores, weights = bench.random_scores(rollouts), bench.shop.rewards.weights(0)
    found["pixrl update"], _ = timed(lambda: bench.aligner.update(rollouts, scores, weights))
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--compile", action="store_true", help="machine.compile for pixrl's side")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench = ours(arguments.dtype, arguments.compile)
    policy, sizes = bench.shop.policy, bench.aligner.micro_batches
    prompts = [group.prompt for group in bench.groups for _ in range(NOISES)]
    published = PublishedLoop(prompts, sizes.train, policy.precision)
    good = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(0))
    print(
        f"{SAMPLES} samples, {STEPS} steps, {LEVELS} noise levels, micro-batches of {sizes.rollout} and {sizes.train}, "
        f"{arguments.dtype}, {torch.get_num_threads()} thread, compiled: {arguments.compile}"
    )
    one_round(published, bench, good)  # warms up
    rounds = [one_round(published, bench, good) for _ in range(arguments.rounds)]
    for phase in ("draw", "update"):
        mine, theirs = ([one[f"{who} {phase}"] for one in rounds] for who in ("pixrl", "published"))
        ratios = sorted(b / a for a, b in zip(mine, theirs, strict=True))
        print(
            f"{phase:7} published {statistics.median(theirs):7.2f} s   pixrl {statistics.median(mine):7.2f} s   ratio "
            f"{statistics.median(ratios):5.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f} over {len(ratios)} rounds"
        )


if __name__ == "__main__":
    main()
