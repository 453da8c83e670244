"""Tiny picture encoders with random weights, in the layouts that they are published in."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SwinBackbone,
    SwinConfig,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from pixrl.rewards.zoo.birefnet import BiRefNet
from tests import tiny

_OPENCLIP_PARTS = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
HEAD_WIDTHS = (1024, 128, 64, 16, 1)
LAION_LAYERS, V25_LAYERS = (0, 2, 4, 6, 7), (0, 2, 4, 6, 8)


def openclip_state(model: CLIPModel) -> dict[str, Tensor]:
    """A CLIPModel's weights under OpenCLIP's names, written from OpenCLIP's side: one entry a parameter of its."""
    ours = model.state_dict()
    state: dict[str, Tensor] = {"logit_scale": ours["logit_scale"]}
    towers = (("vision_model", "visual.", "vision_config"), ("text_model", "", "text_config"))
    for tower, prefix, config in towers:
        for layer in range(model.config.to_dict()[config]["num_hidden_layers"]):
            source, target = f"{tower}.encoder.layers.{layer}", f"{prefix}transformer.resblocks.{layer}"
            for end in ("weight", "bias"):
                thirds = [ours[f"{source}.self_attn.{letter}_proj.{end}"] for letter in "qkv"]
                state[f"{target}.attn.in_proj_{end}"] = torch.cat(thirds)
                for part, published in _OPENCLIP_PARTS.items():
                    state[f"{target}.{published}.{end}"] = ours[f"{source}.{part}.{end}"]
    for end in ("weight", "bias"):
        state[f"visual.ln_pre.{end}"] = ours[f"vision_model.pre_layrnorm.{end}"]
        state[f"visual.ln_post.{end}"] = ours[f"vision_model.post_layernorm.{end}"]
        state[f"ln_final.{end}"] = ours[f"text_model.final_layer_norm.{end}"]
    state["visual.class_embedding"] = ours["vision_model.embeddings.class_embedding"]
    state["visual.conv1.weight"] = ours["vision_model.embeddings.patch_embedding.weight"]
    state["visual.positional_embedding"] = ours["vision_model.embeddings.position_embedding.weight"]
    state["token_embedding.weight"] = ours["text_model.embeddings.token_embedding.weight"]
    state["positional_embedding"] = ours["text_model.embeddings.position_embedding.weight"]
    state["visual.proj"] = ours["visual_projection.weight"].T
    state["text_projection"] = ours["text_projection.weight"].T
    return {name: tensor.contiguous() for name, tensor in state.items()}


def hpsv2(folder: Path, *, side: int = 28, seed: int = 1) -> tuple[Path, Path]:
    """HPSv2's two .pt files in half precision, and the CLIP folder (other weights) that they were trained from."""
    words = tiny.clip(folder / "clip", side=side)
    config = json.loads((words / "config.json").read_text())
    config["vision_config"]["hidden_act"] = (
        "gelu"  # as laion's ViT-H/14; CLIPModel's own default is quick_gelu
    )
    (words / "config.json").write_text(json.dumps(config))
    published = folder / "hpsv2"
    published.mkdir()
    for number, name in enumerate(("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt")):
        tuned = CLIPModel.from_pretrained(
            tiny.clip(folder / f"tuned-{number}", side=side, seed=seed + number)
        )
        half = {name: tensor.half() for name, tensor in openclip_state(tuned).items()}
        torch.save({"state_dict": half}, published / name)
    return published, words


def laion_head(file: Path, width: int, *, seed: int = 0) -> Path:
    """sac+logos+ava1-l14-linearMSE.pth: the state dict of `layers`."""
    return _head(file, width, "layers", LAION_LAYERS, torch.float32, seed)


def siglip_head(file: Path, width: int, *, seed: int = 0) -> Path:
    """aesthetic_predictor_v2_5.pth: the state dict of `scoring_head`, in bfloat16."""
    return _head(file, width, "scoring_head", V25_LAYERS, torch.bfloat16, seed)


def _head(file: Path, width: int, name: str, layers: tuple[int, ...], dtype: torch.dtype, seed: int) -> Path:
    torch.manual_seed(seed)
    state = {}
    for layer, out in zip(layers, HEAD_WIDTHS, strict=True):
        linear = nn.Linear(width, out)
        state[f"{name}.{layer}.weight"] = (3 * linear.weight.detach()).to(dtype)
        state[f"{name}.{layer}.bias"] = linear.bias.detach().to(dtype)
        width = out
    torch.save(state, file)
    return file


def siglip(folder: Path, *, side: int = 28, seed: int = 0) -> Path:
    """A whole SiglipModel folder, text tower included, as google/siglip-so400m-patch14-384."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config=sizes | {"vocab_size": 50},
        vision_config=sizes | {"image_size": side, "patch_size": side // 4},
    )
    SiglipModel(config).save_pretrained(folder)
    SiglipImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)
    return folder


def dino_v1(folder: Path, *, side: int = 224, seed: int = 0) -> Path:
    """A ViTModel folder without pooler, with the preprocessor_config.json that lies beside facebook/dino-vits16."""
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        patch_size=side // 7,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)
    return folder


def birefnet(folder: Path, *, side: int = 64, seed: int = 0, readme: str | None = None) -> Path:
    """A BiRefNet folder as published: its own names, training's weights among them, a config without a known class."""
    torch.manual_seed(seed)
    swin = SwinConfig(
        embed_dim=12,
        depths=[1, 1, 2, 1],
        num_heads=[1, 2, 2, 4],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    model = BiRefNet(SwinBackbone(swin)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "offset_conv" in name:
                parameter.normal_(std=0.3)
        model.decoder.conv_out1[0].weight.mul_(20)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(birefnet_state(model, folder / "backbone"), folder / "model.safetensors")
    config = {
        "architectures": ["BiRefNet"],
        "auto_map": {"AutoModelForImageSegmentation": "birefnet.BiRefNet"},
        "bb_pretrained": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "pixrl.json").write_text(json.dumps({"resolution": side}))
    if readme is not None:
        (folder / "README.md").write_text(readme)
    return folder


def birefnet_state(model: BiRefNet, scratch: Path) -> dict[str, Tensor]:
    """A BiRefNet's weights under the published names, with some of training's."""
    parts = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("bb.")}
    state: dict[str, Tensor] = parts | {
        "decoder.conv_ms_spvn_4.weight": torch.zeros(1, 96, 1, 1),
        "bb.layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.long),
    }
    model.bb.save_pretrained(scratch)  # transformers' names on disk
    backbone = load_file(scratch / "model.safetensors")
    shutil.rmtree(scratch)
    for name in sorted(backbone):
        published = _swin_name(name)
        if ".attention.self.query." in name:
            thirds = [backbone[name.replace("query", word)] for word in ("query", "key", "value")]
            state[published.replace(".attention.self.query.", ".attn.qkv.")] = torch.cat(thirds)
        elif ".self.key." not in name and ".self.value." not in name and not name.startswith("swin."):
            state[published] = backbone[name]
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _swin_name(name: str) -> str:
    """The name in the Swin code that BiRefNet uses."""
    for ours, published in (
        ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
        ("embeddings.norm.", "patch_embed.norm."),
        ("encoder.layers.", "layers."),
        (".attention.output.dense.", ".attn.proj."),
        (".attention.self.relative_position", ".attn.relative_position"),
        (".layernorm_before.", ".norm1."),
        (".layernorm_after.", ".norm2."),
        (".intermediate.dense.", ".mlp.fc1."),
        (".output.dense.", ".mlp.fc2."),
        *((f"hidden_states_norms.stage{n + 1}.", f"norm{n}.") for n in range(4)),
    ):
        name = name.replace(ours, published)
    return f"bb.{name}"
