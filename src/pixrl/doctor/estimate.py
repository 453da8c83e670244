"""What a run takes, estimated before its weights are loaded: memory, micro-batches, the time of a step."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from pixrl import models
from pixrl.algorithms.trainer import MicroBatches
from pixrl.algorithms.world import sharers
from pixrl.device import Precision, choose_precision, free_bytes
from pixrl.doctor.diagnosis import Batches, Findings, Hardware, Need, run_name, size
from pixrl.doctor.generator import require_fit
from pixrl.doctor.needs import existing_device, require_bitsandbytes
from pixrl.doctor.trained import bytes_on_process, trained_of
from pixrl.errors import CheckpointError, InputError, PixrlError
from pixrl.hub import Checkpoint
from pixrl.hub_check import remedy
from pixrl.models.base import Conditioning, Renderer
from pixrl.models.loading import DENOISERS, denoiser_of
from pixrl.models.memory.estimate import (
    CONTRADICTIONS,
    SMALL_MODEL,
    SMALL_SIDE,
    Cost,
    PartSize,
    cost_of,
    empty_pipeline,
    imagined,
    operations_of,
    parameters_of,
)
from pixrl.models.memory.placement import TEXT_PARTS, set_decoding
from pixrl.models.memory.plan import Base, MemoryPlan, Offload, Shard
from pixrl.models.memory.quantization import NF4, linear_layers
from pixrl.models.memory.sharding import sharded_bytes, transformer_blocks
from pixrl.models.pipeline import FlowPipelinePolicy
from pixrl.models.text import PromptCache
from pixrl.runs.config import AlignConfig, Train, kind_of
from pixrl.runs.environment import describe
from pixrl.runs.folder import RunFolder
from pixrl.runs.loaded import attach_slots
from pixrl.runs.place import ENVIRONMENT, RECIPE
from pixrl.runs.planner import (
    SAFE_SHARE,
    evened,
    fewer_references,
    fitting,
    smaller_references,
    smaller_runs,
    trial,
)

PLENTY = 2**31
"""Free bytes of which a small model takes a small share, whatever it draws."""
_SAME = (
    "model",
    "guidance",
    "resolution",
    "exploration",
    "sampling",
    "loss",
    "train",
    "lora",
    "machine",
    "rewards",
)
"""Keys of a recipe on which the time of a step depends."""
SIDES, TRIES = (256, 1024), 6
"""Sides of the matrix products that measure this machine's speed, and how often each is tried; the best counts."""
LONG = 0.01
"""Seconds of a small product after which a large one would take too long."""
_PHASE = "seconds/"


def find_place(
    device: str,
    dtype: str,
    processes: int,
    findings: Findings,
    *,
    local: int | None = None,
    on_gpu: str = "auto",
) -> tuple[torch.device, Hardware, Precision]:
    """Return where the run would compute, and with which precision.

    What is asked for and is not there is a problem; the estimates go on without it. `on_gpu` is the dtype that "auto"
    stands for on a GPU; `local`: the processes on this host, None: all.
    """
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
    return chosen, Hardware(str(chosen), processes, *names, free_bytes(chosen), local or processes), precision


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
        """Prepare the policy, and find out what it takes.

        `weighed`: find out what a picture takes, which costs seconds; without it `drawing`, `training` and
        `operations` are unset.
        """
        self.weighed = weighed
        self.trained, self.precision = trained_of(policy, config, precision), precision
        self.size = (policy.settings.width, policy.settings.height)
        self.cpu_batch = policy.micro_batch
        if config.machine.gradient_checkpointing:
            policy.checkpoint_gradients()
        without_encoders(policy, condition[:1], precision)
        self.policy, self.references = policy, len(condition.references)
        if not weighed:
            return
        with torch.device("meta"):
            attach_slots(policy, config, copies=())  # copies compute nothing here
        self._condition, self._decodes = condition, config.loss.through_decoder
        self.drawing, self.training = self.costs(self.references)

        @torch.no_grad()
        def decode(count: int) -> None:
            with policy.decoder_present():
                policy.decode(policy.initial_noise(range(count)))

        with imagined(policy.denoiser, policy.vae, pixels=pixels_of(policy, condition)):
            self.pass_operations = operations_of(trial(policy, condition, decode=False))
            """Number of floating point operations of one pass over a picture's latents, without its gradient."""
            self.operations = policy.settings.steps * self.pass_operations + operations_of(decode)
            """Number of floating point operations of drawing one picture."""

    def disk(self, config: AlignConfig) -> int:
        """Return the bytes that the run's folder may take: checkpoints, and pictures that PNG cannot make smaller."""
        output, evaluation = config.output, config.evaluation
        checkpoints = (output.keep_checkpoints + 1) * (self.trained.saved + self.trained.optimizer)
        kept = -(-config.steps // output.images_every) * config.prompts.per_step * config.group_size
        times = 2 if evaluation.every is None else 2 + config.steps // evaluation.every
        shown = times * evaluation.prompts * evaluation.per_prompt
        return checkpoints + (kept + shown) * 3 * math.prod(self.size)

    def training_operations(self) -> int:
        """Return the floating point operations of one picture at one noise level, with its gradient."""
        with imagined(self.policy.denoiser, self.policy.vae, pixels=pixels_of(self.policy, self._condition)):
            return operations_of(trial(self.policy, self._condition, train=True, decode=self._decodes))

    def costs(self, references: int) -> tuple[Cost, Cost]:
        """Return the memory that drawing and training take when the model is shown so many of the references."""
        policy, modules = self.policy, (self.policy.denoiser, self.policy.vae)
        condition = replace(self._condition, references=self._condition.references[:references])
        with imagined(*modules, pixels=pixels_of(policy, condition)):
            drawing = cost_of(trial(policy, condition), modules)
            return drawing, cost_of(trial(policy, condition, train=True, decode=self._decodes), modules)


def pixels_of(policy: FlowPipelinePolicy, condition: Conditioning) -> int:
    """Return the pixels of a picture with those of the references that it is drawn with."""
    rows, columns = policy.latent_shape[1:]
    latents = rows * columns + sum(x.shape[-2] * x.shape[-1] for x in condition.references)
    return policy.settings.width * policy.settings.height * latents // (rows * columns)


def without_encoders(policy: FlowPipelinePolicy, row: Conditioning, precision: Precision) -> None:
    """Let a policy without content take this row for every prompt, and compute as it would with its weights."""
    policy.precision = precision
    policy._cache = PromptCache(lambda prompt: row)


def empty_renderer(
    model: str,
    checkpoint: Checkpoint,
    precision: Precision,
    device: torch.device,
    plan: MemoryPlan,
    findings: Findings,
    *,
    weights: bool = True,
    **options: object,
) -> object:
    """Return the adapter of a checkpoint around a pipeline without content; what the plan cannot do is a problem.

    `weights`: the weights' files are there, and must fit.
    """
    adapter: Any = models.adapter_of(checkpoint)
    pipeline = empty_pipeline(adapter.pipeline_class, checkpoint.folder, precision)
    if weights:
        require_fit(checkpoint, pipeline, findings, t5=options.get("t5") is not False)
    made = adapter(checkpoint, name=model, device="cpu", dtype="float32", pipeline=pipeline, **options)
    with findings.catch(Need.SETTING):
        set_decoding(made.vae, plan, made.settings.longest)
    if plan.base is not Base.DTYPE:
        with findings.catch(Need.SETTING):
            linear_layers(denoiser_of(pipeline), model, plan.base)
    if plan.base is Base.NF4 and weights:
        require_bitsandbytes(NF4, findings)
    if plan.offload is not Offload.NONE and device.type == "cpu":
        findings.miss(
            Need.SETTING, f"offload={plan.offload.value} has no effect on a CPU: remove it, or choose a GPU."
        )
    return made


def can_be_estimated(adapter: type[Renderer], model: str, findings: Findings) -> bool:
    """Return whether a model's memory can be found out before its weights are loaded; note it where it cannot."""
    if adapter.pipeline_class is not None:
        return True
    findings.note(
        f"The memory of {model} was not checked: its adapter {adapter.__name__} is made around no class of diffusers, "
        "so that what it needs is not known before it is loaded."
    )
    return False


def contradiction(folder: Path, error: BaseException) -> str:
    """Return the message on configs that describe a model that cannot compute."""
    said = next(iter(str(error).splitlines()), type(error).__name__)
    return (
        f"The model that the configs in {folder} describe cannot compute ({said}): they contradict each other. "
        f"{remedy(folder)}"
    )


@contextmanager
def report_misfits(
    checkpoint: Checkpoint, findings: Findings, refused: type[Exception] = PixrlError
) -> Iterator[None]:
    """Report what stands against a model that the block makes without content: settings, weights or configs.

    `refused`: further errors than pixrl's own that lie in the settings.
    """
    try:
        yield
    except (PixrlError, refused) as error:
        findings.miss(Need.WEIGHTS if isinstance(error, CheckpointError) else Need.SETTING, error)
    except CONTRADICTIONS as error:
        findings.miss(Need.WEIGHTS, contradiction(checkpoint.folder, error))


@contextmanager
def refuse_misfits(checkpoint: Checkpoint) -> Iterator[None]:
    """Raise a CheckpointError where the model that the block makes from configs alone cannot compute."""
    try:
        yield
    except InputError:
        raise
    except CONTRADICTIONS as error:
        raise CheckpointError(contradiction(checkpoint.folder, error)) from error


def is_small(parts: Mapping[str, PartSize], longest: int, device: torch.device) -> bool:
    """Return whether a model is so small that it fits into memory without a check, with the batches planned for it."""
    return parameters_of(parts) < SMALL_MODEL and longest <= SMALL_SIDE and free_bytes(device) > PLENTY


def on_device(parts: dict[str, PartSize], plan: MemoryPlan, *, text_dropped: bool = False) -> int:
    """Return the bytes of weights that lie on the device at a time."""
    sizes = {name: part.bytes for name, part in parts.items()}
    text = sum(taken for name, taken in sizes.items() if name in TEXT_PARTS)
    if plan.offload is Offload.SEQUENTIAL:
        return max(text, sizes.get("vae", 0))
    if plan.offload is Offload.PARTS and text_dropped:  # prompts are read while the denoiser waits
        return max(text, sum(sizes.values()) - text)
    if plan.offload is Offload.PARTS:
        return sum(sizes.values()) - text - sizes.get("vae", 0) + max(text, sizes.get("vae", 0))
    return sum(sizes.values()) - (text if text_dropped else 0)


@dataclass(frozen=True)
class Fitted:
    """A run fitted into the memory of a process, or what it takes where it does not fit."""

    batches: Batches
    resident: int
    """The bytes that lie on the device all the time."""
    peak: int
    free: int
    sharded: bool

    @property
    def fits(self) -> bool:
        """Whether the peak is within what is free."""
        return self.peak <= self.free


def fit(
    config: AlignConfig,
    device: torch.device,
    place: Hardware,
    parts: dict[str, PartSize],
    rewards: dict[str, int],
    estimate: Estimate,
) -> Fitted:
    """Fit a run into the memory of a place: weights whole if they fit, else sharded where that is possible."""
    machine, trained, denoiser = config.machine, estimate.trained, estimate.policy.denoiser
    free = place.free // (place.local if device.type == "cpu" else 1)
    can_wait = machine.offload is not Offload.SEQUENTIAL and machine.base is Base.DTYPE
    is_full = config.train is Train.FULL
    can_wait &= not (is_full and config.optimizer.eight_bit)
    ways: tuple[bool, ...] = (False,)
    if place.processes > 1 and can_wait and machine.shard is not Shard.NONE and transformer_blocks(denoiser):
        ways = (True,) if machine.divides else (False, True)  # the one that takes less memory last
    drawn = -(-config.prompts.per_step // place.processes) * config.group_size
    for sharded in ways:
        resident = on_device(parts, machine, text_dropped=machine.drop_text_encoders) + sum(rewards.values())
        each = sharers(place.processes, place.local) if sharded else 1
        resident += bytes_on_process(trained, denoiser, each if is_full else 1, estimate.precision)
        if each > 1 and not is_full:
            whole = sum(part.bytes for name, part in parts.items() if name in DENOISERS)
            resident += (
                sharded_bytes(denoiser, each) - whole - trained.folded
            )  # divided weights are not folded
        # sharded weights are gathered in the computing dtype, and given back
        drawing, training = (
            replace(cost, first=max(cost.each, cost.first - trained.casts))
            if each > 1 and trained.casts
            else cost
            for cost in (estimate.drawing, estimate.training)
        )
        chosen, reasons = [], []
        for name, count, cost, given in (
            ("rollout", drawn, drawing, machine.rollout_batch),
            ("training", -(-drawn // config.optimizer.updates), training, machine.train_batch),
        ):
            most, why = _most(device, cost, free - resident, estimate.cpu_batch, given)
            chosen.append(evened(count, most))
            reasons.append(
                f"{name}: {-(-count // chosen[-1])} x {chosen[-1]} for {count} pictures; at most {most} ({why})"
            )
        micro = MicroBatches(*chosen)
        batches = Batches(micro.rollout, micro.train, tuple(reasons))
        peak = resident + _higher(drawing, training, (batches.rollout, batches.train or 1))
        found = Fitted(batches, resident, peak, free, sharded)
        if found.fits:
            break
    return found


def report_lack(needed: int, free: int, ways: Sequence[str], findings: Findings) -> None:
    """Report that more bytes are needed than are free, and the settings that save some."""
    findings.miss(
        Need.MEMORY,
        f"{size(needed)} are needed and {size(free)} are free. Save memory with {', '.join(ways)}.",
    )


def fit_batches(
    config: AlignConfig,
    device: torch.device,
    place: Hardware,
    parts: dict[str, PartSize],
    rewards: dict[str, int],
    estimate: Estimate | None,
    findings: Findings,
) -> tuple[Batches | None, int | None, bool]:
    """Fit a run into memory: weights whole if they fit, else sharded where the recipe and the model allow it.

    Returns:
        The micro-batches, the bytes of a process at its peak with them, and whether the weights are sharded. A lack of
        memory is a problem, sharding that the recipe does not name is noted.
    """
    if estimate is None:
        return None, None, config.machine.divides
    found = fit(config, device, place, parts, rewards, estimate)
    if not found.fits:
        batches, shown = found.batches, estimate.references
        ways = [*(smaller_references(estimate.policy) if shown else ()), *smaller_runs(config)]
        if shown > 1:
            one = _higher(*estimate.costs(1), (batches.rollout, batches.train or 1))
            each = -(-(found.peak - found.resident - one) // (shown - 1))
            fitted = fitting(one, max(1, each), found.free - found.resident)
            ways.insert(0, fewer_references(fitted, shown))
        report_lack(found.peak, found.free, ways, findings)
    elif found.sharded and not config.machine.divides:
        findings.note(
            f"machine.shard: the weights do not fit whole into {size(found.free)}, so every "
            f"{sharers(place.processes, place.local)} processes divide a copy of the denoiser among them"
        )
    host = sum(part.bytes for part in parts.values()) * place.local
    if found.sharded and config.train is Train.FULL:  # the weights in float32 and one copy of them at a time
        host += (2 * estimate.trained.gradients - estimate.trained.replaced) * place.local
    if device.type != "cpu" and host > free_bytes(torch.device("cpu")):
        findings.miss(Need.MEMORY, f"Weights pass through main memory, which needs {size(host)} free.")
    return found.batches, found.peak, found.sharded


def _most(device: torch.device, cost: Cost, room: int, cpu_batch: int, given: int | None) -> tuple[int, str]:
    """Return the largest micro-batch by the planner's rules, and why."""
    if given is not None:
        return given, "the recipe says so"
    if device.type == "cpu":
        return cpu_batch, "what suits a CPU's cache at this resolution"
    most = cost.most(int(room * SAFE_SHARE))
    return most, f"about {size(cost.each)} a picture, {size(max(room, 0))} for pictures"


def _higher(drawing: Cost, training: Cost, batches: Sequence[int]) -> int:
    """Return the peak with these micro-batches. Not the sum: drawing is over when training begins."""
    return max(drawing.bytes(batches[0]), training.bytes(batches[1]))


def measured(config: AlignConfig, runs: Path) -> tuple[float | None, str | None]:
    """Return the mean seconds of a step in the newest run with the same work on the same machine, and its name."""
    folders = [path.parent for path in runs.glob(f"*/{RECIPE}")]
    wanted = config.model_dump(mode="json")
    for path in sorted(folders, key=lambda folder: folder.stat().st_mtime, reverse=True):
        try:
            folder = RunFolder.open(path, allow_changed=True)
            if folder.kind != kind_of(config):
                continue
            recipe = folder.recipe()
            per_step = recipe.get("prompts", {}).get("per_step") == wanted["prompts"]["per_step"]
            if not (per_step and all(recipe.get(name) == wanted[name] for name in _SAME)):
                continue
            rows = folder.metrics()[1:]  # the first step also warms up and checks itself
        except PixrlError:
            continue  # a damaged run says nothing about this one
        seconds = [sum(x for name, x in row.items() if name.startswith(_PHASE)) for row in rows]
        if not seconds:
            continue
        here = json.loads(describe(None, ""))["machine"]
        there = json.loads((folder.path / ENVIRONMENT).read_text(encoding="utf-8"))["machine"]
        if all(there[name] == here[name] for name in ("cpu", "cores", "gpus")):
            return fmean(seconds), run_name(path)
    return None, None


def lower_bound(operations: int, device: torch.device, precision: Precision) -> tuple[float, str]:
    """Return the seconds of so many operations at the speed of large matrix products, measured here in a moment.

    A CPU's speed is what one thread does in a second that it really computes, times the threads. Other programs that
    keep the machine busy change little of it, and threads that get in each other's way make it no smaller.
    """
    dtype = precision.autocast or precision.weights
    if device.type == "cpu" and dtype is torch.float16:
        dtype = torch.float32
    rate = _operations_a_second(device, dtype, torch.get_num_threads())
    return operations / rate, f"drawing alone, at {rate / 1e9:.0f} GFLOP/s"


@cache
def _operations_a_second(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    on_cpu = device.type == "cpu"
    clock = time.thread_time if on_cpu else time.perf_counter
    torch.set_num_threads(1 if on_cpu else threads)
    try:
        for side in SIDES:
            x = torch.ones(side, side, device=device, dtype=dtype)
            seconds = min(_product_seconds(x, clock) for _ in range(TRIES))
            if seconds > LONG:  # a processor that imitates bfloat16 would take seconds for the larger one
                break
    finally:
        torch.set_num_threads(threads)
    return (threads if on_cpu else 1) * 2 * side**3 / seconds


def _product_seconds(x: torch.Tensor, clock: Callable[[], float]) -> float:
    begun = clock()
    (x @ x)[0, 0].item()  # waits for a GPU
    return clock() - begun
