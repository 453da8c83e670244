"""What a trained slot is worth: pictures of held-out prompts at fixed seeds, by every reward, and how diverse they are.

The seeds depend on nothing but (seed, prompt, picture): the base, every method and every step of a run are drawn from
the same noise, so that their figures can be compared prompt by prompt.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from pixrl.algorithms.exploration import Group, NoiseOnly, prepare
from pixrl.algorithms.sampling import ODESolver, Samples, Schedule, Solver, StepPlan, roll_out
from pixrl.data.prompts import Prompt
from pixrl.metrics.diversity import DiversityMeter
from pixrl.models.base import Conditioning, FlowPolicy
from pixrl.models.slots import Slot
from pixrl.rewards.encoders import load_encoder
from pixrl.rewards.segmentation import Segmenter
from pixrl.rewards.set import RewardSet
from pixrl.rewards.settings import RewardSetting
from pixrl.runs.config import AlignConfig, read_config
from pixrl.runs.folder import RunFolder
from pixrl.runs.loaded import SLOTS, LoadedRun, load_run
from pixrl.runs.record import find_place, read_start, require_same_model
from pixrl.types import RewardBatch, Scores

EPOCH = -6
"""Epoch of these pictures' seeds. Training uses 0 and up; the loop's own evaluation -5."""
TAG = "tag"
"""What a GenEval entry calls its task."""


@dataclass(frozen=True)
class Drawing:
    """The settings by which pictures are drawn."""

    per_prompt: int
    steps: int
    solver: Solver
    seed: int
    micro_batch: int


@dataclass(frozen=True)
class Drawn:
    """The pictures of some prompts, `per_prompt` each, prompt by prompt."""

    samples: Samples
    images_BCHW: Tensor
    seconds: float


@dataclass(frozen=True)
class RewardFigures:
    """The figures of one reward; nan where nothing was scored."""

    held_out: bool
    """Only logged, never trained on."""
    mean: float
    """Over all pictures that were scored."""
    failed: int
    """Pictures without a score, left out of every mean."""
    tasks: Mapping[str, float]
    """Task -> mean, for prompts that name one (GenEval's six)."""
    task_mean: float
    """The mean of the task means, as GenEval's overall score is taken; nan without tasks."""
    prompt_means: tuple[float, ...]
    """One a prompt."""


@dataclass(frozen=True)
class Evaluation:
    """The figures of a slot on held-out prompts."""

    slot: str
    prompts: int
    per_prompt: int
    seed: int
    steps: int
    rewards: Mapping[str, RewardFigures]
    distance: float
    """Mean pairwise feature distance of a prompt's pictures, averaged over prompts; nan for one picture each."""
    layouts: float
    """Mean number of distinct layouts of a prompt's pictures; nan without a detector."""
    seconds: float
    """Of drawing alone."""

    def figures(self) -> dict[str, float | None]:
        """Return the figures by name: reward/NAME, reward/NAME/failed or TASK, diversity, layouts; None for nan."""
        found: dict[str, float] = {"diversity": self.distance, "layouts": self.layouts}
        for name, one in self.rewards.items():
            found[f"reward/{name}"] = one.mean
            found[f"reward/{name}/failed"] = one.failed
            found |= {f"reward/{name}/{task}": mean for task, mean in one.tasks.items()}
        return {name: None if math.isnan(x) else x for name, x in found.items()}

    def to_json(self) -> dict[str, object]:
        """Return the evaluation as JSON values, with None for nan."""
        return {name: _without_nan(value) for name, value in asdict(self).items()}


def draw(policy: FlowPolicy, slot: Slot, prompts: Sequence[Prompt], drawing: Drawing) -> Drawn:
    """Draw pictures of prompts by one slot, without exploration and without random steps.

    `drawing.micro_batch` changes them by rounding at most.
    """
    begun = time.perf_counter()
    groups = [Group(n, EPOCH, n, prompt.text, prompt.metadata) for n, prompt in enumerate(prompts)]
    samples = Samples.of(groups, drawing.per_prompt, 1, drawing.seed)
    plan = StepPlan(Schedule.of(policy, drawing.steps), drawing.solver)
    with policy.slot(slot):
        variants = prepare(NoiseOnly(), policy, groups)
        images_BCHW, _, _ = roll_out(policy, variants, samples, plan, drawing.micro_batch)
    return Drawn(samples, images_BCHW, time.perf_counter() - begun)


@torch.no_grad()
def sample(
    policy: FlowPolicy, conditioning: Conditioning, seeds: Sequence[int], *, solver: str = "euler"
) -> Tensor:
    """Draw pictures [B, 3, H, W] in [0, 1] as a run's evaluation does: `policy.sample` with a recipe's solver.

    Args:
        policy: draws with `policy.settings.steps` steps, with the weights of the moment.
        conditioning: one row a picture.
        seeds: one a picture; those of samples/gallery.json give the pictures of a run's evaluation.
        solver: euler or dpm.
    """
    plan = StepPlan(Schedule.of(policy, policy.settings.steps), Solver(solver))
    steps, x = ODESolver(plan), plan.schedule.sigmas[0] * policy.initial_noise(seeds)
    for number, sigma in enumerate(plan.schedule.sigmas[:-1]):
        x = steps.step(x, policy.velocity(x, x.new_full((len(x),), sigma), conditioning), number)
    return policy.decode(x).float().cpu()


def evaluate(
    policy: FlowPolicy,
    slot: Slot,
    prompts: Sequence[Prompt],
    drawing: Drawing,
    rewards: RewardSet,
    meter: DiversityMeter,
) -> Evaluation:
    """Draw and score pictures of prompts.

    Raises:
        RunError: too many pictures could not be scored (`RewardSet`).
    """
    drawn = draw(policy, slot, prompts, drawing)
    samples = drawn.samples
    scores = rewards.of_single_pictures().score(
        RewardBatch(drawn.images_BCHW, samples.prompts, samples.metadata)
    )
    held_out = {setting.name: setting.held_out for setting in rewards.settings}
    diversity = meter.measure(drawn.images_BCHW, samples.prompt_B)
    tasks = [str(prompt.metadata[TAG]) if TAG in prompt.metadata else None for prompt in prompts]
    return Evaluation(
        slot=slot.value,
        prompts=len(prompts),
        per_prompt=drawing.per_prompt,
        seed=drawing.seed,
        steps=drawing.steps,
        rewards={name: reward_figures(one, tasks, held_out[name]) for name, one in scores.items()},
        distance=diversity.distance,
        layouts=diversity.layouts,
        seconds=drawn.seconds,
    )


def reward_figures(scores: Scores, tasks: Sequence[str | None], held_out: bool) -> RewardFigures:
    """Return the figures of scores [P S], the same number of each prompt; `tasks` names each prompt's task.

    A score that is nan is left out of every mean and counted.
    """
    values_PS = scores.values_B.double().view(len(tasks), -1)
    by_task: dict[str, float] = {}
    for task in dict.fromkeys(task for task in tasks if task is not None):
        by_task[task] = _mean(values_PS[[place for place, own in enumerate(tasks) if own == task]])
    known = [mean for mean in by_task.values() if not math.isnan(mean)]
    return RewardFigures(
        held_out=held_out,
        mean=_mean(values_PS),
        failed=int(values_PS.isnan().sum()),
        tasks=by_task,
        task_mean=sum(known) / len(known) if known else math.nan,
        prompt_means=tuple(_mean(values_S) for values_S in values_PS),
    )


def load_meter(features: str, segmenter: str | None) -> DiversityMeter:
    """Load a meter that compares by a CLIP or DINO checkpoint, and finds layouts by a segmentation checkpoint."""
    detector = None if segmenter is None else Segmenter(segmenter)
    return DiversityMeter(load_encoder(features).image_features, detector)


def open_run(path: Path, rewards: Sequence[RewardSetting] = ()) -> LoadedRun:
    """Load a run with the slots of its newest checkpoint; before the first one they are the base.

    Args:
        path: the run's folder.
        rewards: further ones to judge by, held out.

    Raises:
        RunError: it is no align run.
        CheckpointError: the model is another one now.
    """
    folder = RunFolder.open(path)
    config = read_config(folder)
    shop = load_run(config.model_copy(update={"rewards": (*config.rewards, *rewards)}))
    require_same_model(folder, read_start(folder), shop.policy)
    _, _, saved = find_place(folder)
    if saved is not None:
        slots = {name.removeprefix(SLOTS): x for name, x in saved[0].items() if name.startswith(SLOTS)}
        shop.slots.load_state(slots)
    return shop


def evaluated_slot(config: AlignConfig) -> Slot:
    """Return the slot of the averaged weights where a run has any, else that of the trained ones."""
    return Slot.CURRENT if config.optimizer.ema is None else Slot.EMA


def _mean(values: Tensor) -> float:
    known = values[~values.isnan()]
    return known.mean().item() if len(known) else math.nan


def _without_nan(value: object) -> object:
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, Mapping):
        return {name: _without_nan(one) for name, one in value.items()}
    if isinstance(value, tuple | list):
        return [_without_nan(one) for one in value]
    return value
