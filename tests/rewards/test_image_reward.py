"""ImageReward from its published files: the parts of BLIP in their places, and the published constants."""

from pathlib import Path

import pytest
import torch
from tests import tiny_blip
from tests.tolerance import MODEL, agree
from torch import Tensor, nn
from transformers import BertTokenizer, CLIPImageProcessor

from pixrl import rewards
from pixrl.errors import CheckpointError
from pixrl.rewards.base import DifferentiableReward
from pixrl.rewards.python import to_pil
from pixrl.rewards.zoo.image_reward import ImageReward, normalize
from pixrl.types import RewardBatch, Scores

PROMPTS = ["a red owl", "two cats", "a red owl", "a cat", "an owl on grass"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_blip.image_reward(tmp_path_factory.mktemp("image_reward") / "model")


def score(folder: Path, images: Tensor, **options: object) -> Scores:
    reward = rewards.load("image_reward", model=folder, device="cpu", **options)
    return reward.score(RewardBatch(images, PROMPTS))


def by_hand(folder: Path, images: Tensor) -> Tensor:
    """Pictures through PIL one by one, the parts called one after the other, the head with its dropout layers."""
    vision, text, head = tiny_blip.image_reward_models()
    words = BertTokenizer.from_pretrained(str(folder))
    side = tiny_blip.SIDE
    fit = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    values = []
    for image, prompt in zip(to_pil(images), PROMPTS, strict=True):
        tokens = words(prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        with torch.no_grad():
            seen = vision(fit(images=image, return_tensors="pt").pixel_values).last_hidden_state
            states = text(
                input_ids=tokens.input_ids,
                attention_mask=tokens.attention_mask,
                encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long),
                is_decoder=False,
            ).last_hidden_state
            values.append((head(states[:, 0]).item() - 0.16717362830052426) / 1.0333394966054072)
    return torch.tensor(values)


@pytest.mark.parametrize("shape", [(32, 32), (60, 44), (40, 90)])
def test_it_is_the_parts_in_a_row(folder: Path, images: Tensor, shape: tuple[int, int]) -> None:
    pictures = nn.functional.interpolate(images, shape, mode="bilinear")
    values = score(folder, pictures).values_B
    assert torch.allclose(values, by_hand(folder, pictures), atol=2e-3)
    assert values.std() > 20 * 2e-3  # the tolerance tells pictures apart


def test_the_published_scale() -> None:
    """An output at the mean is 0, one deviation above it 1."""
    outputs = torch.tensor([0.16717362830052426, 0.16717362830052426 + 1.0333394966054072])
    assert agree(normalize(outputs), torch.tensor([0.0, 1.0]), 8)


def test_picture_and_prompt_both_count(folder: Path, images: Tensor) -> None:
    values = score(folder, images[[0, 0, 0, 1, 1]]).values_B
    assert agree(values[0], values[2], MODEL)  # same picture, same prompt
    assert abs(values[0] - values[1]) > 1e-4 and abs(values[3] - values[0]) > 1e-4


def test_the_gradient_reaches_the_picture(folder: Path, images: Tensor) -> None:
    reward = rewards.load("image_reward", model=folder, device="cpu")
    assert isinstance(reward, DifferentiableReward)
    pictures = images.clone().requires_grad_()
    values = reward.differentiable_scores(pictures, PROMPTS)
    values.sum().backward()
    assert pictures.grad is not None and pictures.grad.isfinite().all()
    assert pictures.grad.abs().flatten(1).max(dim=1).values.min() > 0
    assert torch.allclose(values.detach(), score(folder, images).values_B, atol=0.02)


def test_provenance(folder: Path, images: Tensor) -> None:
    provenance = score(folder, images).provenance
    assert provenance["licence"] == "Apache-2.0" and provenance["revision"] == "local"
    assert provenance["scale"] == "(head - 0.167174) / 1.03334"


def test_the_vocabulary_can_be_elsewhere(folder: Path, images: Tensor, tmp_path: Path) -> None:
    bare = tiny_blip.image_reward(tmp_path / "bare", with_vocabulary=False)
    with pytest.raises(CheckpointError, match="tokenizer: google-bert/bert-base-uncased"):
        score(bare, images)
    words = tiny_blip.vocabulary(tmp_path / "bert")
    assert torch.equal(score(bare, images, tokenizer=words).values_B, score(folder, images).values_B)


def test_what_does_not_fit_is_refused(folder: Path, images: Tensor, tmp_path: Path) -> None:
    broken = tiny_blip.image_reward(tmp_path / "broken")
    weights = torch.load(broken / "ImageReward.pt", weights_only=True)

    def with_weights(changed: dict[str, Tensor]) -> None:
        torch.save(changed, broken / "ImageReward.pt")
        score(broken, images)

    lost = "blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"
    with pytest.raises(CheckpointError, match=r"1 weights are missing \(encoder\.layer\.1\.cross"):
        with_weights({key: value for key, value in weights.items() if key != lost})
    with pytest.raises(CheckpointError, match=r"no weights under 'mlp\.layers\.'"):
        with_weights({key: value for key, value in weights.items() if not key.startswith("mlp")})
    with pytest.raises(CheckpointError, match=r"0\.weight has the shape \[8, 32\]"):
        with_weights(weights | {"mlp.layers.0.weight": torch.zeros(8, 32)})
    (broken / "ImageReward.pt").unlink()
    with pytest.raises(CheckpointError, match=r"ImageReward\.pt is missing; the folder holds med_config"):
        score(broken, images)


def test_every_weight_of_the_file_is_used(folder: Path) -> None:
    """Changing any one of the three parts changes the score: none is left at its random start."""
    first, second = (ImageReward(folder, device="cpu") for _ in range(2))
    for mine, other in ((first.vision, second.vision), (first.text, second.text), (first.head, second.head)):
        for one, two in zip(mine.parameters(), other.parameters(), strict=True):
            assert torch.equal(one, two)
