"""Is FLUX read right from the authors' own file? At the true width, with one block of each kind and random weights.

    python benchmarks/flux_single_file.py

diffusers' converter knows the published width alone, so the tests' tiny models cannot go through it: this writes a
transformer of width 3072 under the names of black-forest-labs/flux (`flux1-dev.safetensors`), half a billion random
numbers in bfloat16, loads the file beside the toy world's other parts, and compares every tensor. Needs about 5 GB of
memory and 1 GB of disk.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from pixrl import hub, hub_check, models
from pixrl.models.flux import FluxPolicy

WIDTH, HEADS = 3072, 24
CONFIG = {
    "_class_name": "FluxTransformer2DModel",
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": WIDTH // HEADS,
    "num_attention_heads": HEADS,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}
EMBEDDERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
NORMS = {
    "double_blocks.0.img_attn.norm.query_norm.scale": "transformer_blocks.0.attn.norm_q.weight",
    "double_blocks.0.img_attn.norm.key_norm.scale": "transformer_blocks.0.attn.norm_k.weight",
    "double_blocks.0.txt_attn.norm.query_norm.scale": "transformer_blocks.0.attn.norm_added_q.weight",
    "double_blocks.0.txt_attn.norm.key_norm.scale": "transformer_blocks.0.attn.norm_added_k.weight",
    "single_blocks.0.norm.query_norm.scale": "single_transformer_blocks.0.attn.norm_q.weight",
    "single_blocks.0.norm.key_norm.scale": "single_transformer_blocks.0.attn.norm_k.weight",
}


def as_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The transformer's tensors under the authors' names."""
    found = {theirs: state[ours] for theirs, ours in NORMS.items()}
    for end in ("weight", "bias"):
        found |= {f"{theirs}.{end}": state[f"{ours}.{end}"] for theirs, ours in EMBEDDERS.items()}
        for theirs, parts in DOUBLE.items():
            joined = torch.cat([state[f"transformer_blocks.0.{part}.{end}"] for part in parts])
            found[f"double_blocks.0.{theirs}.{end}"] = joined
        for theirs, parts in SINGLE.items():
            joined = torch.cat([state[f"single_transformer_blocks.0.{part}.{end}"] for part in parts])
            found[f"single_blocks.0.{theirs}.{end}"] = joined
        scale, shift = state[f"norm_out.linear.{end}"].chunk(2)
        found[f"final_layer.adaLN_modulation.1.{end}"] = torch.cat([shift, scale])
    return {name: tensor.contiguous() for name, tensor in found.items()}


def random_transformer() -> FluxTransformer2DModel:
    """Norms random too, so that a mix-up shows."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        made: FluxTransformer2DModel = FluxTransformer2DModel.from_config(CONFIG)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.normal_()
    return made


def main() -> None:
    """The command."""
    with tempfile.TemporaryDirectory(prefix="pixrl-flux-") as place:
        folder = Path(place) / "flux"
        shutil.copytree(hub.folder("toy:flux", hub_check.Layout.PIPELINE), folder)
        shutil.rmtree(folder / "transformer")
        (folder / "transformer").mkdir()
        (folder / "transformer" / "config.json").write_text(json.dumps(CONFIG))
        expected = random_transformer().state_dict()
        published = as_published(expected)
        assert sum(x.numel() for x in published.values()) == sum(x.numel() for x in expected.values())
        file = Path(place) / "flux1-dev.safetensors"
        save_file(published, file)
        print(f"{len(published)} tensors, {file.stat().st_size / 1e9:.2f} GB under the authors' names")
        policy = models.load(f"{file}@{folder}", device="cpu", dtype="float32")
        assert isinstance(policy, FluxPolicy)
        loaded = policy.denoiser.state_dict()
        wrong = [name for name in expected if not torch.equal(loaded[name], expected[name].float())]
        missing = sorted(expected.keys() ^ loaded.keys())
        print(f"{len(loaded)} tensors loaded; {len(wrong)} differ, {len(missing)} are missing or too many")
        raise SystemExit(1 if wrong or missing else 0)


if __name__ == "__main__":
    main()
