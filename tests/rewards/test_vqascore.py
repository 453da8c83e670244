"""VQAScore from CLIP-FlanT5's shards: question, padding, answer, each against the original's way."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from tests import tiny, tiny_flant5
from tests.tiny_bin import BIN, RunsCode, as_bin
from tests.tolerance import MODEL, agree, rounding
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionModel

from pixrl import rewards
from pixrl.errors import CheckpointError
from pixrl.rewards.python import to_pil
from pixrl.rewards.weights import describe, origin
from pixrl.rewards.zoo.vqascore import VQAScoreReward, answer_probability
from pixrl.types import RewardBatch, Scores

PROMPTS = ["a red owl", "two cats on a very long sofa", "a red owl", "No", "an owl"]
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flant5.vision_tower(tmp_path_factory.mktemp("vqa") / "tower")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flant5.tokenizer(tmp_path_factory.mktemp("vqa") / "words")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tower: Path) -> Path:
    return tiny_flant5.flant5(tmp_path_factory.mktemp("vqa") / "model", tower)


@pytest.fixture(scope="module")
def reward(checkpoint: Path, words: Path) -> VQAScoreReward:
    return VQAScoreReward(checkpoint, words, device="cpu", dtype="float32")


def score(reward: VQAScoreReward, images: Tensor, prompts: list[str] = PROMPTS) -> Scores:
    return reward.score(RewardBatch(images[: len(prompts)], prompts))


def square(image: Image.Image, mean: list[float]) -> Image.Image:
    side = max(image.size)
    padded = Image.new("RGB", (side, side), tuple(int(255 * one) for one in mean))
    padded.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return padded


def by_hand(image: Image.Image, text: str, tower: Path, words: Path) -> float:
    """One picture through PIL, into parts that were never saved; T5's own resizing of its vocabulary, and its loss."""
    vision, fit = CLIPVisionModel.from_pretrained(tower), CLIPImageProcessor.from_pretrained(tower)
    model, projector = tiny_flant5.text_model()
    tokenizer = AutoTokenizer.from_pretrained(words)
    model.resize_token_embeddings(len(tokenizer))
    pixels = fit(square(image, fit.image_mean), return_tensors="pt").pixel_values
    prompt = f'{SYSTEM} USER: <image>\nDoes this figure show "{text}"? Please answer yes or no. ASSISTANT: '
    before, after = (torch.tensor([tokenizer(part).input_ids]) for part in prompt.split("<image>"))
    assert before[0, -1] == after[0, -1] == tokenizer.eos_token_id
    with torch.no_grad():
        seen = projector(vision(pixels, output_hidden_states=True).hidden_states[-2][:, 1:])
        embed = model.get_input_embeddings()
        inputs = torch.cat([embed(before), seen, embed(after)], dim=1)
        answer = torch.tensor([tokenizer("Yes").input_ids])
        assert tokenizer.convert_ids_to_tokens(answer[0]) == ["▁Yes", "</s>"]
        return float((-model(inputs_embeds=inputs, labels=answer).loss).exp())


@pytest.mark.parametrize("shape", [(28, 28), (60, 44), (30, 70)])
def test_it_is_the_original_one_by_one(
    reward: VQAScoreReward, images: Tensor, tower: Path, words: Path, shape: tuple[int, int]
) -> None:
    pictures = torch.nn.functional.interpolate(images, shape, mode="bilinear")
    values = score(reward, pictures).values_B
    pairs = zip(to_pil(pictures), PROMPTS, strict=True)
    expected = torch.tensor([by_hand(*pair, tower, words) for pair in pairs])
    error = (values - expected).abs().max().item()
    size = (
        5 * expected.max().item()
    )  # a chance near exp(-5) is off by as much of itself as its logit of 5 is off
    bound = rounding(torch.float32, 4 * MODEL, size)
    assert error < bound and values.std() > 10 * bound, (error, values, expected)
    assert values.min() > 0 and values.max() < 1


def test_the_formula_on_known_probabilities() -> None:
    """P(Yes) = 0.9 and P(</s> | Yes) = 0.4: the square root of 0.36."""
    logits = torch.tensor([[[0.1, 0.9], [0.4, 0.6]], [[0.5, 0.5], [0.5, 0.5]]]).log()
    values = answer_probability(logits, torch.tensor([[1, 0], [0, 1]]))
    assert agree(values, torch.tensor([0.6, 0.5]), 8)


def test_spare_rows_of_the_vocabulary_are_cut(reward: VQAScoreReward) -> None:
    assert reward.text_model.lm_head.weight.shape[0] == len(tiny_flant5.PIECES)
    assert reward.text_model.shared.weight.shape[0] == len(tiny_flant5.PIECES)


def test_the_gradient_reaches_the_picture(reward: VQAScoreReward, images: Tensor) -> None:
    pictures = images.clone().requires_grad_()
    values = reward.differentiable_scores(pictures, [*PROMPTS[:4], "an <image> of an owl"])
    assert values.isnan().tolist() == [False] * 4 + [True]
    values[:4].sum().backward()
    assert pictures.grad is not None and pictures.grad.isfinite().all()
    assert pictures.grad[:4].abs().flatten(1).max(dim=1).values.min() > 0
    assert torch.allclose(values[:4].detach(), score(reward, images).values_B[:4], atol=1e-3)


def test_a_prompt_that_holds_the_pictures_mark(reward: VQAScoreReward, images: Tensor) -> None:
    scores = score(reward, images, ["an <image> of an owl", "an owl"])
    assert scores.values_B.isnan().tolist() == [True, False]
    assert scores.reasons[0] == "the prompt holds <image>, where the picture would go"


def test_the_tower_can_be_elsewhere(
    reward: VQAScoreReward, images: Tensor, tower: Path, words: Path, tmp_path: Path
) -> None:
    """Its weights are the tower's folder's where the shards have none."""
    bare = tiny_flant5.flant5(tmp_path / "bare", tower, with_tower=False, with_tokenizer=True)
    settings = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(settings | {"mm_vision_tower": str(tmp_path / "gone")}))
    with pytest.raises(CheckpointError, match="gone"):
        VQAScoreReward(bare, device="cpu", dtype="float32")
    other = VQAScoreReward(bare, vision=tower, device="cpu", dtype="float32")
    assert agree(score(other, images).values_B, score(reward, images).values_B, 4 * MODEL)
    assert other.provenance["vision"] == describe(tower, tower)["model"]


@pytest.mark.parametrize("whole", [False, True], ids=["a tower", "a CLIP"])
def test_the_tower_can_be_pickled_tensors(tower: Path, words: Path, tmp_path: Path, whole: bool) -> None:
    """As in openai/clip-vit-large-patch14-336: a pytorch_model.bin with both towers, and nothing else."""
    bare = tiny_flant5.flant5(tmp_path / "bare", tower, with_tower=False)
    safe = tmp_path / "safe"
    tiny.clip(safe) if whole else shutil.copytree(tower, safe)
    pickled = as_bin(safe, tmp_path / "pickled")
    images = torch.rand(2, 3, 30, 40, generator=torch.Generator().manual_seed(0))
    found, expected = (
        score(VQAScoreReward(bare, words, vision=vision, device="cpu", dtype="float32"), images, PROMPTS[:2])
        for vision in (pickled, safe)
    )
    assert agree(found.values_B, expected.values_B, 4 * MODEL)
    assert found.provenance["vision"] == origin(pickled, pickled, [pickled / BIN], "")["model"]
    torch.save({"logit_scale": RunsCode()}, pickled / BIN)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin .* more than tensors"):
        VQAScoreReward(bare, words, vision=pickled, device="cpu", dtype="float32")


def test_provenance(reward: VQAScoreReward, tower: Path, words: Path) -> None:
    provenance = reward.provenance
    assert provenance["licence"] == "Apache-2.0"
    assert provenance["vision"].startswith(f"{tower} (") and provenance["tokenizer"].startswith(f"{words} (")
    assert provenance["question"] == 'Does this figure show "{text}"? Please answer yes or no. ASSISTANT:'


def test_what_does_not_fit_is_refused(tower: Path, words: Path, tmp_path: Path) -> None:
    folder = tiny_flant5.flant5(tmp_path / "model", tower)

    def load(**options: object) -> None:
        rewards.load("vqascore", model=folder, device="cpu", dtype="float32", **options)

    with pytest.raises(CheckpointError, match="tokenizer: google/flan-t5-xxl"):
        load()
    shard = folder / "pytorch_model-00001-of-00002.bin"
    kept = torch.load(shard, weights_only=True)
    lost = next(key for key in kept if key.startswith("decoder.block.0"))
    torch.save({key: value for key, value in kept.items() if key != lost}, shard)
    with pytest.raises(CheckpointError, match=r"1 weights are missing \(decoder\.block\.0"):
        load(tokenizer=words)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"00001-of-00002\.bin is missing"):
        load(tokenizer=words)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"mm_projector_type": "linear"}))
    with pytest.raises(CheckpointError, match="has mm_projector_type 'linear'; CLIP-FlanT5 has 'mlp2x_gelu'"):
        load(tokenizer=words)
