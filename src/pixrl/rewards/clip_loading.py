"""Loading a CLIP: from a transformers folder (`toy:clip`, a path, a hub id) or one file with OpenCLIP's names."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pixrl.device import quiet_loading
from pixrl.errors import CheckpointError
from pixrl.hub import Layout, folder, read_json
from pixrl.rewards.openclip import to_transformers
from pixrl.rewards.preprocess import InputPreprocessing, Preprocessing
from pixrl.rewards.sources import describe, is_weight_file, words_folder
from pixrl.rewards.weights import LOADING_ERRORS, build, load_folder, read_weights

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LoadedClip:
    """A CLIPModel on the CPU, and what its input needs."""

    model: "CLIPModel"
    tokenizer: "PreTrainedTokenizerBase"
    preprocess: InputPreprocessing
    provenance: Mapping[str, str]


def load_clip(
    ref: str | Path,
    processor: str | Path | None,
    preprocess: InputPreprocessing | None,
    dtype: torch.dtype,
) -> LoadedClip:
    """A CLIPModel with tokenizer and preprocessing; see `ClipSimilarity`.

    Raises:
        CheckpointError: a checkpoint is missing, damaged or of another class, or an OpenCLIP file has no `processor`.
    """
    if is_weight_file(ref):
        path = Path(str(ref)).expanduser()
        if processor is None:
            raise CheckpointError(
                f"{path} holds weights alone. Give processor: the folder or hub id of the CLIP it was trained from, "
                "such as laion/CLIP-ViT-H-14-laion2B-s32B-b79K."
            )
        words = words_folder(processor)
        model = _from_openclip(path, words, dtype)
    else:
        path = folder(ref, Layout.REWARD)
        words = path if processor is None else words_folder(processor)
        model = _from_folder(path, dtype)
    preprocess = preprocess or Preprocessing.from_folder(words, square=False)
    with quiet_loading():
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(words, local_files_only=True)
        except LOADING_ERRORS as error:
            raise CheckpointError(f"The tokenizer in {words} could not be loaded: {error}") from error
    provenance = {**describe(ref, path), "preprocessing": preprocess.describe()}
    if processor is not None:
        provenance["processor"] = str(processor)
    return LoadedClip(model, tokenizer, preprocess, provenance)


def _require_clip(path: Path) -> None:
    kind = read_json(path / "config.json").get("model_type")
    if kind != "clip":
        raise CheckpointError(
            f"{path} holds a {kind!r} model; CLIP similarity needs a 'clip' one, such as toy:clip."
        )


def _from_folder(path: Path, dtype: torch.dtype) -> "CLIPModel":
    _require_clip(path)
    with quiet_loading():
        from transformers import CLIPModel

        model: CLIPModel = load_folder(CLIPModel, path, dtype)
    return model


def _from_openclip(file: Path, words: Path, dtype: torch.dtype) -> "CLIPModel":
    """The file's weights in the architecture that the config beside the tokenizer describes."""
    _require_clip(words)
    with quiet_loading():
        from transformers import CLIPConfig, CLIPModel

        config = CLIPConfig.from_pretrained(words, local_files_only=True)
        weights = to_transformers(read_weights([file]), file)
        model: CLIPModel = build(CLIPModel, config, weights, dtype, file)
    return model
