"""A denoiser whose frozen linear layers are kept in 8 or in 4 bits.

int8: a scale for each row of a weight [out, in], so that its largest value is 127 (Dettmers et al., 2022, "LLM.int8()",
of weights alone). By torch itself: see docs/log.md on why not by torchao or bitsandbytes.

nf4: 4 bits as NormalFloat by bitsandbytes, QLoRA (Dettmers et al., 2023, "QLoRA: Efficient Finetuning of Quantized
LLMs"): each 64 values share a scale in float32.

A layer is unpacked while it computes, forwards and backwards, so rollouts and updates see the same weights. Activations
are not rounded. LoRA above it is in float32, as on any base.

Deviations from QLoRA: 1. scales are not quantized in turn, which would save another 0.37 bits a value. 2. A layer whose
inputs are no multiple of 64 keeps its dtype: bitsandbytes 0.50.2 unpacks it on a CPU with the scales of other blocks.
Published SD3, FLUX and SDXL have none.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pixrl.device import Precision
from pixrl.errors import InputError
from pixrl.libraries import bitsandbytes
from pixrl.models.memory.plan import Base

NF4 = "base=nf4"
"""What a message says that needs bitsandbytes."""
BLOCK = 64
"""The values that share a scale of NF4."""
LARGEST = 127
"""The largest value of int8 that is used, of either sign."""


def is_quantized(shape: Sequence[int], base: Base) -> bool:
    """Return whether the weight of a linear layer of this shape [out, in] is quantized."""
    return base is Base.INT8 or (base is Base.NF4 and shape[1] % BLOCK == 0)


def linear_layers(denoiser: nn.Module, name: str, base: Base) -> dict[str, nn.Linear]:
    """Return the layers that are quantized, by name.

    Raises:
        InputError: there are none.
    """
    found = {
        key: one
        for key, one in denoiser.named_modules()
        if type(one) is nn.Linear and is_quantized((one.out_features, one.in_features), base)
    }
    if not found:
        of = f" of {BLOCK} inputs or a multiple of it" if base is Base.NF4 else ""
        raise InputError(
            f"base={base.value} has no effect on {name}: its {type(denoiser).__name__} has no linear layers{of}. "
            "Leave it out."
        )
    return found


@torch.no_grad()
def quantize(denoiser: nn.Module, name: str, base: Base, device: torch.device, precision: Precision) -> None:
    """Replace every linear layer by a quantized one on the device; all else stays where and as it is.

    Raises:
        InputError: it has no such layers.
        RunError: bitsandbytes is needed and not installed.
    """
    if base is Base.NF4:
        bitsandbytes(NF4)
        setattr(denoiser, "is_loaded_in_4bit", True)  # noqa: B010  (peft asks for it)
    computes_in = precision.autocast or precision.weights
    for key, layer in linear_layers(denoiser, name, base).items():
        made: nn.Linear
        if base is Base.INT8:
            made = Int8Linear(layer, device)
        else:
            made = bitsandbytes(NF4).nn.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=layer.bias is not None,
                compute_dtype=computes_in,
                compress_statistics=False,
                quant_type="nf4",
                device="meta",
            )
            # On CPUs with AVX512-BF16 it would repack its weights for drawing, and then pass no gradients on.
            setattr(made, "support_avx512bf16_for_cpu", False)  # noqa: B010
            if layer.bias is not None:  # forward would cast it in place, within inference mode
                made.bias = nn.Parameter(layer.bias.to(device, computes_in), requires_grad=False)
            made.weight = _nf4_weight(made, layer.weight.data, device)
        parent, _, own = key.rpartition(".")
        setattr(denoiser.get_submodule(parent), own, made.train(layer.training))


class Int8Linear(nn.Linear):
    """A frozen linear layer with a weight [out, in] in int8, and a scale in float32 for each row of it."""

    scale_O1: Tensor

    def __init__(self, layer: nn.Linear, device: torch.device) -> None:
        """Quantize a layer, on the device."""
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        if layer.bias is not None:
            self.bias = nn.Parameter(layer.bias.to(device), requires_grad=False)
        self.pack(layer.weight.to(device))

    def pack(self, weight_OI: Tensor) -> None:
        """Set the weight, rounded."""
        weight_OI = weight_OI.float()
        scale_O1 = weight_OI.abs().amax(1, keepdim=True) / LARGEST
        rounded = (weight_OI / torch.where(scale_O1 > 0, scale_O1, 1)).round()
        self.weight = nn.Parameter(rounded.to(torch.int8), requires_grad=False)
        self.register_buffer("scale_O1", scale_O1)

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., in] times the unpacked weight, in the dtype of x, or autocast's."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        found: Tensor = _Product.apply(x, self.weight, self.scale_O1)  # type: ignore[no-untyped-call]
        return found if self.bias is None else found + self.bias.to(found.dtype)


class _Product(torch.autograd.Function):
    """x [..., in] times an int8 weight [out, in], which is unpacked anew in the backward pass and not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, scale_O1: Tensor) -> Tensor:
        ctx.save_for_backward(weight_OI, scale_O1)
        return functional.linear(x, _unpacked(weight_OI, scale_O1, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weight_OI, scale_O1 = ctx.saved_tensors
        (gradient,) = gradients
        return gradient @ _unpacked(weight_OI, scale_O1, gradient.dtype), None, None


def _unpacked(weight_OI: Tensor, scale_O1: Tensor, dtype: torch.dtype) -> Tensor:
    dense_OI = torch.empty(weight_OI.shape, dtype=dtype, device=weight_OI.device)
    return torch.mul(weight_OI, scale_O1, out=dense_OI)  # rounded once, without a copy in float32


def _nf4_weight(layer: nn.Linear, weight_OI: Tensor, device: torch.device) -> nn.Parameter:
    packed: nn.Parameter = (
        bitsandbytes(NF4)
        .nn.Params4bit(
            weight_OI.contiguous(),
            requires_grad=False,
            compress_statistics=False,
            quant_type="nf4",
            module=layer,
        )
        .to(device)
    )
    return packed


def dense_weight(layer: nn.Linear) -> Tensor:
    """Return a layer's weight [out, in] in float32, unpacked where it is quantized."""
    if isinstance(layer, Int8Linear):
        return _unpacked(layer.weight, layer.scale_O1, torch.float32)
    weight: Any = layer.weight
    if weight.is_floating_point():
        return layer.weight.float()
    unpacked: Tensor = bitsandbytes(NF4).functional.dequantize_4bit(weight.data, weight.quant_state)
    return unpacked.float()


@torch.no_grad()
def set_weight(layer: nn.Linear, weight_OI: Tensor) -> None:
    """Replace a layer's weight, rounded to its dtype, and quantized where the layer is."""
    weight: Any = layer.weight
    if isinstance(layer, Int8Linear):
        layer.pack(weight_OI)
    elif weight.is_floating_point():
        weight.copy_(weight_OI)
    else:
        layer.weight = _nf4_weight(layer, weight_OI.to(weight.quant_state.dtype), weight.device)


def quantized_bytes(shape: Sequence[int], base: Base) -> int:
    """Return the bytes of a quantized weight of this shape [out, in], with its scales."""
    values = shape[0] * shape[1]
    if base is Base.INT8:
        return values + 4 * shape[0]
    return -(-values // 2) + 4 * -(-values // BLOCK)
