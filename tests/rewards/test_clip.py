"""CLIP similarities equal transformers' own, and RMLer's masked similarity fails where nothing is in the picture."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from tests import tiny
from tests.tolerance import MODEL, agree, rounding
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from pixrl import rewards
from pixrl.errors import CheckpointError, ConfigError, InputError, ShapeError
from pixrl.rewards.base import DifferentiableReward
from pixrl.rewards.clip import ClipImageReward, FusionScorer
from pixrl.rewards.encoders import ClipSimilarity
from pixrl.rewards.segmentation import Foreground, Segmenter
from pixrl.types import RewardBatch

TEXTS = ["a photo of an owl", "a snail"]


def left_half(images: Tensor) -> Tensor:
    """A foreground by rule: the left half of every picture that is not black."""
    masks = torch.zeros(len(images), *images.shape[-2:])
    masks[..., : images.shape[-1] // 2] = 1
    return masks * (images.amax(dim=(1, 2, 3)) > 0).float().view(-1, 1, 1)


def test_embeddings_equal_transformers(clip: ClipSimilarity, clip_folder: Path, images: Tensor) -> None:
    model = CLIPModel.from_pretrained(clip_folder).eval()
    arrays = (images.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    pixels = CLIPImageProcessorPil.from_pretrained(clip_folder)(
        [Image.fromarray(a) for a in arrays], return_tensors="pt"
    )
    words = AutoTokenizer.from_pretrained(clip_folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**pixels, **words)
    assert torch.allclose(clip.image_features(images), output.image_embeds, atol=2e-2)
    assert agree(clip.text_features(TEXTS), output.text_embeds, MODEL)


def test_features_are_unit_vectors_of_each_picture_alone(clip: ClipSimilarity, images: Tensor) -> None:
    features = clip.image_features(images)
    assert features.dtype is torch.float32
    assert agree(features.norm(dim=1), torch.ones(5), 64)
    assert agree(clip.image_features(images[2:3]), features[2:3], MODEL)


def test_the_batch_size_does_not_matter(clip_folder: Path, clip: ClipSimilarity, images: Tensor) -> None:
    small = ClipSimilarity(clip_folder, batch=2)
    assert agree(small.image_features(images), clip.image_features(images), MODEL)


def test_texts_are_encoded_once(clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = ClipSimilarity(clip_folder)
    first = clip.text_features([*TEXTS, TEXTS[0]])
    monkeypatch.setattr(
        clip.model, "get_text_features", lambda **texts: pytest.fail(f"encoded again: {texts}")
    )
    assert torch.equal(clip.text_features(TEXTS), first[:2])


def test_embed_is_differentiable_in_the_pixels(clip: ClipSimilarity, images: Tensor) -> None:
    pixels = clip.preprocess(images).requires_grad_()
    clip.embed(pixels)[:, 0].sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().max() > 0


def test_an_exemplar_is_most_similar_to_itself(clip: ClipSimilarity, images: Tensor) -> None:
    scorer = FusionScorer(clip, Foreground(left_half))
    exemplars = scorer.exemplar_features(images[:2])
    result = scorer.similarities(images, [exemplars[:1], exemplars[1:]])
    assert result.similarities_BN.shape == (5, 2)
    assert agree(result.similarities_BN.diagonal(), torch.ones(2), MODEL)
    assert (result.similarities_BN <= 1 + rounding(torch.float32, 64)).all()
    assert result.reasons == (None,) * 5


def test_only_the_foreground_counts(clip: ClipSimilarity, images: Tensor) -> None:
    scorer = FusionScorer(clip, Foreground(left_half))
    repainted = images.clone()
    repainted[..., 16:] = 0.3
    assert torch.equal(scorer.exemplar_features(images), scorer.exemplar_features(repainted))


def test_several_exemplars_are_averaged_as_cosines(clip: ClipSimilarity, images: Tensor) -> None:
    scorer = FusionScorer(clip, Foreground(left_half))
    rows = scorer.exemplar_features(images[:3])
    both = scorer.similarities(images, [rows[:2], rows[2:]]).similarities_BN[:, 0]
    each = scorer.similarities(images, [rows[:1], rows[1:2]]).similarities_BN
    assert agree(both, each.mean(dim=1), 64)


def test_an_empty_picture_fails_with_a_reason(clip: ClipSimilarity, images: Tensor) -> None:
    scorer = FusionScorer(clip, Foreground(left_half))
    exemplars = scorer.exemplar_features(images[:2])
    images[3] = 0
    result = scorer.similarities(images, [exemplars[:1], exemplars[1:]])
    assert result.similarities_BN[3].isnan().all()
    assert result.similarities_BN[[0, 1, 2, 4]].isfinite().all()
    assert result.reasons == (None, None, None, "no foreground found", None)


def test_an_empty_exemplar_is_left_out_and_none_left_is_an_error(
    clip: ClipSimilarity, images: Tensor
) -> None:
    scorer = FusionScorer(clip, Foreground(left_half))
    images[1] = 0
    rows = scorer.exemplar_features(images[:3])
    assert rows[1].isnan().all()
    without = scorer.similarities(images, [rows, rows[2:]]).similarities_BN
    expected = scorer.similarities(images, [rows[[0, 2]], rows[2:]]).similarities_BN
    assert torch.equal(without.nan_to_num(), expected.nan_to_num())
    with pytest.raises(InputError, match=r"None of the 1 exemplars of concept 1.*other seeds"):
        scorer.similarities(images, [rows[:1], rows[1:2]])
    with pytest.raises(ShapeError, match="Exemplars of concept 0"):
        scorer.similarities(images, [rows[0], rows[2:]])


def test_provenance_names_model_preprocessing_and_background(
    clip: ClipSimilarity, segmenter: Segmenter
) -> None:
    provenance = FusionScorer(clip, Foreground(segmenter), (0.5, 0.5, 0.5)).provenance
    assert provenance["model"].startswith(clip.name)
    assert "shortest edge 28 bicubic" in provenance["preprocessing"]
    assert provenance["foreground"].startswith(segmenter.name)
    assert provenance["background"] == "(0.5, 0.5, 0.5)"
    assert "left_half" in FusionScorer(clip, Foreground(left_half)).provenance["foreground"]


def test_the_text_reward_is_the_cosine(clip_folder: Path, clip: ClipSimilarity, images: Tensor) -> None:
    reward = rewards.load("clip_text", model=clip_folder, device="cpu")
    scores = reward.score(RewardBatch(images[:2], TEXTS))
    expected = (clip.image_features(images[:2]) * clip.text_features(TEXTS)).sum(dim=1)
    assert agree(scores.values_B, expected, MODEL)


def test_a_template_makes_the_text_of_the_prompt(clip_folder: Path, images: Tensor) -> None:
    plain = rewards.load("clip_text", model=clip_folder, device="cpu")
    styled = rewards.load(
        "clip_text", model=clip_folder, device="cpu", template="{prompt}, {prompt} at night"
    )
    written = RewardBatch(images[:2], [f"{text}, {text} at night" for text in TEXTS])
    found = styled.score(RewardBatch(images[:2], TEXTS)).values_B
    assert torch.equal(found, plain.score(written).values_B)
    assert not torch.equal(found, plain.score(RewardBatch(images[:2], TEXTS)).values_B)
    assert isinstance(styled, DifferentiableReward)
    assert isinstance(plain, DifferentiableReward)
    learned = styled.differentiable_scores(images[:2], TEXTS)
    assert torch.equal(learned, plain.differentiable_scores(images[:2], list(written.prompts)))
    assert styled.provenance["template"] == "{prompt}, {prompt} at night"
    assert "template" not in plain.provenance


def test_a_template_without_the_prompt_is_refused_before_anything_loads() -> None:
    with pytest.raises(ConfigError, match=r'needs \{prompt\}.* got \'at night\'.*"\{prompt\} in the snow"'):
        rewards.load("clip_text", model="no-such-folder", template="at night")


def test_the_image_reward_needs_a_reference(clip_folder: Path, images: Tensor) -> None:
    reward = rewards.load("clip_image", model=clip_folder, device="cpu")
    metadata = [{"reference": images[0]}, {"reference": images[:3]}, {}]
    scores = reward.score(RewardBatch(images[:3], ["x"] * 3, metadata))
    assert scores.values_B[0].item() == pytest.approx(1, abs=rounding(torch.float32, MODEL))
    assert scores.values_B[1].isfinite()
    assert scores.values_B[2].isnan()
    assert scores.reasons == (None, None, "no reference picture in the metadata (under 'reference')")
    nothing = reward.score(RewardBatch(images[:2], ["x"] * 2))
    assert nothing.values_B.isnan().all()


def test_the_image_reward_can_look_at_the_foreground_alone(
    clip_folder: Path, segmenter_folder: Path, images: Tensor
) -> None:
    reward = rewards.load(
        "clip_image", model=clip_folder, segmenter=segmenter_folder, background=(0.0, 0.0, 0.0)
    )
    scores = reward.score(RewardBatch(images[:1], ["x"], [{"reference": images[0]}]))
    assert scores.values_B.item() == pytest.approx(1, abs=rounding(torch.float32, MODEL))
    assert scores.provenance["background"] == "(0.0, 0.0, 0.0)"


@pytest.mark.parametrize("cut_out", [False, True])
def test_references_are_encoded_once(cut_out: bool, clip_folder: Path, images: Tensor) -> None:
    """By six samples that share one, and by later steps."""
    options = {"segmenter": left_half} if cut_out else {}
    reward = rewards.load("clip_image", model=clip_folder, device="cpu", **options)
    assert isinstance(reward, ClipImageReward)
    calls: list[int] = []
    original = reward.encoder.image_features
    reward.encoder.image_features = lambda batch: calls.append(len(batch)) or original(batch)  # type: ignore
    six = torch.cat([images, images[:1]])
    first = reward.score(RewardBatch(six, ["x"] * 6, [{"reference": images[4]}] * 6))
    again = reward.score(RewardBatch(six, ["x"] * 6, [{"reference": images[4].clone()}] * 6))
    assert calls == [6, 1, 6]
    assert torch.equal(first.values_B, again.values_B)


def test_the_image_reward_says_where_nothing_was_found(clip_folder: Path, images: Tensor) -> None:
    reward = ClipImageReward(clip_folder, segmenter=left_half, device="cpu")
    black, broken = torch.zeros(3, 32, 32), torch.full((3, 32, 32), torch.nan)
    pictures = torch.stack([black, images[0], images[0], broken])
    references: list[object] = [images[1], black, [black, images[1]], images[1]]
    scores = reward.score(RewardBatch(pictures, ["x"] * 4, [{"reference": one} for one in references]))
    assert scores.reasons == (
        "no foreground found in the picture",
        "no foreground found in the reference",
        None,
        "the picture is not finite",
    )
    assert scores.values_B.isnan().tolist() == [True, True, False, True]


def test_a_folder_without_weights(tmp_path: Path) -> None:
    tiny.clip(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors"):
        ClipSimilarity(tmp_path)


def test_a_folder_of_another_class(segmenter_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a 'segformer' model"):
        ClipSimilarity(segmenter_folder)


def test_the_table_refuses_what_it_does_not_know(clip_folder: Path) -> None:
    with pytest.raises(InputError, match=r"Did you mean 'geneval'\?"):
        rewards.load("genevl")
    with pytest.raises(ConfigError, match=r"no option 'modell'.*Did you mean 'model'"):
        rewards.load("clip_text", modell=clip_folder)
    with pytest.raises(ConfigError, match="needs the option 'model'"):
        rewards.load("clip_text")
    with pytest.raises(InputError, match="non-empty list of texts"):
        ClipSimilarity(clip_folder).text_features([])
