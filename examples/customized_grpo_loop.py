"""Customized-GRPO in one file: keep a subject's identity while following the prompt. Read `e2po_loop.py` first.

    python examples/customized_grpo_loop.py

trains the toy world's FLUX, which is shown one reference picture of each subject, for a few steps. A test holds its
first update against that of `pixrl personalize`. Besides Flow-GRPO (random steps with a density, a clipped ratio):

* SARS: where identity and prompt agree, the advantage gains; where they conflict, it loses (Eqs. 10 and 11).
* TDW: the prompt counts more in early steps, the identity in late ones (Eq. 12).

Axes: P prompts, S samples of a prompt, B = P S, T sampling steps.
"""

from collections.abc import Iterator, Sequence
from itertools import count

import torch
from torch import Tensor

from pixrl import models, rewards
from pixrl.algorithms.exploration import Group, NoiseOnly, prepare
from pixrl.algorithms.sampling import Use
from pixrl.data.subject_prompts import subject_prompts
from pixrl.data.subjects import load_subjects
from pixrl.equations import clipped_surrogate, flow_sde_step, group_advantages, prompt_weight, shape_advantage
from pixrl.models.base import Conditioning
from pixrl.models.flux import FluxPolicy
from pixrl.models.slots import LoraSlots
from pixrl.runs.data import PromptSampler
from pixrl.types import RewardBatch, sample_seed

SEED = 0
PROMPTS, SAMPLES, STEPS = 4, 4, 8  # P, S, T
ETA, LR, ALPHA = 0.7, 2e-3, 0.5
W_MAX, W_MIN = 0.7, 0.3
Transition = tuple[Tensor, Tensor, Tensor]
"""Latents before a random step, behind it, and the log-density of the step [B]."""


def condition(policy: FluxPolicy, groups: Sequence[Group]) -> Conditioning:
    """Each sample's prompt with its subject's reference picture."""
    anchor = prepare(NoiseOnly(), policy, groups).anchor
    return anchor[torch.arange(len(groups)).repeat_interleave(SAMPLES)]


def sde_step(
    policy: FluxPolicy, x: Tensor, given: Conditioning, number: int, **what: Tensor
) -> tuple[Tensor, Tensor]:
    """One random step of Flow-GRPO's SDE: where it leads, and its log-density; of `noise`, or of a given `next_x`."""
    sigmas = policy.schedule(STEPS)
    velocity = policy.velocity(x, x.new_full((len(x),), float(sigmas[number])), given)
    here, there = (x.new_full((len(x),), float(sigmas[at])) for at in (number, number + 1))
    step = flow_sde_step(x, velocity, here, there, ETA, sigma_max=float(sigmas[1]), **what)
    return step.next_x, step.log_prob


@torch.no_grad()
def draw(policy: FluxPolicy, given: Conditioning, groups: Sequence[Group]) -> tuple[Tensor, list[Transition]]:
    """Pictures [B, 3, H, W], and the random steps: all but the last one, which ends on the data."""
    keys = [(one, s) for one in groups for s in range(SAMPLES)]
    streams = [sample_seed(SEED, one.epoch, one.index, s) for one, s in keys]
    x, transitions = policy.initial_noise(streams), []
    for number in range(STEPS - 1):
        noise = policy.initial_noise([sample_seed(stream, Use.STEP, number, 0) for stream in streams])
        after, log_prob_B = sde_step(policy, x, given, number, noise=noise)
        transitions.append((x, after, log_prob_B))
        x = after
    last = policy.schedule(STEPS)[STEPS - 1]
    x = x - last * policy.velocity(x, x.new_full((len(x),), float(last)), given)
    return policy.decode(x).float().cpu(), transitions


def shaped(identity_PS: Tensor, prompt_PS: Tensor) -> Tensor:
    """Advantages [T, P, S] of both rewards, shaped by SARS and weighted by TDW at every true step."""
    steps_T = torch.arange(float(STEPS))
    prompt_T = prompt_weight(steps_T, STEPS, W_MAX, W_MIN, 6.0, 22.0, 0.8 * 25 / STEPS, 14.0)[:, None, None]
    identity, prompt = (group_advantages(one) for one in (identity_PS, prompt_PS))
    each = [shape_advantage(identity, prompt, float(1 - w), float(w), ALPHA, "tanh") for w in prompt_T]
    return torch.stack(each).clamp(-5, 5)


def train(model: str = "toy:flux") -> Iterator[tuple[LoraSlots, float]]:
    """Trains for as long as it is asked; after each step, the LoRA slots and the sum of both rewards' means."""
    policy = models.load(model, device="cpu", dtype="float32", steps=STEPS)
    assert isinstance(policy, FluxPolicy)
    policy.place()
    slots = policy.attach_lora(rank=16, alpha=32, seed=SEED)
    identity = rewards.load(
        "dino_seg", model="toy:identity", segmenter="toy:segmenter", mask="both", references="all"
    )
    follows = rewards.load("preference", model="toy:preference")
    subjects = subject_prompts(load_subjects("toy:subjects"), count=1)
    prompts = PromptSampler(subjects, per_step=PROMPTS, seed=SEED)
    optimizer = torch.optim.AdamW(slots.parameters(), lr=LR, weight_decay=1e-4)
    for step in count():
        groups = prompts.groups(step)
        given = condition(policy, groups)
        images_BCHW, transitions = draw(policy, given, groups)
        each = [one for one in groups for _ in range(SAMPLES)]
        batch = RewardBatch(images_BCHW, [one.prompt for one in each], [one.metadata for one in each])
        identity_PS, prompt_PS = (
            one.score(batch).values_B.view(len(groups), SAMPLES) for one in (identity, follows)
        )
        failed_PS = identity_PS.isnan() | prompt_PS.isnan()  # a failed score counts for neither reward
        nan = torch.nan
        advantage_TB = shaped(identity_PS.masked_fill(failed_PS, nan), prompt_PS.masked_fill(failed_PS, nan))
        rows = (~failed_PS.flatten()).nonzero().flatten()
        optimizer.zero_grad()
        for number, (x, after, old_log_prob_B) in enumerate(transitions):
            with policy.quick_backward():
                _, log_prob_B = sde_step(policy, x[rows], given[rows], number, next_x=after[rows])
            advantage_B = advantage_TB[number].flatten()[rows]
            loss_B = clipped_surrogate(log_prob_B, old_log_prob_B[rows], advantage_B, torch.inf)
            (loss_B.sum() / (len(transitions) * len(rows))).backward()
        torch.nn.utils.clip_grad_norm_(slots.parameters(), 1.0)
        optimizer.step()
        yield slots, (identity_PS.nanmean() + prompt_PS.nanmean()).item()


if __name__ == "__main__":
    for number, (_, mean) in zip(range(10), train(), strict=False):
        print(f"step {number}: identity and prompt together {mean:.3f}")
