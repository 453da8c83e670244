"""Checkpoint references, cards and half-written folders: every refusal says which file and what to type."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pixrl import cli, hub, hub_check, libraries, models
from pixrl.errors import CheckpointError, InputError, PixrlError


def test_a_toy_name_is_a_folder_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_check, "TOY_ROOT", tmp_path)
    (tmp_path / "sd3").mkdir()
    assert models.resolve("toy:sd3") == tmp_path / "sd3"


def test_an_unknown_toy_name_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"Did you mean 'toy:sd3'.*There are toy:clip, toy:vae.*toy:flux"):
        models.resolve("toy:sd33")


@pytest.mark.parametrize("ref", ["toysd3", "toy:sd4", "./nowhere"])
def test_where_a_generator_is_wanted_only_generators_are_offered(ref: str) -> None:
    for ask in (lambda: models.load(ref), lambda: hub.read_card(ref, hub_check.Layout.PIPELINE)):
        with pytest.raises(PixrlError, match=r"toy:sd3, toy:turbo, toy:flux") as refused:
            ask()
        assert "toy:clip" not in str(refused.value) and "toy:vae" not in str(refused.value)


def test_a_generator_of_the_command_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        cli.app, ["fuse", "owl", "snail", "--model", "toysd3", "--out", str(tmp_path / "x")]
    )
    assert done.exit_code == 2
    assert "Did you mean 'toy:sd3'? Give toy:sd3, toy:turbo, toy:flux, a local folder" in done.stderr


def test_a_toy_checkpoint_that_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_check, "TOY_ROOT", tmp_path)
    with pytest.raises(CheckpointError, match="pixrl toy build --stage sd3"):
        models.resolve("toy:sd3")
    monkeypatch.setattr(libraries, "CHECKOUT", tmp_path)
    with pytest.raises(
        CheckpointError, match="install that again, in a checkout: pip install --force-reinstall"
    ):
        models.resolve("toy:sd3")


def test_a_folder_and_a_hub_id(tmp_path: Path) -> None:
    assert models.resolve(tmp_path) == tmp_path
    assert models.resolve(str(tmp_path)) == tmp_path
    assert models.resolve("stabilityai/sdxl-turbo") == "stabilityai/sdxl-turbo"


@pytest.mark.parametrize("ref", ["/nowhere/at/all", "./missing", Path("missing")])
def test_a_missing_folder(ref: str | Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        models.resolve(ref)


@pytest.mark.parametrize("ref", ["sd3", "a/b/c", "two words/x"])
def test_what_is_no_reference(ref: str) -> None:
    with pytest.raises(InputError, match="not a checkpoint reference"):
        models.resolve(ref)


def test_a_bare_toy_name_is_suggested() -> None:
    with pytest.raises(InputError, match="Did you mean 'toy:sd3'"):
        models.resolve("sd3")


def test_a_hub_id_without_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"hf download nobody/nothing-at-all"):
        models.load("nobody/nothing-at-all")


def test_resolving_imports_no_torch() -> None:
    code = (
        "import sys; from pixrl import models, rewards; models.resolve('a/b'); print('torch' in sys.modules)"
    )
    source = Path(hub.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(source)},
    )
    assert done.stdout.strip() == "False"


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "folder": (lambda p: shutil.rmtree(p / "vae"), r"'vae' \(AutoencoderKL\).*missing"),
    "weights": (
        lambda p: (p / "transformer/diffusion_pytorch_model.safetensors").unlink(),
        r"transformer holds no .safetensors",
    ),
    "truncated": (
        lambda p: _truncate(p / "transformer/diffusion_pytorch_model.safetensors"),
        r"diffusion_pytorch_model.safetensors is cut short: \d+ bytes of \d+",
    ),
    "header": (
        lambda p: (p / "vae/diffusion_pytorch_model.safetensors").write_bytes(
            b"\xff\xff\x00\x00\x00\x00\x00\x00abc"
        ),
        r"vae/diffusion_pytorch_model.safetensors is cut short",
    ),
    "empty": (
        lambda p: (p / "vae/diffusion_pytorch_model.safetensors").write_bytes(b""),
        r"vae/diffusion_pytorch_model.safetensors is cut short: 0 bytes",
    ),
    "config": (lambda p: (p / "text_encoder/config.json").unlink(), r"text_encoder/config.json is missing"),
    "half a config": (
        lambda p: (p / "text_encoder_2/config.json").write_text('{"a": '),
        r"text_encoder_2/config.json is not readable JSON",
    ),
    "tokenizer": (
        lambda p: [f.unlink() for f in (p / "tokenizer_2").iterdir()] and None,
        r"tokenizer_2 holds no tokenizer.json",
    ),
    "scheduler": (
        lambda p: (p / "scheduler/scheduler_config.json").unlink(),
        r"scheduler/scheduler_config.json is missing",
    ),
    "index": (lambda p: (p / "model_index.json").unlink(), r"model_index.json is missing"),
    "class": (
        lambda p: (p / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"})),
        r"KandinskyPipeline, which pixrl has no adapter for\. It loads StableDiffusion3Pipeline, .*"
        r"write its name as _class_name into a copy's model_index\.json and give the copy's folder",
    ),
    "pickle": (
        lambda p: (
            (p / "vae/diffusion_pytorch_model.safetensors").rename(p / "vae/diffusion_pytorch_model.bin")
            and None
        ),
        r"pickled weights are never loaded",
    ),
    "shard": (
        lambda p: (
            (p / "vae/model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "model-1.safetensors"}}'
            )
            and None
        ),
        r"model-1.safetensors is missing: its index lists it",
    ),
    "card": (
        lambda p: (p / "pixrl.json").write_text('{"steps": "many"}') and None,
        r"entry 'steps' is wrong",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_half_written_checkpoint(damage: str, sd3_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(sd3_folder, folder)
    act, message = DAMAGE[damage]
    act(folder)
    with pytest.raises(CheckpointError, match=message):
        models.load(folder)


def test_the_remedy_names_the_toy_stage(
    sd3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_check, "TOY_ROOT", tmp_path)
    shutil.copytree(sd3_folder, tmp_path / "sd3")
    _truncate(tmp_path / "sd3/vae/diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match="Type: pixrl toy build --stage sd3"):
        models.load("toy:sd3")


def test_t5_may_be_left_out_of_a_published_folder(sd3_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(sd3_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder_3"], index["tokenizer_3"] = (
        ["transformers", "T5EncoderModel"],
        ["transformers", "T5Tokenizer"],
    )
    (folder / "model_index.json").write_text(json.dumps(index))
    assert "text_encoder_3" not in hub_check.components(folder)
    assert len(models.load(folder).encode(["owl"])) == 1


def test_a_card_keeps_what_it_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "pixrl.json").write_text(
        json.dumps(
            {"steps": 3, "presence": {"threshold": 0.7, "balance": 0.1, "quantile": 0.05}, "note": "x"}
        )
    )
    card = models.read_card(tmp_path)
    assert card.steps == 3
    assert card.exemplar_prompt == "A photo of {concept}"
    assert card.presence is not None
    assert (card.presence.threshold, card.presence.balance) == (0.7, 0.1)
    assert card.presence.model_extra == {"quantile": 0.05}
    assert card.model_extra == {"note": "x"}


def test_without_a_card_everything_is_open(tmp_path: Path) -> None:
    assert models.read_card(tmp_path) == hub.Card()
    assert models.read_card("stabilityai/sdxl-turbo") == hub.Card()


def test_arguments_win_over_the_card_and_the_card_over_the_class(sd3_folder: Path) -> None:
    assert models.load(sd3_folder).settings.steps == 4
    assert models.load(sd3_folder, steps=7, guidance=2.0).settings.steps == 7
    assert models.load(sd3_folder, steps=7, guidance=2.0).settings.guidance == 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "sd33"}, "Did you mean 'sd3'"),
        ({"device": "gpu"}, "Unknown device 'gpu'"),
        ({"dtype": "half"}, "Unknown dtype 'half'"),
        ({"device": "cpu", "dtype": "float16"}, "needs a GPU"),
        ({"resolution": 33}, "multiple of 8"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_wrong_arguments(sd3_folder: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        models.load(sd3_folder, **options)  # type: ignore[arg-type]


def test_the_fingerprint_follows_the_weights(sd3_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(sd3_folder, folder)
    assert hub.fingerprint(folder) == hub.fingerprint(sd3_folder)
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    assert hub.fingerprint(folder) != hub.fingerprint(sd3_folder)


def test_the_hub_cache_names_its_blobs_by_hash(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"never read")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.safetensors").symlink_to(blob)
    before = hub.fingerprint(snapshot)
    blob.write_bytes(b"other content")
    assert hub.fingerprint(snapshot) == before
