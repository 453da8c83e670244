"""What a recipe needs that may be missing: weights, tokens, packages, data, disk. Nothing is loaded or downloaded."""

import shutil
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from zipfile import is_zipfile

import torch

from pixrl.algorithms.optim import EIGHT_BIT_EXTRA, EIGHT_BIT_PACKAGE
from pixrl.device import Precision, choose_device
from pixrl.doctor.diagnosis import Findings, Need, size
from pixrl.errors import CheckpointError, InputError, PixrlError
from pixrl.hub import Checkpoint, Layout, locate, resolve, split_adapter, split_single_file
from pixrl.hub_check import check_folder, read_header
from pixrl.hub_fetch import ask, cache_place, cached_folder, split_revision
from pixrl.models import adapter_of, lora_files
from pixrl.models.estimate import PartSize, part_sizes
from pixrl.models.slots import Lora
from pixrl.rewards.weights import is_weight_file, weight_shards
from pixrl.runs.files import free_bytes

_ZIP = b"PK\x03\x04"
"""How a file of torch.save begins; the list of what it holds stands at its end."""


def find_pipeline(ref: str, findings: Findings, *, fetch: bool = False, t5: bool = True) -> Checkpoint | None:
    """The generator's checkpoint where it is on the disk and complete. `fetch`: it is downloaded where it is not."""
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
    checkpoint: Checkpoint, precision: Precision, findings: Findings, *, t5: bool = True
) -> dict[str, PartSize]:
    """Part of the generator -> its size; none where its files cannot be read."""
    try:
        return part_sizes(checkpoint, precision, t5=t5)
    except CheckpointError as error:
        findings.miss(Need.WEIGHTS, error)
        return {}


def model_bytes(ref: str, findings: Findings) -> int | None:
    """Bytes of the weights that a reward's or a fusion's model is loaded from; None where they are not there.

    A folder that is not whole, a file that is cut short and a model that cannot be had are problems.
    """
    try:
        if is_weight_file(ref):
            return file_bytes(ref)
        folder = present(ref, findings, _has_weights)
        if folder is None:
            return None
        check_folder(folder, Layout.REWARD)
        require_pieces(folder, findings)
        return sum(file.stat().st_size for file in weight_shards(folder))
    except CheckpointError as error:
        findings.miss(Need.WEIGHTS, error)
        return None


def file_bytes(ref: str | Path, advice: str = "") -> int:
    """Bytes of one file of weights.

    Raises:
        CheckpointError: it is not there, or cut short.
    """
    file = Path(ref).expanduser()
    if not file.is_file():
        raise CheckpointError(f"There is no file {str(ref)!r} (looked in {Path.cwd()}). {advice}".rstrip())
    if file.suffix == ".safetensors":
        read_header(file)
        return file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(len(_ZIP))
    if not start or (start == _ZIP and not is_zipfile(file)):
        raise CheckpointError(
            f"{file} is cut short: {file.stat().st_size} bytes, without the end of its list of tensors. Download it "
            "again."
        )
    return file.stat().st_size


def present(
    ref: str, findings: Findings, is_whole: Callable[[Path], bool], *, weights: bool = True
) -> Path | None:
    """The folder of a reference. None where it is not there: a problem, or a note that it will be downloaded.

    Args:
        ref: toy:NAME, a folder or a hub id.
        findings: where that is noted.
        is_whole: whether the cache's folder of a hub id holds what is needed of it.
        weights: whether its weights are.
    """
    try:
        place = resolve(ref)
        folder = cached_folder(place) if isinstance(place, str) else place
    except (CheckpointError, InputError) as error:
        findings.miss(Need.WEIGHTS, error)
        return None
    if folder is None or (isinstance(place, str) and not is_whole(folder)):
        _note_download(str(place), findings, weights=weights)
        return None
    return folder


def _has_weights(folder: Path) -> bool:
    """Whether the files of some weights are there, cut short or not."""
    try:
        return bool(weight_shards(folder))
    except CheckpointError:
        return False


def existing_device(name: str) -> torch.device:
    """As `choose_device`, and a GPU's number must be one that is there.

    Raises:
        InputError: there is no such device.
    """
    try:
        chosen = choose_device(name)
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        raise InputError(
            f"Unknown device {name!r} ({said}). Use 'auto', 'cpu', 'cuda' or 'cuda:N'."
        ) from None
    count = torch.cuda.device_count()
    if chosen.type == "cuda" and (chosen.index or 0) >= count:
        raise InputError(
            f"device {name!r}: there are {count} GPUs here, numbered from 0. Use 'auto', 'cpu' or 'cuda:0'."
        )
    return chosen


def require_eight_bit(findings: Findings) -> None:
    """The package of the 8-bit optimizer."""
    if find_spec(EIGHT_BIT_PACKAGE) is None:
        findings.miss(
            Need.PACKAGE,
            f"optimizer.eight_bit needs {EIGHT_BIT_PACKAGE}. Type: pip install 'pixrl[{EIGHT_BIT_EXTRA}]'",
        )


def require_tokenizers(checkpoint: Checkpoint, findings: Findings) -> None:
    """The packages of a generator's tokenizers."""
    for folder in sorted(checkpoint.folder.glob("tokenizer*")):
        require_pieces(folder, findings)


def require_pieces(folder: Path, findings: Findings) -> None:
    """T5's tokenizer is a SentencePiece file in some folders, which only that package reads."""
    only_pieces = (folder / "spiece.model").is_file() and not (folder / "tokenizer.json").is_file()
    if only_pieces and find_spec("sentencepiece") is None:
        findings.miss(
            Need.PACKAGE, f"{folder}/spiece.model needs sentencepiece. Type: pip install 'pixrl[rewards]'"
        )


def find_lora(place: str | None, checkpoint: Checkpoint | None, findings: Findings) -> Lora | None:
    """The LoRA that is merged before training, which is noted; None where there is none, or it cannot be read."""
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


def require_disk(needed: int, findings: Findings, folder: Path | None = None) -> None:
    """Room for the run's folder, under runs/ here unless another is given."""
    place = Path.cwd() if folder is None else folder
    free = free_bytes(place)
    if free < needed:
        findings.miss(
            Need.DISK,
            f"The run may need {size(needed)}, and {size(free)} are free in {place}: write less "
            "(output.images_every, output.keep_checkpoints), or give --out on a larger disk.",
        )


def _cached(ref: str, findings: Findings) -> Path | None:
    """The folder of the generator's hub id in the cache. Otherwise whether it could be downloaded is noted."""
    folder = cached_folder(ref)
    if folder is None:
        _note_download(ref, findings, is_generator=True)
    return folder


def _note_download(ref: str, findings: Findings, *, weights: bool = True, is_generator: bool = False) -> None:
    """Notes a download that is possible; one that is not is a problem."""
    try:
        remote = ask(ref)
    except CheckpointError as error:
        is_gated = "is gated" in str(error)
        findings.miss(Need.TOKEN if is_gated else Need.WEIGHTS, error)
        return
    free = _free_for_downloads()
    if weights and remote.weights > free:
        findings.miss(
            Need.DISK,
            f"{ref} has {size(remote.weights)} of weights, and {size(free)} are free in {cache_place()}.",
        )
    repo, revision = split_revision(ref)
    download = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
    if is_generator:
        findings.notes.append(
            f"{ref} will be downloaded ({size(remote.weights)} of weights). Its parameters, memory and micro-batches "
            f"are not known before its configs are there, so memory was not checked. To check it first, type: "
            f"{download}"
        )
    elif weights:
        findings.notes.append(
            f"{ref} will be downloaded ({size(remote.weights)} of weights); they are not in the memory above. To "
            f"count them, type: {download}"
        )
    else:
        findings.notes.append(f"The configs and the tokenizer of {ref} will be downloaded.")


def _free_for_downloads() -> int:
    place = cache_place()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def total(sizes: Mapping[str, int]) -> int:
    """Bytes of several models."""
    return sum(sizes.values())
