"""Whether a picture's training fits into memory with the reference pictures that a recipe asks for."""

from dataclasses import replace

import torch
from torch import Tensor

from pixrl.device import free_bytes
from pixrl.errors import InputError
from pixrl.models.base import Conditioning
from pixrl.models.flow_pipeline import FlowPipelinePolicy

SAFE_SHARE = 0.8
"""Of the free memory that may be used."""


def require_room(policy: FlowPipelinePolicy, condition: Conditioning, room: int | None = None) -> None:
    """InputError, with the number that fits, when one picture with all its references does not fit into memory.

    What its backward pass keeps is counted with one reference and with two, and grows by the same amount with each
    further one.

    Args:
        policy: with LoRA slots, whose gradient is what needs the memory.
        condition: one row.
        room: bytes; None: a safe share of what is free.
    """
    count = len(condition.references)
    if count < 2:
        return
    room = int(free_bytes(policy.device) * SAFE_SHARE) if room is None else room
    one, two = (kept_bytes(policy, replace(condition, references=condition.references[:n])) for n in (1, 2))
    each = max(1, two - one)
    need = one + (count - 1) * each
    if need <= room:
        return
    fit = 0 if room < one else 1 + (room - one) // each
    remedy = f"{fit} fit: --set references.count={fit}" if fit else "not even one fits"
    raise InputError(
        f"{count} reference pictures need about {need / 2**30:.2f} GiB to train on one picture, and "
        f"{room / 2**30:.2f} GiB may be used; {remedy}. Or make them smaller (references.side), or set "
        "machine.gradient_checkpointing=true."
    )


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
