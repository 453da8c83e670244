"""What is loaded is what was published, and what does not fit is refused in a sentence that says what to do."""

import json
import shutil
from pathlib import Path

import httpx2
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.models.test_sd3 import diffusers_pictures

from pixrl import hub_fetch, models
from pixrl.errors import CheckpointError, InputError
from pixrl.models.flux import FluxPolicy, Preset
from pixrl.models.sd3 import SD3Policy

WEIGHTS = "diffusion_pytorch_model.safetensors"
OWL, SNAIL = "a photo of an owl", "a photo of a snail"


@pytest.fixture
def copy(sd3_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd3_folder, tmp_path / "copy"))


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
    with pytest.raises(CheckpointError, match="transformer"):
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
    sharded = models.load(folder)
    assert isinstance(sharded, SD3Policy)
    expected = sharded.sample(sharded.encode([OWL]), [1])
    (folder / "transformer" / WEIGHTS).unlink()
    sharded.pipeline.transformer.save_pretrained(folder / "transformer", max_shard_size="20KB")
    shards = sorted((folder / "transformer").glob("*-of-*.safetensors"))
    assert len(shards) > 2
    again = models.load(folder)
    assert torch.equal(again.sample(again.encode([OWL]), [1]), expected)
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[:-20])
    with pytest.raises(CheckpointError, match=rf"{shards[1].name} is cut short"):
        models.load(folder)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=rf"{shards[1].name} is missing: its index lists it"):
        models.load(folder)


def test_dual_attention_equals_the_published_pipeline(tmp_path: Path) -> None:
    policy = models.load(tiny.sd3(tmp_path, card=tiny.SD3_CARD, dual=True), device="cpu", dtype="float32")
    assert isinstance(policy, SD3Policy)
    assert any("attn2" in name for name, _ in policy.transformer.named_parameters())
    ours = policy.sample(policy.encode([OWL, SNAIL]), [1, 2])
    assert torch.allclose(ours, diffusers_pictures(policy, [OWL, SNAIL], [1, 2], 0.0), atol=2e-4)


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
    monkeypatch.setattr(hub_fetch, "has_token", lambda: token is not None)
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
    for reach in (hub_fetch.ask, hub_fetch.fetch_pipeline, lambda ref: hub_fetch.fetch_files(ref, ["*"])):
        with pytest.raises(CheckpointError, match=r"Name or service not known.*hf download owner/name"):
            reach("owner/name")


def test_a_pinned_revision_comes_from_the_cache(
    sd3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "c" * 40
    repo = tmp_path / "models--owner--name"
    shutil.copytree(sd3_folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "v1").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub_fetch.cached_folder("owner/name@v1") == repo / "snapshots" / commit
    assert hub_fetch.cached_folder("owner/name@v2") is None
    assert hub_fetch.fetch_files("owner/name@v1", ["*"]) == repo / "snapshots" / commit
