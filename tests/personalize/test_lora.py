"""UNO's LoRA layout: read, merged, written; and what cannot be read."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixrl import models
from pixrl.errors import CheckpointError, RunError
from pixrl.models.flux import FluxPolicy
from pixrl.models.lora import export as lora_export
from pixrl.models.lora import files as lora_files
from pixrl.models.lora.export import Blocks
from pixrl.models.slots import added, slot_lora
from tests.tiny_lora import peft_folder
from tests.tolerance import MODEL, PICTURE, agree

WIDTH, RANK = 32, 3
TINY = Blocks(double=1, single=1, width=WIDTH)
INNER = {"qkv_lora1": 3, "qkv_lora2": 3, "proj_lora1": 1, "proj_lora2": 1}


def published(seed: int = 0) -> dict[str, Tensor]:
    """A file as UNO publishes it, for the tiny transformer: one double and one single block of width 32."""
    generator = torch.Generator().manual_seed(seed)

    def pair(name: str, into: int, out_of: int) -> dict[str, Tensor]:
        return {
            f"{name}.down.weight": torch.randn(RANK, into, generator=generator) * 0.1,
            f"{name}.up.weight": torch.randn(out_of, RANK, generator=generator) * 0.1,
        }

    found: dict[str, Tensor] = {}
    for processor, times in INNER.items():
        found |= pair(f"double_blocks.0.processor.{processor}", WIDTH, times * WIDTH)
    found |= pair("single_blocks.0.processor.qkv_lora", WIDTH, 3 * WIDTH)
    found |= pair("single_blocks.0.processor.proj_lora", 5 * WIDTH, WIDTH)
    return found


def load(folder: Path) -> FluxPolicy:
    found = models.load(folder, device="cpu", dtype="float32")
    assert isinstance(found, FluxPolicy)
    return found


@torch.no_grad()
def velocity(policy: FluxPolicy) -> Tensor:
    x = policy.initial_noise([0, 1])
    return policy.velocity(x, torch.tensor([0.8, 0.2]), policy.encode(["a cat", "an owl"]))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "dit_lora.safetensors"
    save_file(published(), path)
    return path


def test_every_module_gets_its_part_of_the_change(bare: FluxPolicy, file: Path) -> None:
    before = {name: x.clone() for name, x in bare.denoiser.state_dict().items()}
    bare.merge_lora(file)
    given = published()

    def change(name: str) -> Tensor:
        return given[f"{name}.up.weight"] @ given[f"{name}.down.weight"]

    double, single = "double_blocks.0.processor.", "single_blocks.0.processor."
    expected = {"transformer_blocks.0.attn.to_out.0": change(f"{double}proj_lora1")}
    expected["transformer_blocks.0.attn.to_add_out"] = change(f"{double}proj_lora2")
    expected["single_transformer_blocks.0.proj_out"] = change(f"{single}proj_lora")
    for prefix, names, whole in (
        ("transformer_blocks.0.attn.", ("to_q", "to_k", "to_v"), change(f"{double}qkv_lora1")),
        (
            "transformer_blocks.0.attn.",
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            change(f"{double}qkv_lora2"),
        ),
        ("single_transformer_blocks.0.attn.", ("to_q", "to_k", "to_v"), change(f"{single}qkv_lora")),
    ):
        expected |= {prefix + name: part for name, part in zip(names, whole.chunk(3), strict=True)}
    for name, after in bare.denoiser.state_dict().items():
        module = name.removesuffix(".weight")
        wanted = before[name] + expected[module] if module in expected and name != module else before[name]
        assert agree(after, wanted, 8 * RANK), name


def test_it_is_what_diffusers_makes_of_the_file(flux_folder: Path, bare: FluxPolicy, file: Path) -> None:
    bare.merge_lora(file)
    other = load(flux_folder)
    other.pipeline.load_lora_weights(load_file(file))
    assert agree(velocity(bare), velocity(other), MODEL)


def test_slots_come_back_through_both_layouts(flux_folder: Path, policy: FluxPolicy, tmp_path: Path) -> None:
    assert policy.lora is not None
    with torch.no_grad():
        for parameter in policy.lora.parameters():
            parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    lora = slot_lora(policy.lora.state(), "current", scale=8 / 4)
    with_proj = lora | {"single_transformer_blocks.0.proj_out": (torch.zeros(4, 160), torch.zeros(32, 4))}
    wanted = velocity(policy)
    for name, tensors in (
        ("uno", lora_export.to_uno(with_proj, TINY)),
        ("uno without the single projections", lora_export.to_uno(lora, TINY)),
        ("diffusers", lora_export.to_diffusers(lora, "flux")),
    ):
        again = load(flux_folder)
        assert not agree(velocity(again), wanted, PICTURE)
        again.merge_lora(lora_export.write_lora(tmp_path / f"{name}.safetensors", tensors))
        assert agree(velocity(again), wanted, MODEL), name
    found, _ = FluxPipeline.lora_state_dict(dict(lora_export.to_uno(with_proj, TINY)), return_alphas=True)
    assert all(key.startswith("transformer.") for key in found)
    shapes = {x.shape[0] for key, x in lora_export.to_uno(with_proj, TINY).items() if "down" in key}
    assert shapes == {12}


def test_an_imported_lora_and_what_was_trained_add_up(flux_folder: Path, file: Path, tmp_path: Path) -> None:
    policy = load(flux_folder)
    policy.merge_lora(file)
    slots = policy.attach_lora(rank=2, alpha=2)
    with torch.no_grad():
        for parameter in slots.parameters():
            parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    whole = added([lora_files.read_lora(file, "flux"), slot_lora(slots.state(), "current", 1.0)])
    again = load(flux_folder)
    again.merge_lora(lora_export.write_lora(tmp_path / "both.safetensors", lora_export.to_uno(whole, TINY)))
    assert agree(velocity(again), velocity(policy), MODEL)


def test_the_fingerprint_tells_a_merged_backbone(bare: FluxPolicy, file: Path, tmp_path: Path) -> None:
    before = bare.backbone_fingerprint
    bare.merge_lora(file)
    assert bare.backbone_fingerprint != before
    bare.attach_lora(rank=2, alpha=2)
    with pytest.raises(RunError, match="before attach_lora"):
        bare.merge_lora(file)


def test_files_that_cannot_be_read(bare: FluxPolicy, file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="hf download bytedance-research/UNO"):
        bare.merge_lora(tmp_path / "missing.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="cut short"):
        bare.merge_lora(cut)
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, other)
    with pytest.raises(CheckpointError, match="no LoRA of FLUX"):
        bare.merge_lora(other)
    large = {name: torch.zeros(RANK, 64) if "down" in name else x for name, x in published().items()}
    save_file(large, other)
    before = velocity(bare)
    with pytest.raises(CheckpointError, match="another model"):
        bare.merge_lora(other)
    assert torch.equal(velocity(bare), before)


def peft_file(path: Path, *, rank: int, **config: object) -> dict[str, Tensor]:
    """A LoRA on q and k as diffusers saves it today, with peft's configuration in the header; its tensors."""
    generator = torch.Generator().manual_seed(7)
    tensors, name = {}, "transformer.transformer_blocks.0.attn"
    for module in ("to_q", "to_k"):
        tensors[f"{name}.{module}.lora_A.weight"] = torch.randn(rank, WIDTH, generator=generator) * 0.1
        tensors[f"{name}.{module}.lora_B.weight"] = torch.randn(WIDTH, rank, generator=generator) * 0.1
    header = {
        f"transformer.{key}": x
        for key, x in {"r": rank, "target_modules": ["to_q", "to_k"], **config}.items()
    }
    save_file(tensors, path, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(header)})
    return tensors


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({"lora_alpha": 16}, (4.0, 4.0)),
        ({"lora_alpha": 16, "use_rslora": True}, (8.0, 8.0)),
        ({"lora_alpha": 4, "alpha_pattern": {"transformer_blocks.0.attn.to_k": 2}}, (1.0, 0.5)),
        ({"lora_alpha": 8, "alpha_pattern": {"to_k": 12}}, (2.0, 3.0)),
    ],
)
def test_the_alpha_that_diffusers_writes_into_the_header_counts(
    flux_folder: Path,
    bare: FluxPolicy,
    tmp_path: Path,
    config: dict[str, object],
    scales: tuple[float, float],
) -> None:
    path = tmp_path / "lora.safetensors"
    tensors = peft_file(path, rank=4, **config)
    found = lora_files.read_lora(path, "flux")
    for module, scale in zip(("to_q", "to_k"), scales, strict=True):
        name = f"transformer_blocks.0.attn.{module}"
        down, up = (tensors[f"transformer.{name}.lora_{side}.weight"] for side in "AB")
        assert agree(found[name][1] @ found[name][0], scale * up @ down, 8 * RANK)
    other = load(flux_folder)
    other.pipeline.load_lora_weights(str(tmp_path), weight_name=path.name)
    plain = velocity(bare)
    bare.merge_lora(path)
    assert agree(velocity(bare), velocity(other), MODEL)
    assert not agree(velocity(bare), plain, PICTURE)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight",
            "ip_adapter.*are no LoRA layers",
        ),
        (
            "transformer.transformer_blocks.0.attn.to_v.lora_magnitude_vector",
            "lora_magnitude.*are no LoRA layers",
        ),
        ("transformer.transformer_blocks.0.attn.to_v.lora_B.bias", "bias are no LoRA layers"),
        ("transformer.transformer_blocks.0.attn.to_v.lora_B.weight", "belong to no pair of down and up"),
        ("transformer.transformer_blocks.0.attn.to_v.alpha", r"to_v\.alpha belong to no pair"),
        ("text_encoder.encoder.layers.0.q_proj.lora_A.weight", "are not of the transformer"),
        (
            "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.lora_down.weight",
            "are not of the transformer",
        ),
        (
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight",
            "are not of the transformer",
        ),
    ],
)
def test_a_part_of_a_file_is_never_lost_in_silence(
    bare: FluxPolicy, tmp_path: Path, name: str, message: str
) -> None:
    path = tmp_path / "lora.safetensors"
    tensors = peft_file(path, rank=4, lora_alpha=4)
    save_file(tensors | {name: torch.zeros(4, 4)}, path)
    before = velocity(bare)
    with pytest.raises(CheckpointError, match=message):
        bare.merge_lora(path)
    assert torch.equal(velocity(bare), before)


def kohya_file(names: tuple[str, ...], *, rank: int, alpha: float | None) -> dict[str, Tensor]:
    """A LoRA in the names of sd-scripts (or ComfyUI), the single file's modules with dots as underscores."""
    generator = torch.Generator().manual_seed(8)
    tensors = {}
    for name in names:
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, WIDTH, generator=generator) * 0.1
        out_of = 3 * WIDTH if name.endswith("qkv") else WIDTH
        tensors[f"{name}.lora_up.weight"] = torch.randn(out_of, rank, generator=generator) * 0.1
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


@pytest.mark.parametrize("alpha", [None, 2.0, 16.0])
def test_the_alphas_of_keys_count_as_diffusers_reads_them(
    flux_folder: Path, bare: FluxPolicy, tmp_path: Path, alpha: float | None
) -> None:
    path = tmp_path / "lora.safetensors"
    names = ("lora_unet_double_blocks_0_img_attn_proj", "lora_unet_double_blocks_0_img_attn_qkv")
    tensors = kohya_file(names, rank=4, alpha=alpha)
    save_file(tensors, path)
    change = tensors[f"{names[0]}.lora_up.weight"] @ tensors[f"{names[0]}.lora_down.weight"]
    down, up = lora_files.read_lora(path, "flux")["transformer_blocks.0.attn.to_out.0"]
    assert agree(up @ down, (alpha or 4) / 4 * change, 8 * RANK)
    other = load(flux_folder)
    other.pipeline.load_lora_weights(str(tmp_path), weight_name=path.name)
    bare.merge_lora(path)
    assert agree(velocity(bare), velocity(other), MODEL)


def test_alphas_beside_peft_keys_count(flux_folder: Path, bare: FluxPolicy, tmp_path: Path) -> None:
    path, name = tmp_path / "lora.safetensors", "transformer.transformer_blocks.0.attn"
    tensors = peft_file(path, rank=4)
    save_file(
        tensors | {f"{name}.to_q.alpha": torch.tensor(16.0), f"{name}.to_k.alpha": torch.tensor(2.0)}, path
    )
    other = load(flux_folder)
    other.pipeline.load_lora_weights(str(tmp_path), weight_name=path.name)
    bare.merge_lora(path)
    assert agree(velocity(bare), velocity(other), MODEL)
    save_file(tensors | {f"{name}.to_q.alpha": torch.tensor(16.0)}, path)
    with pytest.raises(CheckpointError, match="to_k have no alpha, but others do"):
        lora_files.read_lora(path, "flux")


def test_modules_of_different_ranks_share_the_headers_alpha(
    flux_folder: Path, bare: FluxPolicy, tmp_path: Path
) -> None:
    path, name = tmp_path / "lora.safetensors", "transformer.transformer_blocks.0.attn"
    tensors = peft_file(path, rank=4)
    key = f"{name}.to_k.lora_A.weight", f"{name}.to_k.lora_B.weight"
    tensors |= {key[0]: tensors[key[0]][:2].clone(), key[1]: tensors[key[1]][:, :2].clone()}
    header = {"r": 4, "lora_alpha": 8, "rank_pattern": {"to_k": 2}, "target_modules": ["to_q", "to_k"]}
    own = json.dumps({f"transformer.{name}": x for name, x in header.items()})
    save_file(tensors, path, metadata={"format": "pt", "lora_adapter_metadata": own})
    found = lora_files.read_lora(path, "flux")["transformer_blocks.0.attn.to_k"]
    assert agree(found[1] @ found[0], 4 * tensors[key[1]] @ tensors[key[0]], 8 * RANK)
    other = load(flux_folder)
    other.pipeline.load_lora_weights(str(tmp_path), weight_name=path.name)
    bare.merge_lora(path)
    assert agree(velocity(bare), velocity(other), MODEL)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            ("lora_transformer_transformer_blocks_0_attn_to_q",),
            "lora_unet_.* are of another layout than the rest",
        ),
        (("something_else",), "something_else.* are of another layout than the rest"),
    ],
)
def test_what_diffusers_drops_is_refused(tmp_path: Path, extra: tuple[str, ...], message: str) -> None:
    path = tmp_path / "lora.safetensors"
    names = ("lora_unet_double_blocks_0_img_attn_proj", *extra)
    save_file(kohya_file(names, rank=4, alpha=2.0), path)
    with pytest.raises(CheckpointError, match=message):
        lora_files.read_lora(path, "flux")


def test_the_last_layers_alpha_counts(tmp_path: Path) -> None:
    """diffusers' reader takes it for the rank; here it is in the weights before they are converted."""
    names = ("lora_unet_double_blocks_0_img_attn_proj", "lora_unet_final_layer_linear")
    tensors = kohya_file(names, rank=4, alpha=2.0)
    save_file(tensors, tmp_path / "lora.safetensors")
    found = lora_files.read_lora(tmp_path / "lora.safetensors", "flux")
    for module, name in zip(("transformer_blocks.0.attn.to_out.0", "proj_out"), names, strict=True):
        down, up = found[module]
        wanted = 0.5 * tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
        assert agree(up @ down, wanted, 8 * RANK), module


def test_a_folder_that_peft_wrote_of_a_flux(flux_folder: Path, bare: FluxPolicy, tmp_path: Path) -> None:
    other = load(flux_folder)
    wanted = peft_folder(tmp_path / "lora", other.denoiser, r=6, lora_alpha=3)
    bare.merge_lora(tmp_path / "lora")
    changed = [
        name for name, x in load(flux_folder).denoiser.state_dict().items() if not x.equal(wanted[name])
    ]
    assert len(changed) == 11
    for name, after in bare.denoiser.state_dict().items():
        assert agree(after, wanted[name], 8 * RANK), name


@pytest.mark.parametrize(
    ("header", "strength"),
    [({"ss_network_dim": "4", "ss_network_alpha": "2.0"}, 0.5), ({"lora_alpha": "16"}, 4.0), ({}, 1.0)],
)
def test_the_headers_alpha_counts_without_tensors(
    tmp_path: Path, header: dict[str, str], strength: float
) -> None:
    name = "lora_unet_double_blocks_0_img_attn_proj"
    tensors = kohya_file((name,), rank=4, alpha=None)
    save_file(tensors, tmp_path / "lora.safetensors", metadata=header or None)
    down, up = lora_files.read_lora(tmp_path / "lora.safetensors", "flux")[
        "transformer_blocks.0.attn.to_out.0"
    ]
    wanted = strength * tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
    assert agree(up @ down, wanted, 8 * RANK)


@pytest.mark.parametrize("side", ["up", "down"])
@pytest.mark.parametrize(
    "processor", ["double_blocks.0.processor.qkv_lora1", "single_blocks.0.processor.proj_lora"]
)
def test_half_a_pair_of_unos_file_is_refused(tmp_path: Path, processor: str, side: str) -> None:
    path = tmp_path / "dit_lora.safetensors"
    save_file({key: x for key, x in published().items() if key != f"{processor}.{side}.weight"}, path)
    with pytest.raises(CheckpointError):
        lora_files.read_lora(path, "flux")


def test_weights_that_are_not_finite_are_refused(bare: FluxPolicy, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    tensors = peft_file(path, rank=4, lora_alpha=4)
    broken = next(iter(tensors))
    tensors[broken][0, 0] = torch.nan
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"to_q\.lora_A\.weight are not finite"):
        bare.merge_lora(path)
    save_file({k: x.nan_to_num() for k, x in tensors.items()}, path, metadata={"lora_adapter_metadata": "{"})
    with pytest.raises(CheckpointError, match="lora_adapter_metadata cannot be read"):
        bare.merge_lora(path)


def test_what_has_no_place_in_the_layout() -> None:
    pair = (torch.zeros(2, 32), torch.zeros(32, 2))
    with pytest.raises(CheckpointError, match="q, k and v together"):
        lora_export.to_uno({"transformer_blocks.0.attn.to_q": pair}, TINY)
    with pytest.raises(CheckpointError, match="no place in UNO's layout"):
        lora_export.to_uno({"transformer_blocks.0.ff.net.2": pair}, TINY)
    with pytest.raises(CheckpointError, match=r"first 'transformer_blocks\.1\.attn\.to_out\.0'"):
        lora_export.to_uno({"transformer_blocks.1.attn.to_out.0": pair}, TINY)


def test_every_processor_of_the_published_layout_is_written() -> None:
    """UNO's code builds them all, of one rank, and leaves what a file lacks without values."""
    pair = (torch.ones(2, WIDTH), torch.ones(WIDTH, 2))
    file = lora_export.to_uno(
        {"transformer_blocks.18.attn.to_out.0": pair}, Blocks(double=19, single=38, width=WIDTH)
    )
    shapes = {
        name.replace("blocks.0", f"blocks.{number}"): (2, x.shape[1]) if "down" in name else (len(x), 2)
        for name, x in published().items()
        for number in range(19 if name.startswith("double") else 38)
    }
    assert {name: tuple(x.shape) for name, x in file.items()} == shapes and len(shapes) == 304
    trained = {f"double_blocks.18.processor.proj_lora1.{side}.weight" for side in ("down", "up")}
    assert {name for name, x in file.items() if x.any()} == trained
