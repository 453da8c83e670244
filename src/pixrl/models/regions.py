"""Attention by region: each place of a picture attends to the prompts by how much of it is theirs.

With `Conditioning.regions_BNHW` the tokens of a row's N prompts stand one after another. To the logit of image token p
and a token of prompt n, log m_n(p) is added, where m_n is the prompt's mask at p; so the weight of that token is
m_n(p) times what it would be, and none at all where the mask is 0. Where the text attends to the image (SD3, FLUX) the
same is added the other way round. Tokens of different prompts never attend to each other, and image tokens attend to
each other as always. So a prompt whose mask is 1 everywhere draws its own picture, whatever the others say, and where
masks sum to 1 the text together weighs what one prompt would.

Masks in place of this bias, of image tokens' attention to each other too, are training-free regional prompting of
diffusion transformers (Chen et al. 2024, arXiv:2411.02395).

FLUX's transformer takes a bias as an argument. SD3's has none, and in SDXL's UNet the bias differs with the resolution
of a level: for those it is put in while the network runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pixrl.errors import InputError, RunError, ShapeError
from pixrl.models.conditioning import Conditioning
from pixrl.models.trained import TrainedDenoiser

Size = tuple[int, int]
"""Rows and columns of image tokens."""


def text_bias(conditioning: Conditioning, size: Size) -> Tensor:
    """Return the logarithm of each text token's mask at every image token, float32 [B, L, rows * columns].

    Raises:
        ShapeError: the rows have no regions, or their tokens cannot be divided among them.
        InputError: the rows have reference pictures, which belong to no region.
    """
    regions, length = conditioning.regions_BNHW, conditioning.tokens_BLD.shape[1]
    if regions is None or regions.ndim != 4 or len(regions) != len(conditioning) or length % regions.shape[1]:
        raise ShapeError(
            f"regions: masks {None if regions is None else list(regions.shape)} for tokens "
            f"{list(conditioning.tokens_BLD.shape)}; give masks [B, N, H, W] of the N prompts whose tokens stand one "
            "after another."
        )
    if conditioning.references:
        raise InputError(
            f"{len(conditioning.references)} reference pictures beside regions: a reference belongs to no region. "
            "Leave the references out, or average predictions (mixing=spatial)."
        )
    masks = F.interpolate(regions.float(), size=size, mode="bilinear", antialias=True, align_corners=False)
    return masks.flatten(2).log().repeat_interleave(length // regions.shape[1], dim=1)


def joint_bias(conditioning: Conditioning, size: Size, *, image_first: bool) -> Tensor | None:
    """Return what is added to the logits of attention over text and image together, or None without regions.

    Args:
        conditioning: B rows of L tokens.
        size: of the picture in tokens, P of them.
        image_first: whether the image's tokens stand before the text's.

    Returns:
        Queries by keys, [B, 1, L + P, L + P], of the tokens' dtype.

    Raises:
        ShapeError, InputError: as `text_bias`.
    """
    if conditioning.regions_BNHW is None:
        return None
    between_BLP = text_bias(conditioning, size)
    rows, length, places = between_BLP.shape
    owners_L = torch.arange(length, device=between_BLP.device) // (
        length // conditioning.regions_BNHW.shape[1]
    )
    total, dtype = length + places, conditioning.tokens_BLD.dtype
    bias = between_BLP.new_zeros(rows, 1, total, total, dtype=dtype)
    text, image = slice(0, length), slice(length, None)
    if image_first:
        text, image = slice(places, None), slice(0, places)
    bias[:, 0, text, text].masked_fill_(owners_L[:, None] != owners_L, -torch.inf)
    bias[:, 0, text, image] = between_BLP.to(dtype)
    bias[:, 0, image, text] = between_BLP.mT.to(dtype)
    return bias


class _Biased(TorchFunctionMode):
    """Adds a bias [B, 1, K, K] to the logits of all attention over K tokens while it is open; other attention is as is.

    SD3's second attention, over the image alone, has fewer tokens by those of the text.
    """

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = bias
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = kwargs or {}
        if func is not F.scaled_dot_product_attention or args[1].shape[-2] != self.bias.shape[-1]:
            return func(*args, **own)
        self.calls += 1
        query, key, value = args
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.bias.to(query.dtype), **own)


@contextmanager
def joint_attention(policy: TrainedDenoiser, bias: Tensor | None) -> Iterator[None]:
    """Let the transformer attend over text and image together with this bias while it is open; None: as always.

    Raises:
        InputError: the transformer is compiled, or its activations are computed anew in the backward pass.
        RunError: the transformer attended without torch's attention.
    """
    if bias is None:
        yield
        return
    _require_plain(policy)
    mode = _Biased(bias)
    with mode:
        yield
    _require_calls(mode.calls)


@contextmanager
def cross_attention(policy: TrainedDenoiser, conditioning: Conditioning, size: Size) -> Iterator[None]:
    """Let the UNet's image tokens attend to the text by the rows' regions while it is open; without any as always.

    Args:
        policy: whose UNet halves the latents from level to level.
        conditioning: B rows.
        size: of the latents.

    Raises:
        InputError, RunError: as `joint_attention`.
        ShapeError: as `text_bias`, or the UNet attends at a resolution that is no halving of the latents.
    """
    if conditioning.regions_BNHW is None:
        yield
        return
    _require_plain(policy)
    found: dict[int, Tensor] = {}
    calls = 0

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal calls
        if kwargs.get("encoder_hidden_states") is None:  # attention of the image to itself
            return None
        calls += 1
        image_BPC = args[0] if args else kwargs["hidden_states"]
        places = image_BPC.shape[1]
        if places not in found:
            rows, columns = size  # of the latents, halved and rounded up until there are so many image tokens
            while rows * columns > places:
                rows, columns = (rows + 1) // 2, (columns + 1) // 2
            if rows * columns != places:
                raise ShapeError(
                    f"regions: {places} image tokens are no halving of latents of {size[0]} x {size[1]}."
                )
            found[places] = text_bias(conditioning, (rows, columns)).mT.to(image_BPC.dtype)
        return args, kwargs | {"attention_mask": found[places]}

    layers = [one for one in policy.denoiser.modules() if isinstance(one, Attention)]
    hooks = [layer.register_forward_pre_hook(add, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    _require_calls(calls)


def _require_plain(policy: TrainedDenoiser) -> None:
    """Raise InputError where the network would run again, or run as compiled, without what is put in."""
    again = torch.is_grad_enabled() and getattr(policy.denoiser, "is_gradient_checkpointing", False)
    if policy.compiled or again:
        how = "compiled blocks" if policy.compiled else "gradient checkpointing"
        raise InputError(f"Attention by region does not reach {how}: load the model again without.")


def _require_calls(calls: int) -> None:
    if not calls:
        raise RunError(
            "Attention by region was not reached: the network attends by another function than torch's "
            "scaled_dot_product_attention. Load the model again with diffusers' default attention processors."
        )
