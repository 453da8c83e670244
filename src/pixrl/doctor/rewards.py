"""What a recipe's rewards need that may be missing: options, packages, keys, services, metadata, models.

A reward's own class is asked: whether it can be made with its options (`Reward.examine`), which models it reads and
how (`Reward.reads`), which packages it lacks (`Reward.lacks_package`), and what it lacks of a prompt (`Reward.lacks`).
Before a run's generator loads, its rewards also score a synthetic batch (`rehearse`).
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from pixrl import rewards as rewards_table
from pixrl.data.prompts import Prompt
from pixrl.device import choose_precision
from pixrl.doctor.diagnosis import Findings, Need
from pixrl.doctor.needs import (
    existing_device,
    file_bytes,
    local_folder,
    model_bytes,
    present,
    require_pieces,
    shortened,
)
from pixrl.errors import CheckpointError, ConfigError, InputError, PixrlError, RunError, ServiceError
from pixrl.hub import TOY_PREFIX, resolve
from pixrl.hub_check import TOY_ROOT, read_json
from pixrl.libraries import require
from pixrl.models.base import Renderer
from pixrl.models.memory.estimate import PartSize, parameters_of
from pixrl.rewards.base import Form, Options, Read, Reward
from pixrl.rewards.http import key_from
from pixrl.rewards.references import references_of
from pixrl.rewards.set import RewardSet
from pixrl.rewards.settings import RewardSetting
from pixrl.rewards.weights import WEIGHT_SUFFIXES, is_weight_file
from pixrl.types import RewardBatch
from pixrl.workers import require_answer

_WRONG_KINDS = (TypeError, ValueError, AttributeError, LookupError)
"""Errors that Python raises for an option of a kind that a reward does not expect."""
TOY_SIDE, TOY_LARGEST = 64, 2**26
"""Side in pixels of the toy world's pictures, and more parameters than any of its models has."""
TOY_MODEL = "--set model=toy:sd3"
"""What to type where the toy world was meant."""
REHEARSED = 4
"""Number of pictures in the synthetic batch."""


def find_rewards(
    settings: Sequence[RewardSetting], prompts: Sequence[Prompt], findings: Findings
) -> dict[str, int]:
    """Return for each model of a reward that is there the bytes of its weights, as often as they are loaded.

    Args:
        settings: the rewards.
        prompts: all prompts of whose pictures they will give scores.
        findings: filled with what is missing.
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
        try:
            if setting.on is not None:
                require("ray", "ray", f"The reward {setting.name!r}")
                require_answer(setting.on.ray)
            elif "device" in setting.options:
                choose_precision(existing_device(str(options["device"])), str(options.get("dtype", "auto")))
        except PixrlError as error:
            findings.miss(Need.DEVICE, f"The reward {setting.name!r}: {error}")
        if not _is_refused(setting, kind, options, findings):
            for ref, taken in _models(setting, kind, options, findings):
                found[ref] = found.get(ref, 0) + (taken if setting.on is None else 0)
        package = kind.lacks_package(metadata)
        if package is not None:
            findings.miss(Need.PACKAGE, f"The reward {setting.name!r} {package}")
    return found


def named_models(settings: Sequence[RewardSetting]) -> dict[str, object]:
    """Return what a recipe gives for each option of a reward that names a model, by the option's dotted path."""
    found: dict[str, object] = {}
    for setting in settings:
        with contextlib.suppress(ImportError, PixrlError):  # `find_rewards` says what is wrong
            options = rewards_table.checked_options(setting.reward, setting.options)
            for option in rewards_table.kind_of(setting.reward).reads(options):
                found[f"rewards.{setting.name}.options.{option}"] = setting.options.get(option)
    return found


def _is_refused(setting: RewardSetting, kind: type[Reward], options: Options, findings: Findings) -> bool:
    """Return whether the reward's class refuses its options, which is then a problem."""
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


def _models(
    setting: RewardSetting, kind: type[Reward], options: Options, findings: Findings
) -> list[tuple[str, int]]:
    """Return the models that a reward reads, with the bytes of their weights."""
    found = []
    for option, read in kind.reads(options).items():
        ref = read.named(options, option)
        try:
            if ref is None and read.beside:  # config or tokenizer lie in the model's folder
                model = str(options["model"])
                folder = Path(model).expanduser().parent if is_weight_file(model) else local_folder(model)
                if folder is None:
                    raise CheckpointError(
                        f"It is not given, and {model} is published without {' or '.join(read.files)}."
                    )
                _require_files(folder, read, read.files)
                require_pieces(folder, findings)
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
    """Return the bytes of a model's weights; None where there are none to load, or they are not there.

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
            folder = local_folder(ref)
            kind = None if folder is None else read_json(folder / "config.json").get("model_type")
            if kind not in read.kinds:
                raise CheckpointError(
                    f"{folder} holds a {kind!r} model, and a {' or '.join(map(repr, read.kinds))} one is needed."
                )
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


def _require_files(folder: Path, read: Read, names: Sequence[str]) -> None:
    missing = _missing(folder, read, names)
    if missing:
        raise CheckpointError(f"{folder} holds no {' or '.join(missing)}.")


def _missing(folder: Path, read: Read, names: Sequence[str]) -> Sequence[str]:
    """Return the files that a folder lacks: each of FILES is needed, of WORDS one."""
    missing = [name for name in names if not (folder / name).is_file()]
    return missing if read.form is Form.FILES or len(missing) == len(names) else ()


def require_metadata(
    settings: Sequence[RewardSetting],
    sets: Mapping[str, Sequence[Prompt]],
    max_failed_share: float,
    findings: Findings,
) -> None:
    """Check that the prompts say what each reward must know of them.

    Args:
        settings: the rewards.
        sets: the prompts by the setting that names them.
        max_failed_share: share of a set's prompts that may lack it, which is then a note.
        findings: filled with what is missing.
    """
    for setting in settings:
        try:
            kind = rewards_table.kind_of(setting.reward)
        except ImportError:
            continue  # `find_rewards` says which package is missing
        for source, prompts in sets.items():
            lacking = [
                (prompt, reason)
                for prompt in prompts
                if (reason := kind.lacks(prompt.text, prompt.metadata, setting.options)) is not None
            ]
            if not lacking:
                continue
            prompt, reason = lacking[0]
            said = (
                f"The reward {setting.name!r} can score no picture of {len(lacking)} of {len(prompts)} prompts "
                f"({source}); {shortened(prompt.text)}: {reason}."
            )
            if len(lacking) > max_failed_share * len(prompts):
                findings.miss(Need.DATA, f"{said} Give prompts that have it, or leave the reward out.")
            else:
                findings.note(said)


def require_own_world(
    renderer: Renderer,
    parts: Mapping[str, PartSize],
    named: Mapping[str, object],
    findings: Findings,
    *,
    instead: str = TOY_MODEL,
) -> None:
    """Refuse judges of the toy world for another generator: they have seen nothing but the toy world's drawings.

    Args:
        renderer: the generator, without content.
        parts: the sizes of its parts.
        named: what the settings that name a judge's checkpoint give, by the setting.
        findings: filled with what is refused.
        instead: what to type where the toy world was meant, or where a recipe with other judges is.
    """
    settings = renderer.settings
    if renderer.vocabulary is not None or settings.longest <= TOY_SIDE or parameters_of(parts) <= TOY_LARGEST:
        return
    for setting, ref in named.items():
        if not isinstance(ref, str | Path):
            continue
        is_toy = str(ref).startswith(TOY_PREFIX)
        with contextlib.suppress(PixrlError):  # what it names is not there, of which others tell
            place = resolve(ref)
            is_toy |= isinstance(place, Path) and place.resolve().is_relative_to(TOY_ROOT.resolve())
        if is_toy:
            findings.miss(
                Need.SETTING,
                f"{setting} is {ref}, which has only seen the toy world's drawings of {TOY_SIDE} x {TOY_SIDE}, and "
                f"{renderer.name} draws pictures of {settings.width} x {settings.height}: its scores would mean "
                f"nothing. Name a published checkpoint there (docs/rewards.md), or type: {instead}",
            )


def reward_notes(settings: Sequence[RewardSetting], *, announced: bool) -> Iterator[str]:
    """Yield what the rewards say of themselves, such as which code of the user's a run will execute; execute none.

    `announced`: leave out what a line says that `plugins` prints before it runs.
    """
    for setting in settings:
        with contextlib.suppress(ImportError, PixrlError):  # `find_rewards` says what is wrong
            options = rewards_table.checked_options(setting.reward, setting.options)
            for note in rewards_table.kind_of(setting.reward).notes(options, announced=announced):
                yield f"The reward {setting.name!r} {note}"


def rehearse(
    rewards: RewardSet, prompts: Sequence[Prompt], size: tuple[int, int], findings: Findings
) -> None:
    """Let every reward score a small synthetic batch: what raises there would raise in the first step.

    Noise is shown, or a prompt's own reference picture where it has one. A picture without a score is only noted, for
    that may lie with the picture.

    Args:
        rewards: all rewards of the run.
        prompts: the run's prompts, of which a few are taken.
        size: width and height in pixels of the generator's pictures.
        findings: filled with the failure of a reward.
    """
    chosen = [prompts[place * len(prompts) // REHEARSED] for place in range(REHEARSED)] if prompts else []
    if not chosen:
        return
    images = []
    for number, prompt in enumerate(chosen):
        known = references_of(prompt.metadata) if "reference" in prompt.metadata else []
        patches = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(number))
        shown = known[0].float().cpu() if known else patches
        images.append(F.interpolate(shown, size=size[::-1], mode="bilinear")[0].clamp(0, 1))
    batch = RewardBatch(torch.stack(images), [one.text for one in chosen], [one.metadata for one in chosen])
    count = len(chosen)
    for name, reason in rewards.broken(batch).items():
        said = f"The reward {name!r} failed for {count} of {count} pictures of a synthetic batch: {reason}."
        findings.miss(Need.SERVICE, RunError(said))
