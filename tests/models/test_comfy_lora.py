"""LoRA files under the published names change the published weights as the trained modules change ours."""

import pytest
import torch
from diffusers import FluxPipeline
from tests.tolerance import agree
from torch import Tensor

from pixrl.errors import CheckpointError
from pixrl.models.lora.export import to_comfyui

WIDTH = 3072  # diffusers' reader of this layout knows FLUX's published width alone
RANK = 2


def lora(modules: dict[str, tuple[int, int]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Random (down, up) by module: (inputs, outputs)."""
    generator = torch.Generator().manual_seed(0)
    return {
        module: (
            torch.randn(RANK, inputs, generator=generator),
            torch.randn(outputs, RANK, generator=generator),
        )
        for module, (inputs, outputs) in modules.items()
    }


def test_diffusers_reads_fluxs_file_back() -> None:
    square, wide = (WIDTH, WIDTH), (WIDTH, 4 * WIDTH)
    double, single = "transformer_blocks.0.", "single_transformer_blocks.3."
    names = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")
    given = lora(
        {f"{double}attn.{name}": square for name in names}
        | {f"{single}attn.{name}": square for name in ("to_q", "to_k", "to_v")}
        | {f"{single}proj_mlp": wide}
    )
    found, alphas = FluxPipeline.lora_state_dict(dict(to_comfyui(given, "flux")), return_alphas=True)
    assert not alphas
    for module, (down, up) in given.items():
        key = f"transformer.{module}"
        probe = torch.randn(down.shape[1], 3, generator=torch.Generator().manual_seed(1))
        change = found[f"{key}.lora_B.weight"] @ (found[f"{key}.lora_A.weight"] @ probe)
        assert agree(change, up @ (down @ probe), down.shape[1]), module
    assert {key.rsplit(".lora_", 1)[0] for key in found} == {f"transformer.{module}" for module in given}


def test_parts_without_a_lora_stay_as_they_are() -> None:
    given = lora({"single_transformer_blocks.1.attn.to_k": (8, 8), "transformer_blocks.0.attn.to_v": (8, 8)})
    file = to_comfyui(given, "flux")
    single = "lora_unet_single_blocks_1_linear1"
    change = file[f"{single}.lora_up.weight"] @ file[f"{single}.lora_down.weight"]
    assert change.shape == (7 * 8, 8)
    down, up = given["single_transformer_blocks.1.attn.to_k"]
    assert agree(change[8:16], up @ down, 8 * RANK)
    assert change[:8].abs().max() == change[16:].abs().max() == 0
    double = "lora_unet_double_blocks_0_img_attn_qkv"
    assert file[f"{double}.lora_up.weight"].shape == (24, RANK)
    assert file[f"{double}.alpha"].item() == RANK
    assert len(file) == 6


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_what_has_no_place(kind: str) -> None:
    with pytest.raises(CheckpointError, match=rf"'context_embedder' has no place .* for {kind}"):
        to_comfyui(lora({"context_embedder": (4, 4)}), kind)
    with pytest.raises(CheckpointError, match="has no place"):
        to_comfyui(lora({"transformer_blocks.0.attn.norm_q": (4, 4)}), kind)
