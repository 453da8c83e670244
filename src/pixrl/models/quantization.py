"""A denoiser whose frozen linear layers are kept in 4 bits, as NormalFloat (NF4), by bitsandbytes.

QLoRA (Dettmers et al., 2023, "QLoRA: Efficient Finetuning of Quantized LLMs"): each 64 values share a scale in
float32. A layer is unpacked while it computes, forwards and backwards, so rollouts and updates see the same weights.
LoRA above it is in float32, as on any base.

Deviations: 1. scales are not quantized in turn, which would save another 0.37 bits a value. 2. A layer whose inputs are
no multiple of 64 keeps its dtype: bitsandbytes 0.50.2 unpacks it on a CPU with the scales of other blocks. Published
SD3, FLUX and SDXL have none.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pixrl.device import Precision
from pixrl.errors import InputError
from pixrl.libraries import require

PACKAGE, EXTRA = "bitsandbytes", "quantized"
BLOCK = 64
"""The values that share a scale."""


def library() -> Any:
    """Return bitsandbytes.

    Raises:
        RunError: it is not installed.
    """
    return require(PACKAGE, EXTRA, "base=nf4")


def linear_layers(denoiser: nn.Module, name: str) -> dict[str, nn.Linear]:
    """Return the layers that are quantized, by name.

    Raises:
        InputError: there are none.
    """
    found = {
        key: one
        for key, one in denoiser.named_modules()
        if type(one) is nn.Linear and one.in_features % BLOCK == 0
    }
    if not found:
        raise InputError(
            f"base=nf4 has no effect on {name}: its {type(denoiser).__name__} has no linear layers of {BLOCK} inputs "
            f"or a multiple of it. Leave it out."
        )
    return found


@torch.no_grad()
def quantize(denoiser: nn.Module, name: str, device: torch.device, precision: Precision) -> None:
    """Replace every linear layer by one of 4 bits on the device; all else stays where and as it is.

    Raises:
        InputError: it has no such layers.
        RunError: bitsandbytes is not installed.
    """
    bnb, computes_in = library(), precision.autocast or precision.weights
    for key, layer in linear_layers(denoiser, name).items():
        made = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=computes_in,
            compress_statistics=False,
            quant_type="nf4",
            device="meta",
        )
        # On CPUs with AVX512-BF16 it would repack its weights for drawing, and then pass no gradients on.
        made.support_avx512bf16_for_cpu = False
        if layer.bias is not None:  # forward would cast it in place, within inference mode
            made.bias = nn.Parameter(layer.bias.to(device, computes_in), requires_grad=False)
        made.weight = _packed(made, layer.weight.data, device)
        parent, _, own = key.rpartition(".")
        setattr(denoiser.get_submodule(parent), own, made.train(layer.training))
    setattr(denoiser, "is_loaded_in_4bit", True)  # noqa: B010  (peft asks for it)


def _packed(layer: nn.Module, weight_OI: Tensor, device: torch.device) -> nn.Parameter:
    packed: nn.Parameter = (
        library()
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
    weight: Any = layer.weight
    if weight.is_floating_point():
        return layer.weight.float()
    unpacked: Tensor = library().functional.dequantize_4bit(weight.data, weight.quant_state)
    return unpacked.float()


@torch.no_grad()
def set_weight(layer: nn.Linear, weight_OI: Tensor) -> None:
    """Replace a layer's weight, rounded to its dtype, and quantized where the layer is."""
    weight: Any = layer.weight
    if weight.is_floating_point():
        weight.copy_(weight_OI)
    else:
        layer.weight = _packed(layer, weight_OI.to(weight.quant_state.dtype), weight.device)


def quantized_bytes(values: int) -> int:
    """Return the bytes of a matrix of so many values: half a byte each, and the scales."""
    return -(-values // 2) + 4 * -(-values // BLOCK)
