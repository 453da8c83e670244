"""Placing the parts of a pipeline on its device, and setting how its VAE decodes, by a memory plan."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from enum import StrEnum
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from pixrl.errors import InputError
from pixrl.models.latents import is_of_video
from pixrl.models.memory.plan import MemoryPlan, Offload

TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_LORA = "lora_"


class PipelinePart(StrEnum):
    """A part of a pipeline that need not be on the device all the time."""

    TEXT = "text"
    VAE = "vae"


class Placement:
    """The places of the parts of a pipeline: what is on the device now, and what waits on the CPU."""

    def __init__(
        self,
        pipeline: Any,
        denoiser: nn.Module,
        device: torch.device,
        plan: MemoryPlan,
        *,
        placed: bool = False,
    ) -> None:
        """Move the parts from the CPU to where the plan wants them, unless they were `placed` before.

        Raises:
            InputError: the plan has no effect on this device.
        """
        if plan.offload is not Offload.NONE and device.type == "cpu":
            raise InputError(
                f"offload={plan.offload.value} has no effect on a CPU: remove it, or choose a GPU."
            )
        self.pipeline = pipeline
        self.denoiser = denoiser
        self.device = device
        self.offload = plan.offload
        self._divides = plan.divides
        self.on_device: set[PipelinePart] = set(PipelinePart) if placed else set()
        if placed:
            return
        if plan.offload is Offload.SEQUENTIAL:
            stream_weights(denoiser, device)
            return
        if not plan.divides:
            denoiser.to(device)
        if plan.offload is Offload.NONE:
            for part in PipelinePart:
                self._move(part, device)

    @contextmanager
    def moved(self, part: PipelinePart) -> Iterator[None]:
        """Move the text encoders, or the VAE, to the device within it, and back to the CPU after it."""
        self._move(part, self.device)
        try:
            yield
        finally:
            self._move(part, torch.device("cpu"))

    @contextmanager
    def changing_layers(self) -> Iterator[None]:
        """Stop streaming for a change of the denoiser's layers, such as adding LoRA, and begin anew after it."""
        if self.offload is not Offload.SEQUENTIAL:
            yield
            return
        unstream_weights(self.denoiser)
        yield
        stream_weights(self.denoiser, self.device)

    @contextmanager
    def without_denoiser(self) -> Iterator[None]:
        """Let the denoiser wait on the CPU within it, where parts take turns on the device anyway."""
        if self.offload is not Offload.PARTS or self._divides:
            yield
            return
        self.denoiser.to("cpu")
        try:
            yield
        finally:
            self.denoiser.to(self.device)

    def drop_text(self) -> None:
        """Free the text encoders for good."""
        self.pipeline.register_modules(
            **{name: None for name in TEXT_PARTS if self.pipeline.components.get(name) is not None}
        )

    def _move(self, part: PipelinePart, device: torch.device) -> None:
        for name in ("vae",) if part is PipelinePart.VAE else TEXT_PARTS:
            module = self.pipeline.components.get(name)
            if module is not None:
                module.to(device)
        here = self.on_device | {part}
        self.on_device = here if device == self.device else self.on_device - {part}


def stream_weights(module: nn.Module, device: torch.device) -> None:
    """Keep frozen weights on the CPU from now on, and each layer's on `device` only while it computes.

    LoRA layers and buffers move to the device and stay there.
    """
    for name, layer in list(module.named_modules()):
        if _LORA in name:
            layer.to(device)
        elif next(layer.parameters(recurse=False), None) is not None:
            hook = AlignDevicesHook(execution_device=device, offload=True)
            add_hook_to_module(layer, hook)
        else:
            for key, buffer in layer.named_buffers(recurse=False):
                layer.register_buffer(key, buffer.to(device), key not in layer._non_persistent_buffers_set)


def unstream_weights(module: nn.Module) -> None:
    """Put all weights back on the CPU and end `stream_weights`."""
    for layer in module.modules():
        remove_hook_from_module(layer)


def without_gradients(offload: Offload) -> AbstractContextManager[None]:
    """Return a context for drawing: torch's inference mode, or no_grad where weights are offloaded.

    Weights that move within inference mode could not be trained with afterwards.
    """
    return torch.inference_mode() if offload is Offload.NONE else torch.no_grad()


def set_decoding(vae: Any, plan: MemoryPlan, longest: int) -> None:
    """Set how a VAE decodes, and encodes references: slice by slice, tile by tile, or whole.

    `longest`: the pictures' longer side in pixels.

    Raises:
        InputError: tiles as large as the pictures, or no multiple of a latent, or too small for one.
    """
    if plan.vae_slicing:
        vae.enable_slicing()
    side = plan.vae_tiling
    if side is None:
        return
    of_video = is_of_video(vae)
    unit = int(vae.spatial_compression_ratio if of_video else 2 ** (len(vae.config.block_out_channels) - 1))
    if side >= longest:
        raise InputError(
            f"vae_tiling={side} has no effect on pictures of {longest} pixels: give a smaller tile, or leave it out."
        )
    if side % unit or side < 2 * unit:
        raise InputError(f"vae_tiling={side} must be a multiple of {unit} pixels, and at least {2 * unit}.")
    if of_video:
        stride = 3 * side // (4 * unit) * unit
        vae.enable_tiling(side, side, stride, stride)
        return
    vae.enable_tiling()
    vae.tile_sample_min_size = side
    vae.tile_latent_min_size = side // unit
