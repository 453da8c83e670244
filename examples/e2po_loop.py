"""E2PO on DiffusionNFT in one file: from prompts to `optimizer.step()`. The page to read first.

    python examples/e2po_loop.py

trains the toy world's Stable Diffusion 3 for a few steps on two CPU cores. `pixrl align` does the same with every part
exchangeable, in micro-batches, on many processes, with logs and checkpoints; a test holds this file's first update
against that of `pixrl align`. The steps are those of E2PO's algorithm box:

1. Learn K - 1 variants of each prompt, spread from each other at a set distance from it (Eqs. 9-12).
2. Draw every noise with every variant by the old policy; variants steer while it is noisy (Eqs. 8 and 13).
3. Score the pictures; a group's rewards become advantages (Eq. 3).
4. Descend DiffusionNFT's loss, conditioned on the prompt itself (Eqs. 4-7).
5. The old policy follows the trained one slowly.

Axes: P prompts, G noises of a prompt, K variants, S = G K samples of a prompt, B = P S samples.
"""

from collections.abc import Iterator, Sequence
from itertools import count, pairwise

import torch
from torch import Tensor

from pixrl import models, rewards
from pixrl.algorithms.e2po import PerturbationSettings, PerturbedEmbeddings
from pixrl.algorithms.exploration import Group, Variants
from pixrl.algorithms.sampling import Use
from pixrl.data.prompts import load_prompts
from pixrl.equations import group_advantages, interpolate, nft_loss, optimality
from pixrl.models.base import FlowPolicy
from pixrl.models.pipeline import FlowPipelinePolicy
from pixrl.models.slots import LoraSlots, Slot
from pixrl.rewards.base import Reward
from pixrl.runs.data import PromptSampler
from pixrl.types import RewardBatch, sample_seed

SEED = 0
PROMPTS, NOISES, VARIANTS = 4, 2, 4  # P, G, K
SAMPLES = NOISES * VARIANTS  # S
SAMPLING_STEPS = 8
LEVELS, TRAINED_LEVELS = (
    2,
    4,
)  # noise levels that a sample is trained at, of the first so many: layout is decided there
BETA, OLD_DECAY, LR = 1.0, 0.3, 2e-3
EXPLORATION = PerturbationSettings(
    variants=VARIANTS, encoders="both", target=0.6, margin=0.03, weighted="anchor", norm="relative", max_norm=1.0,
    steps=100, lr=4e-3, prompts_at_once=PROMPTS,
)  # fmt: skip


@torch.no_grad()
def draw(policy: FlowPolicy, variants: Variants, groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """Samples of the old policy: pictures [B, 3, H, W] and clean latents [B, C, h, w].

    Sample g + k G of a group begins at noise g and is steered by variant k, so that a group holds every pair of them.
    """
    prompt_B = torch.arange(len(groups)).repeat_interleave(SAMPLES)
    variant_B = torch.arange(VARIANTS).repeat_interleave(NOISES).repeat(len(groups))
    seeds = [sample_seed(SEED, one.epoch, one.index, s % NOISES) for one in groups for s in range(SAMPLES)]
    x = policy.initial_noise(seeds)
    sigmas = policy.schedule(SAMPLING_STEPS).tolist()
    with policy.slot(Slot.OLD):
        for sigma, after in pairwise(sigmas):
            condition = variants.at(
                sigma, prompt_B, variant_B
            )  # c_k(t) = lambda(t) c_k + (1 - lambda(t)) c_0
            velocity = policy.velocity(x, x.new_full((len(x),), sigma), condition)
            x = x + (after - sigma) * velocity
    return policy.decode(x).float().cpu(), x


def score(reward: Reward, images_BCHW: Tensor, groups: Sequence[Group]) -> Tensor:
    """Rewards [P, S]; a picture that could not be scored is nan, and is left out below."""
    each = [one for one in groups for _ in range(SAMPLES)]
    batch = RewardBatch(images_BCHW, [one.prompt for one in each], [one.metadata for one in each])
    return reward.score(batch).values_B.view(len(groups), SAMPLES)


def loss(
    policy: FlowPolicy, variants: Variants, groups: Sequence[Group], x0_B: Tensor, advantage_PS: Tensor
) -> Tensor:
    """DiffusionNFT's loss over all samples that teach something, each at `LEVELS` noise levels of its own."""
    teaches_PS = ~advantage_PS.isnan() & (advantage_PS.nan_to_num() != 0).any(dim=1, keepdim=True)
    rows = teaches_PS.flatten().nonzero().flatten()
    streams = [sample_seed(SEED, one.epoch, one.index, s) for one in groups for s in range(SAMPLES)]
    sigmas = policy.schedule(SAMPLING_STEPS)
    order_BT = torch.stack([shuffled(streams[row]) for row in rows])
    anchor = variants.anchor[rows // SAMPLES]  # c_0: what is learnt is the prompt's own
    x0, good_B = x0_B[rows], optimality(advantage_PS.flatten()[rows])
    total = torch.zeros(())
    for part in range(LEVELS):
        t_B = sigmas[order_BT[:, part]]
        noise = policy.initial_noise([sample_seed(streams[row], Use.FRESH, part, 0) for row in rows])
        x_t = interpolate(x0, noise, t_B)
        with policy.quick_backward():
            velocity = policy.velocity(x_t, t_B, anchor)
            with torch.no_grad(), policy.slot(Slot.OLD):
                old = policy.velocity(x_t, t_B, anchor)
        total = total + nft_loss(x_t, t_B, x0, velocity, old, good_B, BETA).sum()
    return 5 / BETA * total / (LEVELS * len(rows))  # 5 / beta: the scale of the released trainer


def shuffled(stream: int) -> Tensor:
    """A sample's own order of the trained noise levels."""
    generator = torch.Generator().manual_seed(sample_seed(stream, Use.ORDER, 0, 0))
    return torch.randperm(TRAINED_LEVELS, generator=generator)


def train(model: str = "toy:sd3") -> Iterator[tuple[LoraSlots, float]]:
    """Trains for as long as it is asked; after each step, the LoRA slots and the mean reward of its pictures."""
    policy = models.load(model, device="cpu", dtype="float32", steps=SAMPLING_STEPS)
    assert isinstance(policy, FlowPipelinePolicy)
    slots = policy.attach_lora(rank=16, alpha=32, seed=SEED)
    reward = rewards.load("geneval", segmenter="toy:segmenter", clip="toy:clip", graded=True)
    prompts = PromptSampler(load_prompts("toy:geneval"), per_step=PROMPTS, seed=SEED)
    exploration = PerturbedEmbeddings(EXPLORATION)
    optimizer = torch.optim.AdamW(slots.parameters(), lr=LR, weight_decay=1e-4)
    for step in count():
        groups = prompts.groups(step)
        variants = exploration.prepare(policy, [one.prompt for one in groups])
        images_BCHW, x0_B = draw(policy, variants, groups)
        rewards_PS = score(reward, images_BCHW, groups)
        advantage_PS = group_advantages(rewards_PS, "global").clamp(-5, 5)
        optimizer.zero_grad()
        loss(policy, variants, groups, x0_B, advantage_PS).backward()
        torch.nn.utils.clip_grad_norm_(slots.parameters(), 1.0)
        optimizer.step()
        slots.blend(Slot.OLD, Slot.CURRENT, OLD_DECAY)
        yield slots, rewards_PS.nanmean().item()


if __name__ == "__main__":
    for number, (_, mean) in zip(range(10), train(), strict=False):
        print(f"step {number}: reward {mean:.3f}")
