"""Whether a generator's weights are those that its configs describe, and its text encoders those that it takes.

Names and shapes alone are compared: those in the headers of safetensors files with those of the models, made without
content (`models.fit`).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pixrl.doctor.diagnosis import Findings, Need
from pixrl.errors import CheckpointError
from pixrl.hub import Checkpoint, components
from pixrl.hub_check import (
    INDEX,
    T5_COMPONENTS,
    is_model,
    model_files,
    read_header,
    read_json,
    refuse_misfits,
    remedy,
)
from pixrl.models.estimate import DENOISERS, VAE, empty_text_encoder
from pixrl.models.loading import PREFIXES, family, misfit_of_file, misfit_of_folder, part_class

_STEMS = ("model", "diffusion_pytorch_model")
"""How transformers and diffusers call the weights of a part."""
_EXTRA_SIZES = 6
"""Numbers of SDXL's size conditioning."""


def require_fit(checkpoint: Checkpoint, pipeline: Any, findings: Findings, *, t5: bool = True) -> None:
    """Findings where the weights do not fit the configs, or the text encoders not the denoiser.

    Args:
        checkpoint: of the generator.
        pipeline: its denoiser and VAE without content.
        findings: where what is wrong is noted.
        t5: whether SD3's third text encoder is wanted.
    """
    folder, file = checkpoint.folder, checkpoint.file
    kinds = {name: kind for name, kind in components(folder).items() if is_model(kind)}
    wanted = [name for name in kinds if t5 or name not in T5_COMPONENTS]
    inside = [] if file is None else [name for name in wanted if _in_file(name, file)]
    texts: dict[str, nn.Module] = {}
    for name in wanted:
        try:
            part = pipeline.components[name] if name in (*DENOISERS, VAE) else _text(folder, name)
            texts |= {} if name in (*DENOISERS, VAE) else {name: part}
            if name not in inside:
                _check_part(part, folder / name, kinds[name])
            elif file is not None and name not in texts:
                _check_file(part, name, file)
        except CheckpointError as error:
            findings.miss(Need.WEIGHTS, error)
    denoiser = next(pipeline.components[name] for name in DENOISERS if name in kinds)
    for sentence in _contradictions(denoiser, texts):
        findings.miss(Need.WEIGHTS, f"{folder}: {sentence} {remedy(folder)}")


def _text(folder: Path, name: str) -> nn.Module:
    entry: Any = read_json(folder / INDEX)[name]
    library, kind = entry
    return empty_text_encoder(part_class(library, kind, folder), folder / name)


def _in_file(name: str, file: Path) -> bool:
    """Whether a part's weights come from the single file."""
    return name in DENOISERS or any(key.startswith(PREFIXES.get(name, ("\0",))) for key in read_header(file))


def _check_part(part: nn.Module, folder: Path, kind: str) -> None:
    """Of a part in its own folder.

    Raises:
        CheckpointError: its files have names that nothing loads, or their weights do not fit.
    """
    _check_names(folder)
    if "quantization_config" in read_json(folder / "config.json"):
        return  # its tensors are packed
    misfit = misfit_of_folder(folder, part)
    lacking = set(misfit.missing)
    missing = [name for name in misfit.missing if not _others(part, name) - lacking]
    is_text = kind.startswith(("CLIP", "T5"))  # these carry more than their classes use
    refuse_misfits(missing, () if is_text else misfit.unexpected, folder, kind, misfit.reshaped)


def _check_file(part: nn.Module, name: str, file: Path) -> None:
    """Of a part in a single file.

    Raises:
        CheckpointError: the file holds no such part, or one of other sizes.
    """
    misfit = misfit_of_file(file, {name: part})
    if misfit.missing or misfit.reshaped or misfit.layers:
        kind = f"{type(part).__name__} ({name})"
        looks = family(read_header(file))
        is_of = f"By its names it is a file of {looks}: " if looks else ""
        try:
            refuse_misfits(misfit.missing, misfit.layers or misfit.unexpected, file, kind, misfit.reshaped)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} {is_of}name the folder or hub id of the model that it belongs to: {file}@FOLDER"
            ) from None


def _check_names(folder: Path) -> None:
    """Refuses weights under names that diffusers and transformers do not look for."""
    files = [file.name for file in model_files(folder)]
    variant = ".fp16" if files and all(".fp16" in name for name in files) else ""
    names = [f"{stem}{variant}.safetensors" for stem in _STEMS]
    if not any(name in files for name in names) and not any(folder.glob("*.safetensors.index*.json")):
        raise CheckpointError(
            f"{folder} holds {files[0] if files else 'no weights'}, and weights are looked for as "
            f"{' or '.join(names)}. Rename the file. {remedy(folder)}"
        )


def _others(part: nn.Module, name: str) -> set[str]:
    """Further names of the same parameter, of which a file needs one."""
    names: dict[int, set[str]] = {}
    for one, parameter in part.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(one)
    return next((same - {name} for same in names.values() if name in same), set())


def _contradictions(denoiser: Any, texts: Mapping[str, Any]) -> Iterator[str]:
    """Sentences on what the denoiser takes and its text encoders do not give."""
    takes = denoiser.config
    for what, option, given in _given(type(denoiser).__name__, takes, texts):
        if takes[option] != given:
            yield (
                f"{option} of the {type(denoiser).__name__} is {takes[option]}, but {what} give {given}: the configs "
                "belong to different models."
            )


def _given(kind: str, takes: Any, texts: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    """What gives it, the denoiser's option, and how wide it is; nothing where an encoder is unknown."""
    one, two, three = (
        texts[name].config if name in texts else None
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3")
    )
    if one is None or two is None:
        return
    if kind == "SD3Transformer2DModel":
        yield "both CLIPs", "pooled_projection_dim", one.projection_dim + two.projection_dim
        if three is not None:
            yield "the rows of T5", "joint_attention_dim", three.d_model
    elif kind == "FluxTransformer2DModel":
        yield "the pooled features of CLIP", "pooled_projection_dim", one.hidden_size
        yield "the rows of T5", "joint_attention_dim", two.d_model
    elif kind == "UNet2DConditionModel":
        yield "both CLIPs", "cross_attention_dim", one.hidden_size + two.hidden_size
        sizes = _EXTRA_SIZES * takes["addition_time_embed_dim"]
        yield (
            "the second CLIP and the sizes",
            "projection_class_embeddings_input_dim",
            two.projection_dim + sizes,
        )
