"""`flux` starts from what `sd3` has learned: both draw the same world, and most of their layers have the same shape.

SD3's first blocks become FLUX's double blocks as they are; of the later ones the image stream becomes single blocks
(its MLP beside its attention instead of after it). What FLUX reads of the text is first mapped, by least squares over
captions, to what SD3 reads of it. Rotary positions and the guidance embedding start anew: a start, not a copy.
"""

from dataclasses import dataclass

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn

State = dict[str, Tensor]


@dataclass(frozen=True)
class Texts:
    """The same captions as a generator's encoders see them."""

    words_MD: Tensor
    """Features of words, the same words in the same order for both generators."""
    pooled_BE: Tensor


def start_from(flux: FluxTransformer2DModel, sd3: SD3Transformer2DModel, seen: Texts, known: Texts) -> None:
    """Fill `flux` in place; `seen` is what it reads of some captions, `known` what `sd3` reads of them."""
    state, given = flux.state_dict(), sd3.state_dict()
    doubles = len(flux.transformer_blocks)
    state |= {name: tensor for name, tensor in given.items() if name in state and _is_shared(name, doubles)}
    for number in range(len(flux.single_transformer_blocks)):
        state |= _single_block(given, doubles + number, f"single_transformer_blocks.{number}.")
    state |= _patches(given, int(sd3.config.out_channels))
    state |= _composed(given, "context_embedder.", seen.words_MD, known.words_MD)
    state |= _composed(given, "time_text_embed.text_embedder.linear_1.", seen.pooled_BE, known.pooled_BE)
    flux.load_state_dict(state)
    _silence(flux.time_text_embed.guidance_embedder.linear_2)


def _is_shared(name: str, doubles: int) -> bool:
    """Double blocks, the time embedding, and what follows the last block."""
    block = name.split(".")[1] if name.startswith("transformer_blocks.") else None
    if block is not None:
        return int(block) < doubles
    return name.startswith(
        ("time_text_embed.timestep_embedder.", "time_text_embed.text_embedder.linear_2.", "norm_out.")
    )


def _single_block(given: State, block: int, name: str) -> State:
    """Attention and MLP of a block's image stream, side by side behind one modulation."""
    old = f"transformer_blocks.{block}."
    kept = ("attn.to_q.", "attn.to_k.", "attn.to_v.", "attn.norm_q.", "attn.norm_k.")
    out = {
        f"{name}{key.removeprefix(old)}": tensor
        for key, tensor in given.items()
        if key.removeprefix(old).startswith(kept)
    }
    width = len(given[f"{old}attn.to_q.bias"])
    for kind in ("weight", "bias"):
        out[f"{name}norm.linear.{kind}"] = given[f"{old}norm1.linear.{kind}"][: 3 * width]
        out[f"{name}proj_mlp.{kind}"] = given[f"{old}ff.net.0.proj.{kind}"]
    after = (f"{old}attn.to_out.0.", f"{old}ff.net.2.")
    out[f"{name}proj_out.weight"] = torch.cat([given[f"{part}weight"] for part in after], dim=1)
    out[f"{name}proj_out.bias"] = given[f"{after[0]}bias"] + given[f"{after[1]}bias"]
    return out


def _patches(given: State, channels: int) -> State:
    """Into and out of tokens: SD3 writes a patch's channels last, FLUX packs them first."""

    def channels_first(rows: Tensor) -> Tensor:
        return rows.reshape(4, channels, *rows.shape[1:]).transpose(0, 1).flatten(0, 1)

    return {
        "x_embedder.weight": given["pos_embed.proj.weight"].flatten(1),
        "x_embedder.bias": given["pos_embed.proj.bias"],
        "proj_out.weight": channels_first(given["proj_out.weight"]),
        "proj_out.bias": channels_first(given["proj_out.bias"]),
    }


def _composed(given: State, name: str, seen_MD: Tensor, known_ME: Tensor) -> State:
    """The named linear layer of SD3 behind the least-squares map from `seen` to `known`."""
    ones = torch.ones(len(seen_MD), 1)
    solution = torch.linalg.lstsq(torch.cat((seen_MD.float(), ones), dim=1), known_ME.float()).solution
    weight, bias = given[f"{name}weight"], given[f"{name}bias"]
    return {f"{name}weight": weight @ solution[:-1].T, f"{name}bias": weight @ solution[-1] + bias}


def _silence(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
