"""What a recipe needs that may be missing: files, tokens, packages, devices, disk. Nothing is loaded or downloaded."""

import os
import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from zipfile import is_zipfile

import torch

from pixrl.device import choose_device
from pixrl.doctor.diagnosis import Findings, Need, size
from pixrl.errors import CheckpointError, InputError, PixrlError, RunError
from pixrl.hub import ask, cached_folder, download_command, resolve
from pixrl.hub_check import Layout, check_folder, read_header
from pixrl.libraries import bitsandbytes
from pixrl.rewards.weights import is_weight_file, weight_shards
from pixrl.runs.files import free_bytes
from pixrl.runs.place import require_free
from pixrl.runs.trackers import Tracker, require_trackers

_ZIP = b"PK\x03\x04"
"""How a file of torch.save begins; the list of what it holds stands at its end."""
SHOWN = 60
"""Number of characters of a prompt that a message quotes."""


def require_out(out: Path | None, force: bool, findings: Findings) -> None:
    """Check that the run's folder can be made and written, and holds nothing that is kept."""
    if out is None:
        return
    try:
        if "\0" in str(out):
            raise RunError(f"{str(out)!r} holds a zero byte, which no path has. Choose another --out.")
        require_free(out, force)
        above = next(place for place in out.absolute().parents if os.path.lexists(place))
        if not above.is_dir():
            raise RunError(f"{out} cannot be made: {above} is a file. Choose another --out.")
        if not os.access(out if out.is_dir() else above, os.W_OK | os.X_OK):
            raise RunError(f"{out} cannot be made: {above} may not be written to. Choose another --out.")
    except PixrlError as error:
        findings.miss(Need.PLACE, error)
    except OSError as error:
        findings.miss(
            Need.PLACE, f"{str(out)!r} cannot be the run's folder ({error.strerror}). Choose another --out."
        )


def require_disk(needed: int | None, findings: Findings, folder: Path | None = None) -> None:
    """Check that there is room for the run's folder, in the working directory unless another is given.

    `needed`: bytes; None: not known.
    """
    place = Path.cwd() if folder is None else folder
    free = free_bytes(place)
    if needed is not None and free < needed:
        findings.miss(
            Need.DISK,
            f"The run may need {size(needed)}, and {size(free)} are free in {place}: write less "
            "(output.images_every, output.keep_checkpoints), or give --out on a larger disk.",
        )


def existing_device(name: str) -> torch.device:
    """Return the device as `choose_device` does; a GPU's number must be one that is there.

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


def require_bitsandbytes(purpose: str, findings: Findings) -> None:
    """Check that the package of a base in 4 bits and of the 8-bit optimizer can be imported."""
    with findings.catch(Need.PACKAGE):
        bitsandbytes(purpose)


def find_trackers(trackers: Sequence[Tracker], findings: Findings) -> None:
    """Check that the services that a recipe logs to can be used."""
    try:
        require_trackers(trackers)
    except RunError as error:
        findings.miss(Need.PACKAGE, error)


def require_pieces(folder: Path, findings: Findings) -> None:
    """Check that T5's tokenizer can be read: in some folders it is a SentencePiece file, which needs that package."""
    only_pieces = (folder / "spiece.model").is_file() and not (folder / "tokenizer.json").is_file()
    if only_pieces and find_spec("sentencepiece") is None:
        findings.miss(
            Need.PACKAGE, f"{folder}/spiece.model needs sentencepiece. Type: pip install 'pixrl[rewards]'"
        )


def model_bytes(ref: str, findings: Findings) -> int | None:
    """Return the bytes of the weights of a reward's or a fusion's model; None where they are not there.

    A folder that is not whole, a file that is cut short and a model that cannot be had are problems.
    """
    try:
        if is_weight_file(ref):
            return file_bytes(ref)
        folder = present(ref, findings, weight_shards)
        if folder is None:
            return None
        check_folder(folder, Layout.REWARD)
        require_pieces(folder, findings)
        return sum(file.stat().st_size for file in weight_shards(folder))
    except CheckpointError as error:
        findings.miss(Need.WEIGHTS, error)
        return None


def file_bytes(ref: str | Path, advice: str = "") -> int:
    """Return the bytes of one file of weights.

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
    ref: str, findings: Findings, is_whole: Callable[[Path], object], *, weights: bool = True
) -> Path | None:
    """Return the folder of a reference; None where it is not there, with a problem or a note of the download.

    Args:
        ref: toy:NAME, a folder or a hub id.
        findings: filled with the problem or the note.
        is_whole: tells whether the cache's folder of a hub id holds what is needed of it; may raise CheckpointError.
        weights: whether its weights are needed.
    """
    try:
        place = resolve(ref)
        folder = cached_folder(place) if isinstance(place, str) else place
    except (CheckpointError, InputError) as error:
        findings.miss(Need.WEIGHTS, error)
        return None
    is_there = folder is not None
    if folder is not None and isinstance(place, str):
        try:
            is_there = bool(is_whole(folder))
        except CheckpointError:
            is_there = False
    if not is_there:
        note_download(str(place), findings, weights=weights)
        return None
    return folder


def local_folder(ref: str) -> Path | None:
    """Return the folder of a reference, a hub id's in the cache; None where it is not there."""
    place = resolve(ref)
    return cached_folder(place) if isinstance(place, str) else place


def note_download(ref: str, findings: Findings, *, weights: bool = True, is_generator: bool = False) -> None:
    """Note a download that is possible; one that is not is a problem."""
    try:
        remote = ask(ref)
    except CheckpointError as error:
        is_gated = "is gated" in str(error)
        findings.miss(Need.TOKEN if is_gated else Need.WEIGHTS, error)
        return
    from huggingface_hub import constants

    place = cache = Path(constants.HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if weights and remote.weights > free:
        findings.miss(
            Need.DISK,
            f"{ref} has {size(remote.weights)} of weights, and {size(free)} are free in {cache}.",
        )
    download = download_command(ref)
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


def shortened(text: str) -> str:
    """Return a prompt as a message quotes it."""
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")
