"""What a recipe's rewards need that may be missing: options, packages, keys, services, and the models that they read.

A reward's own class is asked: whether it can be made with its options (`Reward.examine`), which models it reads and how
(`Reward.reads`), and which packages it lacks (`Reward.lacks_package`).
"""

import os
from collections.abc import Sequence
from pathlib import Path

from pixrl import rewards as rewards_table
from pixrl.data.prompts import Prompt
from pixrl.device import choose_precision
from pixrl.doctor.diagnosis import Findings, Need
from pixrl.doctor.needs import existing_device, file_bytes, model_bytes, present, require_pieces
from pixrl.errors import CheckpointError, ConfigError, InputError, PixrlError, ServiceError
from pixrl.hub import read_json, resolve
from pixrl.hub_fetch import cached_folder
from pixrl.rewards.base import Form, Options, Read, Reward
from pixrl.rewards.http import key_from
from pixrl.rewards.settings import RewardSetting
from pixrl.rewards.weights import WEIGHT_SUFFIXES, is_weight_file

_WRONG_KINDS = (TypeError, ValueError, AttributeError, LookupError)
"""What Python raises for an option of a kind that a reward does not expect."""


def find_rewards(
    settings: Sequence[RewardSetting], prompts: Sequence[Prompt], findings: Findings
) -> dict[str, int]:
    """Model of a reward -> bytes of the weights that are loaded of it, as often as they are; of those that are there.

    Args:
        settings: the rewards.
        prompts: all that they will score pictures of.
        findings: where what is missing is noted.
    """
    found: dict[str, int] = {}
    metadata = [prompt.metadata for prompt in prompts]
    for setting in settings:
        try:
            kind = rewards_table.kind_of(setting.reward)
            options = rewards_table.checked_options(setting.reward, setting.options)
        except ImportError as error:
            findings.miss(
                Need.PACKAGE,
                f"The reward {setting.name!r} needs {error.name}. Type: pip install 'pixrl[rewards]'",
            )
            continue
        except InputError as error:
            findings.miss(Need.SETTING, error)
            continue
        _require_place(setting, options, findings)
        if not _is_refused(setting, kind, options, findings):
            for ref, taken in _models(setting, kind, options, findings):
                found[ref] = found.get(ref, 0) + taken
        package = kind.lacks_package(metadata)
        if package is not None:
            findings.miss(Need.PACKAGE, f"The reward {setting.name!r} {package}")
    return found


def named_models(setting: RewardSetting) -> dict[str, object]:
    """Option -> the model that it names in a recipe; nothing where the reward's options are wrong."""
    try:
        options = rewards_table.checked_options(setting.reward, setting.options)
        reads = rewards_table.kind_of(setting.reward).reads(options)
    except (ImportError, PixrlError):  # `find_rewards` says what is wrong
        return {}
    return {option: setting.options.get(option) for option in reads}


def _is_refused(setting: RewardSetting, kind: type[Reward], options: Options, findings: Findings) -> bool:
    """Whether the reward's class refuses its options; then that is a problem."""
    variable = None if kind.key_option is None else options[kind.key_option]
    try:
        if variable is not None:
            key_from(os.environ, str(variable), f"The reward {setting.name!r}")
    except ConfigError as error:
        findings.miss(Need.TOKEN, error)
        return True
    try:
        kind.examine(options)
    except CheckpointError as error:
        findings.miss(Need.WEIGHTS, error)
    except ServiceError as error:
        findings.miss(Need.SERVICE, error)
    except PixrlError as error:
        findings.miss(Need.SETTING, error)
    except _WRONG_KINDS as error:
        findings.miss(Need.SETTING, f"The reward {setting.name!r} does not take its options: {error}.")
    else:
        return False
    return True


def _require_place(setting: RewardSetting, options: Options, findings: Findings) -> None:
    """The device and precision that a reward's own options name."""
    try:
        if "device" in setting.options:
            choose_precision(existing_device(str(options["device"])), str(options.get("dtype", "auto")))
    except InputError as error:
        findings.miss(Need.DEVICE, f"The reward {setting.name!r}: {error}")


def _models(
    setting: RewardSetting, kind: type[Reward], options: Options, findings: Findings
) -> list[tuple[str, int]]:
    """What a reward reads, and the bytes of its weights."""
    found = []
    for option, read in kind.reads(options).items():
        ref = read.named(options, option)
        try:
            if ref is None and read.beside:
                _require_beside(str(options["model"]), read, findings)
            taken = _bytes(str(ref), read, findings) if isinstance(ref, str | Path) else None
        except CheckpointError as error:
            findings.miss(
                Need.WEIGHTS,
                f"The reward {setting.name!r}, option {option}: {error} {read.advice}".rstrip(),
            )
            continue
        if taken is not None:
            found.append((str(ref), taken))
    return found


def _bytes(ref: str, read: Read, findings: Findings) -> int | None:
    """Bytes of the weights; None where there are none to load, or they are not there.

    Raises:
        CheckpointError: a file is missing, cut short, or another model's.
    """
    if is_weight_file(ref):
        if read.form is Form.MODEL and not read.alone:
            raise CheckpointError(
                f"{ref} is one file of weights; a folder or a hub id with a config is needed."
            )
        return file_bytes(ref)
    if read.form is Form.MODEL:
        taken = model_bytes(ref, findings)
        if taken is not None and read.kinds:
            _require_kind(ref, read.kinds)
        return taken
    names = read.files
    folder = present(
        ref, findings, lambda folder: not _missing(folder, read, names), weights=read.form is Form.FILES
    )
    if folder is None:
        return None
    _require_files(folder, read, names)
    require_pieces(folder, findings)
    if read.form is Form.WORDS:
        return None
    return sum(file_bytes(folder / name) for name in names if name.endswith(WEIGHT_SUFFIXES))


def _require_kind(ref: str, kinds: Sequence[str]) -> None:
    place = resolve(ref)
    folder = cached_folder(place) if isinstance(place, str) else place
    kind = None if folder is None else read_json(folder / "config.json").get("model_type")
    if kind not in kinds:
        raise CheckpointError(
            f"{folder} holds a {kind!r} model, and a {' or '.join(map(repr, kinds))} one is needed."
        )


def _require_beside(model: str, read: Read, findings: Findings) -> None:
    """Config or tokenizer in the folder of the model, where no other is named."""
    names = read.files
    if is_weight_file(model):
        folder: Path | None = Path(model).expanduser().parent
    else:
        place = resolve(model)
        folder = cached_folder(place) if isinstance(place, str) else place
    if folder is None:
        raise CheckpointError(f"It is not given, and {model} is published without {' or '.join(names)}.")
    _require_files(folder, read, names)
    require_pieces(folder, findings)


def _require_files(folder: Path, read: Read, names: Sequence[str]) -> None:
    missing = _missing(folder, read, names)
    if missing:
        raise CheckpointError(f"{folder} holds no {' or '.join(missing)}.")


def _missing(folder: Path, read: Read, names: Sequence[str]) -> Sequence[str]:
    """What a folder lacks: of FILES any, of WORDS all."""
    missing = [name for name in names if not (folder / name).is_file()]
    return missing if read.form is Form.FILES or len(missing) == len(names) else ()
