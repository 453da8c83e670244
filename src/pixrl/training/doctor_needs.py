"""What a recipe needs that may be missing: weights, tokens, packages, data, disk. Nothing is loaded or downloaded."""

import shutil
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from pixrl import rewards as rewards_table
from pixrl.algorithms.optimizers import EIGHT_BIT_EXTRA, EIGHT_BIT_PACKAGE
from pixrl.errors import CheckpointError, ConfigError, InputError, PixrlError
from pixrl.hub import TOY_PREFIX, Checkpoint, Layout, locate, resolve, split_single_file
from pixrl.hub_check import check_folder, read_header
from pixrl.hub_fetch import ask, cache_place, cached_folder, is_hub_id
from pixrl.rewards.settings import RewardSetting
from pixrl.training.diagnosis import Findings, Need, size
from pixrl.training.files import free_bytes

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_FILES = (*_WEIGHTS, ".json", ".jsonl", ".txt", ".csv", ".py", ".yaml", ".yml", ".parquet")


def find_pipeline(ref: str, findings: Findings) -> Checkpoint | None:
    """The generator's checkpoint where it is on the disk and complete."""
    try:
        config = split_single_file(ref)
        remote = ref if config is None else config[1]
        is_remote = remote is not None and isinstance(resolve(remote), str)
        if not is_remote:
            return locate(ref)
        if config is None:
            found = _cached(ref, findings)
            if found is not None:
                check_folder(found, Layout.PIPELINE)
            return None if found is None else Checkpoint(found)
        found = _cached(str(remote), findings)
        read_header(config[0])
        return None if found is None else Checkpoint(found, config[0])
    except PixrlError as error:
        findings.miss(Need.WEIGHTS, error)
        return None


def find_rewards(settings: Sequence[RewardSetting], findings: Findings) -> dict[str, int]:
    """Model of a reward -> bytes of its weights on the disk, of those that are there."""
    found: dict[str, int] = {}
    for setting in settings:
        try:
            options = rewards_table.checked_options(setting.reward, setting.options)
        except ImportError as error:
            findings.miss(
                Need.PACKAGE,
                f"The reward {setting.name!r} needs {error.name}. Type: pip install 'pixrl[rewards]'",
            )
            continue
        except (InputError, ConfigError) as error:
            findings.miss(Need.SETTING, error)
            continue
        for value in (value for value in options.values() if isinstance(value, str)):
            if value not in found and (taken := model_bytes(value, findings)) is not None:
                found[value] = taken
    return found


def model_bytes(ref: str, findings: Findings) -> int | None:
    """Bytes of a model's weights; None where `ref` names no model, or one that is not there."""
    if Path(ref).is_file():
        return Path(ref).stat().st_size if ref.endswith(_WEIGHTS) else None
    is_named = ref.startswith(TOY_PREFIX) or Path(ref).is_dir() or is_hub_id(ref)
    if not is_named:
        return None
    if ref.endswith(_FILES):
        findings.miss(Need.DATA, f"There is no file {ref!r} (looked in {Path.cwd()}).")
        return None
    try:
        place = resolve(ref)
        folder = _cached(place, findings) if isinstance(place, str) else place
    except (CheckpointError, InputError) as error:
        findings.miss(Need.WEIGHTS, error)
        return None
    if folder is None:
        return None
    return sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in _WEIGHTS)


def require_eight_bit(findings: Findings) -> None:
    """The package of the 8-bit optimizer."""
    if find_spec(EIGHT_BIT_PACKAGE) is None:
        findings.miss(
            Need.PACKAGE,
            f"optimizer.eight_bit needs {EIGHT_BIT_PACKAGE}. Type: pip install 'pixrl[{EIGHT_BIT_EXTRA}]'",
        )


def require_tokenizers(checkpoint: Checkpoint, findings: Findings) -> None:
    """T5's tokenizer is a SentencePiece file in some folders, which only that package reads."""
    for folder in sorted(checkpoint.folder.glob("tokenizer*")):
        only_pieces = (folder / "spiece.model").is_file() and not (folder / "tokenizer.json").is_file()
        if only_pieces and find_spec("sentencepiece") is None:
            findings.miss(
                Need.PACKAGE, f"{folder}/spiece.model needs sentencepiece. Type: pip install 'pixrl[rewards]'"
            )


def require_lora(file: str | None, findings: Findings) -> None:
    """A LoRA that is merged before training."""
    if file is None:
        return
    if not Path(file).is_file():
        findings.miss(
            Need.WEIGHTS,
            f"There is no LoRA file {file!r} (looked in {Path.cwd()}). UNO's: hf download bytedance-research/UNO "
            "dit_lora.safetensors --local-dir .",
        )
        return
    try:
        read_header(Path(file))
    except CheckpointError as error:
        findings.miss(Need.WEIGHTS, error)


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
    """The folder of a hub id in the cache. Otherwise whether it could be downloaded is noted."""
    folder = cached_folder(ref)
    if folder is not None:
        return folder
    try:
        remote = ask(ref)
    except CheckpointError as error:
        is_gated = "is gated" in str(error)
        findings.miss(Need.TOKEN if is_gated else Need.WEIGHTS, error)
        return None
    free = _free_for_downloads()
    if remote.weights > free:
        findings.miss(
            Need.DISK,
            f"{ref} has {size(remote.weights)} of weights, and {size(free)} are free in {cache_place()}.",
        )
    findings.notes.append(
        f"{ref} will be downloaded ({size(remote.weights)}); its memory is told once it is there: hf download {ref}"
    )
    return None


def _free_for_downloads() -> int:
    place = cache_place()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def total(sizes: Mapping[str, int]) -> int:
    """Bytes of several models."""
    return sum(sizes.values())
