"""`pixrl doctor`: what a recipe needs and whether it can run here, before anything loads."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pixrl import config as recipes
from pixrl import models
from pixrl.algorithms.exploration import shown_pictures
from pixrl.data.prompts import Prompt, Split
from pixrl.device import Precision
from pixrl.doctor.diagnosis import Batches, Diagnosis, Findings, Need, Work, size
from pixrl.doctor.estimate import (
    Estimate,
    can_be_estimated,
    contradiction,
    empty_renderer,
    find_place,
    fit_batches,
    is_small,
    lower_bound,
    measured,
    on_device,
    parameters_of,
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
    find_rewards,
    named_models,
    rehearse,
    require_metadata,
    require_own_world,
    reward_notes,
)
from pixrl.errors import CheckpointError, InputError, PixrlError
from pixrl.fusion.config import FuseConfig
from pixrl.fusion.learned import read_policy
from pixrl.fusion.world import PUBLISHED_CLIP, PUBLISHED_SEGMENTER
from pixrl.hub import Checkpoint, read_card
from pixrl.models import adapter_of
from pixrl.models.base import Conditioning, Renderer
from pixrl.models.estimate import (
    CONTRADICTIONS,
    Cost,
    PartSize,
    cost_of,
    imagined,
)
from pixrl.models.pipeline import FlowPipelinePolicy, micro_batch_for
from pixrl.models.sharding import require_blocks
from pixrl.models.slots import Lora, fitting_layers
from pixrl.models.text import PromptCache, check_words
from pixrl.rewards import kind_of as kind_of_reward
from pixrl.rewards.set import RewardSet
from pixrl.runs.config import AlignConfig, PersonalizeConfig, kind_of
from pixrl.runs.loaded import load_rewards, not_trainable, read_prompts, require_trainable, show_references
from pixrl.runs.planner import require_equal_shares, trial

USUAL_SIDE = 512
"""Side in pixels of the synthetic pictures where the generator's own is not known."""


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
    try:
        recipes.dump(config)  # as it will be written down in the run's folder
    except InputError as error:
        findings.miss(Need.SETTING, error)
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
        is_weighed = not about_to_run or (not findings.problems and _is_in_doubt(config, parts, device))
        estimate = _estimate(
            config, checkpoint, precision, device, prompts, texts, lora, findings, weighed=is_weighed
        )
    if estimate is not None:
        judges = named_models(config.rewards) | {"output.features": config.output.features}
        subject = isinstance(config, PersonalizeConfig)
        instead = "pixrl personalize subject/flux-uno --subject FOLDER" if subject else "--set model=toy:sd3"
        require_own_world(estimate.policy, parameters_of(parts), judges.items(), findings, instead=instead)
    weighed = estimate if estimate is not None and estimate.weighed else None
    batches, needed, sharded = fit_batches(config, device, place, parts, rewards, weighed, findings)
    if sharded or machine.divides:
        _require_shardable(config, processes, len(shown), estimate, findings)
    disk = None if estimate is None else _disk(config, estimate)
    if disk is not None:
        require_disk(disk, findings)
    return Diagnosis(
        kind=kind_of(config),
        model=config.model,
        place=place,
        parts=parts,
        rewards=rewards,
        trained=None if estimate is None else estimate.trained,
        side=None if estimate is None else estimate.side,
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


def _require_shardable(
    config: AlignConfig, processes: int, held_out: int, estimate: Estimate | None, findings: Findings
) -> None:
    """Report a model, or a number of processes or prompts, with which weights cannot be sharded."""
    try:
        require_equal_shares(config, processes, held_out)
        if estimate is not None:
            require_blocks(estimate.policy.denoiser)
    except PixrlError as error:
        findings.miss(Need.SETTING, error)


def _prompts(config: AlignConfig, findings: Findings) -> tuple[list[Prompt], list[Prompt]]:
    """Return the prompts of training and those of the evaluation; none where they cannot be read."""
    found: list[list[Prompt]] = []
    for split in Split:
        loaded: Iterable[Prompt] = ()
        try:
            read = read_prompts(config, split)
            findings.notes.extend(note for note in read.notes if note not in findings.notes)
            loaded = read
        except PixrlError as error:
            findings.miss(Need.DATA, error)
        found.append(list(loaded))
    return found[0], found[1]


def _estimate(
    config: AlignConfig,
    checkpoint: Checkpoint,
    precision: Precision,
    device: torch.device,
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    lora: Lora | None,
    findings: Findings,
    *,
    weighed: bool,
) -> Estimate | None:
    options = {
        "steps": config.sampling.steps,
        "guidance": config.guidance,
        "resolution": config.resolution,
        "t5": config.t5,
    }
    try:
        adapter = models.adapter_of(checkpoint)
        if adapter.pipeline_class is None:
            raise not_trainable(adapter, config.model)
        policy = empty_renderer(
            config.model, checkpoint, precision, device, config.machine, findings, weights=True, **options
        )
        policy = require_trainable(policy, config.model)
        check_words(texts, policy.vocabulary, policy.name)
        if policy.distilled_steps is not None:
            findings.note(
                f"{policy.name} was distilled to {policy.distilled_steps} steps. Reinforcement learning moves it off "
                "what the distillation taught, and its pictures blur: train the model that it was distilled from, or "
                "watch the held-out rewards."
            )
        if lora is not None:
            fitting_layers(policy.denoiser, lora, str(config.lora.base))
        require_texts(policy, checkpoint, texts, findings, t5=config.t5)
        return Estimate(policy, condition_row(policy, config, prompts), config, precision, weighed=weighed)
    except (PixrlError, ValueError) as error:  # peft's own, for LoRA targets of a kind that it does not know
        findings.miss(Need.WEIGHTS if isinstance(error, CheckpointError) else Need.SETTING, error)
    except CONTRADICTIONS as error:
        findings.miss(Need.WEIGHTS, contradiction(checkpoint.folder, error))
    return None


def condition_row(policy: FlowPipelinePolicy, config: AlignConfig, prompts: Sequence[Prompt]) -> Conditioning:
    """Return one row of the conditioning as training will have it, with its reference pictures."""
    row = policy.blank()
    if not isinstance(config, PersonalizeConfig):
        return row
    settings = config.references
    policy = show_references(policy, settings)
    count = settings.count or (len(shown_pictures(prompts[0].metadata)) if prompts else 1)
    return Conditioning(row.tokens_BLD, row.pooled_BE, (policy.blank_reference(),) * count)


def _is_in_doubt(config: AlignConfig, parts: Mapping[str, PartSize], device: torch.device) -> bool:
    """Return whether a run of this recipe may need more memory than there is."""
    machine = config.machine
    is_planned = machine.rollout_batch is None and machine.train_batch is None
    shown = config.references.count if isinstance(config, PersonalizeConfig) else 1
    return not (is_planned and shown == 1 and is_small(parts, config.resolution or 0, device))


def _disk(config: AlignConfig, estimate: Estimate) -> int:
    """Return the bytes that the run's folder may take: checkpoints, and pictures that PNG cannot make smaller."""
    output, evaluation = config.output, config.evaluation
    checkpoints = (output.keep_checkpoints + 1) * (estimate.trained.lora + estimate.trained.optimizer)
    kept = -(-config.steps // output.images_every) * config.prompts.per_step * config.group_size
    times = 2 if evaluation.every is None else 2 + config.steps // evaluation.every
    shown = times * evaluation.prompts * evaluation.per_prompt
    return checkpoints + (kept + shown) * 3 * estimate.side**2


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
    try:
        if tried:
            rewards = load_rewards(
                config.model_copy(update={"rewards": tuple(tried), "stages": ()}), found.place.device
            )
            try_rewards(rewards, config, found.side, findings)
    except PixrlError as error:
        findings.miss(Need.WEIGHTS if isinstance(error, CheckpointError) else Need.SERVICE, error)
    return replace(found, problems=findings.problems, notes=findings.notes)


def try_rewards(rewards: RewardSet, config: AlignConfig, side: int | None, findings: Findings) -> None:
    """Let the rewards score a synthetic batch for prompts of training and of the evaluation (`rehearse`)."""
    prompts = [prompt for split in Split for prompt in read_prompts(config, split)]
    rehearse(rewards, prompts, side or USUAL_SIDE, findings)


def examine_fusion(
    config: FuseConfig,
    *,
    processes: int = 1,
    concepts: Sequence[str] | None = None,
    out: Path | None = None,
    force: bool = False,
    about_to_run: bool = False,
) -> Diagnosis:
    """Estimate what a fusion needs, and find what stands against it; for `pixrl doctor` and for the run alike.

    Args:
        config: the recipe.
        processes: number of processes that would share the work.
        concepts: all concepts of a folder of fusions; None: the recipe's.
        out: the run's folder; None: a new one.
        force: whether a run that lies there would be replaced.
        about_to_run: download what is missing of the generator; a small model's memory is in no doubt.
    """
    findings = Findings()
    require_out(out, force, findings)
    find_trackers(config.log, findings)
    if config.policy_from is not None:
        try:
            read_policy(Path(config.policy_from)).require_fits(config)
        except PixrlError as error:
            findings.miss(Need.SETTING, error)
    checkpoint = find_pipeline(config.model, findings, fetch=about_to_run)
    adapter = None if checkpoint is None else adapter_of(checkpoint)
    device, place, precision = find_place(
        config.device, config.dtype, processes, findings, on_gpu=(adapter or Renderer).gpu_dtype
    )
    parts = {} if checkpoint is None else find_parts(checkpoint, precision, findings, base=config.memory.base)
    cost: Cost | None = None
    side, batch = 0, 1
    if checkpoint is not None and adapter is not None and can_be_estimated(adapter, config.model, findings):
        try:
            made = empty_renderer(config.model, checkpoint, precision, device, config.memory, findings)
            assert isinstance(made, FlowPipelinePolicy)
            prompt = read_card(checkpoint.folder).exemplar_prompt
            texts = [
                prompt.format(concept=one) for one in (config.concepts if concepts is None else concepts)
            ]
            check_words(texts, made.vocabulary, made.name)
            require_texts(made, checkpoint, texts, findings, t5=True)
            judges = {"clip": config.clip, "segmenter": config.segmenter}
            require_own_world(
                made, parameters_of(parts), judges.items(), findings, instead="--set model=toy:sd3"
            )
            side = made.settings.resolution
            cost = None if about_to_run and is_small(parts, side, device) else _cost(made, precision)
            batch = min(micro_batch_for(device, side), config.batch)
        except PixrlError as error:
            findings.miss(Need.WEIGHTS if isinstance(error, CheckpointError) else Need.SETTING, error)
        except CONTRADICTIONS as error:
            findings.miss(Need.WEIGHTS, contradiction(checkpoint.folder, error))
    models = _scorer(config, checkpoint, findings)
    needed = None
    if cost is not None:
        needed = on_device(parts, config.memory) + sum(models.values()) + cost.bytes(batch)
        if needed > place.free:
            findings.miss(
                Need.MEMORY,
                f"{size(needed)} are needed and {size(place.free)} are free. Save memory with memory.offload=parts or "
                "sequential, memory.vae_slicing=true, or a smaller checkpoint.",
            )
    disk = None if not side else (config.budget + config.exemplars * len(config.concepts)) * 3 * side**2
    if disk is not None:
        require_disk(disk, findings)
    reason = f"rollout: {batch} at a time, what suits the device at {side} x {side}"
    return Diagnosis(
        kind="fuse",
        model=config.model,
        place=place,
        parts=parts,
        rewards=models,
        trained=None,
        side=side or None,
        drawing=cost,
        training=None,
        batches=None if cost is None else Batches(batch, None, (reason,)),
        needed=needed,
        sharded=False,
        disk=disk,
        work=Work(None, config.batch, None, None, config.budget),
        problems=findings.problems,
        notes=findings.notes,
    )


def _cost(renderer: FlowPipelinePolicy, precision: Precision) -> Cost:
    """Return the memory that drawing with a renderer without content takes."""
    renderer.precision = precision
    row = renderer.blank()
    renderer._cache = PromptCache(lambda prompt: row)
    modules = (renderer.denoiser, renderer.vae)
    with imagined(*modules):
        return cost_of(trial(renderer, row), modules)


def _scorer(config: FuseConfig, checkpoint: Checkpoint | None, findings: Findings) -> dict[str, int]:
    """Return the bytes of the encoder's and the segmenter's weights, by their names."""
    named = [config.clip, config.segmenter]
    if checkpoint is not None:  # without one nobody knows which encoder it is calibrated for
        card = read_card(checkpoint.folder)
        named = [
            config.clip or card.clip or PUBLISHED_CLIP,
            config.segmenter or card.segmenter or PUBLISHED_SEGMENTER,
        ]
    sizes = {ref: model_bytes(ref, findings) for ref in named if ref is not None}
    return {ref: taken for ref, taken in sizes.items() if taken is not None}
