"""OpenCLIP's names of a CLIP's weights, as HPSv2 publishes them, to those of transformers' CLIPModel.

OpenCLIP keeps query, key and value of an attention in one matrix (`in_proj`), and projections transposed.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from pixrl.errors import CheckpointError
from pixrl.rewards.weights import refuse_misfits

_SINGLE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "logit_scale": "logit_scale",
}
_NORMS = {
    "visual.ln_pre": "vision_model.pre_layrnorm",  # so misspelt in every published checkpoint
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_LAYER_PARTS = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.?(weight|bias)$")
_IGNORED = {"attn_mask"}
"""A buffer that OpenCLIP writes into some files; CLIPModel makes its own."""


def to_transformers(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """A CLIPModel's state dict from an OpenCLIP one.

    Raises:
        CheckpointError: a name is not OpenCLIP's; `path` is the file it came from.
    """
    converted: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in state.items():
        pairs = dict(_renamed(name, tensor))
        converted.update(pairs)
        if not pairs and name not in _IGNORED:
            unknown.append(name)
    refuse_misfits([], unknown, path)
    if not converted:
        raise CheckpointError(f"{path} holds no OpenCLIP weights.")
    return converted


def _renamed(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The CLIPModel names and tensors of one OpenCLIP tensor; none where the name is unknown."""
    stem, _, end = name.rpartition(".")
    if name in _SINGLE:
        yield _SINGLE[name], tensor
    elif name in _TRANSPOSED:
        yield _TRANSPOSED[name], tensor.T.contiguous()
    elif stem in _NORMS:
        yield f"{_NORMS[stem]}.{end}", tensor
    elif layer := _LAYER.match(name):
        visual, number, part, end = layer.groups()
        tower = "vision_model" if visual else "text_model"
        prefix = f"{tower}.encoder.layers.{number}"
        if part == "attn.in_proj_":
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                yield f"{prefix}.self_attn.{letter}_proj.{end}", third.clone()
        elif (known := part.rstrip(".")) in _LAYER_PARTS:
            yield f"{prefix}.{_LAYER_PARTS[known]}.{end}", tensor
