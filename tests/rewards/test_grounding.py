"""Boxes of a named object: a tiny Grounding DINO through the real loader, and detectors of known classes."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.tolerance import MODEL, agree
from torch import Tensor
from transformers import (
    BertConfig,
    BertTokenizerFast,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    SwinConfig,
)
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import (
    GroundingDinoImageProcessorPil,
)

from pixrl.errors import CheckpointError, ShapeError
from pixrl.metrics.divgen import spatial_diversity
from pixrl.rewards.segmentation import Instance
from pixrl.rewards.zoo.finders import BOX_THRESHOLD, TEXT_THRESHOLD, DetectorFinder, GroundingDino


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published layout with random weights."""
    path = tmp_path_factory.mktemp("tiny") / "gdino"
    path.mkdir()
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        ".",
        *letters,
        *(f"##{x}" for x in letters),
        "cat",
        "dog",
    ]
    (path / "vocab.txt").write_text("\n".join(words) + "\n")
    torch.manual_seed(0)
    swin = SwinConfig(
        image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    text = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
    )
    config = GroundingDinoConfig(
        backbone_config=swin, text_config=text, d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64, encoder_attention_heads=4, decoder_attention_heads=4, num_queries=10, max_text_len=64,
    )  # fmt: skip
    GroundingDinoForObjectDetection(config).eval().save_pretrained(path)
    tokenizer = BertTokenizerFast.from_pretrained(path)
    images = GroundingDinoImageProcessorPil(size={"shortest_edge": 80, "longest_edge": 128})
    GroundingDinoProcessor(images, tokenizer).save_pretrained(path)
    return path


def test_boxes_are_shares_of_the_picture(folder: Path, images: Tensor) -> None:
    finder = GroundingDino(folder, device="cpu", box_threshold=0.0, text_threshold=0.0, batch=2)
    wide = torch.nn.functional.interpolate(images, (32, 48))
    found = finder.boxes(wide, ["cat", "dog", "cat", "cat", "dog"])
    assert len(found) == 5
    assert all(boxes.shape == (10, 4) for boxes in found)  # every query, at thresholds of 0
    centres = torch.cat(found).unflatten(1, (2, 2)).mean(dim=1)
    assert bool((centres >= 0).all()) and bool((centres <= 1).all())
    assert finder.provenance["box_threshold"] == "0"
    assert finder.provenance["licence"] == "Apache-2.0"
    spread = spatial_diversity([found[:2], found[2:]])
    assert 0 <= spread <= 1


def test_the_phrase_matters_and_the_batch_does_not(folder: Path, images: Tensor) -> None:
    finder = GroundingDino(folder, device="cpu", box_threshold=0.0, text_threshold=0.0)
    kinds = ["cat", "dog", "cat", "dog", "cat"]
    together = finder.boxes(images, kinds)
    alone = [finder.boxes(image[None], [kind])[0] for image, kind in zip(images, kinds, strict=True)]
    assert all(agree(a, b, 4 * MODEL) for a, b in zip(together, alone, strict=True))
    assert not torch.allclose(finder.boxes(images[:1], ["dog"])[0], together[0])


def test_the_thresholds_are_the_published_ones(folder: Path) -> None:
    """Those of the model card of IDEA-Research/grounding-dino-base: scores are not comparable under others."""
    assert (BOX_THRESHOLD, TEXT_THRESHOLD) == (0.35, 0.25)
    finder = GroundingDino(folder, device="cpu")
    assert (finder.box_threshold, finder.text_threshold) == (0.35, 0.25)
    assert (finder.provenance["box_threshold"], finder.provenance["text_threshold"]) == ("0.35", "0.25")
    assert DetectorFinder(TwoOwls()).threshold == 0.35


def test_the_thresholds_reach_the_boxes(
    folder: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each as what transformers calls it; box and text are not swapped."""
    finder = GroundingDino(folder, device="cpu")
    given: dict[str, object] = {}
    original = finder.processor.post_process_grounded_object_detection

    def noted(*args: object, **options: object) -> object:
        given.update(options)
        return original(*args, **options)

    monkeypatch.setattr(finder.processor, "post_process_grounded_object_detection", noted)
    finder.boxes(images[:1], ["cat"])
    assert given == {"threshold": 0.35, "text_threshold": 0.25}


def test_thresholds_leave_boxes_out(folder: Path, images: Tensor) -> None:
    finder = GroundingDino(folder, device="cpu", box_threshold=1.0)
    assert [boxes.shape for boxes in finder.boxes(images[:2], ["cat", "dog"])] == [(0, 4), (0, 4)]


def test_what_is_refused(folder: Path, images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="5 pictures need one kind of object each, got 1"):
        GroundingDino(folder, device="cpu").boxes(images, ["cat"])
    with pytest.raises(CheckpointError, match="holds a 'clip' model"):
        GroundingDino(tiny.clip(tmp_path / "clip"))


class TwoOwls:
    """Sees a sure and an unsure owl, and a cat."""

    provenance: Mapping[str, str] = {"model": "two owls", "preprocessing": "none"}

    def instances(self, images_BCHW: Tensor) -> list[list[Instance]]:
        mask = torch.zeros(images_BCHW.shape[-2:], dtype=torch.bool)
        return [
            [
                Instance("owl", (0.0, 0.0, 16.0, 8.0), 0.9, mask),
                Instance("owl", (8.0, 8.0, 16.0, 16.0), 0.2, mask),
                Instance("cat", (0.0, 16.0, 32.0, 32.0), 0.5, mask),
            ]
            for _ in images_BCHW
        ]


def test_a_detector_of_known_classes(images: Tensor) -> None:
    found = DetectorFinder(TwoOwls()).boxes(images[:3, :, :, :16], ["owl", "cat", "snail"])
    assert found[0].tolist() == [[0, 0, 1, 0.25]]
    assert found[1].tolist() == [[0, 0.5, 2, 1]]
    assert found[2].shape == (0, 4)
