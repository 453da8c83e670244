"""How many pictures go through the model at once, and whether one with its reference pictures fits into memory at all.

The plan only decides memory and speed: every size gives the same pictures and updates. On a GPU two trial batches are
measured and the largest size that fits is taken; on a CPU it is the size that suits its cache. Either way the pieces
are then made equal, and the plan says what was chosen and why.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pixrl.algorithms.trainer import MicroBatches
from pixrl.device import free_bytes
from pixrl.errors import InputError
from pixrl.models.base import Conditioning
from pixrl.models.memory.plan import Offload
from pixrl.models.memory.sharding import transformer_blocks
from pixrl.models.pipeline import FlowPipelinePolicy
from pixrl.models.references import ReferenceShape, TokenReferences
from pixrl.runs.config import AlignConfig, PersonalizeConfig, Train


@dataclass(frozen=True)
class BatchPlan:
    """The chosen sizes of micro-batches, and the reasons in words."""

    micro_batches: MicroBatches
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Limit:
    """The largest size that fits, and what sets it."""

    size: int
    because: str


def plan(
    policy: FlowPipelinePolicy,
    condition: Conditioning,
    *,
    rollouts: int,
    trained: int,
    rollout_batch: int | None = None,
    train_batch: int | None = None,
    through_decoder: bool = False,
) -> BatchPlan:
    """Plan sizes for a process that draws `rollouts` pictures a step and takes optimizer steps of about `trained`.

    `rollout_batch`, `train_batch`: what the recipe asks for. `through_decoder`: the gradient passes the decoder too.
    `condition`: one row, with references as all have,
    for the trial on a GPU.
    """
    given = [
        None if size is None else Limit(size, "the recipe says so") for size in (rollout_batch, train_batch)
    ]
    if policy.device.type != "cuda":
        usual = Limit(policy.micro_batch, "what suits a CPU's cache at this resolution")
        drawing, training = (limit or usual for limit in given)
    else:
        drawing = given[0] or _measured(policy, trial(policy, condition))
        training = given[1] or _measured(policy, trial(policy, condition, train=True, decode=through_decoder))
    sizes = (evened(rollouts, drawing.size), evened(trained, training.size))
    reasons = (
        _say("rollout", rollouts, sizes[0], drawing),
        _say("training", trained, sizes[1], training),
    )
    return BatchPlan(MicroBatches(*sizes), reasons)


def evened(count: int, most: int) -> int:
    """Return the size of equal pieces of at most `most`: 24 by at most 10 is 8, not 10, 10 and 4."""
    pieces = -(-count // most) or 1
    return -(-count // pieces) or 1


def _say(what: str, count: int, size: int, limit: Limit) -> str:
    pieces = -(-count // size)
    return f"{what}: {pieces} x {size} for {count} pictures a process; at most {limit.size} ({limit.because})"


def trial(
    policy: FlowPipelinePolicy, condition: Conditioning, *, train: bool = False, decode: bool = True
) -> Callable[[int], None]:
    """Take some pictures through the model once, to the decoded picture or not, and with the gradient or not."""

    def velocity(count: int) -> Tensor:
        x = policy.initial_noise(range(count))
        return policy.velocity(x, x.new_full((count,), 0.5), Conditioning.cat([condition] * count))

    def one(count: int) -> None:
        with torch.set_grad_enabled(train), policy.decoder_present():
            found = policy.decode(velocity(count)) if decode else velocity(count)
            if train:
                found.square().mean().backward()

    return one


def _measured(policy: FlowPipelinePolicy, attempt: Callable[[int], None]) -> Limit:
    def needed(count: int) -> int:
        """Return the bytes that a trial needs beyond what lies there already."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(policy.device)
        before = torch.cuda.memory_allocated(policy.device)
        try:
            attempt(count)
        finally:
            for parameter in policy.denoiser.parameters():
                parameter.grad = None
        return int(torch.cuda.max_memory_allocated(policy.device)) - before

    def peak(count: int) -> int | None:
        return unless_exhausted(partial(needed, count))

    peak(1)  # the first run also allocates workspaces
    one = peak(1)
    two = None if one is None else peak(2)
    return largest(one, two, torch.cuda.mem_get_info(policy.device)[0])


def largest(one: int | None, two: int | None, free: int) -> Limit:
    """Return the largest batch within the free memory, from the peaks of one and of two pictures.

    Args:
        one, two: bytes; None where memory was used up.
        free: bytes.

    Raises:
        InputError: not even one picture fits.
    """
    if one is None:
        raise InputError(
            f"One picture alone runs out of memory; {free / 2**30:.1f} GiB are free beside the models. Save memory "
            "with machine.gradient_checkpointing=true, machine.offload=parts, fewer or smaller references, or a "
            "smaller resolution. What each takes, pixrl doctor says."
        )
    if two is None:
        return Limit(1, f"two run out of memory, {free / 2**30:.1f} GiB free")
    each = max(1, two - one)
    room = int(free * SAFE_SHARE) - (one - each)
    return Limit(max(1, room // each), f"{each / 2**20:.0f} MiB a picture, {free / 2**30:.1f} GiB free")


SAFE_SHARE = 0.8
"""Of the free memory that may be used."""


def require_equal_shares(config: AlignConfig, processes: int, held_out: int) -> None:
    """Refuse to shard what processes cannot do in step: each must draw as many pictures as the others.

    Args:
        config: the recipe.
        processes: how many share the run.
        held_out: the prompts that the evaluation chooses from.

    Raises:
        InputError: there is one process, or the prompts of a step or of the evaluation are no multiple of them.
    """
    if processes == 1:
        raise InputError(
            "machine.shard=full divides the model among processes, and here is one. Start several (add "
            "--processes 2), or take --set machine.shard=none."
        )
    if isinstance(config, PersonalizeConfig) and config.references.shape is ReferenceShape.OWN:
        raise InputError(
            "references.shape=own: references of several shapes take one pass each, and sharded weights "
            "(machine.shard) need the same passes in all processes. Leave it out, or take --set machine.shard=none"
        )
    shown = min(config.evaluation.prompts, held_out)
    for name, count in (("prompts.per_step", config.prompts.per_step), ("evaluation.prompts", shown)):
        if count % processes:
            fit = count // processes * processes or processes
            is_short = count is shown and fit > held_out
            remedy = f"an evaluation.source of {fit} or more" if is_short else f"--set {name}={fit}"
            raise InputError(
                f"{name}: {count} prompts cannot be shared out evenly to {processes} processes, which sharded weights "
                f"(machine.shard) need, since all processes gather them together. Give {remedy}"
            )


_EXHAUSTED = ("DefaultCPUAllocator", "ALLOC_FAILED", "out of memory")
"""How a RuntimeError of torch's CPU allocator, cuBLAS or cuDNN says that memory is used up."""


def require_room(policy: FlowPipelinePolicy, condition: Conditioning, room: int | None = None) -> None:
    """Raise an InputError with the number of references that fit, where one picture with all of them does not.

    What its backward pass keeps is counted with one reference and with two, and grows by the same amount with each
    further one. Where not even that pass fits, its failure is the answer.

    Args:
        policy: with LoRA slots, whose gradient is what needs the memory.
        condition: one row.
        room: bytes; None: a safe share of what is free.
    """
    count = len(condition.references)
    if count < 2:
        return
    room = int(free_bytes(policy.device) * SAFE_SHARE) if room is None else room
    kept: list[int] = []
    for shown in (1, 2):
        few = replace(condition, references=condition.references[:shown])
        taken = unless_exhausted(partial(kept_bytes, policy, few))
        if taken is None:
            raise InputError(
                f"{count} reference pictures are too many: training on one picture with {shown} of them runs out of "
                f"memory; {_remedy(int(bool(kept) and kept[0] <= room))}"
            )
        kept.append(taken)
    one, each = kept[0], max(1, kept[1] - kept[0])
    need = one + (count - 1) * each
    if need > room:
        raise InputError(
            f"{count} reference pictures need about {need / 2**30:.2f} GiB to train on one picture, and "
            f"{room / 2**30:.2f} GiB may be used; {_remedy(fitting(one, each, room))}"
        )


def fitting(one: int, each: int, room: int) -> int:
    """Return how many references fit, from the bytes with one and those of each further one; 0 if not even one does."""
    return 0 if room < one else 1 + (room - one) // each


def fewer_references(fit: int, count: int) -> str:
    """Return the setting that shows the model as many references as fit, or one where not even that is enough."""
    return f"references.count={max(1, fit)} ({f'{fit} of {count} fit' if fit else 'not enough alone'})"


def smaller_references(policy: FlowPipelinePolicy) -> Iterator[str]:
    """Return the setting that halves the side of references, where there is a smaller one."""
    assert isinstance(policy, TokenReferences)
    unit = policy.reference_unit
    half = policy.reference_side // 2 // unit * unit
    if half:
        yield f"references.side={half}"


def smaller_runs(config: AlignConfig) -> list[str]:
    """Return the settings by which a run of this recipe would need less memory."""
    machine = config.machine
    ways = {
        "machine.gradient_checkpointing=true": not machine.gradient_checkpointing,
        "machine.offload=parts": machine.offload is Offload.NONE,
        "machine.offload=sequential": machine.offload is Offload.PARTS and config.train is Train.LORA,
        "optimizer.eight_bit=true": not config.optimizer.eight_bit,
        "train=lora": config.train is Train.FULL,
        "a smaller resolution": True,
    }
    return [way for way, is_open in ways.items() if is_open]


def unless_exhausted(measure: Callable[[], int]) -> int | None:
    """Return what a measurement gives; None where memory is used up before. Other errors come through.

    The error is let go before the memory is given back: its frames hold the tensors of the pass.
    """
    try:
        return measure()
    except MemoryError:
        pass
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not isinstance(error, torch.OutOfMemoryError) and not any(how in str(error) for how in _EXHAUSTED):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _remedy(fit: int) -> str:
    fits = f"{fit} fit{'s' if fit == 1 else ''}: --set references.count={fit}" if fit else "not even one fits"
    return f"{fits}. Or make them smaller (references.side), or set machine.gradient_checkpointing=true."


def kept_bytes(policy: FlowPipelinePolicy, condition: Conditioning) -> int:
    """Measure the bytes that one picture's backward pass keeps, weights not counted."""
    weights: set[int] = set()
    sizes: dict[int, int] = {}

    def note(module: nn.Module, given: object) -> None:
        own = (x for x in module.parameters() if not isinstance(x, DTensor))  # those are other processes' too
        weights.update(x.untyped_storage()._cdata for x in own)

    def count(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            sizes[storage._cdata] = storage.nbytes()
        return x

    x = policy.initial_noise([0])
    with ExitStack() as hooks, torch.autograd.graph.saved_tensors_hooks(count, lambda kept: kept):
        for module in (policy.denoiser, *transformer_blocks(policy.denoiser)):
            hooks.enter_context(
                module.register_forward_pre_hook(note)
            )  # sharded weights are gathered by then
        velocity = policy.velocity(x, x.new_full((1,), 0.5), condition)
    del velocity  # only now: what it kept must not have been freed and counted again under the same address
    return sum(sizes.values())
