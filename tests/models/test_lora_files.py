"""LoRA files and PEFT folders: the strength that they were trained with, or one sentence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tests.tiny_lora import BLOCK, RANK, TARGETS, WIDTH, peft_folder, tensors
from tests.tolerance import MODEL, agree
from torch import Tensor

from pixrl import models
from pixrl.errors import CheckpointError, RunError
from pixrl.models.lora.export import adapter_metadata, to_comfyui, to_diffusers
from pixrl.models.lora.files import open_lora, read_lora
from pixrl.models.sd3 import SD3Policy
from pixrl.models.slots import merge

CASES = Path(__file__).parents[1] / "data/cases"


def change(file: dict[str, Tensor], module: str) -> Tensor:
    """B A of a module."""
    pair = (file[f"transformer.{module}.lora_{side}.weight"] for side in "BA")
    return torch.linalg.multi_dot(list(pair))


def blob(**settings: Any) -> dict[str, str]:
    """A header as diffusers writes it."""
    own = {"r": RANK, "target_modules": ["to_q", "to_k"], **settings}
    return {
        "format": "pt",
        "lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in own.items()}),
    }


ALPHA = {f"transformer.{BLOCK}.{name}.alpha": torch.tensor(16.0) for name in ("to_q", "to_k")}
STRENGTHS: dict[str, tuple[dict[str, str], dict[str, Any] | None, dict[str, Tensor], float]] = {
    "nothing": ({}, None, {}, 1.0),
    "diffusers": (blob(lora_alpha=16), None, {}, 4.0),
    "diffusers, rslora": (blob(lora_alpha=16, use_rslora=True), None, {}, 8.0),
    "diffusers' save_lora_adapter": ({"lora_adapter_metadata": '{"r": 4, "lora_alpha": 16}'}, None, {}, 4.0),
    "flat": ({"transformer.r": "4", "transformer.lora_alpha": "16"}, None, {}, 4.0),
    "flat, rslora": (
        {"transformer.r": "4", "transformer.lora_alpha": "16", "transformer.use_rslora": "True"}, None, {}, 8.0,
    ),
    "flat, as Python prints it": (
        {"transformer.lora_alpha": "16", "transformer.alpha_pattern": "{'to_.': 8}", "transformer.bias": "none",
         "transformer.use_dora": "False", "transformer.layers_pattern": "None"}, None, {}, 2.0,
    ),
    "kohya": ({"ss_network_dim": "4", "ss_network_alpha": "16.0"}, None, {}, 4.0),
    "kohya, with tensors": ({"ss_network_dim": "4", "ss_network_alpha": "16.0"}, None, ALPHA, 4.0),
    "kohya, resized": ({"ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic"}, None, ALPHA, 4.0),
    "kohya, other dims by type": ({"ss_network_dim": "8", "ss_network_alpha": "16"}, None, ALPHA, 4.0),
    "tensors": ({}, None, ALPHA, 4.0),
    "plain keys": ({"rank": "4", "alpha": "2"}, None, {}, 0.5),
    "plain keys, rslora": ({"lora_alpha": "16", "use_rslora": "true"}, None, {}, 8.0),
    "OneTrainer": ({"ot_config": '{"lora_rank": 4, "lora_alpha": 16.0, "vae": {"alpha": 3}}'}, None, {}, 4.0),
    "peft's beside": ({}, {"r": RANK, "lora_alpha": 8}, {}, 2.0),
    "two that agree": (blob(lora_alpha=16), {"r": RANK, "lora_alpha": 16}, {}, 4.0),
}  # fmt: skip


def written(folder: Path, name: str) -> tuple[Path, dict[str, Tensor], float]:
    header, config, alphas, strength = STRENGTHS[name]
    file = folder / "lora.safetensors"
    save_file(tensors() | alphas, file, metadata=header or None)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return file, tensors(), strength


@pytest.mark.parametrize("name", list(STRENGTHS))
def test_the_merged_weights_are_w_plus_alpha_by_rank_times_b_a(
    sd3: SD3Policy, tmp_path: Path, name: str
) -> None:
    file, given, strength = written(tmp_path, name)
    before = {key: x.clone() for key, x in sd3.denoiser.state_dict().items()}
    sd3.merge_lora(file)
    changed = {f"{BLOCK}.{module}.weight": change(given, f"{BLOCK}.{module}") for module in ("to_q", "to_k")}
    for key, after in sd3.denoiser.state_dict().items():
        wanted = before[key] + strength * changed[key] if key in changed else before[key]
        assert agree(after, wanted, 8 * RANK), key
    assert f"of rank 4 and strength {strength:g}, " in sd3.merged[0].said
    assert ("for it has no alpha" in sd3.merged[0].said) is (name == "nothing")


@pytest.mark.parametrize(("case", "strength"), [("plain", 1), ("header_flat", 4), ("header_ss", 4)])
def test_the_cases_from_the_field(sd3_folder: Path, case: str, strength: float) -> None:
    plain = models.load(sd3_folder, device="cpu", dtype="float32")
    other = models.load(sd3_folder, device="cpu", dtype="float32", lora=CASES / f"{case}.safetensors")
    assert isinstance(plain, SD3Policy) and isinstance(other, SD3Policy)
    given = load_file(CASES / f"{case}.safetensors")
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        module = f"{BLOCK}.{name}"
        weight, merged = (x.denoiser.get_submodule(module).weight for x in (plain, other))
        assert agree(merged, weight + strength * change(given, module), 8 * RANK)


@pytest.mark.parametrize(
    ("header", "config", "alphas", "message"),
    [
        (blob(lora_alpha=16), {"r": 4, "lora_alpha": 8}, {},
         r"strength of .*to_. is 2 by adapter_config\.json and 4 by its header's lora_adapter_metadata"),
        ({"ss_network_alpha": "8", "ss_network_dim": "4"}, None, ALPHA,
         r"is 4 by .*to_.\.alpha and 2 by its header's ss_network_alpha"),
        ({"transformer.r": "4", "transformer.lora_alpha": "4", "ss_network_alpha": "8"}, None, {},
         r"1 by its header's transformer\.lora_alpha and 2 by its header's ss_network_alpha"),
        (blob(lora_alpha=16, use_rslora=True), None, ALPHA, r"is 4 by .*alpha and 8 by its header's lora_adapter"),
        ({"transformer.r": "8", "transformer.lora_alpha": "16"}, None, {}, r"has rank 4, but .* says 8"),
        ({"ss_network_dim": "8", "ss_network_alpha": "16"}, None, {}, r"has rank 4, but .*ss_network_alpha says 8"),
        (blob(lora_alpha=16, rank_pattern={"to_k": 2}), None, {}, r"to_k has rank 4, but .* says 2"),
        ({"ss_network_alpha": "Dynamic"}, None, {}, r"ss_network_alpha is 'Dynamic': no number"),
        ({"my_alpha_value": "3"}, None, {}, r"my_alpha_value \(3\) may be an alpha.* Name it lora_alpha"),
        (blob(lora_alpha=16, use_dora=True), None, {}, r"sets use_dora=True.*more than plain LoRA"),
        ({"use_dora": "True", "lora_alpha": "4"}, None, {}, "sets use_dora"),
        (blob(), None, {}, "says no lora_alpha"),
        ({}, {"peft_type": "LOHA", "lora_alpha": 4}, {}, "adapter_config.json is of LOHA"),
        ({}, {"r": 4, "lora_alpha": 8, "bias": "all"}, {}, r"adapter_config\.json sets bias=all"),
        ({}, {"r": 4, "lora_alpha": 8, "modules_to_save": ["proj_out"]}, {}, r"sets modules_to_save="),
        ({}, {"r": 4, "lora_alpha": 8, "invented_in_2030": 1}, {}, r"sets invented_in_2030=1"),
        ({}, {"r": 4, "lora_alpha": 8, "init_lora_weights": "pissa_niter_4"}, {}, "changes the base"),
        ({}, {"r": 4, "lora_alpha": "much"}, {}, "must be numbers above 0"),
        ({}, {"r": 4, "lora_alpha": 0}, {}, "must be numbers above 0"),
        ({}, {"r": 4, "lora_alpha": 8, "alpha_pattern": {"(": 2}}, {}, "must map names of modules to numbers"),
        ({}, {"r": 4, "lora_alpha": 8, "alpha_pattern": [2]}, {}, "must map names of modules to numbers"),
        ({"lora_adapter_metadata": "[4]"}, None, {}, "lora_adapter_metadata cannot be read"),
        ({"lora_adapter_metadata": "[" * 9000}, None, {}, "lora_adapter_metadata cannot be read"),
        ({}, None, {f"transformer.{BLOCK}.to_q.alpha": torch.tensor(0.0)}, "must be one number above 0"),
        ({}, None, {f"transformer.{BLOCK}.to_q.alpha": torch.tensor(4.0)}, "to_k have no alpha, but others do"),
    ],
)  # fmt: skip
def test_never_another_strength_in_silence(
    tmp_path: Path,
    header: dict[str, str],
    config: dict[str, Any] | None,
    alphas: dict[str, Tensor],
    message: str,
) -> None:
    file = tmp_path / "lora.safetensors"
    save_file(tensors() | alphas, file, metadata=header or None)
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_lora(file, "sd3")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 32, "lora_alpha": 64},
        {"use_rslora": True},
        {"rank_pattern": {"attn.to_q": 2, r"transformer_blocks\.1\.attn\.to_k": 6}},
        {"alpha_pattern": {"to_v": 3}, "rank_pattern": {"to_out.0": 1}, "use_rslora": True},
    ],
    ids=["as Flow-GRPO", "rslora", "ranks", "alphas"],
)
def test_a_folder_that_peft_wrote(
    sd3: SD3Policy, sd3_folder: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    wanted = peft_folder(tmp_path / "lora", sd3_folder, **config)
    before = {key: x.clone() for key, x in sd3.denoiser.state_dict().items()}
    sd3.merge_lora(tmp_path / "lora")
    changed = 0
    for key, after in sd3.denoiser.state_dict().items():
        assert agree(after, wanted[key], 300), key
        changed += not torch.equal(before[key], after)
    assert changed == len(
        [key for key in before if key.endswith(tuple(f"{name}.weight" for name in TARGETS))]
    )


def test_dora_by_peft_is_refused(sd3: SD3Policy, sd3_folder: Path, tmp_path: Path) -> None:
    peft_folder(tmp_path / "lora", sd3_folder, use_dora=True)
    with pytest.raises(CheckpointError, match=r"lora_magnitude_vector.* are no LoRA layers"):
        sd3.merge_lora(tmp_path / "lora")


@pytest.mark.parametrize("names", ["lora_unet_", "diffusion_model."])
def test_the_authors_names_of_sd3(sd3_folder: Path, tmp_path: Path, names: str) -> None:
    """Ours translated by `to_comfyui` and back; with kohya's underscores or the authors' dots, at any alpha."""
    given = tensors(*(f"{BLOCK}.{name}" for name in ("to_q", "to_v", "add_k_proj", "to_out.0")))
    ours = {key.removeprefix("transformer."): x for key, x in given.items()}
    lora = {
        name: (ours[f"{name}.lora_A.weight"], ours[f"{name}.lora_B.weight"])
        for name in {key.rsplit(".lora_", 1)[0] for key in ours}
    }
    file = to_comfyui(lora, "sd3")
    file = {key: x * 3 if key.endswith(".alpha") else x for key, x in file.items()}
    if names == "diffusion_model.":
        dotted = {"joint_blocks_0_x_block_attn_qkv": "joint_blocks.0.x_block.attn.qkv"}
        dotted |= {"joint_blocks_0_context_block_attn_qkv": "joint_blocks.0.context_block.attn.qkv"}
        dotted |= {"joint_blocks_0_x_block_attn_proj": "joint_blocks.0.x_block.attn.proj"}
        for key in list(file):
            module, dot, end = key.removeprefix("lora_unet_").partition(".")
            file[names + dotted[module] + dot + end] = file.pop(key)
    save_file(file, tmp_path / "kohya.safetensors")
    found = read_lora(tmp_path / "kohya.safetensors", "sd3")
    for module, (down, up) in found.items():
        wanted = 3 * lora[module][1] @ lora[module][0] if module in lora else torch.zeros(WIDTH, WIDTH)
        assert agree(up @ down, wanted, 8 * RANK, scale=30.0), module
    assert found.keys() >= lora.keys()
    models.load(sd3_folder, device="cpu", lora=tmp_path / "kohya.safetensors")


def test_what_diffusers_makes_of_it(sd3_folder: Path, tmp_path: Path) -> None:
    given = tensors()
    save_file(given, tmp_path / "x.safetensors", metadata=blob(lora_alpha=16))
    ours, other = (models.load(sd3_folder, device="cpu", dtype="float32") for _ in range(2))
    assert isinstance(ours, SD3Policy) and isinstance(other, SD3Policy)
    ours.merge_lora(tmp_path / "x.safetensors")
    other.pipeline.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
    x, t = ours.initial_noise([0, 1]), torch.tensor([0.8, 0.2])
    with torch.no_grad():
        one, two = (policy.velocity(x, t, policy.encode(["a cat", "an owl"])) for policy in (ours, other))
    assert agree(one, two, MODEL)


def test_exports_of_several_ranks_carry_one() -> None:
    pair = torch.ones(2, WIDTH), torch.ones(WIDTH, 2)
    lora = {f"{BLOCK}.to_q": pair, f"{BLOCK}.to_k": (torch.ones(5, WIDTH), torch.ones(WIDTH, 5))}
    file = to_diffusers(lora, "sd3")
    assert {len(x) for key, x in file.items() if "lora_A" in key} == {5}
    for module, (down, up) in lora.items():
        assert torch.equal(change(file, module), up @ down)
    said = json.loads(adapter_metadata(lora, "sd3")["lora_adapter_metadata"])
    assert said["transformer.r"] == said["transformer.lora_alpha"] == 5
    assert LoraConfig(**{key.removeprefix("transformer."): x for key, x in said.items()}).lora_alpha == 5


def in_folder(**files: str) -> Callable[[Path], Path]:
    """Writes a folder of files that are LoRAs by their names."""

    def write(place: Path) -> Path:
        folder = place / "folder"
        for name, text in files.items():
            file = folder / name.replace("__", "/").replace("_dot_", ".")
            file.parent.mkdir(parents=True, exist_ok=True)
            if text == "lora":
                save_file(tensors(), file)
            else:
                file.write_text(text)
        return folder

    return write


def half(place: Path) -> Path:
    save_file({key: x for key, x in tensors().items() if "to_k.lora_B" not in key}, place / "x.safetensors")
    return place / "x.safetensors"


def other_ranks(place: Path) -> Path:
    key = f"transformer.{BLOCK}.to_k.lora_B.weight"
    save_file(tensors() | {key: torch.zeros(WIDTH, 3)}, place / "x.safetensors")
    return place / "x.safetensors"


def cut(place: Path) -> Path:
    save_file(tensors(), place / "x.safetensors")
    whole = (place / "x.safetensors").read_bytes()
    (place / "x.safetensors").write_bytes(whole[: len(whole) // 2])
    return place / "x.safetensors"


def pickled(name: str) -> Callable[[Path], Path]:
    def write(place: Path) -> Path:
        torch.save(tensors(), place / name)
        return place / name

    return write


def of_modules(*names: str) -> Callable[[Path], Path]:
    def write(place: Path) -> Path:
        save_file(tensors(*names), place / "x.safetensors")
        return place / "x.safetensors"

    return write


def kohya(name: str) -> Callable[[Path], Path]:
    def write(place: Path) -> Path:
        pair = {f"{name}.lora_down.weight": torch.ones(2, 16), f"{name}.lora_up.weight": torch.ones(16, 2)}
        save_file(pair, place / "x.safetensors")
        return place / "x.safetensors"

    return write


def twice(place: Path) -> Path:
    double = {key.removeprefix("transformer."): x for key, x in tensors().items()}
    save_file(tensors() | double, place / "x.safetensors")
    return place / "x.safetensors"


def empty(place: Path) -> Path:
    (place / "x.safetensors").touch()
    return place / "x.safetensors"


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing": (lambda place: place / "x.safetensors", "There is no LoRA file or folder"),
    "a hub id": (lambda place: Path("jieliu/SD3.5M"), "hf download jieliu/SD3.5M --local-dir jieliu/SD3.5M"),
    "half a pair": (half, "to_k.lora_A.weight belong to no pair of down and up"),
    "two ranks in a pair": (other_ranks, r"to_k has no down and up of one rank: \[4, 16\] and \[16, 3\]"),
    "a module twice": (twice, "to_q are there twice"),
    "a name that is too long": (lambda place: place / ("x" * 5000), "cannot be looked for"),
    "nobody's home": (lambda place: Path("~nobodyofthatname/x"), "cannot be looked for"),
    "cut short": (cut, "is cut short"),
    "empty": (empty, "is cut short"),
    "a pickle": (pickled("adapter_model.bin"), "is a pickle"),
    "a pickle by another name": (pickled("x.safetensors"), "is a pickle"),
    "an unknown module": (of_modules("transformer_blocks.9.attn.to_q"), "blocks.9.attn.to_q is missing here"),
    "no module": (of_modules("nosuch"), "nosuch is missing here"),
    "an unknown module of kohya's": (kohya("lora_unet_joint_blocks_0_nosuch"), "pixrl has no name for"),
    "text encoders": (kohya("lora_te1_text_model_encoder_layers_0_mlp_fc1"), "are not of the transformer"),
    "an empty folder": (
        in_folder(README_dot_md="x"),
        "holds no LoRA. Give one with adapter_model.safetensors",
    ),
    "a folder with a folder": (
        in_folder(lora__adapter_config_dot_json="{}"),
        "folder/lora does: give .*/lora",
    ),
    "a folder of a pickle": (
        in_folder(adapter_config_dot_json="{}", adapter_model_dot_bin="x"),
        "is a pickle",
    ),
    "peft's without config": (in_folder(adapter_model_dot_safetensors="lora"), "there is none beside it"),
    "a broken config": (
        in_folder(adapter_model_dot_safetensors="lora", adapter_config_dot_json="{"),
        "adapter_config.json cannot be read",
    ),
    "two files": (
        in_folder(a_dot_safetensors="lora", b_dot_safetensors="lora"),
        "give one of a.safe.*, b.safe",
    ),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_files_end_in_one_sentence_and_change_nothing(sd3: SD3Policy, tmp_path: Path, name: str) -> None:
    write, message = BAD[name]
    before = {key: x.clone() for key, x in sd3.denoiser.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        sd3.merge_lora(write(tmp_path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert all(torch.equal(before[key], x) for key, x in sd3.denoiser.state_dict().items())


def test_a_folder_with_one_file_is_that_file(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "pytorch_lora_weights.safetensors", metadata=blob(lora_alpha=16))
    (tmp_path / "README.md").touch()
    assert "strength 4, by its header's lora_adapter_metadata" in open_lora(tmp_path, "sd3").said


def test_the_config_beside_is_that_of_pefts_own_file(tmp_path: Path) -> None:
    """Another file in the same folder is not what it describes."""
    save_file(tensors(), tmp_path / "adapter_model.safetensors")
    save_file(tensors(), tmp_path / "other.safetensors", metadata={"lora_alpha": "8"})
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 16}')
    assert "strength 4," in open_lora(tmp_path, "sd3").said
    assert "strength 2," in open_lora(tmp_path / "other.safetensors", "sd3").said


def test_what_is_merged_into(sd3: SD3Policy, sdxl_folder: Path, tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="transformer_blocks"):
        models.load(sdxl_folder, device="cpu", lora=tmp_path / "x.safetensors")
    before = sd3.backbone_fingerprint
    sd3.merge_lora(tmp_path / "x.safetensors")
    assert sd3.backbone_fingerprint != before
    sd3.attach_lora(rank=2, alpha=2)
    with pytest.raises(RunError, match="before attach_lora"):
        sd3.merge_lora(tmp_path / "x.safetensors")


def test_half_precision_rounds_the_sum_once() -> None:
    """The change is not rounded to the weights' dtype before it is added."""
    backbone = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH)).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    lora = torch.randn(RANK, WIDTH, generator=generator), torch.randn(WIDTH, RANK, generator=generator)
    weight = backbone[0].weight.detach().clone()
    merge(backbone, {"0": lora}, "x")
    assert torch.equal(backbone[0].weight, (weight.float() + lora[1] @ lora[0]).bfloat16())
    assert not torch.equal(backbone[0].weight, weight + (lora[1] @ lora[0]).bfloat16())


SDXL_BLOCK = "transformer_blocks.0.attn2"
SDXL_NAMES = {
    "diffusers": ("unet.down_blocks.1.attentions.0.{}.to_q.", "lora_A.weight", "lora_B.weight", None),
    "older": ("unet.down_blocks.1.attentions.0.{}.processor.to_q_lora.", "down.weight", "up.weight", None),
    "peft": ("base_model.model.down_blocks.1.attentions.0.{}.to_q.", "lora_A.weight", "lora_B.weight", None),
    "kohya": ("lora_unet_down_blocks_1_attentions_0_{}_to_q.", "lora_down.weight", "lora_up.weight", 2.0),
    "stability": ("lora_unet_input_blocks_4_1_{}_to_q.", "lora_down.weight", "lora_up.weight", 2.0),
}
"""For each layout the beginning of its names, the ends of down and up, and an alpha."""


@pytest.mark.parametrize("layout", SDXL_NAMES)
def test_the_layouts_of_sdxl(layout: str, tmp_path: Path) -> None:
    name, end, other, alpha = SDXL_NAMES[layout]
    stem = name.format(SDXL_BLOCK.replace(".", "_") if alpha else SDXL_BLOCK)
    pair = torch.randn(4, 16), torch.randn(24, 4)
    given = {stem + end: pair[0], stem + other: pair[1]}
    if alpha is not None:
        given[f"{stem}alpha"] = torch.tensor(alpha)
    save_file(given, tmp_path / "x.safetensors")
    found = read_lora(tmp_path / "x.safetensors", "sdxl")
    assert list(found) == [f"down_blocks.1.attentions.0.{SDXL_BLOCK}.to_q"]
    ((read_down, read_up),) = found.values()
    assert agree(read_up @ read_down, pair[1] @ pair[0] * (1 if alpha is None else alpha / 4), 4)
