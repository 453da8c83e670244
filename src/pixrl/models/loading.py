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
from pixrl.hub_check import INDEX, T5_COMPONENTS, is_model, misfits, read_header, read_json, refuse_misfits
from pixrl.models.fit import PREFIXES, Misfit, family, misfit_of_file, misfit_of_folder

__all__ = ["OPTIONAL_PARTS", "PREFIXES", "decoder_dtype", "has_t5", "load_pipeline", "part_class"]

OPTIONAL_PARTS = {"StableDiffusion3Pipeline": T5_COMPONENTS}
"""Parts that a folder may lack: SD3 draws without its T5 encoder."""
_LIBRARIES = ("diffusers", "transformers")
_HARMLESS = ("position_ids", "decoder.", "lm_head.")
"""In the names of weights that published text encoders carry and their classes do not use."""
_CONVERTED = ("transformer", "unet", "vae")
"""Parts whose names in the authors' files are known."""
_FAILURES = (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError)


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
        misfit = misfit_of_folder(part, _without_weights(folder, name, entry))
        refuse_misfits((), (), part, kind, misfit.reshaped)
        raise CheckpointError(f"{part} could not be loaded as a {kind}: {error}") from error
    unexpected = [key for key in report["unexpected_keys"] if not any(word in key for word in _HARMLESS)]
    refuse_misfits(sorted(report["missing_keys"]), sorted(unexpected), part, kind)
    loaded: torch.nn.Module = model
    return loaded


def _without_weights(folder: Path, name: str, entry: Any) -> torch.nn.Module:
    """A part as its config describes it, on the meta device."""
    library, class_name = entry
    kind = part_class(library, class_name, folder)
    try:
        with torch.device("meta"):
            made: torch.nn.Module = (
                kind.from_config(read_json(folder / name / "config.json"))
                if library == "diffusers"
                else kind(kind.config_class.from_pretrained(str(folder / name)))
            )
    except _FAILURES as error:
        raise CheckpointError(
            f"{folder}/{name}/config.json does not describe a {class_name}: {error}"
        ) from error
    return made


def _load_file(
    class_name: str, checkpoint: Checkpoint, precision: Precision, without: Mapping[str, None]
) -> Any:
    """Through diffusers' converters; parts that the file lacks come from the folder."""
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

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
    except (*_FAILURES, SingleFileComponentError) as error:
        index = read_json(folder / INDEX)
        inside = [name for name in components(folder) if name in _CONVERTED and name not in beside]
        misfit = misfit_of_file(file, {name: _without_weights(folder, name, index[name]) for name in inside})
        raise _no_fit(file, folder, class_name, misfit, str(error)) from error
    made = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    left = [f"{name}.{key}" for name, part in made.items() for key in _without_value(part)]
    if left:
        raise _no_fit(file, folder, class_name, Misfit(missing=tuple(left)), "")
    own = {name: made[name] for name in _CONVERTED if name in made and name not in beside}
    misfit = misfit_of_file(file, own)
    if misfit.layers:  # diffusers would leave them out without a word
        raise _no_fit(file, folder, class_name, Misfit(unexpected=misfit.layers), "")
    pipeline.vae.to(decoder_dtype(precision))
    return pipeline


def _without_value(part: torch.nn.Module) -> list[str]:
    """Weights that a single file did not have. One that is another by another name (T5's embeddings) gets its value."""
    from transformers import PreTrainedModel

    if isinstance(part, PreTrainedModel):
        part.tie_weights()
    return [key for key, tensor in part.state_dict().items() if tensor.is_meta]


def _no_fit(file: Path, folder: Path, class_name: str, misfit: Misfit, said: str) -> CheckpointError:
    """`said`: the loader's own words, for where the names and shapes tell nothing."""
    what = misfits(misfit.missing, misfit.unexpected, misfit.reshaped) if misfit else said
    looks = family(read_header(file))
    return CheckpointError(
        f"{file} does not fit a {class_name} with the configs of {folder}: {what}. "
        + (f"By its names it is a file of {looks}. " if looks else "")
        + f"Name the folder or hub id of the model that it belongs to: {file}@FOLDER"
    )


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
