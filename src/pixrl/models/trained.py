"""The denoiser of a policy, and what training attaches to it: slots, shards, compiled blocks."""

from abc import ABC
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from pixrl.device import Precision
from pixrl.errors import InputError, RunError
from pixrl.models.memory.placement import Placement
from pixrl.models.memory.plan import Base, Offload
from pixrl.models.memory.sharding import compile_blocks, shard
from pixrl.models.slots import FullSlots, LoraSlots, Slot, Slots, parse_slot

FULL = (torch.float32, torch.float64)
"""Precisions in which a sum of a weight and its LoRA keeps what the LoRA has learned."""


class TrainedDenoiser(ABC):
    """What a flow pipeline's policy does to its denoiser alone; `pipeline.FlowPipelinePolicy` has the rest."""

    lora_targets: ClassVar[tuple[str, ...]]
    precision: Precision
    placement: Placement
    base: Base
    offload: Offload
    in_step: bool
    compiled: bool = False
    slots: Slots | None = None
    _denoiser: nn.Module

    @property
    def denoiser(self) -> nn.Module:
        """The transformer or UNet that `velocity` runs: the pipeline's own, or the active slot's copy of it."""
        return self._denoiser if self.slots is None else self.slots.backbone

    @property
    def lora(self) -> LoraSlots | None:
        """The slots, where they are LoRA's."""
        return self.slots if isinstance(self.slots, LoraSlots) else None

    def checkpoint_gradients(self) -> None:
        """Recompute the transformer's activations in the backward pass: less memory, about a third more time."""
        self.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]

    def compile(self, backend: str) -> None:
        """Compile every transformer block as `compile_blocks` does; slots must be attached already."""
        for denoiser in (self.denoiser,) if self.slots is None else self.slots.modules:
            compile_blocks(denoiser, backend)
        self.compiled = True

    def shard(self, mesh: DeviceMesh) -> None:
        """Divide the frozen weights among processes as `sharding.shard` does; LoRA must be attached already."""
        shard(self.denoiser, mesh, () if self.lora is None else self.lora.all_parameters())
        self.in_step = True

    def attach_lora(
        self, *, rank: int = 32, alpha: float = 64.0, targets: tuple[str, ...] | None = None, seed: int = 0
    ) -> LoraSlots:
        """Add the trainable slots and return them; the pictures do not change by it.

        Raises:
            RunError: there are slots already.
            InputError: the rank is below 1, or a target names no layer.
        """
        self._require_no_slots()
        wanted = self.lora_targets if targets is None else targets
        with self.placement.changing_layers():
            slots = LoraSlots(self.denoiser, rank=rank, alpha=alpha, targets=wanted, seed=seed)
        self.slots = slots
        return slots

    def attach_full(self, copies: Collection[Slot], mesh: DeviceMesh | None = None) -> FullSlots:
        """Let all of the denoiser's weights be trained, with a copy for each other slot; the pictures do not change.

        The denoiser is float32 from here on; its matrix products stay in the dtype that they were in.

        Args:
            copies: the slots besides `current`.
            mesh: the processes that divide the weights and the copies; None: each has all of them.

        Raises:
            ConfigError: the denoiser has no list of blocks, by which it would be divided.
            RunError: there are slots already.
            InputError: the weights are quantized, wait on the CPU layer by layer, or compute in float16.
        """
        self._require_no_slots()
        if self.base is not Base.DTYPE or self.offload is Offload.SEQUENTIAL:
            how = f"base={self.base.value}" if self.base is not Base.DTYPE else "offload=sequential"
            raise InputError(f"{how}: such weights cannot be trained. Leave it out, or attach_lora.")
        if self.precision.autocast is torch.float16:
            raise InputError("The gradients of whole weights underflow in float16: take dtype=bfloat16.")
        slots = FullSlots(self.denoiser, copies, mesh, self.precision.autocast)
        self.slots, self.in_step = slots, mesh is not None
        return slots

    def folded(self) -> AbstractContextManager[None]:
        as_loaded = self.base is Base.DTYPE and self.offload is Offload.NONE and not self.in_step
        is_full = self.precision.autocast is None and self.precision.weights in FULL
        return self.slots.folded() if self.slots is not None and as_loaded and is_full else nullcontext()

    def _require_no_slots(self) -> None:
        if self.slots is not None:
            raise RunError(
                f"This policy already has {self.slots.kind} slots. Load the model again to attach others."
            )

    def slot(self, name: str) -> AbstractContextManager[None]:
        wanted = parse_slot(name)
        if self.slots is not None:
            return self.slots.use(wanted)
        if wanted in (Slot.OLD, Slot.EMA):
            raise RunError(
                f"The slot {name!r} does not exist before attach_lora(rank=..., alpha=...) or attach_full(copies=...)."
            )
        return nullcontext()
