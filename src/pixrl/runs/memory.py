"""Whether a picture's training fits into memory with the reference pictures that a recipe asks for."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from pixrl.device import free_bytes
from pixrl.errors import InputError
from pixrl.models.base import Conditioning
from pixrl.models.flux import FluxPolicy
from pixrl.models.memory_plan import Offload
from pixrl.models.pipeline import FlowPipelinePolicy
from pixrl.runs.align_config import AlignConfig

SAFE_SHARE = 0.8
"""Of the free memory that may be used."""
_EXHAUSTED = ("DefaultCPUAllocator", "ALLOC_FAILED", "out of memory")
"""How a RuntimeError of torch's CPU allocator, cuBLAS or cuDNN says that memory is used up."""


def require_room(policy: FlowPipelinePolicy, condition: Conditioning, room: int | None = None) -> None:
    """InputError, with the number that fits, when one picture with all its references does not fit into memory.

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
    """How many references fit, from the bytes with one and those of each further one; 0: not even one."""
    return 0 if room < one else 1 + (room - one) // each


def fewer_references(fit: int, count: int) -> str:
    """The setting that shows the model as many references as fit, or one where not even that is enough."""
    return f"references.count={max(1, fit)} ({f'{fit} of {count} fit' if fit else 'not enough alone'})"


def smaller_references(policy: FlowPipelinePolicy) -> Iterator[str]:
    """The setting that halves the side of references, where there is a smaller one."""
    assert isinstance(policy, FluxPolicy)
    unit = 2 * int(policy.pipeline.vae_scale_factor)
    half = policy.reference_side // 2 // unit * unit
    if half:
        yield f"references.side={half}"


def smaller_runs(config: AlignConfig) -> list[str]:
    """The settings by which a run of this recipe would need less memory."""
    machine = config.machine
    ways = {
        "machine.gradient_checkpointing=true": not machine.gradient_checkpointing,
        "machine.offload=parts": machine.offload is Offload.NONE,
        "machine.offload=sequential": machine.offload is Offload.PARTS,
        "optimizer.eight_bit=true": not config.optimizer.eight_bit,
        "a smaller resolution": True,
    }
    return [way for way, is_open in ways.items() if is_open]


def unless_exhausted(measure: Callable[[], int]) -> int | None:
    """What it measures; None where memory is used up before it can. Other errors come through.

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
    """Bytes that one picture's backward pass keeps, weights not counted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.transformer.parameters()}
    sizes: dict[int, int] = {}

    def count(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    x = policy.initial_noise([0])
    with torch.autograd.graph.saved_tensors_hooks(count, lambda kept: kept):
        velocity = policy.velocity(x, x.new_full((1,), 0.5), condition)
    del velocity  # only now: what it kept must not have been freed and counted again under the same address
    return sum(sizes.values())
