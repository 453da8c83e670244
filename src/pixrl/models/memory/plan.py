"""The settings that save memory, which placement.py carries out; importing them loads no torch.

| plan | on the device | costs |
|---|---|---|
| offload: none | everything | nothing |
| offload: parts | the denoiser; text encoders and VAE while they are used | moving them, once a step at most |
| offload: sequential | LoRA, buffers, and each layer of the denoiser while it computes | moving all weights each pass |
| base: int8, nf4 | the denoiser's linear layers in 8 or 4 bits, one whole while it computes | rounding; unpacking |
| shard: full | this process's part of the denoiser, and each block while it computes | gathering them each pass |
| vae_slicing | one picture's decoder activations at a time | a little time |
| vae_tiling: N | the activations of N x N pixels at a time | blended seams: the pictures change a little |

Sequential offload keeps the weights that a backward pass will need, so training with it takes gradient checkpointing.
"""

from enum import StrEnum
from typing import Any

from pydantic import field_validator, model_validator

from pixrl.config import Settings, Side


class Offload(StrEnum):
    """The parts of a pipeline that wait on the CPU while they are not needed."""

    NONE = "none"
    PARTS = "parts"
    """The text encoders and the VAE wait on the CPU."""
    SEQUENTIAL = "sequential"
    """Every layer of the denoiser waits on the CPU."""


class Base(StrEnum):
    """The form in which the frozen weights of a denoiser's linear layers are kept."""

    DTYPE = "dtype"
    """The model's dtype."""
    INT8 = "int8"
    """8 bits (quantization.py)."""
    NF4 = "nf4"
    """4 bits (quantization.py)."""


class Shard(StrEnum):
    """Whether the processes of a run divide the denoiser's frozen weights among them."""

    AUTO = "auto"
    """Where the whole denoiser does not fit."""
    NONE = "none"
    """Every process holds all of them."""
    FULL = "full"
    """Each process holds its part, and gathers each block while it computes."""


class MemoryPlan(Settings):
    """How memory is saved; results depend on it by rounding (a quantized base's is large) and by tiles' seams."""

    base: Base = Base.DTYPE
    """dtype; int8, or nf4 by bitsandbytes: the denoiser's linear layers in 8 or 4 bits: another base, close to it."""

    offload: Offload = Offload.NONE
    """none; parts: text encoders and VAE wait on the CPU; sequential: each layer does, slow (GPU). true means parts."""
    vae_slicing: bool = False
    """Decode one picture at a time."""
    vae_tiling: Side | None = None
    """Decode in tiles of this many pixels a side; none: whole pictures."""

    @property
    def divides(self) -> bool:
        """Whether the denoiser waits on the CPU until it is divided among processes."""
        return False

    @field_validator("offload", mode="before")
    @classmethod
    def _yes_or_no(cls, given: Any) -> Any:
        if isinstance(given, bool):
            return Offload.PARTS if given else Offload.NONE
        return given

    @model_validator(mode="after")
    def _base_can_wait(self) -> "MemoryPlan":
        if self.base is not Base.DTYPE and self.offload is Offload.SEQUENTIAL:
            raise ValueError(
                f"base: {self.base} layers cannot be streamed by offload: sequential, and are small without; take "
                "offload: parts with it, or base: dtype"
            )
        return self
