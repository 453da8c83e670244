"""Fused conditionings from the coefficients that `pixrl export RUN --child N` saved; needs torch and safetensors alone.

A conditioning of ComfyUI is a list of `[tokens, options]`: tokens [1, L, D], and in the options `pooled_output` [1, E]
where the model has pooled features. The sums are those of pixrl, in float32, to the last bit:

* columns: every column of the token features has a coefficient of its own (RMLer, Eq. 2, arXiv 2510.10300);
* tokens: every token has one;
* velocity: each conditioning goes on by itself with its coefficient as `strength`, by which ComfyUI's samplers average
  what the network predicts for them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

COLUMNS, TOKENS, VELOCITY = "columns", "tokens", "velocity"
FORMAT = "pixrl-coefficients"
FOLDER = Path(__file__).with_name("coefficients")
"""Where a file is looked for that is given by its name alone."""
Conditioning = list[list[Any]]


@dataclass(frozen=True)
class Coefficients:
    """What a file of coefficients holds."""

    values_ND: Tensor
    """One row a concept."""
    concepts: tuple[str, ...]
    model: str
    mixing: str
    pooled: str
    """How pooled features are mixed: average, weight or columns."""


def read(file: str) -> Coefficients:
    """Read a file of `pixrl export`. Raises ValueError where there is none, or where it is another one."""
    given = Path(file).expanduser()
    path = given if given.is_file() else FOLDER / file
    if not path.is_file():
        raise ValueError(
            f"There is no file {file!r}, also not in {FOLDER}: give the path of what pixrl export wrote."
        )
    try:
        with safe_open(str(path), framework="pt") as content:
            about = content.metadata() or {}
            if about.get("format") != FORMAT:
                raise ValueError(
                    f"{path} holds no coefficients of pixrl: write them with pixrl export RUN --child N."
                )
            values_ND = content.get_tensor("coefficients_ND").float()
        mixing = str(json.loads(about["mixing"])["kind"])
        concepts = tuple(map(str, json.loads(about["concepts"])))
        return Coefficients(values_ND, concepts, about["model"], mixing, about["pooled"])
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): write it again with pixrl export RUN --child N."
        ) from None


def mix(found: Coefficients, conditionings: list[Conditioning]) -> Conditioning:
    """Mix one conditioning of each concept, in the order of the file's concepts.

    Raises:
        ValueError: they do not fit the coefficients, or each other.
    """
    if len(conditionings) != len(found.concepts):
        raise ValueError(
            f"The coefficients are of {len(found.concepts)} concepts ({' + '.join(found.concepts)}) and "
            f"{len(conditionings)} conditionings are connected: connect one of each, in this order."
        )
    parts = [_only(one, name) for one, name in zip(conditionings, found.concepts, strict=True)]
    if found.mixing == VELOCITY:
        strengths = found.values_ND[:, 0].tolist()
        return [
            [tokens, {**options, "strength": a}]
            for (tokens, options), a in zip(parts, strengths, strict=True)
        ]
    if found.mixing not in (COLUMNS, TOKENS):
        raise ValueError(
            f"The mixing {found.mixing!r} changes with the sampling step or with the place, which no conditioning can "
            f"say: this node takes {COLUMNS}, {TOKENS} and {VELOCITY}."
        )
    if any(options.get("attention_mask") is not None for _, options in parts):
        raise ValueError(
            "These conditionings say which of their tokens count (attention_mask), which cannot be mixed."
        )
    if len({tokens.shape for tokens, _ in parts}) > 1:
        shapes = " and ".join(f"{tokens.shape[1]} × {tokens.shape[2]}" for tokens, _ in parts)
        raise ValueError(
            f"The conditionings have {shapes} tokens × columns: encode prompts of one length with one model."
        )
    pooled: list[Any] = [options.get("pooled_output") for _, options in parts]
    if len({None if one is None else one.shape for one in pooled}) > 1:
        raise ValueError("The conditionings' pooled features differ in width: encode both with one model.")
    tokens_NLD = torch.cat([tokens for tokens, _ in parts])
    pooled_NE = None if pooled[0] is None else torch.cat(pooled)
    _require_fit(found, tokens_NLD, pooled_NE)
    options = {name: value for name, value in parts[0][1].items() if name != "pooled_output"}
    if pooled_NE is not None:
        options["pooled_output"] = _mix_pooled(found, tokens_NLD, pooled_NE)
    return [[_mix_tokens(found, tokens_NLD), options]]


def _only(conditioning: Conditioning, concept: str) -> tuple[Tensor, dict[str, Any]]:
    if len(conditioning) != 1 or len(conditioning[0][0]) != 1:
        raise ValueError(
            f"The conditioning of {concept!r} is itself a combination: connect a text encoder's output directly."
        )
    tokens, options = conditioning[0]
    return tokens, options


def _require_fit(found: Coefficients, tokens_NLD: Tensor, pooled_NE: Tensor | None) -> None:
    axis = 2 if found.mixing == COLUMNS else 1
    width = tokens_NLD.shape[axis]
    own = found.mixing == COLUMNS and found.pooled == COLUMNS
    if own and pooled_NE is None:
        raise ValueError(
            "The coefficients mix pooled features too (pooled=columns), which these conditionings lack."
        )
    wanted = width + (pooled_NE.shape[1] if own and pooled_NE is not None else 0)
    if found.values_ND.shape[1] != wanted:
        raise ValueError(
            f"The coefficients of {' + '.join(found.concepts)} have {found.values_ND.shape[1]} {found.mixing} and "
            f"these conditionings have {wanted}: use the text encoders of {found.model}, with which they were made."
        )


def _mix_tokens(found: Coefficients, tokens_NLD: Tensor) -> Tensor:
    values_ND = found.values_ND.to(tokens_NLD.device)
    if found.mixing == COLUMNS:
        mixed_LD = _fuse(tokens_NLD, values_ND[:, : tokens_NLD.shape[2]])
    else:
        mixed_LD = torch.einsum("bnl,nld->bld", values_ND[None], tokens_NLD.float())[0]
    return mixed_LD[None].to(tokens_NLD.dtype)


def _mix_pooled(found: Coefficients, tokens_NLD: Tensor, pooled_NE: Tensor) -> Tensor:
    values_ND = found.values_ND.to(pooled_NE.device)
    if found.pooled == COLUMNS:
        weights_NE = values_ND[:, tokens_NLD.shape[2] :]
    else:
        weights_NE = values_ND.mean(dim=1, keepdim=True).expand(-1, pooled_NE.shape[1])
        if found.pooled == "average":
            weights_NE = torch.full_like(weights_NE, 1 / len(pooled_NE))
    return _fuse(pooled_NE[:, None], weights_NE).to(pooled_NE.dtype)


def _fuse(embeddings_NLD: Tensor, coefficients_ND: Tensor) -> Tensor:
    """RMLer, Eq. 2: the sum over concepts of each embedding's columns times their coefficients, [L, D]."""
    return (embeddings_NLD.float() * coefficients_ND.float().unsqueeze(1)).sum(dim=0)


class PixrlFusion:
    """The node: conditionings of two to four concepts become one of their fusion."""

    CATEGORY = "conditioning/pixrl"
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "fuse"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        conditioning = ("CONDITIONING",)
        return {
            "required": {"file": ("STRING", {"default": ""}), "first": conditioning, "second": conditioning},
            "optional": {"third": conditioning, "fourth": conditioning},
        }

    @classmethod
    def IS_CHANGED(cls, file: str, **connected: Any) -> float:
        """Let ComfyUI run the node again when the file has changed."""
        path = Path(file).expanduser()
        path = path if path.is_file() else FOLDER / file
        return path.stat().st_mtime if path.is_file() else 0.0

    def fuse(
        self,
        file: str,
        first: Conditioning,
        second: Conditioning,
        third: Conditioning | None = None,
        fourth: Conditioning | None = None,
    ) -> tuple[Conditioning]:
        """Mix the connected conditionings by the file's coefficients."""
        connected = [one for one in (first, second, third, fourth) if one is not None]
        return (mix(read(file), connected),)


NODE_CLASS_MAPPINGS = {"PixrlFusion": PixrlFusion}
NODE_DISPLAY_NAME_MAPPINGS = {"PixrlFusion": "Fuse concepts (pixrl)"}
