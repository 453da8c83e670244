"""Evaluation: pictures of held-out prompts at fixed seeds, drawn and scored before, during and after training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pixrl.algorithms.exploration import Group, NoiseOnly, prepare
from pixrl.algorithms.sampling import Samples, Schedule, Solver, StepPlan, roll_out
from pixrl.algorithms.world import World
from pixrl.data.prompts import Prompt, PromptSet
from pixrl.metrics.diversity import Features, group_diversity
from pixrl.models.base import FlowPolicy
from pixrl.models.slots import Slot
from pixrl.rewards.set import RewardSet
from pixrl.runs.data import share
from pixrl.runs.log import AlignLog

_EPOCH = -5
"""Epoch of the evaluation's seeds; training uses 0 and up."""


@dataclass(frozen=True)
class Evaluator:
    """An evaluation that draws the same prompts and noises each time, with the weights of the moment."""

    policy: FlowPolicy
    prompts: tuple[Prompt, ...]
    per_prompt: int
    steps: int
    solver: Solver
    slot: Slot
    rewards: RewardSet
    features: Features
    world: World
    micro_batch: int
    seed: int

    def run(self, log: AlignLog, step: int, look: Callable[[int], None]) -> dict[str, float]:
        """Draw and score the pictures, log them, and return the figures.

        Args:
            log: takes the pictures, their scores and the figures.
            step: the training step before which this is.
            look: looks at the pictures and scores when they are written, before the figures are.

        Returns:
            `NAME/mean` and `NAME/failed_share` of each reward, and `diversity` where a prompt has several pictures.
        """
        mine = share(len(self.prompts), self.world.rank, self.world.size)
        numbers = range(len(self.prompts))[mine]
        groups = [Group(n, _EPOCH, n, self.prompts[n].text, self.prompts[n].metadata) for n in numbers]
        samples = Samples.of(groups, self.per_prompt, 1, self.seed)
        plan = StepPlan(Schedule.of(self.policy, self.steps), self.solver)
        with self.policy.slot(self.slot):
            variants = prepare(NoiseOnly(), self.policy, groups)
            images, _, _ = roll_out(self.policy, variants, samples, plan, self.micro_batch)
        first = mine.start * self.per_prompt
        log.samples(step, range(first, first + len(samples)), images)
        scores = self.rewards.score(samples.batch(images), self.world.gather)
        log.sample_scores(step, scores)
        figures = {}
        for name, one in scores.items():
            figures[f"{name}/mean"] = self._mean(one.values_B)
            figures[f"{name}/failed_share"] = self._mean(one.values_B.isnan().float())
        if self.per_prompt > 1:
            figures["diversity"] = self._mean(group_diversity(images, self.per_prompt, self.features))
        look(step)
        log.evaluation(step, figures)
        return figures

    def _mean(self, values_B: Tensor) -> float:
        known = values_B[~values_B.isnan()].double()
        total = self.world.sum(
            torch.stack([known.sum(), torch.tensor(float(len(known)), dtype=torch.float64)])
        )
        return (total[0] / total[1]).item()


def spread_evenly(prompts: PromptSet, count: int) -> tuple[Prompt, ...]:
    """Choose `count` prompts at even distances over a set, which may be sorted by task."""
    total = min(count, len(prompts))
    return tuple(prompts[place * len(prompts) // total] for place in range(total))


def gallery(prompts: Sequence[Prompt], per_prompt: int, seed: int) -> list[dict[str, object]]:
    """List what an evaluation draws: number, prompt and seed of each picture, and its subject where there is one."""
    groups = [Group(n, _EPOCH, n, prompt.text, prompt.metadata) for n, prompt in enumerate(prompts)]
    samples = Samples.of(groups, per_prompt, 1, seed)
    shown = [{"subject": one["subject"]} if "subject" in one else {} for one in samples.metadata]
    return [
        {"number": n, "prompt": prompt, "seed": own, **subject}
        for n, (prompt, own, subject) in enumerate(zip(samples.prompts, samples.seeds, shown, strict=True))
    ]
