"""Face embeddings by the user's function: ArcFace's ONNX files are for non-commercial use, so pixrl has none.

With insightface (`pip install insightface onnxruntime`; its model packs are non-commercial):

    # my_faces.py
    import numpy as np
    from insightface.app import FaceAnalysis

    app = FaceAnalysis(name="buffalo_l")
    app.prepare(ctx_id=0)


    def embed(images):
        # RGB PIL images -> one embedding an image, of the widest face; None where there is none
        found = [app.get(np.asarray(image)[:, :, ::-1]) for image in images]
        return [max(faces, key=lambda f: f.bbox[2] - f.bbox[0]).embedding if faces else None for faces in found]

and then `FaceEncoder("my_faces.py:embed")`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pixrl.errors import ConfigError, InputError
from pixrl.rewards.preprocess import batches, require_images
from pixrl.rewards.python import import_function, to_pil
from pixrl.rewards.weights import describe_function

FaceFunction = Callable[[list[Image.Image]], Sequence[Any]]
"""A function from PIL images to one embedding, or None, per image."""
BATCH = 32
HOW = (
    "pixrl loads no face encoder, since ArcFace is published as ONNX files for non-commercial use: `pip install "
    "insightface onnxruntime`, save the function `embed` of docs/rewards.md (Diversity) as my_faces.py, and give "
    "my_faces.py:embed."
)


class FaceEncoder:
    """An encoder of faces by a function `f(images) -> [numbers or None, ...]`; nan where it found no face.

    Args:
        function: an import path (`my_faces.py:embed` or `my_module:embed`), or the function.
        batch: pictures that the function is given at a time.

    Raises:
        ConfigError: it is no import path, the module or file cannot be imported, or it has no such function.
    """

    def __init__(self, function: str | FaceFunction, batch: int = BATCH) -> None:
        if isinstance(function, str) and ":" not in function:
            raise ConfigError(f"{function!r} is no import path of a function. {HOW}")
        found: Any = import_function(function) if isinstance(function, str) else function
        self.function: FaceFunction = found
        self.batch = batch
        self.provenance: Mapping[str, str] = {
            **describe_function(found, function if isinstance(function, str) else None),
            "preprocessing": "8-bit; PIL",
        }

    def image_features(self, images_BCHW: Tensor) -> Tensor:
        """Return embeddings [B, E], float32, not normalized; [B, 1] of nan where no picture has a face.

        Raises:
            InputError: the function gave another number of answers, or embeddings of different lengths.
        """
        require_images(images_BCHW)
        rows = [row for part in batches(images_BCHW, self.batch) for row in self._rows(part)]
        lengths = {len(row) for row in rows if row is not None}
        if len(lengths) > 1:
            raise InputError(
                f"{self.provenance['model']} gave embeddings of {sorted(lengths)} numbers; they must be of one length."
            )
        nothing = np.full(lengths.pop() if lengths else 1, np.nan, dtype=np.float32)
        return torch.from_numpy(np.stack([nothing if row is None else row for row in rows]))

    def _rows(self, images_BCHW: Tensor) -> list[np.ndarray | None]:
        answers = list(self.function(to_pil(images_BCHW)))
        if len(answers) != len(images_BCHW):
            raise InputError(
                f"{self.provenance['model']} gave {len(answers)} answers for {len(images_BCHW)} pictures; give one "
                "each."
            )
        return [None if one is None else np.asarray(one, dtype=np.float32).reshape(-1) for one in answers]
