"""Face embeddings from a function, for IDS."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image, ImageStat

from pixrl.errors import ConfigError, InputError
from pixrl.metrics.divgen import identity_similarity, ids
from pixrl.rewards.zoo.faces import FaceEncoder

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


def test_the_function_gets_a_few_pictures_at_a_time() -> None:
    given: list[int] = []

    def embed(images: list[Image.Image]) -> list[object]:
        given.append(len(images))
        return [None if one.getpixel((0, 0)) == (0, 0, 0) else [1.0, 2.0] for one in images]

    some = pictures((0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 0))
    features = FaceEncoder(embed, batch=2).image_features(some)
    assert given == [2, 2, 1]
    assert features.shape == (5, 2)
    assert features.isnan().all(dim=1).tolist() == [True, True, False, False, True]


def test_provenance_is_the_functions_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(CODE)
    before = FaceEncoder(f"{file}:embed").provenance
    assert re.fullmatch(rf"{re.escape(str(file))}:embed \([0-9a-f]{{16}}\)", before["model"])
    assert (before["revision"], before["licence"]) == ("local", "its own")
    file.write_text(CODE + "# another model\n")
    assert FaceEncoder(f"{file}:embed").provenance["model"] != before["model"]


def test_a_model_pack_is_not_loaded_but_the_way_is_told() -> None:
    with pytest.raises(ConfigError) as caught:
        FaceEncoder("buffalo_l")
    for word in (
        "'buffalo_l'",
        "ONNX",
        "non-commercial",
        "pip install insightface onnxruntime",
        "my_faces.py:embed",
    ):
        assert word in str(caught.value)


@dataclass
class Face:
    bbox: tuple[float, float, float, float]
    embedding: np.ndarray


class FaceAnalysis:
    """insightface's, as far as the example uses it: two faces in a picture that is not black."""

    def __init__(self, name: str) -> None:
        assert name == "buffalo_l"

    def prepare(self, ctx_id: int) -> None: ...

    def get(self, array: np.ndarray) -> list[Face]:
        blue, green, red = array.reshape(-1, 3).mean(axis=0)
        wide, narrow = np.array([red, green, blue]), np.array([9.0, 9, 9])
        return [Face((0, 0, 1, 1), narrow), Face((0, 0, 3, 3), wide)] if array.any() else []


def test_the_example_in_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(# my_faces\.py.*?)```", page, re.DOTALL)
    for name in ("insightface", "insightface.app"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["insightface.app"].FaceAnalysis = FaceAnalysis  # type: ignore[attr-defined]
    (tmp_path / "my_faces.py").write_text(example)
    faces = FaceEncoder(f"{tmp_path / 'my_faces.py'}:embed")
    figure = ids([pictures((1, 0, 0), (0, 1, 0), (0, 0, 0))], faces)
    assert figure.counts == {"pictures": 3, "faces": 2}
    assert figure.value == pytest.approx(0)
    assert faces.image_features(pictures((1, 0, 0)))[0].tolist() == [255, 0, 0]
