"""The text reward: its formula on known strings, where lines are found, what is decoded, and both readers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests import tiny, tiny_ocr
from tests.tolerance import rounding
from torch import Tensor

from pixrl import rewards
from pixrl.device import Precision
from pixrl.errors import CheckpointError, ConfigError
from pixrl.rewards.zoo import ocr
from pixrl.rewards.zoo.ocr import OcrReward, PaddleReader, edit_distance, quoted, text_reward
from pixrl.types import RewardBatch

PROMPTS = ['a sign that says "STOP now"', "a cat", 'an owl, "7"', '""', 'one "']


@pytest.fixture(scope="module")
def paddle(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("ocr")
    return {"model": tiny_ocr.recognizer(base / "rec"), "detector": tiny_ocr.detector(base / "det")}


@pytest.fixture(scope="module")
def reader(paddle: dict[str, Path]) -> PaddleReader:
    made = ocr.make_reader(paddle["model"], paddle["detector"], "cpu", "float32")
    assert isinstance(made, PaddleReader)
    return made


@pytest.mark.parametrize(
    ("read", "target", "reward"),
    [
        ("Hello World", "helloworld", 1.0),
        ("xx HELLO world 7", "helloworld", 1.0),  # what is around it does not count
        ("helo world", "helloworld", 0.9),
        ("hallo wrld!", "helloworld", 0.7),  # one replaced, one lost, one too many
        ("", "stop", 0.0),
        ("something else entirely", "stop", 0.0),  # never below 0
        ("s t o p", "stop", 1.0),
    ],
)
def test_known_answers(read: str, target: str, reward: float) -> None:
    assert text_reward(read, target) == pytest.approx(reward)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("flaw", "lawn", 2), ("", "", 0)],
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_the_quoted_text() -> None:
    assert [quoted(prompt) for prompt in PROMPTS] == ["stopnow", "", "7", "", ""]
    assert quoted('"First one" and "second"') == "firstone"


def letters(*steps: str, sure: float = 0.9) -> Tensor:
    """[T, V]: one letter a step, "_" the blank."""
    table = torch.full((len(steps), len(tiny_ocr.LETTERS)), 1e-3)
    for row, letter in enumerate(steps):
        table[row, 0 if letter == "_" else tiny_ocr.LETTERS.index(letter)] = sure
    return table


@pytest.mark.parametrize(
    ("steps", "text"),
    [("_hh_e_ll_l_oo_", "hello"), ("__", ""), ("aabb", "ab"), ("a_a", "aa"), ("_7", "7")],
)
def test_repeats_and_blanks(steps: str, text: str) -> None:
    assert ocr.decode(letters(*steps), tiny_ocr.LETTERS) == text


def test_an_unsure_line_is_dropped() -> None:
    assert ocr.decode(letters(*"stop", sure=0.49), tiny_ocr.LETTERS) == ""
    assert ocr.decode(letters(*"stop", sure=0.51), tiny_ocr.LETTERS) == "stop"


def text_map(*boxes: tuple[int, int, int, int], chance: float = 0.9) -> np.ndarray:
    found = np.zeros((96, 192), dtype=np.float32)
    for left, top, right, bottom in boxes:
        found[top:bottom, left:right] = chance
    return found


def test_a_line_is_grown_by_area_over_perimeter() -> None:
    """41 x 11 pixels are 40 x 10 between their first and last: 1.5 · 400 / 100 = 6 on every side."""
    assert ocr.unclip((20, 30, 60, 40)) == (14, 24, 66, 46)
    assert ocr.find_lines(text_map((20, 30, 61, 41)), 96, 192) == [(14, 24, 66, 46)]
    assert ocr.find_lines(text_map((20, 30, 61, 41)), 192, 384) == [(28, 48, 132, 92)]


def test_lines_stay_in_the_picture_and_specks_are_dropped() -> None:
    assert ocr.find_lines(text_map((0, 0, 41, 11)), 96, 192) == [(0, 0, 46, 16)]
    assert ocr.find_lines(text_map((20, 30, 23, 60)), 96, 192) == []
    assert ocr.find_lines(text_map((20, 30, 61, 41), chance=0.55), 96, 192) == []
    assert ocr.find_lines(text_map(), 96, 192) == []


def test_the_reading_order() -> None:
    """Lines from the top; words of a line, whose tops differ by less than 10, from the left."""
    right, left, below = (100, 10, 150, 30), (10, 18, 60, 38), (5, 60, 90, 80)
    assert ocr.reading_order([below, right, left]) == [left, right, below]
    apart = (10, 20, 60, 40)
    assert ocr.reading_order([apart, right]) == [right, apart]


@pytest.mark.parametrize(
    ("given", "seen"),
    [((512, 512), (512, 512)), ((1024, 1024), (960, 960)), ((100, 40), (96, 32)), ((1920, 1080), (960, 544))],
)
def test_the_size_that_the_detector_sees(given: tuple[int, int], seen: tuple[int, int]) -> None:
    assert ocr.detector_size(*given) == seen


def test_the_width_of_a_line() -> None:
    assert ocr.line_width(20, 70) == 168
    assert ocr.line_width(48, 100) == 100
    assert ocr.line_width(47, 100) == 103  # 102.1, narrower than 320: rounded up
    assert ocr.line_width(10, 99) == 475  # 475.2: down
    assert ocr.line_width(1, 900) == 3200


def test_crops_on_their_side_are_turned() -> None:
    crop = torch.arange(12.0).view(1, 4, 3).expand(3, 4, 3)
    assert ocr.upright(crop) is crop
    high = torch.arange(6.0).view(1, 3, 2).expand(3, 3, 2)
    assert ocr.upright(high)[0].tolist() == [[1, 3, 5], [0, 2, 4]]


def test_paddle_reads_its_lines_in_order(reader: PaddleReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two lines where the detector says, each read from its own pixels; a picture without lines reads as nothing."""
    maps = torch.stack([torch.tensor(text_map((20, 60, 61, 71), (20, 10, 61, 21))), torch.zeros(96, 192)])
    monkeypatch.setattr(reader, "text_maps", lambda images: maps)
    images = torch.zeros(2, 3, 96, 192)
    images[0, 0, :40], images[0, 1, 40:] = 1, 1  # red above, green below
    monkeypatch.setattr(
        reader, "recognize", lambda crops: ["red" if crop[0].mean() > 0.5 else "green" for crop in crops]
    )
    assert reader.read(images) == ["redgreen", ""]


def test_lines_are_read_alike_in_any_company(reader: PaddleReader) -> None:
    torch.manual_seed(0)
    crops = [torch.rand(3, 12, width) for width in (30, 200, 64, 90, 31)]
    with torch.inference_mode():
        together = reader.recognize(crops)
        alone = [reader.recognize([crop])[0] for crop in crops]
    assert together == alone
    assert len(set(together)) > 1  # the tiny recognizer tells them apart


def test_the_detector_takes_bgr(reader: PaddleReader) -> None:
    """What the model gets is the picture normalized with PaddleOCR's numbers, blue first."""
    seen: list[Tensor] = []

    def detect(pixel_values: Tensor) -> object:
        seen.append(pixel_values)
        return type("Output", (), {"last_hidden_state": torch.zeros(1, 1, 32, 32)})

    kept, reader.detector = reader.detector, detect
    reader.text_maps(torch.tensor([0.2, 0.4, 0.6]).view(1, 3, 1, 1).expand(1, 3, 32, 32))
    reader.detector = kept
    expected = [(0.6 - 0.485) / 0.229, (0.4 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    assert seen[0][0, :, 5, 5].tolist() == pytest.approx(expected, abs=rounding(torch.float32, 64))


def test_scores_and_reasons(paddle: dict[str, Path], images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = OcrReward(**paddle, device="cpu")
    monkeypatch.setattr(reward.reader, "read", lambda images: ["a STOP n0w", "ab"][: len(images)])
    scores = reward.score(RewardBatch(images, PROMPTS))
    nothing = "the prompt has no text in double quotes"
    assert scores.reasons == (None, nothing, None, nothing, nothing)
    assert scores.values_B[[0, 2]].tolist() == pytest.approx([1 - 2 / 7, 0.0])
    assert scores.values_B[[1, 3, 4]].isnan().all()
    assert scores.provenance["detector"].startswith(str(paddle["detector"]))


def test_got_reads_whole_pictures(tmp_path: Path, images: Tensor) -> None:
    """What the processor and generate() give for one picture alone, without the prompt."""
    folder = tiny_ocr.got(tmp_path / "got")
    reward = OcrReward(folder, device="cpu")
    texts = reward.reader.read(images[:3])
    assert len(set(texts)) > 1
    assert texts == [reward.reader.read(images[row : row + 1])[0] for row in range(3)]
    assert not any("OCR:" in text or "<|im_end|>" in text for text in texts)
    scores = reward.score(RewardBatch(images[:1], [f'a sign "{texts[0][3:9]}"']))
    assert scores.values_B.tolist() == [1.0]
    with pytest.raises(ConfigError, match="detector would have no effect"):
        OcrReward(folder, detector=folder)


def test_options_that_contradict_each_other(paddle: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="detector: PaddlePaddle/PP-OCRv5_server_det_safetensors"):
        rewards.load("ocr", model=paddle["model"])
    with pytest.raises(
        CheckpointError, match="'pp_ocrv5_mobile_det' model; ocr reads with a PP-OCR recognizer"
    ):
        rewards.load("ocr", model=paddle["detector"])
    with pytest.raises(CheckpointError, match="detector takes a PP-OCR one"):
        rewards.load("ocr", model=paddle["model"], detector=paddle["model"])
    with pytest.raises(CheckpointError, match="holds a 'clip' model"):
        rewards.load("ocr", model=tiny.clip(tmp_path))


def test_letters_that_do_not_fit_the_model(paddle: dict[str, Path], tmp_path: Path) -> None:
    folder = tiny_ocr.recognizer(tmp_path / "rec")
    config = folder / "preprocessor_config.json"
    config.write_text(json.dumps({"character_list": ["blank", "a"]}))
    with pytest.raises(CheckpointError, match="has 2 letters, the model 64"):
        rewards.load("ocr", model=folder, detector=paddle["detector"])
    config.write_text(json.dumps({"limit_type": "min"}))
    with pytest.raises(CheckpointError, match="limit_type 'min' is not supported"):
        PaddleReader(folder, folder, folder, folder, torch.device("cpu"), Precision(torch.float32, None))
