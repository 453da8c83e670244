"""One safetensors file in the authors' layout gives the pictures of the folder that it was written from."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import published, tiny
from tests.tolerance import PICTURE, agree
from typer.testing import CliRunner

from pixrl import cli, hub, models
from pixrl.errors import CheckpointError, InputError

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def sd3_with_t5(folder: Path) -> Path:
    """Of CLIP-L the SD3 files keep no projection: its pooled features are used as they are."""
    made = tiny.sd3(folder, card=tiny.SD3_CARD | {"max_sequence_length": 8}, with_t5=True)
    file = made / "text_encoder/model.safetensors"
    weights = load_file(file)
    weights["text_projection.weight"] = torch.eye(len(weights["text_projection.weight"]))
    save_file(weights, file, metadata={"format": "pt"})
    return made


def sdxl_of_two_widths(folder: Path) -> Path:
    """As published; by them diffusers tells which encoder's weights it reads."""
    return tiny.sdxl(folder, second=24)


CASES: dict[str, tuple[Callable[..., Path], Callable[[Path, Path], Path], tuple[str, ...]]] = {
    "sd3": (lambda p: tiny.sd3(p, card=tiny.SD3_CARD), published.sd3, ("transformer", "vae")),
    "sd3.5": (lambda p: tiny.sd3(p, card=tiny.SD3_CARD, dual=True), published.sd3, ("transformer", "vae")),
    "sdxl": (tiny.sdxl, published.sdxl, ("unet", "vae")),
    "sd3 and its encoders": (sd3_with_t5, published.sd3_with_encoders, ("transformer", "vae", *ENCODERS)),
    "sdxl and its encoders": (
        sdxl_of_two_widths,
        published.sdxl_with_encoders,
        ("unet", "vae", *ENCODERS[:2]),
    ),
    "flux": (tiny.flux, published.flux, ("transformer",)),
}


@pytest.mark.parametrize("family", CASES)
def test_the_same_pictures_as_the_folder(family: str, tmp_path: Path) -> None:
    make, write, inside = CASES[family]
    folder = make(tmp_path / "model")
    file = write(folder, tmp_path / "model.safetensors")
    whole = models.load(folder, device="cpu", dtype="float32")
    for part in inside:  # what the file holds is not in the folder
        for weights in (folder / part).glob("*.safetensors"):
            weights.unlink()
    alone = models.load(file, device="cpu", dtype="float32")
    named = models.load(f"{file}@{folder}", device="cpu", dtype="float32")
    prompts, seeds = ["a photo of an owl", "a snail"], [1, 2]
    expected = whole.sample(whole.encode(prompts), seeds)
    for other in (alone, named):
        assert agree(other.sample(other.encode(prompts), seeds), expected, PICTURE)
    assert alone.settings == whole.settings
    assert alone.fingerprint() == named.fingerprint() != whole.fingerprint()


def test_what_a_single_file_needs(tmp_path: Path) -> None:
    folder = tiny.sd3(tmp_path / "model", card=tiny.SD3_CARD)
    file = published.sd3(folder, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"no folder .*other. Name a folder or a hub id.*@FOLDER"):
        models.load(file)
    with pytest.raises(CheckpointError, match="does not exist"):
        models.load(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match=r"does not exist"):
        models.load(f"{file}@{tmp_path}/nowhere")
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(CheckpointError, match=r"holds no text_encoder, and neither does .*model"):
        models.load(f"{file}@{folder}")


def refusal(file: Path, folder: Path) -> str:
    """What is said of a file with the configs of a folder, without its first and last sentence."""
    with pytest.raises(CheckpointError) as refused:
        models.load(f"{file}@{folder}", device="cpu")
    message = str(refused.value)
    kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    first = f"{file} does not fit a {kind} with the configs of {folder}: "
    last = f"Name the folder or hub id of the model that it belongs to: {file}@FOLDER"
    assert message.startswith(first) and message.endswith(last)
    return message.removeprefix(first).removesuffix(last).strip()


def renamed(file: Path, change: Callable[[str], str | None]) -> Path:
    """The same weights under other names; None drops one."""
    weights = {change(name): x for name, x in load_file(file).items()}
    save_file({name: x for name, x in weights.items() if name is not None}, file)
    return file


def test_a_file_that_lacks_a_layers_weights(tmp_path: Path) -> None:
    folder = tiny.sd3(tmp_path / "model", card=tiny.SD3_CARD)
    file = published.sd3(folder, tmp_path / "model.safetensors")
    renamed(file, lambda name: None if "joint_blocks.1.x_block.mlp" in name else name)
    mlp = "model.diffusion_model.joint_blocks.1.x_block.mlp"
    assert refusal(file, folder) == (
        f"4 weights are missing ({mlp}.fc1.bias, {mlp}.fc1.weight, {mlp}.fc2.bias, ...). "
        "By its names it is a file of SD3."
    )


def test_a_file_of_another_size(tmp_path: Path) -> None:
    file = published.sd3(tiny.sd3(tmp_path / "small", card=tiny.SD3_CARD), tmp_path / "small.safetensors")
    other = tiny.sd3(tmp_path / "wide", card=tiny.SD3_CARD, with_t5=True)
    said = refusal(file, other)
    prefix = "model.diffusion_model."
    assert said == (
        f"2 weights have another shape ({prefix}context_embedder.weight is [16, 32], expected [16, 48], "
        f"{prefix}y_embedder.mlp.0.weight is [16, 32], expected [16, 40]). By its names it is a file of SD3."
    )
    assert "ignore_mismatched_sizes" not in said


def test_a_file_with_more_layers_than_the_config(tmp_path: Path) -> None:
    """diffusers leaves them out without a word."""
    folder = tiny.sdxl(tmp_path / "model")
    file = published.sdxl(folder, tmp_path / "model.safetensors")
    first, fifth = (f"model.diffusion_model.input_blocks.{n}.0." for n in (1, 4))
    weights = load_file(file)
    more = {name.replace(first, fifth): x.clone() for name, x in weights.items() if name.startswith(first)}
    save_file(weights | more, file)
    assert refusal(file, folder) == (
        f"10 are not known ({fifth}emb_layers.1.bias, {fifth}emb_layers.1.weight, {fifth}in_layers.0.bias, ...). "
        "By its names it is a file of SDXL or an older Stable Diffusion."
    )


SDXL_FILE_AS_SD3 = (
    "59 weights are missing (model.diffusion_model.context_embedder.bias, "
    "model.diffusion_model.context_embedder.weight, model.diffusion_model.final_layer.adaLN_modulation.1.bias, ...) "
    "and 212 are not known (model.diffusion_model.input_blocks.0.0.bias (expected "
)


@pytest.mark.parametrize(
    ("of", "given", "said", "family"),
    [
        ("sdxl", "sd3", SDXL_FILE_AS_SD3, "SDXL or an older Stable Diffusion"),
        ("sdxl", "flux", "48 weights are missing (model.diffusion_model.double_blocks.0.", "SDXL"),
        ("sd3", "sdxl", "212 weights are missing (model.diffusion_model.input_blocks.0.0.bias, ", "SD3"),
        ("sd3", "flux", "model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale, ", "SD3"),
        ("flux", "sdxl", "62 are not known (context_embedder.bias (expected ", None),
    ],
)
def test_a_file_of_another_model(of: str, given: str, said: str, family: str | None, tmp_path: Path) -> None:
    make, write, _ = CASES[of]
    file = write(make(tmp_path / of), tmp_path / f"{of}.safetensors")
    folder = CASES[given][0](tmp_path / given)
    message = refusal(file, folder)
    assert said in message
    assert ("By its names" in message) == (family is not None)
    assert family is None or f"it is a file of {family}" in message


@pytest.mark.parametrize(
    ("family", "old", "new", "count"),
    [
        ("sd3", "x_block", "y_block", 24),
        ("sd3", "joint_blocks", "blocks", 42),
        ("sd3", "model.diffusion_model.", "mod.", 59),
        ("sdxl", "input_blocks", "inp_blocks", 52),
        ("flux", "attn.to_q", "attn.query", 4),
    ],
)
def test_renamed_weights_are_shown_with_the_names_expected(
    family: str, old: str, new: str, count: int, tmp_path: Path
) -> None:
    make, write, _ = CASES[family]
    folder = make(tmp_path / "model")
    file = write(folder, tmp_path / "model.safetensors")
    first = min(name for name in load_file(file) if old in name)
    message = refusal(renamed(file, lambda name: name.replace(old, new)), folder)
    known = first.replace(old, "") if old == "model.diffusion_model." else first
    assert f"{count} weights are missing (" in message
    assert f"{count} are not known ({first.replace(old, new)} (expected {known}?)" in message
    assert message.count("(expected ") == 3


def test_on_the_command_line_it_is_one_sentence(tmp_path: Path) -> None:
    file = published.sdxl(tiny.sdxl(tmp_path / "sdxl"), tmp_path / "sdxl.safetensors")
    folder = tiny.sd3(tmp_path / "sd3", card=tiny.SD3_CARD)
    words = ["fuse", "owl", "snail", "--model", f"{file}@{folder}", "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(cli.app, [*words, "--set", "clip=toy:clip", "--set", "segmenter=toy:segmenter"])
    assert done.exit_code == 1, done.output
    assert done.stderr.startswith(f"Error: The weights of {file} do not"), done.stderr
    assert done.stderr.count("\n") == 1


def test_a_single_file_that_is_cut_short(tmp_path: Path) -> None:
    folder = tiny.sd3(tmp_path / "model", card=tiny.SD3_CARD)
    file = published.sd3(folder, tmp_path / "model.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model.safetensors is cut short: \d+ bytes of \d+"):
        models.load(file)


def test_references_with_a_config_part() -> None:
    assert hub.split_single_file("a/b.safetensors@owner/name@main") == (
        Path("a/b.safetensors"),
        "owner/name@main",
    )
    assert hub.split_single_file("a.safetensors") == (Path("a.safetensors"), None)
    assert hub.split_single_file("owner/name@main") is None
    with pytest.raises(InputError, match="not a checkpoint reference"):
        hub.read_card("b.safetensors@two words")
