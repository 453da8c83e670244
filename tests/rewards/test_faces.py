"""Face embeddings from a function, for IDS."""

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageStat

from pixrl.errors import InputError
from pixrl.evaluation.divgen import identity_similarity
from pixrl.rewards.faces import FaceEncoder

CODE = """
from PIL import ImageStat

def embed(images):
    return [None if mean[0] < 10 else mean for mean in (ImageStat.Stat(image).mean for image in images)]
"""


def pictures(*colours: tuple[float, float, float]) -> torch.Tensor:
    return torch.stack(
        [torch.tensor(colour, dtype=torch.float32).view(3, 1, 1).expand(3, 4, 4) for colour in colours]
    )


def test_ids_of_a_function(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CODE)
    encoder = FaceEncoder(f"{tmp_path / 'mine.py'}:embed")
    features = encoder.image_features(pictures((1, 0, 0), (0, 1, 0), (1, 1, 0)))
    assert features[0].tolist() == [255, 0, 0]
    assert bool(features[1].isnan().all())
    found = identity_similarity(features)
    assert (found.faces, found.pictures) == (2, 3)
    assert found.similarity == pytest.approx(0.5**0.5)


def test_no_face_at_all() -> None:
    features = FaceEncoder(lambda images: [None] * len(images)).image_features(pictures((0, 0, 0), (1, 1, 1)))
    assert identity_similarity(features).faces == 0


def test_wrong_answers() -> None:
    def uneven(images: list[Image.Image]) -> list[list[float]]:
        return [[1.0] * (n + 1) for n in range(len(images))]

    def short(images: list[Image.Image]) -> list[list[float]]:
        return [ImageStat.Stat(images[0]).mean]

    with pytest.raises(InputError, match=r"embeddings of \[1, 2\] numbers"):
        FaceEncoder(uneven).image_features(pictures((0, 0, 0), (1, 1, 1)))
    with pytest.raises(InputError, match="1 answers for 2 pictures"):
        FaceEncoder(short).image_features(pictures((0, 0, 0), (1, 1, 1)))
