"""How many pictures go through the model at once. The plan only decides memory and speed: every size works.

On a GPU two trial batches are measured and the largest size that fits is taken; on a CPU it is the size that suits its
cache. Either way the pieces are then made equal, and the plan says what was chosen and why.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pixrl.algorithms.trainer import MicroBatches
from pixrl.errors import InputError
from pixrl.models.base import Conditioning
from pixrl.models.pipeline import FlowPipelinePolicy
from pixrl.runs.memory import SAFE_SHARE, unless_exhausted


@dataclass(frozen=True)
class Plan:
    """The chosen sizes, in words too."""

    micro_batches: MicroBatches
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Limit:
    """The largest size, and what sets it."""

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
) -> Plan:
    """Sizes for a process that draws `rollouts` pictures a step and takes optimizer steps of about `trained` pictures.

    `rollout_batch`, `train_batch`: what the recipe asks for. `through_decoder`: the gradient passes the decoder too.
    `condition`: one row, with references as all have,
    for the trial on a GPU.
    """
    drawing, training = _limits(policy, condition, rollout_batch, train_batch, through_decoder)
    sizes = (evened(rollouts, drawing.size), evened(trained, training.size))
    reasons = (
        _say("rollout", rollouts, sizes[0], drawing),
        _say("training", trained, sizes[1], training),
    )
    return Plan(MicroBatches(*sizes), reasons)


def evened(count: int, most: int) -> int:
    """The size of equal pieces of at most `most`: 24 by at most 10 is 8, not 10, 10 and 4."""
    pieces = -(-count // most) or 1
    return -(-count // pieces) or 1


def _say(what: str, count: int, size: int, limit: Limit) -> str:
    pieces = -(-count // size)
    return f"{what}: {pieces} x {size} for {count} pictures a process; at most {limit.size} ({limit.because})"


def _limits(
    policy: FlowPipelinePolicy,
    condition: Conditioning,
    rollout_batch: int | None,
    train_batch: int | None,
    through_decoder: bool,
) -> tuple[Limit, Limit]:
    given = [
        None if size is None else Limit(size, "the recipe says so") for size in (rollout_batch, train_batch)
    ]
    drawing, training = given
    if policy.device.type != "cuda":
        usual = Limit(policy.micro_batch, "what suits a CPU's cache at this resolution")
        return drawing or usual, training or usual
    return (
        drawing or _measured(policy, trial(policy, condition)),
        training or _measured(policy, trial(policy, condition, train=True, decode=through_decoder)),
    )


def trial(
    policy: FlowPipelinePolicy, condition: Conditioning, *, train: bool = False, decode: bool = True
) -> Callable[[int], None]:
    """One pass of some pictures through the model, to the decoded picture or not, and with its gradient or not."""

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
    def peak(count: int) -> int | None:
        return unless_exhausted(partial(_peak, policy, attempt, count))

    peak(1)  # the first run also allocates workspaces
    one = peak(1)
    two = None if one is None else peak(2)
    return largest(one, two, torch.cuda.mem_get_info(policy.device)[0])


def largest(one: int | None, two: int | None, free: int) -> Limit:
    """The largest batch within the free memory, from the peaks of one and of two pictures.

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


def _peak(policy: FlowPipelinePolicy, attempt: Callable[[int], None], count: int) -> int:
    """Bytes that a trial needs beyond what lies there already."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(policy.device)
    before = torch.cuda.memory_allocated(policy.device)
    try:
        attempt(count)
    finally:
        for parameter in policy.transformer.parameters():
            parameter.grad = None
    return int(torch.cuda.max_memory_allocated(policy.device)) - before
