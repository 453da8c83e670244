"""Loading a diffusers pipeline from a folder or from one file, and refusing weights that do not fit its configs.

Each part is loaded by its own class, so that missing and unknown weights are seen: diffusers alone would fill what is
missing with random numbers and only log it.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pixrl.device import Precision, quiet_loading
from pixrl.errors import CheckpointError
from pixrl.hub import Checkpoint, components, weight_files
from pixrl.hub_check import INDEX, T5_COMPONENTS, is_model, read_header, read_json, refuse_misfits

OPTIONAL_PARTS = {"StableDiffusion3Pipeline": T5_COMPONENTS}
"""Parts that a folder may lack: SD3 draws without its T5 encoder."""
_LIBRARIES = ("diffusers", "transformers")
_HARMLESS = ("position_ids", "decoder.", "lm_head.")
"""In the names of weights that published text encoders carry and their classes do not use."""
PREFIXES = {
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("text_encoders.clip_l.", "conditioner.embedders.0.", "cond_stage_model."),
    "text_encoder_2": ("text_encoders.clip_g.", "text_encoders.t5xxl.", "conditioner.embedders.1."),
    "text_encoder_3": ("text_encoders.t5xxl.",),
}
"""How the names of a part's weights begin in a single file of Stability AI or Black Forest Labs."""
_FAILURES = (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError)


def load_pipeline(class_name: str, checkpoint: Checkpoint, precision: Precision, *, t5: bool = True) -> Any:
    """A diffusers pipeline of that class on the CPU, frozen and in evaluation mode.

    `t5`: load SD3's third text encoder where the checkpoint has it.

    Raises:
        CheckpointError: the weights do not fit the configs, or diffusers cannot read them.
    """
    load = _load_folder if checkpoint.file is None else _load_file
    with quiet_loading():
        pipeline = load(class_name, checkpoint, precision, _left_out(class_name, checkpoint.folder, t5))
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return pipeline


def decoder_dtype(precision: Precision) -> torch.dtype:
    """The VAE's: bfloat16 in place of float16, in which its activations overflow."""
    return torch.bfloat16 if precision.weights is torch.float16 else precision.weights


def has_t5(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint's folder holds SD3's third text encoder."""
    return T5_COMPONENTS[0] in components(checkpoint.folder)


def part_class(library: str, class_name: str, source: Path) -> Any:
    """The class of one component of a model_index.json."""
    if library in _LIBRARIES:
        try:
            return getattr(importlib.import_module(library), class_name)  # both load their names on first use
        except (AttributeError, ImportError):
            pass
    raise CheckpointError(
        f"{source}/{INDEX} names {library}.{class_name}, which is not among the classes of the installed "
        f"{' and '.join(_LIBRARIES)}. Install a newer one, or give another checkpoint."
    )


def _left_out(class_name: str, folder: Path, t5: bool) -> dict[str, None]:
    present = components(folder)
    optional = OPTIONAL_PARTS.get(class_name, ())
    return {name: None for name in optional if not t5 or name not in present}


def _load_folder(
    class_name: str, checkpoint: Checkpoint, precision: Precision, without: Mapping[str, None]
) -> Any:
    import diffusers

    folder = checkpoint.folder
    index = read_json(folder / INDEX)
    dtypes = {"vae": decoder_dtype(precision)}
    parts = {
        name: _load_part(folder, name, index[name], dtypes.get(name, precision.weights))
        for name, kind in components(folder).items()
        if is_model(kind) and name not in without
    }
    try:
        return getattr(diffusers, class_name).from_pretrained(
            str(folder), local_files_only=True, **parts, **without
        )
    except _FAILURES as error:
        raise CheckpointError(f"{folder} could not be loaded as a {class_name}: {error}") from error


def _load_part(folder: Path, name: str, entry: Any, dtype: torch.dtype) -> torch.nn.Module:
    part = folder / name
    library, kind = entry
    files = [file.name for file in weight_files(part)]
    variant = "fp16" if files and all(".fp16" in file for file in files) else None
    try:
        model, report = part_class(library, kind, folder).from_pretrained(
            str(part),
            dtype=dtype,
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except _FAILURES as error:
        raise CheckpointError(f"{part} could not be loaded as a {kind}: {error}") from error
    unexpected = [key for key in report["unexpected_keys"] if not any(word in key for word in _HARMLESS)]
    refuse_misfits(sorted(report["missing_keys"]), sorted(unexpected), part, kind)
    loaded: torch.nn.Module = model
    return loaded


def _load_file(
    class_name: str, checkpoint: Checkpoint, precision: Precision, without: Mapping[str, None]
) -> Any:
    """Through diffusers' converters; parts that the file lacks come from the folder."""
    import diffusers

    file, folder = checkpoint.file, checkpoint.folder
    assert file is not None
    beside = _parts_beside(file, folder, precision, without)
    try:
        pipeline = getattr(diffusers, class_name).from_single_file(
            str(file),
            config=str(folder),
            dtype=precision.weights,
            local_files_only=True,
            **beside,
            **without,
        )
    except _FAILURES as error:
        raise CheckpointError(
            f"{file} could not be loaded as a {class_name} with the configs of {folder}: {error}. "
            f"Name the folder or hub id of the model that it belongs to: {file}@FOLDER"
        ) from error
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            left = [key for key, tensor in part.state_dict().items() if tensor.is_meta]
            refuse_misfits(left, [], file, f"{type(part).__name__} ({name})")
    pipeline.vae.to(decoder_dtype(precision))
    return pipeline


def _parts_beside(
    file: Path, folder: Path, precision: Precision, without: Mapping[str, None]
) -> dict[str, torch.nn.Module]:
    """The parts of a pipeline that its single file lacks, from the folder with its configs."""
    keys = read_header(file)
    index = read_json(folder / INDEX)
    parts = {}
    for name in components(folder):
        prefixes = PREFIXES.get(name)
        if prefixes is None or name in without or any(key.startswith(prefixes) for key in keys):
            continue
        if not weight_files(folder / name):
            raise CheckpointError(
                f"{file} holds no {name}, and neither does {folder}. Name a folder or a hub id that does: {file}@FOLDER"
            )
        dtype = decoder_dtype(precision) if name == "vae" else precision.weights
        parts[name] = _load_part(folder, name, index[name], dtype)
    return parts
