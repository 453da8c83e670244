"""What does not fit between weights and the configs of a pipeline: names and shapes, from headers alone."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from pixrl.hub_check import Reshaped, model_files, read_header
from pixrl.models.published_names import authors_names

Shape = tuple[int, ...]

PREFIXES = {
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("text_encoders.clip_l.", "conditioner.embedders.0.", "cond_stage_model."),
    "text_encoder_2": ("text_encoders.clip_g.", "text_encoders.t5xxl.", "conditioner.embedders.1."),
    "text_encoder_3": ("text_encoders.t5xxl.",),
}
"""How the names of a part's weights begin in a single file of Stability AI or Black Forest Labs."""
BACKBONE = "model.diffusion_model."
"""How the names of the UNet's or the transformer's begin, where other parts are in the file too."""
_TRAINING = ("model_ema.", "alphas_cumprod", "betas", "denoiser.", "log_one_minus", "posterior_", "sqrt_")
"""What Stability AI's training leaves in a file beside the parts."""
_MARKS = {
    "joint_blocks.": "SD3",
    "double_blocks.": "FLUX",
    "input_blocks.": "SDXL or an older Stable Diffusion",
}


@dataclass(frozen=True)
class Misfit:
    """Names as the file has them, or would."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    reshaped: tuple[Reshaped, ...] = ()
    layers: tuple[str, ...] = ()
    """Those of the unexpected ones that lie in more layers than the model has."""

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.reshaped)

    def __add__(self, other: "Misfit") -> "Misfit":
        return Misfit(
            self.missing + other.missing,
            self.unexpected + other.unexpected,
            self.reshaped + other.reshaped,
            self.layers + other.layers,
        )


def compare(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> Misfit:
    """Sorted by name. Shapes of as many numbers are the same: a 1 x 1 convolution is a matrix."""
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
    """`single_blocks.3` of all names within; the empty string where there is no number."""
    match = re.match(r".*?\.\d+(?=\.)", name)
    return match[0] if match else ""


def misfit_of_folder(part: Path, model: torch.nn.Module) -> Misfit:
    """Between the weights in a part's folder and the model that its config describes.

    Raises:
        CheckpointError: a file is missing or cut short.
    """
    found = {name: one.shape for file in model_files(part) for name, one in read_header(file).items()}
    expected = _shapes(model)
    if found.keys().isdisjoint(expected):  # transformers has dropped a level of its CLIPTextModel
        found = {name.removeprefix("text_model."): shape for name, shape in found.items()}
    return compare(found, expected)


def misfit_of_file(file: Path, models: Mapping[str, torch.nn.Module]) -> Misfit:
    """Between a single file and the parts of a pipeline whose authors' names are known: its backbone and its VAE.

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
        names = authors_names(type(model).__name__, _config(model), shapes)
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
    """Whose file it looks like by the names of its weights; None where that cannot be told."""
    return next((family for name in names for mark, family in _MARKS.items() if mark in name), None)


def _own(header: Mapping[str, Shape], part: str) -> tuple[str, dict[str, Shape]]:
    """The prefix and the weights of one part of a file; of the backbone, where it is no known part."""
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
    """The authors' shapes: matrices with one name lie one above the other."""
    found: dict[str, Shape] = {}
    for ours, theirs in names.items():
        shape = shapes[ours]
        found[theirs] = (found[theirs][0] + shape[0], *shape[1:]) if theirs in found else shape
    return found


def _shapes(model: torch.nn.Module) -> dict[str, Shape]:
    return {name: tuple(x.shape) for name, x in model.state_dict().items()}


def _config(model: Any) -> Mapping[str, Any]:
    config: Mapping[str, Any] = model.config
    return config
