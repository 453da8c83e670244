"""Reward models published as pytorch_model.bin: the same features, nothing in the file is run, no weight is made up."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.tiny_bin import BIN, INDEX, RunsCode, as_bin
from tests.tiny_dino import dino
from tests.tiny_encoders import birefnet, dino_v1
from tests.tiny_mask2former import mask2former
from tests.tolerance import MODEL, agree
from torch import Tensor

from pixrl import rewards
from pixrl.errors import CheckpointError
from pixrl.hub import Remote, ask, fingerprint
from pixrl.hub import folder as hub_folder
from pixrl.hub_check import Layout, check_folder
from pixrl.rewards.encoders import ClipSimilarity, DinoEncoder
from pixrl.rewards.segmentation import Segmenter, load_back_end
from pixrl.rewards.weights import weight_shards
from pixrl.rewards.zoo.birefnet import BiRefNetForeground
from pixrl.rewards.zoo.mask2former import Mask2FormerDetector

SAFE, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"


def of_clip(folder: Path, images: Tensor) -> list[Tensor]:
    clip = ClipSimilarity(folder, device="cpu")
    return [clip.image_features(images), clip.text_features(["a photo of an owl", "a snail"])]


def of_dino(folder: Path, images: Tensor) -> list[Tensor]:
    return [DinoEncoder(folder, device="cpu").image_features(images)]


def of_segmenter(folder: Path, images: Tensor) -> list[Tensor]:
    return [Segmenter(folder, device="cpu").probabilities(images)]


def of_birefnet(folder: Path, images: Tensor) -> list[Tensor]:
    return [BiRefNetForeground(folder, device="cpu").foreground(images)]


def of_mask2former(folder: Path, images: Tensor) -> list[Tensor]:
    found = Mask2FormerDetector(folder, device="cpu").instances(images[:1])[0]
    return [torch.tensor([one.score for one in found]), *(one.mask_HW for one in found)]


Outputs = Callable[[Path, Tensor], list[Tensor]]
KINDS: Mapping[str, tuple[Callable[[Path], Path], Outputs]] = {
    "clip": (tiny.clip, of_clip),
    "dino_v1": (dino_v1, of_dino),
    "dinov2": (dino, of_dino),
    "segmenter": (tiny.segmenter, of_segmenter),
    "birefnet": (birefnet, of_birefnet),
    "mask2former": (mask2former, of_mask2former),
}
DROPPED = {
    "clip": "text_model.encoder.layers.1.mlp.fc1.bias",
    "dino_v1": "layernorm.weight",
    "dinov2": "encoder.layer.1.mlp.fc1.bias",
    "segmenter": "decode_head.classifier.weight",
}
"""A weight of each whose loss shows in the output, as it is named on the disk."""


@pytest.fixture(scope="module")
def safe(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The safetensors folder of a kind, made once."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = KINDS[kind][0](tmp_path_factory.mktemp("safe") / kind)
        return made[kind]

    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_features_are_those_of_safetensors(
    kind: str, safe: Callable[[str], Path], tmp_path: Path, images: Tensor
) -> None:
    pickled, outputs = as_bin(safe(kind), tmp_path / "bin"), KINDS[kind][1]
    assert not list(pickled.rglob("*.safetensors"))
    pairs = zip(outputs(pickled, images), outputs(safe(kind), images), strict=True)
    assert all(agree(found.float(), expected.float(), MODEL) for found, expected in pairs)  # masks are bool


@pytest.mark.parametrize("kind", ["clip", "dino_v1", "dinov2"])
@pytest.mark.parametrize("form", [{"shards": 3}, {"zipped": False}], ids=["shards", "before torch 1.6"])
def test_other_forms_of_the_file(
    kind: str, form: dict[str, int], safe: Callable[[str], Path], tmp_path: Path, images: Tensor
) -> None:
    pickled = as_bin(safe(kind), tmp_path / "bin", **form)  # type: ignore[arg-type]
    found, expected = (KINDS[kind][1](one, images)[0] for one in (pickled, safe(kind)))
    assert agree(found, expected, MODEL)


def test_buffers_that_old_files_hold(safe: Callable[[str], Path], tmp_path: Path, images: Tensor) -> None:
    """openai/clip-vit-base-patch32 was saved with its position ids."""
    pickled = as_bin(safe("clip"), tmp_path / "bin")
    old = torch.load(pickled / BIN, weights_only=True)
    for tower in ("text_model", "vision_model"):
        old[f"{tower}.embeddings.position_ids"] = torch.arange(32)[None]
    torch.save(old, pickled / BIN)
    assert agree(of_clip(pickled, images)[0], of_clip(safe("clip"), images)[0], MODEL)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_file_holds_beside_tensors_is_never_run(
    kind: str, safe: Callable[[str], Path], tmp_path: Path, images: Tensor, capfd: pytest.CaptureFixture[str]
) -> None:
    pickled = as_bin(safe(kind), tmp_path / "bin")
    torch.save({"weight": torch.ones(1), "extra": RunsCode()}, pickled / BIN)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin .* more than tensors, which is never run"):
        KINDS[kind][1](pickled, images)
    assert "must never be printed" not in capfd.readouterr().out


def test_a_file_that_is_cut_short(safe: Callable[[str], Path], tmp_path: Path, images: Tensor) -> None:
    pickled = as_bin(safe("dinov2"), tmp_path / "bin")
    (pickled / BIN).write_bytes((pickled / BIN).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read as weights.*cut short"):
        of_dino(pickled, images)


def test_a_shard_that_is_missing(safe: Callable[[str], Path], tmp_path: Path, images: Tensor) -> None:
    pickled = as_bin(safe("dinov2"), tmp_path / "bin", shards=2)
    (pickled / "pytorch_model-1-of-2.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-1-of-2\.bin is missing: its index lists it"):
        of_dino(pickled, images)


@pytest.mark.parametrize("kind", ["clip", "dino_v1", "dinov2", "segmenter", "birefnet"])
def test_the_checksum_is_of_the_file_that_is_read(
    kind: str, safe: Callable[[str], Path], tmp_path: Path
) -> None:
    load = {"clip": ClipSimilarity, "segmenter": load_back_end, "birefnet": load_back_end}.get(
        kind, DinoEncoder
    )
    folder = as_bin(safe(kind), tmp_path / "bin")
    (folder / "optimizer.bin").write_bytes(b"never read")
    name = load(folder, device="cpu").provenance["model"]  # type: ignore[operator]
    assert name == f"{folder} ({fingerprint(folder, [folder / BIN])})"
    shutil.copy(safe(kind) / SAFE, folder / SAFE)
    (folder / BIN).write_bytes(b"never read")
    assert (
        load(folder, device="cpu").provenance["model"]  # type: ignore[operator]
        == f"{folder} ({fingerprint(folder, [folder / SAFE])})"
    )


def test_safetensors_come_first_whole_before_shards(tmp_path: Path) -> None:
    """As transformers looks for them, so that the checksum is of what it loads."""
    for name in (BIN, "shard.bin", SAFE, "shard.safetensors"):
        (tmp_path / name).touch()
    for index, shard in ((INDEX, "shard.bin"), (SAFE_INDEX, "shard.safetensors")):
        (tmp_path / index).write_text(json.dumps({"weight_map": {"a": shard}}))
    found = []
    for taken in (SAFE, SAFE_INDEX, BIN, INDEX):
        found.extend(file.name for file in weight_shards(tmp_path))
        (tmp_path / taken).unlink()
    assert found == [SAFE, "shard.safetensors", BIN, "shard.bin"]


@pytest.mark.parametrize("kind", DROPPED)
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
def test_a_missing_weight_is_refused_and_named(
    kind: str, pickled: bool, safe: Callable[[str], Path], tmp_path: Path, images: Tensor
) -> None:
    lacking, outputs = shutil.copytree(safe(kind), tmp_path / "lacking"), KINDS[kind][1]
    weights = load_file(lacking / SAFE)
    del weights[DROPPED[kind]]
    save_file(weights, lacking / SAFE, {"format": "pt"})
    folder = as_bin(lacking, tmp_path / "bin") if pickled else lacking
    last = DROPPED[kind].rpartition(".")[0].rpartition(".")[2]
    with pytest.raises(CheckpointError, match=rf"does not fit: 1 weights are missing \(.*{last}"):
        outputs(folder, images)


def test_a_generator_stays_with_safetensors(safe: Callable[[str], Path], tmp_path: Path) -> None:
    pickled = as_bin(safe("clip"), tmp_path / "bin")
    check_folder(pickled, Layout.REWARD)
    with pytest.raises(
        CheckpointError, match=r"has pytorch_model\.bin, but pickled weights are never loaded"
    ):
        check_folder(pickled, Layout.TRANSFORMERS)
    pipeline = tiny.sd3(tmp_path / "sd3")
    part = pipeline / "text_encoder"
    torch.save(load_file(part / SAFE), part / BIN)
    (part / SAFE).unlink()
    with pytest.raises(
        CheckpointError, match=r"has pytorch_model\.bin, but pickled weights are never loaded"
    ):
        check_folder(pipeline, Layout.PIPELINE)


class FakeHub:
    """`snapshot_download` of one repository; what is asked for is copied into a snapshot, as the hub's cache has it."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository = repository
        self.snapshot = cache / "snapshots" / ("ab" * 20)
        self.downloaded: list[str] = []

    def __call__(self, repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert repo == "openai/clip-vit-base-patch32"
        self.snapshot.mkdir(parents=True, exist_ok=True)
        names = sorted(file.name for file in self.repository.iterdir())
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            shutil.copy(self.repository / name, self.snapshot / name)
            self.downloaded.append(name)
        return str(self.snapshot)

    @property
    def weights(self) -> list[str]:
        return [name for name in self.downloaded if name.endswith((".bin", ".safetensors"))]


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("has_safetensors", [False, True])
def test_the_hub_is_asked_for_one_format(
    shards: int,
    has_safetensors: bool,
    safe: Callable[[str], Path],
    tmp_path: Path,
    images: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    repository = as_bin(safe("clip"), tmp_path / "repository", shards=shards)
    (repository / "tf_model.h5").touch()
    if has_safetensors:
        shutil.copy(safe("clip") / SAFE, repository / SAFE)
    hub = FakeHub(repository, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    reward = rewards.load("clip_t", device="cpu")
    bins = [BIN] if shards == 1 else [f"pytorch_model-{n}-of-2.bin" for n in range(2)]
    assert hub.weights == ([SAFE] if has_safetensors else bins)
    assert "tf_model.h5" not in hub.downloaded
    files = [hub.snapshot / name for name in hub.weights]
    assert reward.provenance["model"].endswith(f"({fingerprint(hub.snapshot, files)})")
    assert reward.provenance["revision"] == hub.snapshot.name
    assert reward.provenance["licence"] == "MIT"


def test_other_loaders_never_fetch_the_file(
    safe: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub(as_bin(safe("clip"), tmp_path / "repository"), tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors weights"):
        hub_folder("openai/clip-vit-base-patch32", Layout.TRANSFORMERS)
    assert not hub.weights
    (hub.repository / BIN).unlink()
    (hub.repository / "pytorch_model-1-of-2.bin").touch()
    message = (
        r"no \.safetensors weights and neither pytorch_model\.bin nor .*It has pytorch_model-1-of-2\.bin\."
    )
    with pytest.raises(CheckpointError, match=message):
        hub_folder("openai/clip-vit-base-patch32", Layout.REWARD)


@pytest.mark.parametrize(
    ("sizes", "total"),
    [
        ({SAFE: 5, BIN: 7, "tf_model.h5": 9}, 5),
        ({BIN: 7, "tf_model.h5": 9, "optimizer.bin": 3}, 7),
        ({"pytorch_model-1-of-2.bin": 7, "pytorch_model-2-of-2.bin": 8}, 15),
    ],
)
def test_the_size_of_a_download(sizes: dict[str, int], total: int, monkeypatch: pytest.MonkeyPatch) -> None:
    siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in sizes.items()]
    info = SimpleNamespace(gated=False, siblings=siblings)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: info)
    assert ask("owner/name") == Remote(total)
