"""Loading a diffusers pipeline from a folder or from one file, and refusing weights that do not fit its configs.

Each part is loaded by its own class, so that missing and unknown weights are seen: diffusers alone would fill what is
missing with random numbers and only log it. What does not fit is found from the headers of files and said by name.
"""

import importlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from pixrl.device import Precision, quiet_loading
from pixrl.errors import CheckpointError
from pixrl.hub import Checkpoint, weight_files
from pixrl.hub_check import (
    INDEX,
    T5_COMPONENTS,
    Reshaped,
    components,
    is_model,
    misfits,
    model_files,
    read_header,
    read_json,
    refuse_misfits,
)
from pixrl.models.lora.published_names import authors_names

Shape = tuple[int, ...]
DENOISERS = ("transformer", "unet")

PREFIXES = {
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("text_encoders.clip_l.", "conditioner.embedders.0.", "cond_stage_model."),
    "text_encoder_2": ("text_encoders.clip_g.", "text_encoders.t5xxl.", "conditioner.embedders.1."),
    "text_encoder_3": ("text_encoders.t5xxl.",),
}
"""The prefixes of a part's weights in a single file of Stability AI or Black Forest Labs."""
BACKBONE = "model.diffusion_model."
"""The prefix of the UNet's or the transformer's weights, where other parts are in the file too."""
_TRAINING = ("model_ema.", "alphas_cumprod", "betas", "denoiser.", "log_one_minus", "posterior_", "sqrt_")
"""The prefixes of what Stability AI's training leaves in a file beside the parts."""
_MARKS = {
    "joint_blocks.": "SD3",
    "double_blocks.": "FLUX",
    "input_blocks.": "SDXL or an older Stable Diffusion",
}
OPTIONAL_PARTS = {"StableDiffusion3Pipeline": T5_COMPONENTS}
"""The parts that a folder may lack: SD3 draws without its T5 encoder."""
UNUSED_PARTS = {"QwenImageEditPlusPipeline": ("processor",)}
"""The parts that are never loaded: Qwen's processor needs torchvision, and its picture processor is loaded apart."""
_LIBRARIES = ("diffusers", "transformers")
_HARMLESS = ("position_ids", "decoder.", "lm_head.")
"""The names of weights that published text encoders carry and their classes do not use."""
_WITHIN = "model.language_model."
"""What the names of a language model begin with, beside a vision tower."""
_CONVERTED = ("transformer", "unet", "vae")
"""The parts whose names in the authors' files are known."""
_FAILURES = (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError)


@dataclass(frozen=True)
class Misfit:
    """The weights in which a file differs from a model, by the names that the file has for them, or would have."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    reshaped: tuple[Reshaped, ...] = ()
    layers: tuple[str, ...] = ()
    """The unexpected weights that lie in more layers than the model has."""

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.reshaped)

    def __add__(self, other: "Misfit") -> "Misfit":
        return Misfit(
            self.missing + other.missing,
            self.unexpected + other.unexpected,
            self.reshaped + other.reshaped,
            self.layers + other.layers,
        )


def load_pipeline(class_name: str, checkpoint: Checkpoint, precision: Precision, *, t5: bool = True) -> Any:
    """Load a diffusers pipeline of that class on the CPU, frozen and in evaluation mode.

    Args:
        class_name: the pipeline's class in diffusers.
        checkpoint: the folder, or the single file with a folder of configs.
        precision: the dtype of the weights.
        t5: load SD3's third text encoder where the checkpoint has it.

    Raises:
        CheckpointError: the weights do not fit the configs, or diffusers cannot read them.
    """
    load = _load_folder if checkpoint.file is None else _load_file
    present, optional = components(checkpoint.folder), OPTIONAL_PARTS.get(class_name, ())
    without = {name: None for name in optional if not t5 or name not in present}
    without |= dict.fromkeys(UNUSED_PARTS.get(class_name, ()))
    with quiet_loading():
        pipeline = load(class_name, checkpoint, precision, without)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return pipeline


def denoiser_of(pipeline: Any) -> torch.nn.Module:
    """Return the transformer or the UNet of a pipeline."""
    found: torch.nn.Module = next(part for name, part in pipeline.components.items() if name in DENOISERS)
    return found


def decoder_dtype(precision: Precision) -> torch.dtype:
    """Return the VAE's dtype: bfloat16 in place of float16, in which its activations overflow."""
    return torch.bfloat16 if precision.weights is torch.float16 else precision.weights


def has_t5(checkpoint: Checkpoint) -> bool:
    """Return whether the checkpoint's folder holds SD3's third text encoder."""
    return T5_COMPONENTS[0] in components(checkpoint.folder)


def part_class(library: str, class_name: str, source: Path) -> Any:
    """Return the class of one component of a model_index.json.

    Raises:
        CheckpointError: the installed libraries have no such class.
    """
    if library in _LIBRARIES:
        try:
            return getattr(importlib.import_module(library), class_name)  # both load their names on first use
        except (AttributeError, ImportError):
            pass
    raise CheckpointError(
        f"{source}/{INDEX} names {library}.{class_name}, which is not among the classes of the installed "
        f"{' and '.join(_LIBRARIES)}. Install a newer one, or give another checkpoint."
    )


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
    """Return a part as its config describes it, on the meta device."""
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
    """Load a single file through diffusers' converters; parts that it lacks come from the folder."""
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from transformers import PreTrainedModel

    file, folder = checkpoint.file, checkpoint.folder
    assert file is not None
    keys, index = read_header(file), read_json(folder / INDEX)
    beside: dict[str, torch.nn.Module] = {}  # what the file lacks
    for name in components(folder):
        prefixes = PREFIXES.get(name)
        if prefixes is None or name in without or any(key.startswith(prefixes) for key in keys):
            continue
        if not weight_files(folder / name):
            raise CheckpointError(
                f"{file} holds no {name}, and neither does {folder}. Name a folder or a hub id that does: {file}@FOLDER"
            )
        dtype = decoder_dtype(precision) if name == "vae" else precision.weights
        beside[name] = _load_part(folder, name, index[name], dtype)
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
        inside = [name for name in components(folder) if name in _CONVERTED and name not in beside]
        misfit = misfit_of_file(file, {name: _without_weights(folder, name, index[name]) for name in inside})
        raise _no_fit(file, folder, class_name, misfit, str(error)) from error
    made = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    for part in made.values():
        if isinstance(part, PreTrainedModel):
            part.tie_weights()  # a weight that is another by another name (T5's embeddings) gets its value
    left = [
        f"{name}.{key}" for name, part in made.items() for key, x in part.state_dict().items() if x.is_meta
    ]
    if left:
        raise _no_fit(file, folder, class_name, Misfit(missing=tuple(left)), "")
    own = {name: made[name] for name in _CONVERTED if name in made and name not in beside}
    misfit = misfit_of_file(file, own)
    if misfit.layers:  # diffusers would leave them out without a word
        raise _no_fit(file, folder, class_name, Misfit(unexpected=misfit.layers), "")
    pipeline.vae.to(decoder_dtype(precision))
    return pipeline


def _no_fit(file: Path, folder: Path, class_name: str, misfit: Misfit, said: str) -> CheckpointError:
    """Return the error for a file that does not fit; `said`: the loader's message, where the names tell nothing."""
    what = misfits(misfit.missing, misfit.unexpected, misfit.reshaped) if misfit else said
    looks = family(read_header(file))
    return CheckpointError(
        f"{file} does not fit a {class_name} with the configs of {folder}: {what}. "
        + (f"By its names it is a file of {looks}. " if looks else "")
        + f"Name the folder or hub id of the model that it belongs to: {file}@FOLDER"
    )


def compare(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> Misfit:
    """Compare the shapes of a file's weights with a model's, sorted by name.

    Shapes of as many numbers are the same: a 1 x 1 convolution is a matrix.
    """
    unexpected = sorted(found.keys() - expected.keys())
    layers = {_layer(name) for name in expected}
    lists = {layer.rpartition(".")[0] for layer in layers}
    return Misfit(
        tuple(sorted(expected.keys() - found.keys())),
        tuple(unexpected),
        tuple(
            Reshaped(name, found[name], expected[name])
            for name in sorted(found.keys() & expected.keys())
            if prod(found[name]) != prod(expected[name])
        ),
        tuple(
            name
            for name in unexpected
            if (layer := _layer(name)) not in layers and layer.rpartition(".")[0] in lists
        ),
    )


def _layer(name: str) -> str:
    """Return `single_blocks.3` for all names within it; the empty string where there is no number."""
    match = re.match(r".*?\.\d+(?=\.)", name)
    return match[0] if match else ""


def misfit_of_folder(part: Path, model: torch.nn.Module) -> Misfit:
    """Compare the weights in a part's folder with the model that its config describes.

    Raises:
        CheckpointError: a file is missing or cut short.
    """
    found = {name: one.shape for file in model_files(part) for name, one in read_header(file).items()}
    expected = _shapes(model)
    # transformers gives a text encoder's weights other names where it has moved levels since the file: CLIPTextModel
    # has lost one, Qwen3Model takes the files of Qwen3ForCausalLM, and in Qwen2.5-VL the language model and the vision
    # tower are both within the model
    if any(name.startswith(_WITHIN) for name in expected):
        outside = re.compile(r"^model\.(?!language_model\.|visual\.)")
        within = {outside.sub(_WITHIN, name): shape for name, shape in found.items()}
        found = {re.sub(r"^visual\.", "model.visual.", name): shape for name, shape in within.items()}
    elif not any(name in expected for name in found):
        found = {re.sub(r"^(text_)?model\.", "", name): shape for name, shape in found.items()}
    return compare(found, expected)


def misfit_of_file(file: Path, models: Mapping[str, torch.nn.Module]) -> Misfit:
    """Compare a single file with the parts of a pipeline whose authors' names are known: its backbone and its VAE.

    Args:
        file: a safetensors file.
        models: component name -> what its config describes, of those that should be in the file.

    Raises:
        CheckpointError: the file is cut short.
    """
    header = {name: one.shape for name, one in read_header(file).items()}
    total = Misfit()
    for name, model in models.items():
        prefix, own = _own(header, name)
        shapes = _shapes(model)
        config: Any = model.config
        names = authors_names(type(model).__name__, config, shapes)
        if not names:
            continue
        authors = _joined(shapes, names)
        expected = shapes if len(own.keys() & shapes.keys()) > len(own.keys() & authors.keys()) else authors
        total += compare(
            {prefix + key: shape for key, shape in own.items()},
            {prefix + key: shape for key, shape in expected.items()},
        )
    return total


def family(names: Iterable[str]) -> str | None:
    """Return the model family of a file by the names of its weights; None where that cannot be told."""
    return next((family for name in names for mark, family in _MARKS.items() if mark in name), None)


def _own(header: Mapping[str, Shape], part: str) -> tuple[str, dict[str, Shape]]:
    """Return the prefix and the weights of one part of a file; of the backbone, where it is no known part."""
    if part in PREFIXES:
        prefix = next((p for p in PREFIXES[part] if any(name.startswith(p) for name in header)), "")
    else:
        prefix = BACKBONE if any(name.startswith(BACKBONE) for name in header) else ""
    others = tuple(p for prefixes in PREFIXES.values() for p in prefixes) + _TRAINING
    if prefix:
        return prefix, {
            name.removeprefix(prefix): shape for name, shape in header.items() if name.startswith(prefix)
        }
    return "", {name: shape for name, shape in header.items() if not name.startswith(others)}


def _joined(shapes: Mapping[str, Shape], names: Mapping[str, str]) -> dict[str, Shape]:
    """Return the shapes by the authors' names; matrices with one name lie one above the other."""
    found: dict[str, Shape] = {}
    for ours, theirs in names.items():
        shape = shapes[ours]
        found[theirs] = (found[theirs][0] + shape[0], *shape[1:]) if theirs in found else shape
    return found


def _shapes(model: torch.nn.Module) -> dict[str, Shape]:
    return {name: tuple(x.shape) for name, x in model.state_dict().items()}
