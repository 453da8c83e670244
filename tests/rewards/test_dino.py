"""The identity reward: the cosine of cut-out subjects, and a reason wherever there is none."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.tiny_bin import as_bin
from tests.tiny_dino import dino
from tests.tiny_encoders import dino_v1
from tests.tolerance import MODEL, agree, rounding
from torch import Tensor
from transformers import (
    AutoModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from pixrl import rewards
from pixrl.errors import CheckpointError, ConfigError
from pixrl.rewards.dino import DinoSegReward
from pixrl.rewards.encoders import DinoEncoder
from pixrl.rewards.references import FeatureCache, references_of
from pixrl.rewards.segmentation import Foreground, Segmenter
from pixrl.types import RewardBatch, Scores


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dino(tmp_path_factory.mktemp("tiny") / "dino")


@pytest.fixture(scope="module")
def encoder(dino_folder: Path) -> DinoEncoder:
    return DinoEncoder(dino_folder, device="cpu")


def left_half(images: Tensor) -> Tensor:
    """A foreground by rule: the left half of every picture that is not black."""
    masks = torch.zeros(len(images), *images.shape[-2:])
    masks[..., : images.shape[-1] // 2] = 1
    return masks * (images.amax(dim=(1, 2, 3)) > 0).float().view(-1, 1, 1)


def reward(folder: Path, **options: object) -> DinoSegReward:
    made = DinoSegReward(folder, device="cpu", **{"segmenter": left_half, **options})  # type: ignore[arg-type]
    return made


def score(made: DinoSegReward, images: Tensor, *references: object, **more: object) -> Scores:
    metadata = [{"reference": reference, **more} for reference in references]
    return made.score(RewardBatch(images, ["x"] * len(images), metadata))


def cut(images: Tensor) -> Tensor:
    return Foreground.composite(images, left_half(images))


def test_both_sides_are_cut_out(dino_folder: Path, encoder: DinoEncoder, images: Tensor) -> None:
    scores = score(reward(dino_folder), images[:2], images[2], images[3])
    ours, theirs = (encoder.image_features(cut(part)) for part in (images[:2], images[2:4]))
    assert agree(scores.values_B, (ours * theirs).sum(dim=1), MODEL)
    assert scores.reasons == (None, None)


def test_what_surrounds_the_subject_does_not_count(dino_folder: Path, images: Tensor) -> None:
    changed = images.clone()
    changed[..., 16:] = torch.rand(5, 3, 32, 16, generator=torch.Generator().manual_seed(1)).clamp_min(0.01)
    made = reward(dino_folder)
    assert agree(score(made, changed, *images).values_B, torch.ones(5), MODEL)
    whole = reward(dino_folder, mask="none", segmenter=None)
    assert (score(whole, changed, *images).values_B < 1 - 2 * rounding(torch.float32, MODEL)).all()
    assert agree(score(whole, images, *images).values_B, torch.ones(5), MODEL)


def test_the_reference_alone(dino_folder: Path, encoder: DinoEncoder, images: Tensor) -> None:
    scores = score(reward(dino_folder, mask="reference"), images[:1], images[2])
    expected = encoder.image_features(images[:1]) @ encoder.image_features(cut(images[2:3])).T
    assert agree(scores.values_B, expected.flatten(), MODEL)


def test_all_references_or_the_first(dino_folder: Path, images: Tensor) -> None:
    made, first = reward(dino_folder), reward(dino_folder, references="first")
    each = [score(made, images[:1], images[k]).values_B for k in (1, 2, 3)]
    for several in (images[1:4], list(images[1:4])):
        assert agree(score(made, images[:1], several).values_B, sum(each) / 3, MODEL)
        assert agree(score(first, images[:1], several).values_B, each[0], MODEL)


def test_references_of_different_sizes(dino_folder: Path, images: Tensor) -> None:
    wide = torch.nn.functional.interpolate(images[1:2], (40, 60))[0]
    scores = score(reward(dino_folder), images[:1], [images[1], wide])
    assert scores.values_B.isfinite().all()


def test_no_subject_is_a_failure_with_its_reason(dino_folder: Path, images: Tensor) -> None:
    black = torch.zeros(3, 32, 32)
    made = reward(dino_folder)
    scores = score(made, torch.stack([black, images[0], images[0]]), images[1], black, [black, images[1]])
    assert scores.reasons == (
        "no subject found in the picture",
        "no subject found in the reference",
        None,
    )
    assert scores.values_B.isnan().tolist() == [True, True, False]
    assert agree(scores.values_B[2], score(made, images[:1], images[1]).values_B[0], MODEL)


def test_references_that_are_left_out_are_named(dino_folder: Path, images: Tensor) -> None:
    black = torch.zeros(3, 32, 32)
    made = reward(dino_folder)
    assert made.unused_references({"reference": [images[0], black, images[1], black]}) == [2, 4]
    assert made.unused_references({"reference": [images[0]]}) == []
    assert made.unused_references({}) == []
    first = reward(dino_folder, references="first")
    assert first.unused_references({"reference": [images[0], black]}) == []  # it is not compared


@pytest.mark.parametrize("given", [None, "a.png", [], ["a.png"], torch.zeros(3), 3])
def test_no_reference_is_a_failure(given: object, dino_folder: Path, images: Tensor) -> None:
    scores = score(reward(dino_folder), images[:1], given)
    assert scores.values_B.isnan().all()
    assert scores.reasons == ("no reference picture in the metadata (under 'reference')",)
    assert reward(dino_folder).score(RewardBatch(images, ["x"] * 5)).values_B.isnan().all()


def test_a_broken_picture(dino_folder: Path, images: Tensor) -> None:
    images = images.clone()
    images[1, 0, 0, 0] = torch.nan
    scores = score(reward(dino_folder), images[:2], images[2], images[2])
    assert scores.reasons == (None, "the picture is not finite")


def test_references_are_encoded_once(dino_folder: Path, images: Tensor) -> None:
    made, calls = reward(dino_folder), []
    original = made.encoder.image_features
    made.encoder.image_features = lambda batch: calls.append(len(batch)) or original(batch)  # type: ignore
    first = score(made, images[:4], *[images[4]] * 4)
    again = score(made, images[:4], *[images[4].clone()] * 4)
    assert calls == [4, 1, 4]
    assert torch.equal(first.values_B, again.values_B)


def test_a_group_asks_for_its_references_once(dino_folder: Path, images: Tensor) -> None:
    asked: list[str] = []

    class Counted(dict[str, object]):
        def get(self, key: str, default: object = None) -> object:
            asked.append(key)
            return super().get(key, default)

    made = reward(dino_folder)
    known = [Counted(reference=[images[4], images[3]]), Counted(reference=images[2])]
    scores = score_of(made, images, [known[0], known[1], known[0], known[0], known[1]])
    assert asked.count("reference") == 2
    alone = torch.cat([score_of(made, images[k : k + 1], [known[k in (1, 4)]]).values_B for k in range(5)])
    assert agree(scores.values_B, alone, MODEL)


def score_of(made: DinoSegReward, images: Tensor, metadata: Sequence[Mapping[str, object]]) -> Scores:
    return made.score(RewardBatch(images, ["x"] * len(images), metadata))


def test_the_cache_reads_a_tensor_once_and_again_when_it_was_written_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pixrl.rewards import references

    read: list[int] = []
    original = references._content
    monkeypatch.setattr(references, "_content", lambda image: read.append(1) or original(image))  # type: ignore
    cache, picture = FeatureCache(), torch.rand(3, 4, 4)
    stack = torch.rand(2, 3, 4, 4)
    made: list[int] = []

    def ask(image: Tensor) -> None:
        cache.get(image, "x", lambda: made.append(1) or torch.zeros(1))  # type: ignore[func-returns-value]

    for _ in range(3):
        ask(picture[None])  # a new view of it each time, as `references_of` makes
        for view in stack.split(1):
            ask(view)
    assert len(read) == 3 and len(made) == 3
    picture.zero_()
    ask(picture[None])
    assert len(read) == 4 and len(made) == 4
    with torch.inference_mode():
        unseen = torch.rand(1, 3, 4, 4)
        ask(unseen)
        unseen.fill_(0.5)  # nothing counts this
        ask(unseen)
    assert len(made) == 6


def test_the_cache_is_bounded_and_knows_pictures_apart() -> None:
    cache, pictures = FeatureCache(limit=2), torch.rand(3, 1, 3, 2, 4)
    made = []
    for picture in (*pictures, pictures[2], pictures[0], pictures[2].reshape(1, 3, 4, 2)):
        cache.get(picture, "x", lambda: made.append(1) or torch.zeros(1))  # type: ignore[func-returns-value]
    assert len(made) == 5
    assert len(cache._rows) == 2


def test_references_as_lists_and_stacks() -> None:
    assert [list(p.shape) for p in references_of({"reference": torch.zeros(2, 3, 4, 5)})] == [
        [1, 3, 4, 5]
    ] * 2
    mixed = references_of({"reference": (torch.zeros(3, 4, 5), torch.zeros(2, 3, 6, 6))})
    assert [list(p.shape) for p in mixed] == [[1, 3, 4, 5], [1, 3, 6, 6], [1, 3, 6, 6]]
    assert references_of({}) == []


def test_a_class_region_is_that_class(dino_folder: Path, segmenter_folder: Path, images: Tensor) -> None:
    made = reward(dino_folder, segmenter=segmenter_folder, region="class")
    segmenter = Segmenter(segmenter_folder, device="cpu")
    expected = segmenter.probabilities(images)[:, tiny.KINDS.index("owl")]
    assert agree(segmenter.class_masks(images, ["owl"] * 5), expected, MODEL)
    assert not segmenter.class_masks(images, ["dog"] * 5).any()
    bare = score(made, images[:1], images[1])
    assert bare.reasons == ("no class in the metadata",)
    unknown = score(made, images[:1], images[1], **{"class": "owk"})
    assert unknown.reasons == ("the segmenter knows no 'owk'. Did you mean 'owl'?",)
    known = score(made, images[:1], images[1], **{"class": "owl"})
    assert known.reasons[0] in (None, "no owl found in the picture", "no owl found in the reference")


def test_provenance(dino_folder: Path, segmenter_folder: Path) -> None:
    made = rewards.load("dino_seg", model=dino_folder, segmenter=segmenter_folder, device="cpu")
    assert isinstance(made, DinoSegReward)
    assert made.provenance["model"].startswith(str(dino_folder))
    assert made.provenance["segmenter"].startswith(str(segmenter_folder))
    assert made.provenance["background"] == "(1.0, 1.0, 1.0)"
    whole = reward(dino_folder, mask="none", segmenter=None)
    assert "segmenter" not in whole.provenance
    assert whole.provenance["mask"] == "none"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segmenter": None}, "mask both needs a segmenter, for example segmenter: toy:segmenter"),
        ({"mask": "none"}, "segmenter would have no effect"),
        ({"mask": "none", "segmenter": None, "background": (0, 0, 0)}, "background would have no effect"),
        ({"mask": "none", "segmenter": None, "region": "class"}, "region would have no effect"),
        ({"mask": "boht"}, "unknown mask 'boht'. Did you mean 'both'? Use both, reference, none."),
        ({"references": "one"}, "Use all, first."),
        ({"region": "object"}, "Use foreground, class."),
        ({"region": "class"}, "needs a segmentation checkpoint"),
        ({"subject": 1}, "would cut out all of them together. Take region: class"),
    ],
)
def test_contradicting_options(options: dict[str, object], message: str, dino_folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        reward(dino_folder, **options)
    assert message in str(caught.value)


def with_registers(folder: Path) -> Path:
    """dinov2_with_registers: four more tokens after the first."""
    dino(folder)
    (folder / "model.safetensors").unlink()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    config = Dinov2WithRegistersConfig(**sizes, image_size=28, patch_size=7, num_register_tokens=4)
    Dinov2WithRegistersModel(config).save_pretrained(folder)
    return folder


def dinov3(folder: Path) -> Path:
    """dinov3_vit."""
    dino(folder)
    (folder / "model.safetensors").unlink()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = DINOv3ViTConfig(**sizes, image_size=28, patch_size=7, num_register_tokens=4)
    DINOv3ViTModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("make", [dino, with_registers, dinov3])
def test_the_features_are_the_class_token(
    make: Callable[[Path], Path], tmp_path: Path, images: Tensor
) -> None:
    """What transformers calls the pooled output, in each kind of folder that is taken, safetensors or not."""
    folder = make(tmp_path / "safe")
    encoder = DinoEncoder(folder, device="cpu")
    with torch.no_grad():
        pooled = AutoModel.from_pretrained(folder)(pixel_values=encoder.preprocess(images)).pooler_output
    expected = torch.nn.functional.normalize(pooled, dim=-1)
    assert agree(encoder.image_features(images), expected, MODEL)
    pickled = DinoEncoder(as_bin(folder, tmp_path / "bin"), device="cpu")
    assert agree(pickled.image_features(images), encoder.image_features(images), MODEL)


@pytest.mark.parametrize("make", [tiny.clip, tiny.segmenter])
def test_another_encoder_is_refused_when_it_is_loaded(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path)
    kind = "clip" if make is tiny.clip else "segformer"
    allowed = "dinov2, dinov2_with_registers, dinov3_vit, vit, such as facebook/dinov2-base"
    for load in (
        lambda: DinoEncoder(folder, device="cpu"),
        lambda: rewards.load("dino", model=folder, device="cpu"),
    ):
        with pytest.raises(
            CheckpointError, match=f"holds a '{kind}' model; DINO features need one of {allowed}"
        ):
            load()


@pytest.mark.parametrize("make", [dino, with_registers, dinov3])
def test_the_token_of_training_alone_may_be_missing(
    make: Callable[[Path], Path], tmp_path: Path, images: Tensor
) -> None:
    folder = make(tmp_path)
    expected = DinoEncoder(folder, device="cpu").image_features(images)
    weights = load_file(folder / "model.safetensors")
    del weights["embeddings.mask_token"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert agree(DinoEncoder(folder, device="cpu").image_features(images), expected, MODEL)


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    folder = dino_v1(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["layernorm.weight"] = torch.ones(16)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="could not be loaded as a ViTModel"):
        DinoEncoder(folder, device="cpu")
