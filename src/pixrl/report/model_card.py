"""The model card of an exported LoRA: what it is, how it was made, what it gained and lost, how to use it.

Names, prompts, reasons and whatever else comes from outside stands in it as mere text (`markdown`) or as code (`code`).
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from pixrl.hub_check import INDEX, read_json
from pixrl.hub_fetch import is_hub_id, split_revision
from pixrl.models import NOT_STATED, generator_licence
from pixrl.report import describe as words
from pixrl.report.align import failures, is_unseen
from pixrl.report.card_usage import usage
from pixrl.report.changes import Change, changes_of, warnings
from pixrl.report.samples import before_and_after, class_word, gallery_entries, in_words, subjects_in_words
from pixrl.rewards.settings import RewardSetting
from pixrl.runs.config import AlignConfig, PersonalizeConfig
from pixrl.runs.folder import RunFolder
from pixrl.runs.record import base_and_last, read_rewards, start_if_any
from pixrl.untrusted import code, encodable, fenced, markdown

LICENCE = "licence"
SHOWN = 6
"""Pairs of pictures."""


@dataclass(frozen=True)
class Shown:
    """One pair of a card: files of the run before and after, and their names in the export."""

    prompt: str
    before: tuple[Path, str]
    after: tuple[Path, str]
    reference: tuple[Path, str] | None = None
    """What the model was shown."""
    subject: str | None = None

    @property
    def files(self) -> list[tuple[Path, str]]:
        """All of them."""
        return [one for one in (self.reference, self.before, self.after) if one is not None]


@dataclass(frozen=True)
class Facts:
    """What the card says that the run's folder does not."""

    file: str
    slot: str
    step: int
    layout: str
    pipeline: str
    """diffusers' class."""
    without: tuple[str, ...] = ()
    """Parts that the base model is loaded without."""


def shown_pairs(folder: RunFolder, count: int = SHOWN) -> list[Shown]:
    """Held-out prompts by the base and by the last evaluated weights, from the same noise; spread evenly."""
    found = []
    for entry, before, after in before_and_after(folder):
        names = [f"images/{entry['number']:04d}-{when}.png" for when in ("before", "after")]
        pair = Shown(entry["prompt"], (before, names[0]), (after, names[1]))
        found.append(replace(pair, reference=_reference(folder, entry), subject=entry.get("subject")))
    total = min(count, len(found))
    return [found[place * len(found) // total] for place in range(total)]


def _reference(folder: RunFolder, entry: Mapping[str, Any]) -> tuple[Path, str] | None:
    """The picture of its subject; pairs of one subject and prompt share it."""
    if "reference" not in entry:
        return None
    file = folder.path / entry["reference"]
    return (file, f"images/{file.stem}-reference.png") if file.is_file() else None


def write_card(folder: RunFolder, config: AlignConfig, facts: Facts, pairs: Sequence[Shown]) -> str:
    """The card as markdown, with the front matter that model hubs read."""
    evaluated = base_and_last(folder)
    changes = changes_of(folder, config)
    sections = [
        _front_matter(config),
        _title(folder, config, facts),
        _pictures(config, pairs),
        _changes(folder, config, changes, evaluated),
        artefacts(folder, changes),
        _method(folder, config),
        usage(config, file=facts.file, layout=facts.layout, pipeline=facts.pipeline, without=facts.without),
        _licences(folder, config),
        f"## Recipe\n\n{fenced(folder.recipe_text().strip(), 'yaml')}",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(config: AlignConfig) -> str:
    fields: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    base = split_revision(config.model)[0]
    if is_hub_id(config.model) and not Path(config.model).is_dir():
        fields["base_model"] = base
    licence = encodable(generator_licence(config.model))
    fields |= {"license": "other", "license_name": licence} if licence != NOT_STATED else {}
    method = ["reinforcement-learning"] if config.loss.learns_from_scores else []
    fields["tags"] = ["lora", "diffusers", "pixrl", *method]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).strip()}\n---"


def _title(folder: RunFolder, config: AlignConfig, facts: Facts) -> str:
    what = "averaged (ema)" if facts.slot == "ema" else f"trained ({facts.slot})"
    subjects = subjects_in_words(folder, config)
    of_whom = f"It was trained to draw {markdown(subjects)}. " if subjects else ""
    by = markdown(words.learned_by(config))
    return (
        f"# {markdown(folder.path.name)}\n\n{of_whom}"
        f"A LoRA of rank {config.lora.rank} on {code(config.model)}, trained by {by} with "
        f"`pixrl {folder.kind}`: the {what} weights after {facts.step} of {config.steps} steps."
    )


def _pictures(config: AlignConfig, pairs: Sequence[Shown]) -> str:
    if not pairs:
        return ""
    with_subject = any(pair.reference for pair in pairs)
    columns = ["prompt", *(["subject"] if with_subject else []), "before", "after"]
    rows = [_row(config, pair, with_subject) for pair in pairs]
    table = [_line(columns), "|---" * len(columns) + "|", *rows]
    return "\n".join(["## Before and after", "", "The same prompt and noise.", "", *table])


def _row(config: AlignConfig, pair: Shown, with_subject: bool) -> str:
    subject = ""
    if pair.reference is not None and pair.subject is not None:
        word = class_word(config.evaluation.source or config.prompts.source, pair.subject)
        subject = f"![reference]({_address(pair.reference[1])}) {markdown(in_words(pair.subject, word))}"
    pictures = [
        f"![{when}]({_address(file)})" for when, (_, file) in (("before", pair.before), ("after", pair.after))
    ]
    return _line([markdown(pair.prompt), *([subject] if with_subject else []), *pictures])


def _address(file: str) -> str:
    """A file beside the card as a link takes it: the name of a picture may hold blanks, brackets or bars."""
    return quote(file.encode(errors="surrogateescape"))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _changes(
    folder: RunFolder, config: AlignConfig, changes: Sequence[Change], evaluated: Sequence[Mapping[str, Any]]
) -> str:
    if not changes:
        return "## Gains and losses\n\nNot measured: the run was exported before its second evaluation."
    rows = [
        f"| {markdown(c.name)} | {c.role} | {_number(c.before)} | {_number(c.after)} | {c.gain_text()} |"
        for c in changes
    ]
    head = (
        f"Means over {_evaluated(folder, config)}, from the same noise before and after "
        f"({evaluated[0]['step']} and {evaluated[-1]['step']} updates). {_certainty(changes)}"
    )
    return "\n".join(
        [
            "## Gains and losses",
            "",
            head,
            "",
            "| | | before | after | change |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )


def _certainty(changes: Sequence[Change]) -> str:
    if any(change.interval for change in changes):
        return "In brackets 95 % over prompts. One seed: another one may end elsewhere."
    return "One seed: no interval."


def _evaluated(folder: RunFolder, config: AlignConfig) -> str:
    """What was drawn before and after, and whether training saw it."""
    start, pictures = start_if_any(folder), len(gallery_entries(folder))
    prompts = pictures // config.evaluation.per_prompt
    counted = f"{pictures} pictures of {prompts} prompts" if pictures else "pictures"
    seen = start.get("trained_on")
    if is_unseen(config, start):
        which = "that training did not see"
    elif seen is None or seen == prompts:
        which = "that training saw too"
    else:
        which = f"of which training saw {seen} too"
    return f"{counted} of {code(config.evaluation.source or config.prompts.source)} {which}"


def artefacts(folder: RunFolder, changes: Sequence[Change]) -> str:
    """What got worse, whatever the reason, and what was not looked at."""
    manifest = folder.manifest()
    signs = warnings(changes)
    found = [f"- {markdown(text)}" for text in signs]
    found += [
        f"- {markdown(c.name)} ({c.role}) fell from {c.before:.3g} to {c.after:.3g}."
        for c in changes
        if c.fell and not any(text.startswith(f"{c.name},") for text in signs)
    ]
    failed = failures(manifest)
    if failed:
        total = sum(count for _, count in failed)
        found.append(
            f"- {total} of {len(manifest)} training pictures had no score: {markdown(failed[0][0])} ..."
        )
    if not found:
        found = ["- None was detected: no figure above fell beyond chance."]
    if not any(c.role == "spread" for c in changes):
        found.append(
            "- How varied the pictures of a prompt are was not measured: evaluation.per_prompt is 1."
        )
    found.append("- A reward measures what it measures. Look at the pictures before you rely on the figures.")
    return "## Known artefacts\n\n" + "\n".join(found)


def _method(folder: RunFolder, config: AlignConfig) -> str:
    environment = json.loads((folder.path / "environment.json").read_text(encoding="utf-8"))
    rewards = [
        f"- {code(s.name)} ({s.reward}), {_counts(config, s)}: {markdown(_options(s))}"
        for s in config.rewards
    ]
    facts = [
        f"- {name}: {markdown(text)}"
        for name, text in (*words.method_parts(config), *words.facts(config, start_if_any(folder)))
    ]
    machine = [f"- {name}: {markdown(text)}" for name, text in words.machine_facts(environment)]
    return "\n".join(["## Method", "", *facts, "", "## Rewards", "", *rewards, "", "## Data", "", *_data(config),
                      "", "## Machine", "", *machine])  # fmt: skip


def _data(config: AlignConfig) -> Iterator[str]:
    yield f"- training prompts: {code(config.prompts.source)}"
    yield f"- evaluation prompts: {code(config.evaluation.source or config.prompts.source)}"
    if isinstance(config, PersonalizeConfig):
        shown = "of them only what is shown above is part of this folder"
        yield f"- reference pictures: those of the subjects named there; {shown}"


def _counts(config: AlignConfig, setting: RewardSetting) -> str:
    trained = words.role_of(config, setting) == words.TRAINED
    return f"weight {setting.weight:g}" if trained else words.MEASURED


def _options(setting: RewardSetting) -> str:
    return ", ".join(f"{name} {value}" for name, value in setting.options.items()) or "no options"


def _licences(folder: RunFolder, config: AlignConfig) -> str:
    rows = [
        (config.model, "base model; this LoRA derives from it", generator_licence(config.model)),
    ]
    if config.lora.base is not None:
        lora = config.lora.base
        rows.append((lora, "LoRA that is part of this one", _lora_licence(lora)))
    for name, provenance in read_rewards(folder).items():
        rows += [(model, f"of the reward {name}", licence) for model, licence in _licensed(provenance)]
    lines = [
        _line([code(what, in_table=True), markdown(role), markdown(licence)]) for what, role, licence in rows
    ]
    return "\n".join(["## Licences", "", "| what | role | licence |", "|---|---|---|", *dict.fromkeys(lines)])


def _licensed(provenance: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Each part of a reward and its licence: `model` with `licence`, `segmenter` with `segmenter_licence`."""
    for key, licence in provenance.items():
        if key == LICENCE or key.endswith(f"_{LICENCE}"):
            yield provenance[key.removesuffix(LICENCE).rstrip("_") or "model"], licence


def _lora_licence(file: str) -> str:
    if Path(file).is_dir():
        return generator_licence(file)
    return generator_licence("/".join(Path(file).parts[-3:-1])) if len(Path(file).parts) > 2 else NOT_STATED


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4g}"


def pipeline_name(model: Path) -> str:
    """diffusers' class of a pipeline's folder."""
    return str(read_json(model / INDEX).get("_class_name"))
