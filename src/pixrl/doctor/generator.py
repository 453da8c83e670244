"""The checks of a generator before it is loaded: its files are there, complete and of one model, and prompts fit in.

Of its weights names and shapes alone are compared: those in the headers of safetensors files with those of the models,
made without content.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from pixrl import errors
from pixrl.device import Precision, quiet_loading
from pixrl.doctor.diagnosis import Findings, Need
from pixrl.doctor.needs import note_download, require_pieces, shortened
from pixrl.errors import CheckpointError, PixrlError
from pixrl.hub import Checkpoint, cached_folder, locate, resolve, split_adapter, split_single_file
from pixrl.hub_check import (
    INDEX,
    T5_COMPONENTS,
    Layout,
    check_folder,
    components,
    is_model,
    model_files,
    read_header,
    read_json,
    refuse_misfits,
    remedy,
)
from pixrl.models import adapter_of
from pixrl.models.base import Renderer
from pixrl.models.language import LanguagePolicy
from pixrl.models.loading import DENOISERS, PREFIXES, family, misfit_of_file, misfit_of_folder, part_class
from pixrl.models.lora import files as lora_files
from pixrl.models.memory.estimate import CONTRADICTIONS, VAE, PartSize, empty_text_encoder, part_sizes
from pixrl.models.memory.plan import Base
from pixrl.models.slots import Lora
from pixrl.models.text import check_words

_STEMS = ("model", "diffusion_pytorch_model")
"""Names that transformers and diffusers give to the weights of a part."""
_EXTRA_SIZES = 6
"""Number of values in SDXL's size conditioning."""
CLIP_LENGTH = 77
"""Tokens that CLIP reads at most."""


def find_pipeline(ref: str, findings: Findings, *, fetch: bool = False, t5: bool = True) -> Checkpoint | None:
    """Return the generator's checkpoint where it is on the disk and complete; `fetch`: download it where it is not."""
    try:
        if fetch:
            return locate(ref, t5=t5)
        adapter, place = split_adapter(ref)
        config = split_single_file(place)
        remote = place if config is None else config[1]
        is_remote = remote is not None and isinstance(resolve(remote), str)
        if not is_remote:
            return locate(ref)
        if config is None:
            found = _cached(place, findings)
            if found is not None:
                check_folder(found, Layout.PIPELINE)
            return None if found is None else Checkpoint(found, adapter=adapter)
        found = _cached(str(remote), findings)
        read_header(config[0])
        return None if found is None else Checkpoint(found, config[0], adapter)
    except PixrlError as error:
        findings.miss(Need.WEIGHTS, error)
        return None


def find_parts(
    checkpoint: Checkpoint,
    precision: Precision,
    findings: Findings,
    *,
    t5: bool = True,
    base: Base = Base.DTYPE,
) -> dict[str, PartSize]:
    """Return the size of each part of the generator; {} where its files cannot be read.

    The packages of its tokenizers are checked too.
    """
    for folder in sorted(checkpoint.folder.glob("tokenizer*")):
        require_pieces(folder, findings)
    try:
        return part_sizes(checkpoint, precision, t5=t5, base=base)
    except CheckpointError as error:
        findings.miss(Need.WEIGHTS, error)
        return {}


def find_lora(place: str | None, checkpoint: Checkpoint | None, findings: Findings) -> Lora | None:
    """Return the LoRA that is merged before training, and note it; None where there is none, or it cannot be read."""
    if place is None:
        return None
    layout = None if checkpoint is None else adapter_of(checkpoint).lora_layout
    try:
        if layout is None:
            lora_files.find_lora(Path(place))
            return None
        found = lora_files.open_lora(Path(place), layout)
    except CheckpointError as error:
        findings.miss(Need.WEIGHTS, error)
        return None
    findings.notes.append(f"lora.base {place}: {found.said}; merged before training.")
    return found.lora


def _cached(ref: str, findings: Findings) -> Path | None:
    """Return the folder of the generator's hub id in the cache; otherwise note whether it could be downloaded."""
    folder = cached_folder(ref)
    if folder is None:
        note_download(ref, findings, is_generator=True)
    return folder


def require_texts(
    renderer: Any, checkpoint: Checkpoint, texts: Sequence[str], findings: Findings, *, t5: bool
) -> None:
    """Note the prompts whose end the generator does not read, by its tokenizers, before its encoders are there.

    Raises:
        InputError: the generator has a vocabulary, and a prompt has a word that is not in it.
    """
    check_words(texts, renderer.vocabulary, renderer.name)
    wanted = list(dict.fromkeys(texts))
    lengths: dict[str, tuple[int, list[int]]] = {}
    for name, (tokenizer, most) in _tokenizers(renderer, checkpoint, findings, t5=t5).items():
        with quiet_loading():
            texts = [renderer.framed(text, tokenizer) for text in wanted]
            rows = tokenizer(texts, truncation=False, verbose=False)["input_ids"] if texts else []
        lengths[name] = (most, [len(row) for row in rows])
    cut = {
        name: {n for n, count in enumerate(counts) if count > most}
        for name, (most, counts) in lengths.items()
    }
    by_all = set.intersection(*cut.values()) if cut else set()
    if by_all:
        longest = max(most for most, _ in lengths.values())
        findings.note(
            f"{len(by_all)} of {len(wanted)} prompts are longer than the {longest} tokens that {renderer.name} reads: "
            f"it never sees their end, which rewards judge all the same. The first is "
            f"{shortened(wanted[min(by_all)])}: shorten it{'.' if t5 else ', or take T5 (t5=true), which reads more.'}"
        )
    for name, found in cut.items():
        if found - by_all:
            findings.note(
                f"{len(found - by_all)} of {len(wanted)} prompts are longer than the {lengths[name][0]} tokens that "
                f"{name} reads, which sees their beginning alone; the first is "
                f"{shortened(wanted[min(found - by_all)])}."
            )


def _tokenizers(
    renderer: Any, checkpoint: Checkpoint, findings: Findings, *, t5: bool
) -> dict[str, tuple[Any, int]]:
    """Return each tokenizer by its name, with the number of tokens of a prompt that are read."""
    index: Mapping[str, Any] = read_json(checkpoint.folder / INDEX)
    names = [name for name in components(checkpoint.folder) if name.startswith("tokenizer")]
    found: dict[str, tuple[Any, int]] = {}
    for name in names:
        if name == "tokenizer_3" and not t5:
            continue
        library, kind = index[name]
        try:
            with quiet_loading():
                made = part_class(library, kind, checkpoint.folder).from_pretrained(
                    str(checkpoint.folder / name), local_files_only=True
                )
        except ImportError:
            continue  # `find_parts` says which package is missing
        except (*CONTRADICTIONS, OSError, PixrlError) as error:
            said = next(iter(str(error).splitlines()), type(error).__name__)
            findings.miss(
                Need.WEIGHTS,
                errors.CheckpointError(f"{checkpoint.folder / name} could not be read as a {kind}: {said}"),
            )
            continue
        is_short = kind.startswith("CLIP")
        most = min(CLIP_LENGTH, int(made.model_max_length)) if is_short else int(renderer.framed_length)
        if most:
            found[name] = (made, most)
    return found


def require_fit(checkpoint: Checkpoint, pipeline: Any, findings: Findings, *, t5: bool = True) -> None:
    """Check that the weights fit the configs, and the text encoders the denoiser.

    Args:
        checkpoint: the generator's files.
        pipeline: its denoiser and VAE without content.
        findings: filled with what does not fit.
        t5: whether SD3's third text encoder is wanted.
    """
    folder, file = checkpoint.folder, checkpoint.file
    kinds = {name: kind for name, kind in components(folder).items() if is_model(kind)}
    wanted = [name for name in kinds if t5 or name not in T5_COMPONENTS]
    keys = () if file is None else tuple(read_header(file))
    inside = [
        name
        for name in wanted
        if file is not None
        and (name in DENOISERS or any(key.startswith(PREFIXES.get(name, ("\0",))) for key in keys))
    ]
    index: Mapping[str, Any] = read_json(folder / INDEX)
    texts: dict[str, nn.Module] = {}
    for name in wanted:
        try:
            if name in (*DENOISERS, VAE):
                part = pipeline.components[name]
            else:
                library, kind = index[name]
                part = empty_text_encoder(part_class(library, kind, folder), folder / name)
                texts[name] = part
            if name not in inside:
                _check_part(part, folder / name, kinds[name])
            elif file is not None and name not in texts:
                _check_file(part, name, file)
        except CheckpointError as error:
            findings.miss(Need.WEIGHTS, error)
    denoiser = next(pipeline.components[name] for name in DENOISERS if name in kinds)
    takes, kind = denoiser.config, type(denoiser).__name__
    for what, option, given in _given(adapter_of(checkpoint), kind, takes, texts):
        if takes[option] != given:
            findings.miss(
                Need.WEIGHTS,
                f"{folder}: {option} of the {kind} is {takes[option]}, but {what} give {given}: the configs "
                f"belong to different models. {remedy(folder)}",
            )


def _check_part(part: nn.Module, folder: Path, kind: str) -> None:
    """Check the weights of a part in its own folder.

    Raises:
        CheckpointError: its files have names that nothing loads, or their weights do not fit.
    """
    files = [file.name for file in model_files(folder)]
    variant = ".fp16" if files and all(".fp16" in name for name in files) else ""
    names = [f"{stem}{variant}.safetensors" for stem in _STEMS]  # what diffusers and transformers look for
    if not any(name in files for name in names) and not any(folder.glob("*.safetensors.index*.json")):
        raise CheckpointError(
            f"{folder} holds {files[0] if files else 'no weights'}, and weights are looked for as "
            f"{' or '.join(names)}. Rename the file. {remedy(folder)}"
        )
    if "quantization_config" in read_json(folder / "config.json"):
        return  # its tensors are packed
    misfit = misfit_of_folder(folder, part)
    lacking = set(misfit.missing)
    missing = [name for name in misfit.missing if not _others(part, name) - lacking]
    is_text = kind.startswith(("CLIP", "T5", "Qwen"))  # these carry more than their classes use
    refuse_misfits(missing, () if is_text else misfit.unexpected, folder, kind, misfit.reshaped)


def _check_file(part: nn.Module, name: str, file: Path) -> None:
    """Check the weights of a part in a single file.

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


def _others(part: nn.Module, name: str) -> set[str]:
    """Return the other names of the same parameter; a file needs one of them."""
    names: dict[int, set[str]] = {}
    for one, parameter in part.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(one)
    return next((same - {name} for same in names.values() if name in same), set())


def _given(
    adapter: type[Renderer], kind: str, takes: Any, texts: Mapping[str, Any]
) -> Iterator[tuple[str, str, int]]:
    """Yield which encoders give a width, the denoiser's option that takes it, and the width, where they are known."""
    one, two, three = (
        texts[name].config if name in texts else None
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3")
    )
    if one is None:
        return
    if issubclass(adapter, LanguagePolicy):
        width = len(adapter.layers) * one.get_text_config().hidden_size
        yield "the rows of the language model", adapter.width_option, width
    if two is None:
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
