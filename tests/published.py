"""Tiny pipelines written as one file, under the names and in the order of the models' authors.

The maps are the inverse of the conversions that diffusers applies when it reads such a file.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]

_VAE = (
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r".down.\1.block.\2."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.upsamplers\.0\.", ".upsample."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_q\.", ".q."),
    (r"\.to_k\.", ".k."),
    (r"\.to_v\.", ".v."),
    (r"\.to_out\.0\.", ".proj_out."),
)


def part(folder: Path, name: str) -> Tensors:
    """The weights of one component of a folder."""
    found: Tensors = {}
    for file in sorted((folder / name).glob("*.safetensors")):
        found |= load_file(file)
    return found


def vae(folder: Path, prefix: str = "first_stage_model.") -> Tensors:
    """An AutoencoderKL under the names of CompVis; its up blocks are counted from the other end."""
    weights = part(folder, "vae")
    count = 1 + max(int(key.split(".")[2]) for key in weights if key.startswith("decoder.up_blocks."))
    found: Tensors = {}
    for key, x in weights.items():
        name = re.sub(
            r"\.up_blocks\.(\d+)\.(resnets\.(\d+)|upsamplers\.0)\.",
            lambda m: f".up.{count - 1 - int(m[1])}." + (f"block.{m[3]}." if m[3] else "upsample."),
            key,
        )
        for pattern, new in _VAE:
            name = re.sub(pattern, new, name)
        is_attention = ".mid.attn_1." in name and name.endswith(".weight") and "norm" not in name
        found[prefix + name] = x[:, :, None, None].clone() if is_attention else x
    return found


def sd3(folder: Path, file: Path) -> Path:
    """Transformer and VAE as Stability AI publishes them; text encoders stay in the folder, as for SD3.5."""
    save_file(sd3_transformer(part(folder, "transformer")) | vae(folder), file)
    return file


def sd3_transformer(weights: Tensors) -> Tensors:
    """SD3Transformer2DModel as MMDiT: q, k and v in one, shift and scale of the last norms the other way round."""
    prefix = "model.diffusion_model."
    layers = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("transformer_blocks."))
    names = {
        "context_embedder": "context_embedder",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "pos_embed.proj": "x_embedder.proj",
        "proj_out": "final_layer.linear",
    }
    found: Tensors = {f"{prefix}pos_embed": weights["pos_embed.pos_embed"]}
    for ours, theirs in names.items():
        for end in ("weight", "bias"):
            found[f"{prefix}{theirs}.{end}"] = weights[f"{ours}.{end}"]
    for end in ("weight", "bias"):
        found[f"{prefix}final_layer.adaLN_modulation.1.{end}"] = _swapped(weights[f"norm_out.linear.{end}"])
        for layer in range(layers):
            _sd3_block(weights, found, prefix, layer, end, last=layer == layers - 1)
    return found


def _sd3_block(weights: Tensors, found: Tensors, prefix: str, layer: int, end: str, *, last: bool) -> None:
    ours, theirs = f"transformer_blocks.{layer}.", f"{prefix}joint_blocks.{layer}."

    def put(name: str, *sources: str, change: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        parts = [weights[f"{ours}{source}.{end}"] for source in sources if f"{ours}{source}.{end}" in weights]
        if parts:
            found[f"{theirs}{name}.{end}"] = change(torch.cat(parts))

    put("x_block.attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v")
    put("context_block.attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
    put("x_block.attn2.qkv", "attn2.to_q", "attn2.to_k", "attn2.to_v")
    norms = {
        "x_block.attn": ("attn.norm_q", "attn.norm_k"),
        "x_block.attn2": ("attn2.norm_q", "attn2.norm_k"),
        "context_block.attn": ("attn.norm_added_q", "attn.norm_added_k"),
    }
    for stream, (q, k) in norms.items():
        put(f"{stream}.ln_q", q)
        put(f"{stream}.ln_k", k)
    put("x_block.attn.proj", "attn.to_out.0")
    put("x_block.attn2.proj", "attn2.to_out.0")
    put("context_block.attn.proj", "attn.to_add_out")
    put("x_block.adaLN_modulation.1", "norm1.linear")
    put("context_block.adaLN_modulation.1", "norm1_context.linear", change=_swapped if last else lambda x: x)
    for stream, ff in (("x_block", "ff"), ("context_block", "ff_context")):
        put(f"{stream}.mlp.fc1", f"{ff}.net.0.proj")
        put(f"{stream}.mlp.fc2", f"{ff}.net.2")


def _swapped(x: Tensor) -> Tensor:
    first, second = x.chunk(2)
    return torch.cat([second, first])


def sdxl(folder: Path, file: Path) -> Path:
    """UNet and VAE as in the files of SDXL; text encoders stay in the folder."""
    save_file(_ldm_unet(part(folder, "unet"), layers=1) | vae(folder), file)
    return file


def _ldm_unet(weights: Tensors, layers: int) -> Tensors:
    top = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    resnet = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }

    def place(block: str, which: int, kind: str, number: int) -> str:
        if block == "mid_block":
            return f"middle_block.{1 if kind == 'attentions' else 2 * number}"
        at = (layers + 1) * which + number
        if block == "down_blocks":
            return f"input_blocks.{at + 1}.{int(kind == 'attentions')}"
        return f"output_blocks.{at}.{int(kind == 'attentions')}"

    found: Tensors = {}
    for key, x in weights.items():
        module, _, end = key.rpartition(".")
        inside = re.fullmatch(
            r"(mid_block|(?:down|up)_blocks)\.(?:(\d+)\.)?(resnets|attentions)\.(\d+)\.(.+)", module
        )
        resized = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(?:down|up)samplers\.0\.conv", module)
        if inside:
            block, which, kind, number, rest = inside.groups()
            rest = resnet[rest] if kind == "resnets" else rest
            name = f"{place(block, int(which or 0), kind, int(number))}.{rest}"
        elif resized and resized[1] == "down":
            name = f"input_blocks.{(layers + 1) * (int(resized[2]) + 1)}.0.op"
        elif resized:
            name = f"output_blocks.{(layers + 1) * int(resized[2]) + layers}.2.conv"
        else:
            name = top[module]
        found[f"model.diffusion_model.{name}.{end}"] = x
    return found


def sd3_with_encoders(folder: Path, file: Path) -> Path:
    """As Stability AI publishes SD3 Medium with its text encoders: all under the names of transformers."""
    parts = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}
    found = sd3_transformer(part(folder, "transformer")) | vae(folder)
    for ours, theirs in parts.items():
        found |= {f"text_encoders.{theirs}.transformer.{key}": x for key, x in part(folder, ours).items()}
    save_file({key: x.clone() for key, x in found.items()}, file)
    return file


def sdxl_with_encoders(folder: Path, file: Path) -> Path:
    """As Stability AI publishes SDXL: CLIP-L under the names of transformers, CLIP-G under those of OpenCLIP."""
    first = {
        f"text_model.{key.removeprefix('text_model.')}": x for key, x in part(folder, "text_encoder").items()
    }
    found = _ldm_unet(part(folder, "unet"), layers=1) | vae(folder)
    found |= {f"conditioner.embedders.0.transformer.{key}": x for key, x in first.items()}
    second = _open_clip(part(folder, "text_encoder_2"))
    found |= {f"conditioner.embedders.1.model.{key}": x for key, x in second.items()}
    save_file(found, file)
    return file


def _open_clip(weights: Tensors) -> Tensors:
    """A CLIPTextModelWithProjection as OpenCLIP: q, k and v in one, the projection the other way round."""
    top = {
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    inner = {
        "self_attn.out_proj": "attn.out_proj",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    found = {theirs: weights[ours] for ours, theirs in top.items()}
    found["text_projection"] = weights["text_projection.weight"].T.contiguous()
    prefix = "text_model.encoder.layers."
    for layer in {key.removeprefix(prefix).split(".")[0] for key in weights if key.startswith(prefix)}:
        ours, theirs = f"{prefix}{layer}.", f"transformer.resblocks.{layer}."
        for end in ("weight", "bias"):
            qkv = [weights[f"{ours}self_attn.{name}_proj.{end}"] for name in "qkv"]
            found[f"{theirs}attn.in_proj_{end}"] = torch.cat(qkv)
            found |= {f"{theirs}{new}.{end}": weights[f"{ours}{old}.{end}"] for old, new in inner.items()}
    return found


def flux(folder: Path, file: Path) -> Path:
    """The transformer alone, as FLUX is published; under diffusers' names, since their converter knows one width."""
    save_file(part(folder, "transformer"), file)
    return file
