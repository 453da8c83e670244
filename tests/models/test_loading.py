"""What is loaded is what was published, and what does not fit is refused in a sentence that says what to do."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.models.test_sd3 import diffusers_pictures
from tests.tolerance import PICTURE, agree

from pixrl import hub, hub_check, models
from pixrl.errors import CheckpointError, InputError
from pixrl.models.flux import FluxPolicy, Preset
from pixrl.models.sd3 import SD3Policy

WEIGHTS = "diffusion_pytorch_model.safetensors"
OWL, SNAIL = "a photo of an owl", "a photo of a snail"


@pytest.fixture
def copy(sd3_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd3_folder, tmp_path / "copy"))


COMMIT = "c" * 40


def cached(
    folder: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    refs: dict[str, str],
    repo: str = "owner/some-name",
) -> Path:
    """A copy of a folder as the hub's cache in `place` holds it; the hub itself is not asked."""
    within = place / f"models--{repo.replace('/', '--')}"
    found = Path(shutil.copytree(folder, within / "snapshots" / COMMIT))
    (within / "refs").mkdir()
    for name, commit in refs.items():
        (within / "refs" / name).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return found


def rewrite(file: Path, change: object) -> None:
    """Saves a file's weights under other names; None drops one."""
    weights = load_file(file)
    named = {change(name): x for name, x in weights.items()}  # type: ignore[operator]
    save_file({name: x for name, x in named.items() if name is not None}, file)


def test_missing_weights_are_never_made_up(copy: Path) -> None:
    rewrite(copy / "transformer" / WEIGHTS, lambda n: None if "blocks.1.attn.to_q" in n else n)
    with pytest.raises(CheckpointError, match=r"transformer do not fit a SD3Transformer2DModel.*2 weights are missing "
                       r"\(transformer_blocks.1.attn.to_q.bias, transformer_blocks.1.attn.to_q.weight\)"):  # fmt: skip
        models.load(copy)


def test_unknown_weights_are_named_with_the_nearest_expected_ones(copy: Path) -> None:
    rewrite(copy / "transformer" / WEIGHTS, lambda n: n.replace("attn.to_q", "attention.query"))
    with pytest.raises(CheckpointError) as refused:
        models.load(copy)
    message = str(refused.value)
    assert "4 weights are missing" in message
    assert "4 are not known (transformer_blocks.0.attention.query.bias" in message
    assert "(expected transformer_blocks.0.attn.to_q.bias?)" in message
    assert message.count("expected") == 3


def test_more_layers_than_the_config_says(copy: Path) -> None:
    config = json.loads((copy / "text_encoder/config.json").read_text())
    (copy / "text_encoder/config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match=r"text_encoder do not fit .*16 are not known"):
        models.load(copy)


def test_weights_of_another_width(copy: Path) -> None:
    config = json.loads((copy / "transformer/config.json").read_text())
    (copy / "transformer/config.json").write_text(json.dumps(config | {"caption_projection_dim": 32}))
    with pytest.raises(CheckpointError) as refused:
        models.load(copy)
    assert str(refused.value) == (
        f"The weights of {copy}/transformer do not fit a SD3Transformer2DModel of its config.json: 2 weights have "
        "another shape (context_embedder.bias is [16], expected [32], context_embedder.weight is [16, 32], expected "
        "[32, 32]). Config and weights belong to different models: take both from the same one. Save or download it "
        "again, for example: hf download OWNER/NAME --local-dir FOLDER"
    )


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_text_encoders_of_another_width(part: str, sdxl_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sdxl_folder, tmp_path / "copy"))
    config = json.loads((folder / part / "config.json").read_text())
    (folder / part / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(
        CheckpointError,
        match=r"6 weights have another shape \(.*layers\.0\.mlp\.fc1\.bias is \[32\], expected \[48\]",
    ) as refused:
        models.load(folder)
    assert "ignore_mismatched_sizes" not in str(refused.value)


def test_a_config_that_describes_no_model(copy: Path) -> None:
    config = json.loads((copy / "transformer/config.json").read_text())
    (copy / "transformer/config.json").write_text(json.dumps(config | {"num_layers": "two"}))
    with pytest.raises(
        CheckpointError, match=r"transformer/config\.json does not describe a SD3Transformer2DModel"
    ):
        models.load(copy)


def test_a_part_of_another_class(copy: Path) -> None:
    shutil.rmtree(copy / "vae")
    shutil.copytree(copy / "transformer", copy / "vae")
    with pytest.raises(
        CheckpointError, match=r"that of a SD3Transformer2DModel, but .*'vae' is a AutoencoderKL"
    ):
        models.load(copy)


def test_a_single_model_is_no_generator(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"is a CLIPModel, no image generator.*stable-diffusion-3.5-medium"
    ):
        models.load(tiny.clip(tmp_path / "clip"))


@pytest.mark.parametrize("protocol", ["zip", "bare"])
def test_a_pickle_under_the_name_of_safetensors(copy: Path, protocol: str) -> None:
    file = copy / "vae" / WEIGHTS
    torch.save({"weight": torch.zeros(2000)}, file, _use_new_zipfile_serialization=protocol == "zip")
    with pytest.raises(CheckpointError, match=r"vae.*is a pickle \(torch.save\).*never loaded"):
        models.load(copy)


def test_a_shard_that_is_missing_or_cut_short(tmp_path: Path) -> None:
    folder = tiny.sd3(tmp_path / "model", card=tiny.SD3_CARD)
    sharded = models.load(folder, device="cpu", dtype="float32")
    assert isinstance(sharded, SD3Policy)
    expected = sharded.sample(sharded.encode([OWL]), [1])
    (folder / "transformer" / WEIGHTS).unlink()
    sharded.pipeline.transformer.save_pretrained(folder / "transformer", max_shard_size="20KB")
    shards = sorted((folder / "transformer").glob("*-of-*.safetensors"))
    assert len(shards) > 2
    again = models.load(folder, device="cpu", dtype="float32")
    assert agree(again.sample(again.encode([OWL]), [1]), expected, PICTURE)
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[:-20])
    with pytest.raises(CheckpointError, match=rf"{shards[1].name} is cut short"):
        models.load(folder)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=rf"{shards[1].name} is missing: its index lists it"):
        models.load(folder)


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards_without_their_index(variant: str, tmp_path: Path) -> None:
    folder = tiny.sd3(tmp_path / "model", card=tiny.SD3_CARD)
    policy = models.load(folder, device="cpu", dtype="float32")
    assert isinstance(policy, SD3Policy)
    expected = policy.sample(policy.encode([OWL]), [1])
    part = folder / "transformer"
    (part / WEIGHTS).unlink()
    policy.pipeline.transformer.save_pretrained(
        part, max_shard_size="20KB", variant=variant.removeprefix(".") or None
    )
    again = models.load(folder, device="cpu", dtype="float32")
    assert agree(again.sample(again.encode([OWL]), [1]), expected, PICTURE)
    index = f"diffusion_pytorch_model.safetensors.index{variant}.json"
    (part / index).unlink()
    shards = sorted(part.glob("*-of-*.safetensors"))
    with pytest.raises(CheckpointError) as refused:
        models.load(folder)
    assert str(refused.value) == (
        f"{part} holds {len(shards)} shards ({shards[0].name}, ...), but {index}, which says what lies in which, is "
        "missing. Save or download it again, for example: hf download OWNER/NAME --local-dir FOLDER"
    )


@pytest.mark.parametrize(
    ("main", "pinned"), [(COMMIT, ""), ("d" * 40, f" --revision {COMMIT}"), (None, f" --revision {COMMIT}")]
)
def test_what_is_broken_in_the_hubs_cache_is_mended_by_a_command(
    main: str | None, pinned: str, sd3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cached(sd3_folder, tmp_path, monkeypatch, {} if main is None else {"main": main})
    file = folder / "transformer" / WEIGHTS
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    command = "Download it again: hf download owner/some-name{}" + pinned + " --force-download"
    said = command.format(f" transformer/{WEIGHTS}")
    with pytest.raises(CheckpointError, match=rf"is cut short: \d+ bytes of \d+\. {re.escape(said)}$"):
        models.load(folder)
    file.rename(file.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    said = command.format(" transformer/diffusion_pytorch_model.safetensors.index.json")
    with pytest.raises(CheckpointError, match=rf"is missing\. {re.escape(said)}$"):
        models.load(folder)
    shutil.rmtree(folder / "transformer")
    said = command.format(" --include 'transformer/*'")
    with pytest.raises(CheckpointError, match=rf"transformer is missing\. {re.escape(said)}$"):
        models.load(folder)
    assert hub_check.remedy(folder) == command.format("")


def test_dual_attention_equals_the_published_pipeline(tmp_path: Path) -> None:
    policy = models.load(tiny.sd3(tmp_path, card=tiny.SD3_CARD, dual=True), device="cpu", dtype="float32")
    assert isinstance(policy, SD3Policy)
    assert any("attn2" in name for name, _ in policy.denoiser.named_parameters())
    ours = policy.sample(policy.encode([OWL, SNAIL]), [1, 2])
    assert agree(ours, diffusers_pictures(policy, [OWL, SNAIL], [1, 2], 0.0), PICTURE)


def test_three_text_encoders_with_and_without_t5(tmp_path: Path) -> None:
    folder = tiny.sd3(tmp_path / "model", card=tiny.SD3_CARD | {"max_sequence_length": 8}, with_t5=True)
    three = models.load(folder).encode([OWL]).tokens_BLD
    two = models.load(folder, t5=False)
    assert isinstance(two, SD3Policy)
    assert two.pipeline.text_encoder_3 is None
    rows = two.encode([OWL]).tokens_BLD
    assert rows.shape == three.shape == (1, tiny.TEXT_LENGTH + 8, 48)
    assert torch.equal(rows[:, : tiny.TEXT_LENGTH], three[:, : tiny.TEXT_LENGTH])
    assert rows[:, tiny.TEXT_LENGTH :].abs().max() == 0 < three[:, tiny.TEXT_LENGTH :].abs().max()


def test_leaving_t5_out_where_there_is_none(sd3_folder: Path, sdxl_folder: Path) -> None:
    with pytest.raises(InputError, match="no T5 encoder"):
        models.load(sd3_folder, t5=False)
    with pytest.raises(InputError, match="no SD3 checkpoint"):
        models.load(sdxl_folder, t5=False)


def test_schnell_takes_no_guidance_and_dev_does(tmp_path: Path) -> None:
    schnell = tiny.flux(tmp_path / "schnell")
    (schnell / "pixrl.json").unlink()
    policy = models.load(schnell, resolution=32)
    assert isinstance(policy, FluxPolicy)
    assert (policy.settings.steps, policy.settings.guidance, policy.text_length) == (4, 0.0, 256)
    with pytest.raises(InputError, match=r"guidance 3.5 has no effect.*schnell"):
        models.load(schnell, guidance=3.5)
    dev = tiny.flux(tmp_path / "dev", guidance_embeds=True)
    (dev / "pixrl.json").unlink()
    policy = models.load(dev, resolution=32)
    assert isinstance(policy, FluxPolicy)
    assert (policy.settings.steps, policy.settings.guidance, policy.text_length) == (25, 4.0, 512)
    assert policy.preset is Preset.UNO


def test_a_kontext_folder_places_references_as_kontext(tmp_path: Path) -> None:
    folder = tiny.flux(tmp_path, guidance_embeds=True)
    index = json.loads((folder / "model_index.json").read_text())
    named = index | {
        "_class_name": "FluxKontextPipeline",
        "image_encoder": [None, None],
        "feature_extractor": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(named))
    policy = models.load(folder)
    assert isinstance(policy, FluxPolicy)
    assert policy.preset is Preset.KONTEXT
    shown = policy.with_references(policy.encode(["a cat"]), [torch.rand(1, 3, 32, 32)])
    assert policy.sample(shown, [1]).shape == (1, 3, 32, 32)


def test_the_base_model_of_sdxl_is_told_by_its_scheduler(sdxl_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sdxl_folder, tmp_path / "base"))
    (folder / "pixrl.json").unlink()
    scheduler = folder / "scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"timestep_spacing": "leading"}))
    settings = models.load(folder).settings
    assert (settings.steps, settings.guidance, settings.resolution) == (50, 5.0, 1024)


def hub_error(kind: type[hub_errors.HfHubHTTPError], status: int) -> hub_errors.HfHubHTTPError:
    request = httpx2.Request("GET", "https://huggingface.co/api/models/owner/name")
    return kind(
        "Access to model owner/name is restricted.", response=httpx2.Response(status, request=request)
    )


@pytest.mark.parametrize(
    ("kind", "token", "message"),
    [
        (hub_errors.GatedRepoError, None, r"gated, and no token is set: accept its licence.*hf auth login"),
        (
            hub_errors.GatedRepoError,
            "hf_x",
            r"gated, and your token has no access: accept its licence at https",
        ),
        (
            hub_errors.RepositoryNotFoundError,
            None,
            r"no repository 'owner/name'.*If it is private, give a token",
        ),
        (hub_errors.RevisionNotFoundError, None, r"no revision 'v9'.*commits/main"),
    ],
)
def test_the_hub_says_no(
    kind: type[hub_errors.HfHubHTTPError], token: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def refuse(repo: str, **given: object) -> str:
        seen.update(given, repo=repo)
        try:
            raise hub_error(kind, 401)
        except hub_errors.HfHubHTTPError as error:
            raise OSError("Cannot load model owner/name") from error

    monkeypatch.setattr("diffusers.DiffusionPipeline.download", refuse)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    with pytest.raises(CheckpointError, match=message):
        models.load("owner/name@v9")
    assert (seen["repo"], seen["revision"]) == ("owner/name", "v9")


def test_offline_mode_names_itself_and_the_pinned_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointError, match=r"HF_HUB_OFFLINE is set.*hf download nobody/nothing --revision v1"
    ):
        models.load("nobody/nothing@v1")


def test_no_connection_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoRoute(hub_errors.HTTPError):
        """As the hub's transport raises it: no OSError."""

    def unreachable(*_: object, **__: object) -> str:
        raise NoRoute("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", unreachable)
    for reach in (hub.ask, hub.fetch_pipeline, lambda ref: hub.fetch_files(ref, ["*"])):
        with pytest.raises(CheckpointError, match=r"Name or service not known.*hf download owner/name"):
            reach("owner/name")


def test_a_pinned_revision_comes_from_the_cache(
    sd3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cached(sd3_folder, tmp_path, monkeypatch, {"v1": COMMIT}, repo="owner/name")
    assert hub.cached_folder("owner/name@v1") == folder
    assert hub.cached_folder("owner/name@v2") is None
    assert hub.fetch_files("owner/name@v1", ["*"]) == folder
    for revision in ("v1", COMMIT):
        assert hub.fetch_pipeline(f"owner/name@{revision}") == folder
        assert models.load(f"owner/name@{revision}").name == f"owner/name@{revision}"
    for ref in ("owner/name", "owner/name@v2"):  # another revision than the one in the cache
        with pytest.raises(
            CheckpointError, match="HF_HUB_OFFLINE is set, and the cache does not hold all of it"
        ):
            hub.fetch_pipeline(ref)


PIPELINE_FILES = {
    "model_index.json": 1,
    "sd_xl_base_1.0.safetensors": 7000,  # the whole pipeline in one file
    "text_encoders/clip_g.safetensors": 1400,  # in no part's folder
    "unet/config.json": 1,
    "unet/diffusion_pytorch_model-00001-of-00002.safetensors": 300,
    "unet/diffusion_pytorch_model-00002-of-00002.safetensors": 200,
    "unet/diffusion_pytorch_model.fp16.safetensors": 250,
    "unet/diffusion_pytorch_model.bin": 500,
    "vae/config.json": 1,
    "vae/diffusion_pytorch_model.fp16.safetensors": 30,  # the one variant that there is
}
MODEL_FILES = {
    "config.json": 1,
    "model.safetensors": 400,
    "model.fp16.safetensors": 200,
    "onnx/model.safetensors": 400,
    "pytorch_model.bin": 400,
}


@pytest.mark.parametrize(
    ("files", "size"),
    [
        (PIPELINE_FILES, 530),
        (MODEL_FILES, 400),
        ({"pytorch_model.bin": 70, "pytorch_model.fp16.bin": 35}, 70),
        ({"other.safetensors": 5}, 5),
        ({"README.md": 9}, 0),
    ],
)
def test_the_size_of_a_download_counts_what_is_downloaded(
    files: dict[str, int], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    siblings = [SimpleNamespace(rfilename=name, size=bytes_) for name, bytes_ in files.items()]
    info = SimpleNamespace(gated=False, siblings=siblings)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: info)
    assert hub.ask("owner/name").weights == size
