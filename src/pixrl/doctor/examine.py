"""`pixrl doctor`: what a recipe needs and whether it can run here, before anything loads."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pixrl import config as recipes
from pixrl.algorithms.exploration import shown_pictures
from pixrl.config import parse_resolution
from pixrl.data.prompts import Prompt, Split
from pixrl.device import Precision, quiet_loading
from pixrl.doctor.diagnosis import Diagnosis, Findings, Need, Work
from pixrl.doctor.estimate import (
    Estimate,
    empty_renderer,
    find_place,
    fit_batches,
    is_small,
    lower_bound,
    measured,
    report_misfits,
)
from pixrl.doctor.generator import find_lora, find_parts, find_pipeline, require_texts
from pixrl.doctor.needs import (
    find_trackers,
    model_bytes,
    require_bitsandbytes,
    require_disk,
    require_out,
)
from pixrl.doctor.rewards import (
    TOY_MODEL,
    find_rewards,
    named_models,
    rehearse,
    require_metadata,
    require_own_world,
    reward_notes,
)
from pixrl.hub import Checkpoint
from pixrl.models import adapter_of
from pixrl.models.base import Conditioning
from pixrl.models.memory.estimate import (
    PartSize,
)
from pixrl.models.memory.sharding import require_blocks
from pixrl.models.pipeline import FlowPipelinePolicy
from pixrl.models.slots import Lora, fitting_layers
from pixrl.rewards import kind_of as kind_of_reward
from pixrl.rewards.set import RewardSet
from pixrl.runs.config import AlignConfig, PersonalizeConfig, kind_of
from pixrl.runs.loaded import load_rewards, not_trainable, read_prompts, require_trainable, show_references
from pixrl.runs.planner import require_equal_shares

USUAL_SIZE = (512, 512)
"""Width and height of the synthetic pictures where those of the generator's are not known."""


@quiet_loading()
def examine_training(
    config: AlignConfig,
    *,
    processes: int = 1,
    local: int | None = None,
    out: Path | None = None,
    force: bool = False,
    about_to_run: bool = False,
) -> Diagnosis:
    """Estimate what an align or personalize recipe needs, and find what stands against its run.

    `pixrl doctor` prints it, and the run itself refuses by it (`require`): what doctor says, the run does.

    Args:
        config: the recipe.
        processes: number of processes that would share its steps.
        local: number of them on this host; None: all.
        out: the run's folder; None: a new one.
        force: whether a run that lies there would be replaced.
        about_to_run: download what is missing of the generator; time and memory are left to the run itself where a
            small model leaves no doubt.
    """
    findings = Findings()
    with findings.catch(Need.SETTING):
        recipes.dump(config)  # as it will be written down in the run's folder
    require_out(out, force, findings)
    machine = config.machine
    device, place, precision = find_place(machine.device, machine.dtype, processes, findings, local=local)
    prompts, shown = _prompts(config, findings)
    rewards = find_rewards(config.rewards, prompts + shown, findings)
    sets = {"prompts.source": prompts, "evaluation.source": shown}
    require_metadata(config.rewards, sets, config.scoring.max_failed_share, findings)
    findings.notes.extend(reward_notes(config.rewards, announced=about_to_run))
    if config.output.features is not None:
        taken = model_bytes(config.output.features, findings)
        rewards |= {} if taken is None else {config.output.features: taken}
    if config.optimizer.eight_bit:
        require_bitsandbytes("optimizer.eight_bit", findings)
    find_trackers(config.log, findings)
    checkpoint = find_pipeline(config.model, findings, fetch=about_to_run, t5=config.t5)
    lora = find_lora(config.lora.base, checkpoint, findings)
    parts: dict[str, PartSize] = {}
    estimate: Estimate | None = None
    if checkpoint is not None:
        parts = find_parts(checkpoint, precision, findings, t5=config.t5, base=config.machine.base)
        texts = [prompt.text for prompt in prompts + shown]
        texts += [] if config.negative_prompt is None else [config.negative_prompt]
        estimate = _estimate(
            config, checkpoint, parts, precision, device, prompts, texts, lora, findings, about_to_run
        )
    weighed = estimate if estimate is not None and estimate.weighed else None
    batches, needed, sharded = fit_batches(config, device, place, parts, rewards, weighed, findings)
    if sharded or machine.divides:
        with findings.catch(Need.SETTING):
            require_equal_shares(config, processes, len(shown))
            if estimate is not None:
                require_blocks(estimate.policy.denoiser)
    disk = None if estimate is None else estimate.disk(config)
    require_disk(disk, findings)
    return Diagnosis(
        kind=kind_of(config),
        model=config.model,
        place=place,
        parts=parts,
        rewards=rewards,
        trained=None if estimate is None else estimate.trained,
        size=None if estimate is None else estimate.size,
        drawing=None if weighed is None else weighed.drawing,
        training=None if weighed is None else weighed.training,
        batches=batches,
        needed=needed,
        sharded=sharded,
        disk=disk,
        work=_work(config, device, precision, prompts, weighed, processes, timed=not about_to_run),
        problems=findings.problems,
        notes=findings.notes,
    )


def _prompts(config: AlignConfig, findings: Findings) -> tuple[list[Prompt], list[Prompt]]:
    """Return the prompts of training and those of the evaluation; none where they cannot be read."""
    found: list[list[Prompt]] = []
    for split in Split:
        found.append([])
        with findings.catch(Need.DATA):
            read = read_prompts(config, split)
            for note in read.notes:
                findings.note(note)
            found[-1].extend(read)
    return found[0], found[1]


def _estimate(
    config: AlignConfig,
    checkpoint: Checkpoint,
    parts: Mapping[str, PartSize],
    precision: Precision,
    device: torch.device,
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    lora: Lora | None,
    findings: Findings,
    about_to_run: bool,
) -> Estimate | None:
    options = {"steps": config.sampling.steps, **config.drawing}
    is_weighed = not about_to_run
    if about_to_run and not findings.problems:  # where its memory is in doubt
        is_planned = config.machine.rollout_batch is None and config.machine.train_batch is None
        one = config.references.count == 1 if isinstance(config, PersonalizeConfig) else True
        longest = 0 if config.resolution is None else max(parse_resolution(config.resolution))
        is_weighed = not (is_planned and one and is_small(parts, longest, device))
    judges = named_models(config.rewards) | {"output.features": config.output.features}
    subject = isinstance(config, PersonalizeConfig)
    instead = "pixrl personalize subject/flux-uno --subject FOLDER" if subject else TOY_MODEL
    found: Estimate | None = None
    with report_misfits(checkpoint, findings, ValueError):  # peft's own, for LoRA targets of an unknown kind
        adapter = adapter_of(checkpoint)
        if adapter.pipeline_class is None:
            raise not_trainable(adapter, config.model)
        policy = empty_renderer(
            config.model, checkpoint, precision, device, config.machine, findings, weights=True, **options
        )
        policy = require_trainable(policy, config.model)
        require_texts(policy, checkpoint, texts, findings, t5=config.t5)
        if policy.distilled_steps is not None:
            findings.note(
                f"{policy.name} was distilled to {policy.distilled_steps} steps. Reinforcement learning moves it off "
                "what the distillation taught, and its pictures blur: train the model that it was distilled from, or "
                "watch the held-out rewards."
            )
        if lora is not None:
            fitting_layers(policy.denoiser, lora, str(config.lora.base))
        row = condition_row(policy, config, prompts)
        found = Estimate(policy, row, config, precision, weighed=is_weighed)
        require_own_world(policy, parts, judges, findings, instead=instead)
    return found


def condition_row(policy: FlowPipelinePolicy, config: AlignConfig, prompts: Sequence[Prompt]) -> Conditioning:
    """Return one row of the conditioning as training will have it, with its reference pictures."""
    row = policy.blank()
    if not isinstance(config, PersonalizeConfig):
        return row
    policy = show_references(policy, config)
    count = config.references.count or (len(shown_pictures(prompts[0].metadata)) if prompts else 1)
    return replace(row, references=(policy.blank_reference(),) * count)


def _work(
    config: AlignConfig,
    device: torch.device,
    precision: Precision,
    prompts: Sequence[Prompt],
    estimate: Estimate | None,
    processes: int,
    *,
    timed: bool,
) -> Work:
    count = len(prompts) or None
    images = config.prompts.per_step * config.group_size
    steps = None if count is None else -(-count // config.prompts.per_step)
    seconds, known_from = measured(config, Path("runs")) if timed else (None, None)
    is_bound = seconds is None
    if seconds is None and estimate is not None and timed:
        seconds, known_from = lower_bound(estimate.operations * -(-images // processes), device, precision)
    return Work(
        prompts=count,
        images_per_step=images,
        steps_per_epoch=steps,
        images_per_epoch=None if count is None else count * config.group_size,
        images_in_all=config.steps * images,
        seconds_per_step=seconds,
        known_from=known_from,
        is_lower_bound=is_bound and seconds is not None,
    )


def try_out(config: AlignConfig, found: Diagnosis) -> Diagnosis:
    """Add to a diagnosis what the rewards do with a synthetic batch; code that a recipe names is not executed.

    Args:
        config: the recipe.
        found: nothing that stands against it.
    """
    findings = Findings(list(found.problems), list(found.notes))
    tried = [
        one.model_copy(update={"held_out": False, "weight": 1.0})
        for one in config.rewards
        if not kind_of_reward(one.reward).runs_functions
    ]
    if tried:
        alone = config.model_copy(update={"rewards": tuple(tried), "stages": ()})
        with findings.catch(Need.SERVICE, weights=True):
            try_rewards(load_rewards(alone, found.place.device), config, found.size, findings)
    return replace(found, problems=findings.problems, notes=findings.notes)


def try_rewards(
    rewards: RewardSet, config: AlignConfig, size: tuple[int, int] | None, findings: Findings
) -> None:
    """Let the rewards score a synthetic batch for prompts of training and of the evaluation (`rehearse`)."""
    prompts = [prompt for split in Split for prompt in read_prompts(config, split)]
    rehearse(rewards, prompts, size or USUAL_SIZE, findings)
