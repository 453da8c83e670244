"""BLIP-VQA as T2I-CompBench asks it: its questions, [ENC], the first word of the answer, the product over phrases."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
from tests import tiny, tiny_blip
from tests.tolerance import MODEL, agree
from torch import Tensor
from transformers import AutoTokenizer, BlipForQuestionAnswering, BlipImageProcessorPil

from pixrl import rewards
from pixrl.errors import CheckpointError, RunError
from pixrl.rewards.python import to_pil
from pixrl.rewards.zoo.blip_vqa import BlipVQAReward, answer_ids, question
from pixrl.types import RewardBatch, Scores

PHRASES = [["a red owl", "two cats"], ["a cat"], ["a red owl", "a red owl"], ["owl"], ["a cat", "no", "yes"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_blip.blip_vqa(tmp_path_factory.mktemp("blip") / "vqa")


@pytest.fixture(scope="module")
def reward(folder: Path) -> BlipVQAReward:
    return BlipVQAReward(folder, device="cpu")


def score(reward: BlipVQAReward, images: Tensor, phrases: list[object]) -> Scores:
    count = len(phrases)
    metadata = [{} if one is None else {"phrases": one} for one in phrases]
    return reward.score(RewardBatch(images[:count], ["a prompt"] * count, metadata))


def by_hand(folder: Path, images: Tensor, phrases: list[list[str]]) -> Tensor:
    """One question at a time, through PIL and the model's parts, over the whole vocabulary's softmax."""
    model = BlipForQuestionAnswering.from_pretrained(folder).eval()
    words, fit = AutoTokenizer.from_pretrained(folder), BlipImageProcessorPil.from_pretrained(folder)
    enc, dec, yes, no = words.convert_tokens_to_ids(["[ENC]", "[DEC]", "yes", "no"])
    values = []
    for image, several in zip(to_pil(images), phrases, strict=True):
        product = 1.0
        for phrase in several:
            tokens = words(f"{phrase}?", return_tensors="pt")
            tokens.input_ids[:, 0] = enc
            with torch.no_grad():
                seen = model.vision_model(fit(image, return_tensors="pt").pixel_values).last_hidden_state
                states = model.text_encoder(
                    input_ids=tokens.input_ids, encoder_hidden_states=seen, is_decoder=False
                ).last_hidden_state
                logits = model.text_decoder(torch.tensor([[dec]]), encoder_hidden_states=states).logits[0, 0]
            chances = logits.softmax(-1)
            product *= float(chances[yes] / (chances[yes] + chances[no]))
        values.append(product)
    return torch.tensor(values)


def test_it_is_the_original_one_by_one(reward: BlipVQAReward, folder: Path, images: Tensor) -> None:
    pictures = torch.nn.functional.interpolate(images, (40, 60), mode="bilinear")
    values = score(reward, pictures, PHRASES).values_B
    expected = by_hand(folder, pictures, PHRASES)
    error = (values - expected).abs().max().item()
    assert error < 2e-3 and values.std() > 10 * 2e-3, (error, values)


def test_the_product_over_phrases(reward: BlipVQAReward, images: Tensor) -> None:
    same = images[[0, 0, 0]]
    first, second, both = score(
        reward, same, [["a red owl"], ["two cats"], ["a red owl", "two cats"]]
    ).values_B
    assert agree(both, first * second, MODEL)


@pytest.mark.parametrize(
    ("phrase", "asked"),
    [("A Red owl", "a red owl?"), ('a "big" (old) owl.', "a big old owl?"), ("it's #1: owl", "it's 1 owl?")],
)
def test_the_questions(phrase: str, asked: str) -> None:
    assert question(phrase) == asked
    assert question("a " * 60).split(" ") == ["a"] * 50


def test_enc_is_put_in_place_of_cls(reward: BlipVQAReward, folder: Path, images: Tensor) -> None:
    """With [CLS] left at the start, as transformers does, the answer is another one."""
    seen = reward.encode(images[:2])
    with torch.inference_mode():
        ours = reward.yes(seen, ["a red owl?", "a cat?"])
        ids = reward.ids
        reward.ids = type(ids)(reward.tokenizer.cls_token_id, ids.start, ids.yes, ids.no)
        theirs = reward.yes(seen, ["a red owl?", "a cat?"])
        reward.ids = ids
    assert (ours - theirs).abs().max() > 1e-3


def test_blips_own_tokens_come_after_berts(folder: Path, tmp_path: Path) -> None:
    """Published folders may hold BERT's vocabulary alone: then [DEC] is 30522 and [ENC] 30523."""
    with_both = answer_ids(AutoTokenizer.from_pretrained(folder), folder)
    from transformers import BertTokenizer

    bare = answer_ids(BertTokenizer.from_pretrained(str(tiny_blip.vocabulary(tmp_path / "bert"))), tmp_path)
    assert bare == with_both
    assert (bare.start, bare.encode) == (len(tiny_blip.WORDS), len(tiny_blip.WORDS) + 1)


def test_failures_have_reasons(reward: BlipVQAReward, images: Tensor) -> None:
    broken = images.clone()
    broken[3] = torch.nan
    scores = score(reward, broken, [["owl"], "owl", [], ["owl"], ["owl", 3]])
    assert scores.values_B.isnan().tolist() == [False, True, True, True, True]
    assert scores.reasons == (
        None,
        "metadata['phrases'] is a list of phrases, got 'owl'",
        "the prompt has no noun phrase to ask about",
        "the picture is not finite",
        "metadata['phrases'] holds something that is no phrase: ['owl', 3]",
    )


@pytest.mark.skipif(importlib.util.find_spec("spacy") is not None, reason="spaCy is installed")
def test_without_spacy_the_extra_is_named(reward: BlipVQAReward, images: Tensor) -> None:
    assert score(reward, images, [["owl"]]).reasons == (None,)  # listed phrases need no spaCy
    with pytest.raises(RunError, match=r"needs spacy, .*pip install 'pixrl\[compbench\]'"):
        score(reward, images, [["owl"], None])


def test_phrases_by_spacy(folder: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spaCy of the same interface: places are dropped, each prompt is parsed once, at most 8 are asked."""
    parsed = []

    def parse(prompt: str) -> types.SimpleNamespace:
        parsed.append(prompt)
        return types.SimpleNamespace(
            noun_chunks=[types.SimpleNamespace(text=part) for part in prompt.split(" on ")]
        )

    spacy = types.ModuleType("spacy")
    vars(spacy)["load"] = {"en_core_web_sm": parse}.__getitem__
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    reward = BlipVQAReward(folder, device="cpu")
    prompts = [
        "a red owl on the left on two cats",
        "a red owl on the left on two cats",
        " on ".join("abcdefghij"),
    ]
    found = reward.score(RewardBatch(images[[0, 0, 1]], prompts)).values_B
    listed = score(reward, images[[0, 0, 1]], [["a red owl", "two cats"]] * 2 + [list("abcdefgh")]).values_B
    assert torch.equal(found, listed)
    assert parsed == [prompts[0], prompts[2]]


def test_without_spacys_model(folder: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise OSError(f"[E050] Can't find model '{name}'")

    spacy = types.ModuleType("spacy")
    vars(spacy)["load"] = load
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    with pytest.raises(RunError, match="python -m spacy download en_core_web_sm"):
        BlipVQAReward(folder, device="cpu").score(RewardBatch(images[:1], ["an owl"]))


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'clip' model; blip_vqa needs a 'blip' one"):
        rewards.load("blip_vqa", model=tiny.clip(tmp_path))
