"""Face embeddings by a function of yours: no class of transformers has ArcFace, and its packs are non-commercial.

With insightface (its model packs are non-commercial):

    # my_faces.py
    import numpy as np
    from insightface.app import FaceAnalysis

    app = FaceAnalysis(name="buffalo_l")
    app.prepare(ctx_id=0)

    def embed(images):
        # RGB PIL images -> one embedding an image, of the largest face; None where there is none
        found = [app.get(np.asarray(image)[:, :, ::-1]) for image in images]
        return [max(faces, key=lambda f: f.bbox[2] - f.bbox[0]).embedding if faces else None for faces in found]
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pixrl.errors import InputError
from pixrl.rewards.preprocess import require_images
from pixrl.rewards.python_reward import import_function, to_pil

FaceFunction = Callable[[list[Image.Image]], Sequence[Any]]


class FaceEncoder:
    """Embeddings [N, E] of a function `f(images) -> [numbers or None, ...]`; a row of nan where it found no face.

    Args:
        function: an import path (`my_faces.py:embed` or `my_module:embed`), or the function.

    Raises:
        ConfigError: the module or file cannot be imported, or has no such function.
    """

    def __init__(self, function: str | FaceFunction) -> None:
        found: Any = import_function(function) if isinstance(function, str) else function
        self.function: FaceFunction = found
        label = function if isinstance(function, str) else f"{function.__module__}:{function.__qualname__}"
        self.provenance: Mapping[str, str] = {"model": label, "preprocessing": "8-bit; PIL"}

    def image_features(self, images_BCHW: Tensor) -> Tensor:
        """Embeddings [B, E], float32, not normalized.

        Raises:
            InputError: the function gave another number of answers, or embeddings of different lengths.
        """
        require_images(images_BCHW)
        answers = list(self.function(to_pil(images_BCHW)))
        label = self.provenance["model"]
        if len(answers) != len(images_BCHW):
            raise InputError(
                f"{label} gave {len(answers)} answers for {len(images_BCHW)} pictures; give one each."
            )
        rows = [None if one is None else np.asarray(one, dtype=np.float32).reshape(-1) for one in answers]
        lengths = {len(row) for row in rows if row is not None}
        if len(lengths) > 1:
            raise InputError(
                f"{label} gave embeddings of {sorted(lengths)} numbers; they must be of one length."
            )
        nothing = np.full(lengths.pop() if lengths else 1, np.nan, dtype=np.float32)
        return torch.from_numpy(np.stack([nothing if row is None else row for row in rows]))
