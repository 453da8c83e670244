"""What a run of `train: full` learned, for other programs: a pipeline's folder, or the denoiser's weights as one file.

The folder is the base model with the trained denoiser in it, each part in the dtype of the base's own files, by
diffusers' `save_pretrained`. The file has the weights as they were trained, in float32, by diffusers' names. Either is
read back and compared.
"""

import os
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pixrl import models
from pixrl.device import Precision, quiet_loading
from pixrl.errors import CheckpointError, InputError
from pixrl.hub import CARD_FILE, Checkpoint
from pixrl.hub_check import INDEX
from pixrl.models.loading import DENOISERS, denoiser_of, load_pipeline
from pixrl.models.memory.estimate import headers
from pixrl.models.slots import Slot
from pixrl.runs.config import AlignConfig
from pixrl.runs.files import replace_folder, temporary
from pixrl.runs.loaded import SLOTS

FILE = "weights.safetensors"
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def denoiser_name(pipeline: Any) -> str:
    """Return the name of a pipeline's denoiser: transformer or unet."""
    return next(name for name in DENOISERS if pipeline.components.get(name) is not None)


def trained_pipeline(
    config: AlignConfig, checkpoint: Checkpoint, tensors: Mapping[str, Tensor], slot: Slot
) -> Any:
    """Return the base model's pipeline with one slot's weights, in float32 on the CPU.

    Raises:
        CheckpointError: the checkpoint holds no such weights, or those of another model.
    """
    adapter: Any = models.adapter_of(checkpoint)
    pipeline = load_pipeline(adapter.pipeline_class, checkpoint, Precision(torch.float32, None), t5=config.t5)
    prefix = f"{SLOTS}{slot.value}/"
    own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    denoiser = denoiser_of(pipeline)
    known = {name: x.shape for name, x in denoiser.named_parameters()}
    if known != {name: x.shape for name, x in own.items()}:
        raise CheckpointError(
            f"The checkpoint's slot {slot.value!r} does not hold the weights of {config.model}: it has {len(own)} "
            f"tensors, and the model {len(known)}. Put the model back that the run began with."
        )
    denoiser.load_state_dict(own, strict=False)  # buffers are not trained
    return pipeline


def write_file(pipeline: Any, place: Path, metadata: Mapping[str, str]) -> Path:
    """Write the denoiser's weights as one file, all of it or nothing, and return it.

    Raises:
        CheckpointError: what was written is read back as something else.
    """
    content = {name: x.contiguous() for name, x in denoiser_of(pipeline).state_dict().items()}
    place.mkdir(parents=True, exist_ok=True)
    file = place / FILE
    beside = temporary(file, "tmp")
    try:
        save_file(content, beside, metadata=dict(metadata))
        _require_same(load_file(beside), content, file)
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)
    return file


def write_folder(pipeline: Any, checkpoint: Checkpoint, place: Path) -> Path:
    """Write a pipeline's folder, all of it or nothing, and return its model_index.json.

    An export that is there already is replaced.

    Raises:
        InputError: there is something else at that place.
        CheckpointError: what was written is read back as something else.
    """
    if place.exists() and not (place / INDEX).is_file() and any(place.iterdir()):
        raise InputError(f"{place} holds something else than an exported pipeline. Give another --out.")
    parts = {name: one for name, one in pipeline.components.items() if isinstance(one, nn.Module)}
    for name, tensors in headers(checkpoint, list(parts)).items():
        counts = Counter[str]()  # each part gets the dtype that most of its values have in the base's files
        for one in tensors.values():
            counts[one.dtype] += torch.Size(one.shape).numel()
        parts[name].to(_DTYPES.get(counts.most_common(1)[0][0], torch.float32))
    name, denoiser = denoiser_name(pipeline), denoiser_of(pipeline)
    kind: Any = type(denoiser)
    beside = temporary(place.absolute(), "tmp")
    try:
        with quiet_loading():
            pipeline.save_pretrained(beside)
            read = kind.from_pretrained(beside / name, torch_dtype=next(denoiser.parameters()).dtype)
        _require_same(read.state_dict(), denoiser.state_dict(), place / name)
        card = checkpoint.folder / CARD_FILE
        if card.is_file():  # how the model is sampled
            shutil.copyfile(card, beside / CARD_FILE)
        replace_folder(beside, place.absolute())
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return place / INDEX


def _require_same(read: Mapping[str, Tensor], written: Mapping[str, Tensor], place: Path) -> None:
    wrong = sorted(read.keys() ^ written.keys())
    wrong = wrong or [name for name, x in written.items() if not torch.equal(read[name], x)]
    if wrong:
        raise CheckpointError(
            f"{wrong[0]} of {place} is read back as something else than was written, so it was not kept. Install the "
            "versions of constraints.txt, and export again."
        )
