"""What stands against a run is found before a model loads, a folder is made or anything is deleted.

`doctor.examine` and `doctor_fuse.examine_fusion` put all checks together. `pixrl doctor` prints what they find, and the
commands that run call the same function and refuse by it (`require`): what doctor says, the run does. A run then also
scores a synthetic batch with its rewards, before the generator loads (`rehearse`); `pixrl doctor --score` does so too.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pixrl import errors
from pixrl import rewards as rewards_table
from pixrl.data.prompts import Prompt
from pixrl.device import quiet_loading
from pixrl.doctor.diagnosis import Diagnosis, Findings, Need
from pixrl.errors import PixrlError, RunError
from pixrl.hub import TOY_PREFIX, TOY_ROOT, Checkpoint, components, resolve
from pixrl.hub_check import INDEX, read_json
from pixrl.models.base import Renderer
from pixrl.models.estimate import CONTRADICTIONS
from pixrl.models.loading import part_class
from pixrl.rewards.references import references_of
from pixrl.rewards.set import RewardSet
from pixrl.rewards.settings import RewardSetting
from pixrl.runs.place import require_free
from pixrl.types import RewardBatch

TOY_SIDE, TOY_LARGEST = 64, 2**26
"""Pixels of the toy world's pictures, and more parameters than any of its models has."""
CLIP_LENGTH = 77
REHEARSED = 4
"""Pictures of the synthetic batch."""
SHOWN = 60
"""Characters of a prompt that a message quotes."""


def require(found: Diagnosis | Findings) -> tuple[str, ...]:
    """Refuses what cannot run, by the first problem's own error; gives the notes on what can.

    Raises:
        PixrlError: the problems, in one message.
    """
    if not found.problems:
        return tuple(found.notes)
    messages = [problem.message for problem in found.problems]
    kind: type[PixrlError] = vars(errors)[found.problems[0].error]
    if len(messages) == 1:
        raise kind(messages[0])
    raise kind("\n  ".join([f"{len(messages)} things stand against this run:", *messages]))


def require_out(out: Path | None, force: bool, findings: Findings) -> None:
    """The run's folder: nothing that is kept is there, and it can be made and written."""
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


def require_metadata(
    settings: Sequence[RewardSetting],
    sets: Mapping[str, Sequence[Prompt]],
    max_failed_share: float,
    findings: Findings,
) -> None:
    """What each reward must know of the prompts that it scores pictures of.

    Args:
        settings: the rewards.
        sets: setting -> the prompts that it names.
        max_failed_share: of a set's prompts that may lack it; then that is a note.
        findings: where what is missing is noted.
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
                f"({source}); {_short(prompt.text)}: {reason}."
            )
            if len(lacking) > max_failed_share * len(prompts):
                findings.miss(Need.DATA, f"{said} Give prompts that have it, or leave the reward out.")
            else:
                findings.note(said)


def require_own_world(
    renderer: Renderer, parameters: int, named: Iterable[tuple[str, object]], findings: Findings
) -> None:
    """A judge of the toy world has seen nothing but its drawings: of a published model's pictures it knows nothing.

    Args:
        renderer: the generator, without content.
        parameters: of all its parts.
        named: setting -> the checkpoint that it names.
        findings: where that is noted.
    """
    side = renderer.settings.resolution
    if renderer.vocabulary is not None or side <= TOY_SIDE or parameters <= TOY_LARGEST:
        return
    for setting, ref in named:
        if isinstance(ref, str | Path) and _is_toy(ref):
            findings.miss(
                Need.SETTING,
                f"{setting} is {ref}, which has only seen the toy world's drawings of {TOY_SIDE} x {TOY_SIDE}, and "
                f"{renderer.name} draws pictures of {side} x {side}: its scores would mean nothing. Name a published "
                "checkpoint there (docs/rewards.md), or type: --set model=toy:sd3",
            )


def _is_toy(ref: str | Path) -> bool:
    if str(ref).startswith(TOY_PREFIX):
        return True
    try:
        place = resolve(ref)
    except PixrlError:
        return False
    return isinstance(place, Path) and place.resolve().is_relative_to(TOY_ROOT.resolve())


def require_texts(
    renderer: Any, checkpoint: Checkpoint, texts: Sequence[str], findings: Findings, *, t5: bool
) -> None:
    """Every prompt through every tokenizer of the generator, before its text encoders are there."""
    wanted = list(dict.fromkeys(texts))
    lengths: dict[str, tuple[int, list[int]]] = {}
    for name, (tokenizer, most) in _tokenizers(renderer, checkpoint, findings, t5=t5).items():
        with quiet_loading():
            rows = tokenizer(wanted, truncation=False, verbose=False)["input_ids"] if wanted else []
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
            f"{_short(wanted[min(by_all)])}: shorten it{'.' if t5 else ', or take T5 (t5=true), which reads more.'}"
        )
    for name, found in cut.items():
        if found - by_all:
            findings.note(
                f"{len(found - by_all)} of {len(wanted)} prompts are longer than the {lengths[name][0]} tokens that "
                f"{name} reads, which sees their beginning alone; the first is {_short(wanted[min(found - by_all)])}."
            )


def _tokenizers(
    renderer: Any, checkpoint: Checkpoint, findings: Findings, *, t5: bool
) -> dict[str, tuple[Any, int]]:
    """Tokenizer -> itself, and how many tokens of a prompt are read."""
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
            continue  # `require_tokenizers` says which package is missing
        except (*CONTRADICTIONS, OSError, PixrlError) as error:
            said = next(iter(str(error).splitlines()), type(error).__name__)
            findings.miss(
                Need.WEIGHTS,
                errors.CheckpointError(f"{checkpoint.folder / name} could not be read as a {kind}: {said}"),
            )
            continue
        is_long = kind.startswith("T5")
        most = int(renderer.text_length) if is_long else min(CLIP_LENGTH, int(made.model_max_length))
        if most:
            found[name] = (made, most)
    return found


def reward_notes(settings: Sequence[RewardSetting], *, announced: bool) -> Iterator[str]:
    """What the rewards say of themselves, such as which code of the user's a run will execute. Executes none of it.

    `announced`: leave out what a line says that `plugins` prints before it runs.
    """
    for setting in settings:
        with contextlib.suppress(ImportError, PixrlError):  # `find_rewards` says what is wrong
            options = rewards_table.checked_options(setting.reward, setting.options)
            for note in rewards_table.kind_of(setting.reward).notes(options, announced=announced):
                yield f"The reward {setting.name!r} {note}"


def rehearse(rewards: RewardSet, prompts: Sequence[Prompt], side: int, findings: Findings) -> None:
    """Lets every reward score a small synthetic batch: what raises there would raise in the first step.

    Noise is shown, or a prompt's own reference picture where it has one. A picture without a score is only noted, for
    that may lie with the picture.

    Args:
        rewards: all of the run.
        prompts: the actual ones, of which a few are taken.
        side: pixels of the generator's pictures.
        findings: where a reward's failure is noted.
    """
    chosen = [prompts[place * len(prompts) // REHEARSED] for place in range(REHEARSED)] if prompts else []
    if not chosen:
        return
    images = torch.stack([_synthetic(prompt, number, side) for number, prompt in enumerate(chosen)])
    batch = RewardBatch(images, [one.text for one in chosen], [one.metadata for one in chosen])
    count = len(chosen)
    for name, reason in rewards.broken(batch).items():
        said = f"The reward {name!r} failed for {count} of {count} pictures of a synthetic batch: {reason}."
        findings.miss(Need.SERVICE, RunError(said))


def _synthetic(prompt: Prompt, number: int, side: int) -> torch.Tensor:
    """A picture [3, S, S] in [0, 1]: the prompt's first reference, else noise in coarse patches."""
    known = references_of(prompt.metadata) if "reference" in prompt.metadata else []
    noise = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(number))
    shown = known[0].float().cpu() if known else noise
    return torch.nn.functional.interpolate(shown, size=(side, side), mode="bilinear")[0].clamp(0, 1)


def _short(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")
