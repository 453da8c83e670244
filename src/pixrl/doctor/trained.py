"""The memory that training takes beside the loaded weights: slots, gradients, the optimizer's state."""

import torch
from torch import nn

from pixrl.algorithms.optim import moment_bytes
from pixrl.algorithms.world import BUCKET
from pixrl.device import Precision
from pixrl.doctor.diagnosis import Trained
from pixrl.models.memory.plan import Base, Offload
from pixrl.models.memory.sharding import gathered_bytes
from pixrl.models.pipeline import FlowPipelinePolicy
from pixrl.models.slots import slot_sizes
from pixrl.models.trained import FULL
from pixrl.runs.config import AlignConfig, Train

FLOAT = 4
"""Bytes of a number of the trained weights, their gradients and their optimizer."""
LORA_SLOTS = 3
"""LoRA slots of a run."""


def trained_of(policy: FlowPipelinePolicy, config: AlignConfig, precision: Precision) -> Trained:
    """Return what a recipe trains of a policy that has no slots yet.

    Raises:
        InputError: a target is no layer that LoRA can change.
    """
    eight_bit = config.optimizer.eight_bit
    if config.train is Train.LORA:
        targets = policy.lora_targets if config.lora.targets is None else config.lora.targets
        sizes = slot_sizes(policy.denoiser, targets, config.lora.rank)
        count = sum(sizes)
        slots = LORA_SLOTS * FLOAT * count
        moments = moment_bytes(sizes, eight_bit=eight_bit)
        weights = (
            sum(down * up for down, up in zip(sizes[::2], sizes[1::2], strict=True)) // config.lora.rank**2
        )
        machine = config.machine
        as_loaded = machine.base is Base.DTYPE and machine.offload is Offload.NONE
        # as `TrainedDenoiser.folded` decides
        is_folded = as_loaded and precision.autocast is None and precision.weights in FULL
        words = f"LoRA, {LORA_SLOTS} slots"
        folded = FLOAT * weights if is_folded else 0
        return Trained(count, slots, slots, FLOAT * count, moments, words, folded=folded)
    sizes = [parameter.numel() for parameter in policy.denoiser.parameters()]
    count, copies = sum(sizes), 1 + len(config.copies)
    casts = 0
    if precision.autocast is not None:  # which keeps copies of trained weights in its dtype during a pass
        layers = [one for one in policy.denoiser.modules() if isinstance(one, nn.Linear | nn.Conv2d)]
        casts = precision.autocast.itemsize * sum(x.numel() for layer in layers for x in layer.parameters())
    return Trained(
        parameters=count,
        slots=copies * FLOAT * count,
        saved=(copies - 1) * FLOAT * count,  # the reference is the model itself
        gradients=FLOAT * count,
        optimizer=moment_bytes(sizes, eight_bit=eight_bit),
        what=f"all weights, x {copies}",
        replaced=precision.weights.itemsize * count,
        casts=casts,
    )


def bytes_on_process(trained: Trained, denoiser: nn.Module, processes: int, precision: Precision) -> int:
    """Return the bytes that training adds on a process to the loaded weights.

    Args:
        trained: of `trained_of`.
        denoiser: what is trained, or LoRA's backbone.
        processes: how many divide trained weights; 1: they are whole, as LoRA always is.
        precision: of the run.
    """
    own = trained.slots + trained.folded + trained.gradients + trained.optimizer - trained.replaced
    if processes == 1:
        return own + min(trained.gradients, FLOAT * BUCKET)
    parts = -(-(own + trained.replaced) // processes)
    return parts + gathered_bytes(denoiser, precision.autocast or torch.float32) - trained.replaced
