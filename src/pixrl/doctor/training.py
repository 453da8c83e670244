"""`pixrl doctor`: what an align or personalize recipe needs and whether it can run here, before anything loads."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pixrl import config as recipes
from pixrl import models
from pixrl.algorithms.exploration import shown_pictures
from pixrl.algorithms.optim import moment_bytes
from pixrl.algorithms.trainer import MicroBatches
from pixrl.data.prompts import Prompt, Split
from pixrl.device import Precision, choose_precision, free_bytes
from pixrl.doctor.diagnosis import Batches, Diagnosis, Findings, Hardware, Need, Trained, Work, size
from pixrl.doctor.needs import (
    existing_device,
    find_lora,
    find_parts,
    find_pipeline,
    model_bytes,
    require_disk,
    require_eight_bit,
    require_tokenizers,
    total,
)
from pixrl.doctor.preflight import (
    require_metadata,
    require_out,
    require_own_world,
    require_texts,
    reward_notes,
)
from pixrl.doctor.rewards import find_rewards, named_models
from pixrl.doctor.weights import require_fit
from pixrl.doctor.work import lower_bound, measured
from pixrl.errors import CheckpointError, InputError, PixrlError
from pixrl.hub import Checkpoint
from pixrl.hub_check import remedy
from pixrl.models.base import Conditioning, Renderer
from pixrl.models.estimate import (
    CONTRADICTIONS,
    Cost,
    PartSize,
    cost_of,
    empty_pipeline,
    imagined,
    operations_of,
)
from pixrl.models.memory_plan import MemoryPlan, Offload
from pixrl.models.pipeline import FlowPipelinePolicy
from pixrl.models.placement import TEXT_PARTS, set_decoding
from pixrl.models.slots import Lora, fitting_layers, slot_sizes
from pixrl.models.text import PromptCache, check_words
from pixrl.runs.config import AlignConfig, PersonalizeConfig, kind_of
from pixrl.runs.loaded import not_trainable, read_prompts, require_trainable, show_references
from pixrl.runs.planner import (
    SAFE_SHARE,
    evened,
    fewer_references,
    fitting,
    smaller_references,
    smaller_runs,
    trial,
)

SLOTS = 3
SMALL_MODEL, SMALL_SIDE, PLENTY = 2**25, 256, 2**31
"""Parameters, pixels and free bytes: such a model takes a small share of that memory, whatever it draws."""
FLOAT = 4


def examine(
    config: AlignConfig,
    *,
    processes: int = 1,
    out: Path | None = None,
    force: bool = False,
    about_to_run: bool = False,
) -> Diagnosis:
    """What a recipe needs, estimated, and what stands against its run: the same for `pixrl doctor` and for the run.

    Args:
        config: the recipe.
        processes: how many would share its steps.
        out: the run's folder; None: a new one.
        force: whether a run that is there would be replaced.
        about_to_run: download what is missing of the generator; time and memory are left to the run itself where a
            small model leaves no doubt.
    """
    findings = Findings()
    _require_recipe(config, findings)
    require_out(out, force, findings)
    device, place, precision = find_place(config.machine.device, config.machine.dtype, processes, findings)
    prompts, shown = _prompts(config, findings)
    rewards = find_rewards(config.rewards, prompts + shown, findings)
    sets = {"prompts.source": prompts, "evaluation.source": shown}
    require_metadata(config.rewards, sets, config.scoring.max_failed_share, findings)
    findings.notes.extend(reward_notes(config.rewards, announced=about_to_run))
    if config.output.features is not None:
        taken = model_bytes(config.output.features, findings)
        rewards |= {} if taken is None else {config.output.features: taken}
    if config.optimizer.eight_bit:
        require_eight_bit(findings)
    checkpoint = find_pipeline(config.model, findings, fetch=about_to_run, t5=config.t5)
    lora = find_lora(config.lora.base, checkpoint, findings)
    parts: dict[str, PartSize] = {}
    estimate: Estimate | None = None
    if checkpoint is not None:
        require_tokenizers(checkpoint, findings)
        parts = find_parts(checkpoint, precision, findings, t5=config.t5)
        texts = [prompt.text for prompt in prompts + shown]
        estimate = _estimate(
            config,
            checkpoint,
            precision,
            device,
            prompts,
            texts,
            lora,
            findings,
            weighed=not about_to_run or (not findings.problems and _is_in_doubt(config, parts, device)),
        )
    if estimate is not None:
        require_own_world(estimate.policy, parameters_of(parts), _judges(config), findings)
    weighed = estimate if estimate is not None and estimate.weighed else None
    batches, needed = _fit(config, device, place, parts, rewards, weighed, findings)
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
        disk=disk,
        work=_work(config, device, precision, prompts, weighed, processes, timed=not about_to_run),
        problems=findings.problems,
        notes=findings.notes,
    )


def find_place(
    device: str, dtype: str, processes: int, findings: Findings, *, on_gpu: str = "auto"
) -> tuple[torch.device, Hardware, Precision]:
    """Where the run would compute; what it asks for and is not there is a problem, and estimates go on without."""
    asked = dtype
    try:
        chosen = existing_device(device)
    except InputError as error:
        findings.miss(Need.DEVICE, error)
        chosen = torch.device("cpu")
        precision = choose_precision(torch.device("cuda"), dtype)
    else:
        if chosen.type == "cuda" and dtype == "auto":
            asked = on_gpu
        try:
            precision = choose_precision(chosen, asked)
        except InputError as error:
            findings.miss(Need.DEVICE, error)
            precision = choose_precision(torch.device("cuda"), dtype)
    computing = precision.autocast or precision.weights
    names = (str(precision.weights).removeprefix("torch."), str(computing).removeprefix("torch."))
    return chosen, Hardware(str(chosen), processes, *names, free_bytes(chosen)), precision


class Estimate:
    """A policy without content, and what it takes to draw and to train one picture."""

    def __init__(
        self,
        policy: FlowPipelinePolicy,
        condition: Conditioning,
        config: AlignConfig,
        precision: Precision,
        *,
        weighed: bool = True,
    ) -> None:
        """`weighed`: find out what a picture takes, which costs seconds; otherwise all that uses it is unset."""
        self.weighed = weighed
        lora = config.lora
        sizes = slot_sizes(
            policy.transformer, policy.lora_targets if lora.targets is None else lora.targets, lora.rank
        )
        count = sum(sizes)
        self.trained = Trained(
            parameters=count,
            lora=SLOTS * FLOAT * count,
            gradients=FLOAT * count,
            optimizer=moment_bytes(sizes, eight_bit=config.optimizer.eight_bit),
        )
        self.side = policy.settings.resolution
        self.cpu_batch = policy.micro_batch
        modules = (policy.transformer, policy.vae)
        if config.machine.gradient_checkpointing:
            policy.checkpoint_gradients()
        policy.precision = precision
        policy._cache = PromptCache(lambda prompt: condition[:1])
        self.policy, self.references = policy, len(condition.references)
        if not weighed:
            return
        with torch.device("meta"):
            policy.attach_lora(rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=config.seed)
        self._condition, self._decodes = condition, config.loss.through_decoder
        self.drawing, self.training = self.costs(self.references)
        with imagined(*modules):
            one_pass = operations_of(trial(policy, condition, decode=False))
            with_decoder = operations_of(trial(policy, condition))
        self.operations = with_decoder + (policy.settings.steps - 1) * one_pass
        """Floating point operations of drawing one picture."""

    def costs(self, references: int) -> tuple[Cost, Cost]:
        """What drawing and training take when the model is shown so many of the references."""
        policy, modules = self.policy, (self.policy.transformer, self.policy.vae)
        condition = replace(self._condition, references=self._condition.references[:references])
        with imagined(*modules):
            drawing = cost_of(trial(policy, condition), modules)
            return drawing, cost_of(trial(policy, condition, train=True, decode=self._decodes), modules)


def empty_renderer(
    model: str,
    checkpoint: Checkpoint,
    precision: Precision,
    device: torch.device,
    plan: MemoryPlan,
    findings: Findings,
    **options: object,
) -> object:
    """The adapter of a checkpoint around a pipeline without content; what the plan cannot do here is a problem."""
    adapter: Any = models.adapter_of(checkpoint)
    pipeline = empty_pipeline(adapter.pipeline_class, checkpoint.folder, precision)
    require_fit(checkpoint, pipeline, findings, t5=options.get("t5") is not False)
    made = adapter(checkpoint, name=model, device="cpu", dtype="float32", pipeline=pipeline, **options)
    try:
        set_decoding(made.vae, plan, made.settings.resolution)
    except InputError as error:
        findings.miss(Need.SETTING, error)
    if plan.offload is not Offload.NONE and device.type == "cpu":
        findings.miss(
            Need.SETTING, f"offload={plan.offload.value} has no effect on a CPU: remove it, or choose a GPU."
        )
    return made


def can_be_estimated(adapter: type[Renderer], model: str, findings: Findings) -> bool:
    """Whether its memory can be found out before its weights are loaded; noted where it cannot."""
    if adapter.pipeline_class is not None:
        return True
    findings.note(
        f"The memory of {model} was not checked: its adapter {adapter.__name__} is made around no class of diffusers, "
        "so that what it needs is not known before it is loaded."
    )
    return False


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
            config.model, checkpoint, precision, device, config.machine, findings, **options
        )
        policy = require_trainable(policy, config.model)
        check_words(texts, policy.vocabulary, policy.name)
        if lora is not None:
            fitting_layers(policy.transformer, lora, str(config.lora.base))
        require_texts(policy, checkpoint, texts, findings, t5=config.t5)
        return Estimate(policy, _condition(policy, config, prompts), config, precision, weighed=weighed)
    except (PixrlError, ValueError) as error:  # peft's own, for LoRA targets of a kind that it does not know
        findings.miss(Need.WEIGHTS if isinstance(error, CheckpointError) else Need.SETTING, error)
    except CONTRADICTIONS as error:
        findings.miss(Need.WEIGHTS, contradiction(checkpoint.folder, error))
    return None


def contradiction(folder: Path, error: BaseException) -> str:
    """What is said of configs that describe a model that cannot compute."""
    said = next(iter(str(error).splitlines()), type(error).__name__)
    return (
        f"The model that the configs in {folder} describe cannot compute ({said}): they contradict each other. "
        f"{remedy(folder)}"
    )


def _condition(policy: FlowPipelinePolicy, config: AlignConfig, prompts: Sequence[Prompt]) -> Conditioning:
    """One row as training will have it, with its reference pictures."""
    row = policy.blank()
    if not isinstance(config, PersonalizeConfig):
        return row
    settings = config.references
    policy = show_references(policy, settings)
    count = settings.count or (len(shown_pictures(prompts[0].metadata)) if prompts else 1)
    return Conditioning(row.tokens_BLD, row.pooled_BE, (policy.blank_reference(),) * count)


def _prompts(config: AlignConfig, findings: Findings) -> tuple[list[Prompt], list[Prompt]]:
    """The training prompts, and those of the evaluation."""
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


def _require_recipe(config: AlignConfig, findings: Findings) -> None:
    """Whether the settings can be written down, as they will be in the run's folder."""
    try:
        recipes.dump(config)
    except InputError as error:
        findings.miss(Need.SETTING, error)


def _judges(config: AlignConfig) -> Iterator[tuple[str, object]]:
    """Setting -> the checkpoint that it names, of all that looks at pictures."""
    for setting in config.rewards:
        for option, ref in named_models(setting).items():
            yield f"rewards.{setting.name}.options.{option}", ref
    yield "output.features", config.output.features


def parameters_of(parts: Mapping[str, PartSize]) -> int:
    return sum(part.parameters for part in parts.values())


def is_small(parts: Mapping[str, PartSize], side: int, device: torch.device) -> bool:
    """Whether nobody need ask if a model fits into memory, with the batches that are planned for it."""
    return parameters_of(parts) < SMALL_MODEL and side <= SMALL_SIDE and free_bytes(device) > PLENTY


def _is_in_doubt(config: AlignConfig, parts: Mapping[str, PartSize], device: torch.device) -> bool:
    """Whether a run of this recipe may need more memory than there is."""
    machine = config.machine
    is_planned = machine.rollout_batch is None and machine.train_batch is None
    shown = config.references.count if isinstance(config, PersonalizeConfig) else 1
    return not (is_planned and shown == 1 and is_small(parts, config.resolution or 0, device))


def group_size(config: AlignConfig) -> int:
    """Samples of a prompt."""
    return config.exploration.noises * config.exploration.per_noise


def on_device(parts: dict[str, PartSize], plan: MemoryPlan, *, text_dropped: bool = False) -> int:
    """Bytes of weights that lie on the device at a time."""
    sizes = {name: part.bytes for name, part in parts.items()}
    text = sum(taken for name, taken in sizes.items() if name in TEXT_PARTS)
    if plan.offload is Offload.SEQUENTIAL:
        return max(text, sizes.get("vae", 0))
    if plan.offload is Offload.PARTS:
        return total(sizes) - text - sizes.get("vae", 0) + max(text, sizes.get("vae", 0))
    return total(sizes) - (text if text_dropped else 0)


def _fit(
    config: AlignConfig,
    device: torch.device,
    place: Hardware,
    parts: dict[str, PartSize],
    rewards: dict[str, int],
    estimate: Estimate | None,
    findings: Findings,
) -> tuple[Batches | None, int | None]:
    """Micro-batches, and the bytes of a process at its peak with them."""
    if estimate is None:
        return None, None
    machine, trained = config.machine, estimate.trained
    weights = on_device(parts, machine, text_dropped=machine.drop_text_encoders)
    resident = weights + total(rewards) + trained.lora + 2 * trained.gradients + trained.optimizer
    free = place.free // (place.processes if device.type == "cpu" else 1)
    groups = -(-config.prompts.per_step // place.processes)
    drawn = groups * group_size(config)
    counts = (drawn, -(-drawn // config.optimizer.updates))
    chosen, reasons = [], []
    for name, count, cost, given in (
        ("rollout", counts[0], estimate.drawing, machine.rollout_batch),
        ("training", counts[1], estimate.training, machine.train_batch),
    ):
        most, why = _most(device, cost, free - resident, estimate.cpu_batch, given)
        chosen.append(evened(count, most))
        reasons.append(
            f"{name}: {-(-count // chosen[-1])} x {chosen[-1]} for {count} pictures; at most {most} ({why})"
        )
    peak = resident + _higher(estimate.drawing, estimate.training, chosen)
    if peak > free:
        ways = ", ".join((*_fewer(estimate, chosen, free - resident), *smaller_runs(config)))
        said = f"{size(peak)} are needed and {size(free)} are free. Save memory with {ways}."
        findings.miss(Need.MEMORY, said)
    host = total({name: part.bytes for name, part in parts.items()}) * place.processes
    if device.type != "cpu" and host > free_bytes(torch.device("cpu")):
        findings.miss(Need.MEMORY, f"Weights pass through main memory, which needs {size(host)} free.")
    micro = MicroBatches(*chosen)
    return Batches(micro.rollout, micro.train, tuple(reasons)), peak


def _most(device: torch.device, cost: Cost, room: int, cpu_batch: int, given: int | None) -> tuple[int, str]:
    """The largest size, by the planner's rules."""
    if given is not None:
        return given, "the recipe says so"
    if device.type == "cpu":
        return cpu_batch, "what suits a CPU's cache at this resolution"
    usable = int(room * SAFE_SHARE) - (cost.first - cost.each)
    most = max(1, usable // cost.each)
    return most, f"about {size(cost.each)} a picture, {size(max(room, 0))} for pictures"


def _higher(drawing: Cost, training: Cost, batches: Sequence[int]) -> int:
    """The peak with these micro-batches. Not both: drawing is over when training begins."""
    return max(drawing.bytes(batches[0]), training.bytes(batches[1]))


def _fewer(estimate: Estimate, batches: Sequence[int], room: int) -> list[str]:
    """How to show the model less, with the number of references that fits."""
    ways = list(smaller_references(estimate.policy)) if estimate.references else []
    if estimate.references > 1:
        one = _higher(*estimate.costs(1), batches)
        each = -(-(_higher(estimate.drawing, estimate.training, batches) - one) // (estimate.references - 1))
        ways.insert(0, fewer_references(fitting(one, max(1, each), room), estimate.references))
    return ways


def _disk(config: AlignConfig, estimate: Estimate) -> int:
    """Bytes that the run's folder may take: checkpoints, and pictures that PNG cannot make smaller."""
    output, evaluation = config.output, config.evaluation
    checkpoints = (output.keep_checkpoints + 1) * (estimate.trained.lora + estimate.trained.optimizer)
    kept = -(-config.steps // output.images_every) * config.prompts.per_step * group_size(config)
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
    images = config.prompts.per_step * group_size(config)
    steps = None if count is None else -(-count // config.prompts.per_step)
    seconds, known_from = measured(config, Path("runs")) if timed else (None, None)
    is_bound = seconds is None
    if seconds is None and estimate is not None and timed:
        seconds, known_from = lower_bound(estimate.operations * -(-images // processes), device, precision)
    return Work(
        prompts=count,
        images_per_step=images,
        steps_per_epoch=steps,
        images_per_epoch=None if count is None else count * group_size(config),
        images_in_all=config.steps * images,
        seconds_per_step=seconds,
        known_from=known_from,
        is_lower_bound=is_bound and seconds is not None,
    )
