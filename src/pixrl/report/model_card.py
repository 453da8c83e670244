"""The model card of an exported LoRA, or of whole weights: what it is, what it gained and lost, how to use it.

Names, prompts, reasons and whatever else comes from outside stands in it as mere text (`markdown`) or as code (`code`).
The code that it shows for loading it (`usage`) runs as it stands, once FOLDER is filled in.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from pixrl.config import parse_resolution
from pixrl.hub import TOY_PREFIX, is_hub_id, split_adapter, split_revision, split_single_file
from pixrl.hub_check import INDEX, read_json
from pixrl.models import NOT_STATED, generator_licence
from pixrl.report.align import (
    class_word,
    facts,
    in_words,
    is_unseen,
    learned_by,
    machine_facts,
    method_parts,
    subjects_in_words,
)
from pixrl.report.figures import Change, changes_of, failures, warnings
from pixrl.runs.config import AlignConfig, PersonalizeConfig, Train
from pixrl.runs.folder import RunFolder
from pixrl.runs.reading import (
    MEASURED,
    TRAINED,
    base_and_last,
    before_and_after,
    gallery_entries,
    start_if_any,
)
from pixrl.runs.record import read_rewards, shape_of
from pixrl.untrusted import code, encodable, fenced, markdown

LICENCE = "licence"
SHOWN = 6
"""Pairs of pictures on a card."""
FOLDER, PICTURES, PROMPT = "FOLDER", "PICTURES", "PROMPT"
"""Words in the shown code that the reader replaces."""
DIFFUSERS, COMFYUI, UNO, WEIGHTS = "diffusers", "comfyui", "uno", "weights"
UNO_RANK = 512
"""Rank of UNO's published file, which its app sets."""
PICTURE = "picture.png"
_DRAWING = ("from pixrl.runs.measure import sample", "from pixrl.runs.folder import png_bytes")
_IMAGES = "of seed 0: [1, 3, rows, columns] in [0, 1]"


@dataclass(frozen=True)
class Shown:
    """One pair of a card: for each picture its file in the run and its name in the export."""

    prompt: str
    before: tuple[Path, str]
    after: tuple[Path, str]
    reference: tuple[Path, str] | None = None
    """The reference picture that the model was shown."""
    subject: str | None = None

    @property
    def files(self) -> list[tuple[Path, str]]:
        """All files of the pair, with their names in the export."""
        return [one for one in (self.reference, self.before, self.after) if one is not None]


@dataclass(frozen=True)
class Facts:
    """The facts of an export that the run's folder does not hold."""

    file: str
    slot: str
    step: int
    layout: str
    pipeline: str
    """diffusers' class of the base model."""
    without: tuple[str, ...] = ()
    """Parts that the base model is loaded without."""
    denoiser: str = "transformer"
    """The denoiser's name in the pipeline."""


def shown_pairs(folder: RunFolder, count: int = SHOWN) -> list[Shown]:
    """Return `count` pairs, spread evenly over the evaluation: base and last evaluated weights, from the same noise."""
    found = []
    for entry, before, after in before_and_after(folder):
        names = [f"images/{entry['number']:04d}-{when}.png" for when in ("before", "after")]
        reference = None
        if "reference" in entry and (file := folder.path / entry["reference"]).is_file():
            # shared by pairs of one subject and prompt
            reference = (file, f"images/{file.stem}-reference.png")
        pair = (before, names[0]), (after, names[1])
        found.append(Shown(entry["prompt"], *pair, reference, entry.get("subject")))
    total = min(count, len(found))
    return [found[place * len(found) // total] for place in range(total)]


def write_card(folder: RunFolder, config: AlignConfig, facts: Facts, pairs: Sequence[Shown]) -> str:
    """Return the card as markdown, with the front matter that model hubs read."""
    evaluated = base_and_last(folder)
    changes = changes_of(folder, shape_of(config))
    what = "averaged (ema)" if facts.slot == "ema" else f"trained ({facts.slot})"
    is_full = config.train is Train.FULL
    of_what = "All weights of the denoiser of" if is_full else f"A LoRA of rank {config.lora.rank} on"
    subjects = subjects_in_words(folder, config)
    of_whom = f"It was trained to draw {markdown(subjects)}. " if subjects else ""
    by = markdown(learned_by(config))
    sections = [
        _front_matter(config),
        f"# {markdown(folder.path.name)}\n\n{of_whom}"
        f"{of_what} {code(config.model)}, trained by {by} with "
        f"`pixrl {folder.kind}`: the {what} weights after {facts.step} of {config.steps} steps.",
        _pictures(config, pairs),
        _changes(folder, config, changes, evaluated),
        artefacts(folder, changes),
        _method(folder, config),
        usage(config, facts),
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
    fields["tags"] = [*(["lora"] if config.train is Train.LORA else []), "diffusers", "pixrl", *method]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).strip()}\n---"


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
    """Return a file beside the card as a link takes it: the name of a picture may hold blanks, brackets or bars."""
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
    certainty = (
        "In brackets 95 % over prompts. One seed: another one may end elsewhere."
        if any(change.interval for change in changes)
        else "One seed: no interval."
    )
    head = (
        f"Means over {_evaluated(folder, config)}, from the same noise before and after "
        f"({evaluated[0]['step']} and {evaluated[-1]['step']} updates). {certainty}"
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


def _evaluated(folder: RunFolder, config: AlignConfig) -> str:
    """Say what was drawn before and after training, and whether training saw it."""
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
    """Return the section on what got worse, whatever the reason, and on what was not looked at."""
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
    roles = shape_of(config).roles
    rewards = [
        f"- {code(s.name)} ({s.reward}), "
        f"{f'weight {s.weight:g}' if roles[s.name] == TRAINED else MEASURED}: "
        f"{markdown(', '.join(f'{name} {value}' for name, value in s.options.items()) or 'no options')}"
        for s in config.rewards
    ]
    settings = [
        f"- {name}: {markdown(text)}"
        for name, text in (*method_parts(config), *facts(config, start_if_any(folder)))
    ]
    data = [
        f"- training prompts: {code(config.prompts.source)}",
        f"- evaluation prompts: {code(config.evaluation.source or config.prompts.source)}",
    ]
    if isinstance(config, PersonalizeConfig):
        shown = "of them only what is shown above is part of this folder"
        data.append(f"- reference pictures: those of the subjects named there; {shown}")
    machine = [f"- {name}: {markdown(text)}" for name, text in machine_facts(environment)]
    return "\n".join(["## Method", "", *settings, "", "## Rewards", "", *rewards, "", "## Data", "", *data,
                      "", "## Machine", "", *machine])  # fmt: skip


def _licences(folder: RunFolder, config: AlignConfig) -> str:
    is_lora = config.train is Train.LORA
    rows = [
        (
            config.model,
            f"base model; {'this LoRA derives' if is_lora else 'these weights derive'} from it",
            generator_licence(config.model),
        ),
    ]
    if config.lora.base is not None:
        lora = config.lora.base
        # a file lies in the folder that says its licence, or in one of OWNER/NAME/FILE
        folders = lora if Path(lora).is_dir() else "/".join(Path(lora).parts[-3:-1])
        known = Path(lora).is_dir() or len(Path(lora).parts) > 2
        licence = generator_licence(folders) if known else NOT_STATED
        rows.append((lora, f"LoRA that is part of {'this one' if is_lora else 'them'}", licence))
    for name, provenance in read_rewards(folder).items():
        for key, licence in provenance.items():
            # each part of a reward has its own: `model` with `licence`, `segmenter` with `segmenter_licence`
            if key == LICENCE or key.endswith(f"_{LICENCE}"):
                part = provenance[key.removesuffix(LICENCE).rstrip("_") or "model"]
                rows.append((part, f"of the reward {name}", licence))
    lines = [
        _line([code(what, in_table=True), markdown(role), markdown(licence)]) for what, role, licence in rows
    ]
    return "\n".join(["## Licences", "", "| what | role | licence |", "|---|---|---|", *dict.fromkeys(lines)])


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4g}"


def pipeline_name(model: Path) -> str:
    """Return the name of diffusers' class of a pipeline's folder."""
    return str(read_json(model / INDEX).get("_class_name"))


def usage(config: AlignConfig, facts: Facts) -> str:
    """Return the section that says how to load what was exported, as markdown."""
    parts, file, layout = ["## Use"], facts.file, facts.layout
    if layout == COMFYUI:
        parts.append(
            f"Put `{file}` into `ComfyUI/models/loras` and load it with the node *Load LoRA* (model alone)."
        )
    elif layout == UNO:
        parts.append(
            f"`{file}` has the keys of the file that UNO is published as. pixrl takes it as the base of a run: "
            f"`lora.base: {FOLDER}/{file}`. UNO's own code needs a change for it: the last section."
        )
        return "\n\n".join(parts)
    else:
        note = (
            " diffusers draws with its own sampler, from noise of its own: the pictures are not those of the run, "
            f"which were drawn with pixrl's {config.sampling.solver.value}."
        )
        parts += [
            f"{FOLDER} is where this file lies, {PROMPT} what to draw."
            f"{'' if _needs_pixrl(config, layout) else note}",
            _code(_loaded(config, facts)),
        ]
    if isinstance(config, PersonalizeConfig):
        parts += _references(config, facts)
    return "\n\n".join(parts)


def _is_pipeline(config: AlignConfig, layout: str) -> bool:
    """Return whether the export is a whole pipeline's folder."""
    return config.train is Train.FULL and layout == DIFFUSERS


def _needs_pixrl(config: AlignConfig, layout: str) -> bool:
    """Return whether the base is a model that diffusers alone cannot load."""
    adapter, place = split_adapter(config.model)
    if _is_pipeline(config, layout):
        return bool(adapter)
    return bool(adapter) or place.startswith(TOY_PREFIX) or split_single_file(place) is not None


def _weights(facts: Facts) -> str:
    """Return code that gives whole weights to a pipeline's, or a policy's, denoiser."""
    return f"load_state_dict(load_file({_text(f'{FOLDER}/{facts.file}')}))"


def in_unos_code(file: str, rank: int) -> str:
    """Return a section on what must be set in UNO's code, as markdown: `rank` is that of every module of the file."""
    of_app = "the rank that its `app.py` sets" if rank == UNO_RANK else f"where its `app.py` sets {UNO_RANK}"
    return (
        f"## UNO's own code\n\nEvery LoRA layer of `{file}` has rank {rank}, {of_app}. UNO's code builds its layers of "
        f"one rank before it reads the file, and a file of another rank does not load: set `lora_rank={rank}` in "
        "`UNOPipeline(...)`. Its loader takes the published file from the hub first: in `load_flow_model_only_lora` "
        f"(`uno/flux/util.py`) set `hf_download=False`, and the environment variable `LORA={FOLDER}/{file}`. Layers "
        "that were not trained are in the file as zeros, so that no key of the published layout is missing. It was "
        "not run with UNO's code."
    )


_WITH_PICTURES = ("Flux2KleinPipeline", "FluxKontextPipeline", "QwenImageEditPlusPipeline")
"""The pipelines of diffusers that take reference pictures themselves."""


def _references(config: PersonalizeConfig, facts: Facts) -> list[str]:
    """Say how the reference pictures are shown to a model with these weights."""
    layout = facts.layout
    who = "ComfyUI draws" if layout == COMFYUI else f"A plain {facts.pipeline} draws"
    what = f"{who} with these weights, but shows the model no reference pictures, which it was trained to look at."
    if layout == COMFYUI:
        return [
            f"{what} pixrl shows them; the code is in the card of the layout diffusers, which "
            "`pixrl export RUN --format diffusers` writes to `RUN/export/diffusers/README.md`."
        ]
    if facts.pipeline in _WITH_PICTURES:
        what = f"{who} with these weights, and takes reference pictures as `image=`, in a size of its own."
    return [
        f"{what} pixrl shows them as in training ({PICTURES} is a folder with pictures of the subject):",
        _code(_shown(config, facts)),
    ]


def _code(lines: Iterator[str]) -> str:
    return fenced("\n".join(lines), "python")


def _loaded(config: AlignConfig, facts: Facts) -> Iterator[str]:
    """Yield code for diffusers' pipeline with the export, or for pixrl's model where diffusers cannot load the base."""
    is_pipeline, pipeline = _is_pipeline(config, facts.layout), facts.pipeline
    ref = FOLDER if is_pipeline else config.model
    learned = f"load_lora_weights({_text(FOLDER)}, weight_name={_text(facts.file)})"
    if facts.layout == WEIGHTS:
        learned = f"{facts.denoiser}.{_weights(facts)}"
        yield "from safetensors.torch import load_file"
    if _needs_pixrl(config, facts.layout):
        yield "from pathlib import Path"
        yield ""
        yield "from pixrl import models"
        yield from _DRAWING
        yield ""
        yield f"model = models.load({_text(ref)}{_load_options(config)})"
        yield from () if is_pipeline else (f"model.pipeline.{learned}",)
        yield from _drawn(config, "model", f"model.encode([{_text(PROMPT)}])")
        return
    base, _, revision = ref.partition("@") if is_hub_id(ref) else (ref, "", "")
    pinned = f", revision={_text(revision)}" if revision else ""
    absent = "".join(f", {name}=None" for name in facts.without)
    yield f"from diffusers import {pipeline}"
    yield ""
    yield f"pipeline = {pipeline}.from_pretrained({_text(base)}{pinned}{absent})"
    yield from () if is_pipeline else (f"pipeline.{learned}",)
    yield f"image = pipeline(prompt={_text(PROMPT)}{_keywords(_call(config, pipeline))}).images[0]"
    yield f"image.save({_text(PICTURE)})"


def _call(config: AlignConfig, pipeline: str) -> dict[str, object]:
    """Return the arguments with which a pipeline of diffusers draws as the run's evaluation does."""
    width, height = (None, None) if config.resolution is None else parse_resolution(config.resolution)
    scale, away = "guidance_scale", config.negative_prompt
    if pipeline.startswith("QwenImage"):  # it is guided only where a negative prompt is given
        scale, away = "true_cfg_scale", " " if away is None else away
    key, text = "negative_prompt", None if away is None else _text(away)
    if pipeline.startswith("Flux2") and text is not None:  # it takes one as features alone
        key, text = "negative_prompt_embeds", f"pipeline.encode_prompt({text})[0]"
    found: dict[str, object] = {"num_inference_steps": _steps(config), scale: config.guidance, key: text}
    return found | {"height": height, "width": width}


def _drawn(config: AlignConfig, policy: str, conditioning: str) -> Iterator[str]:
    """Yield code that draws a picture with the run's solver and saves it."""
    yield f"images = sample({policy}, {conditioning}, [0], solver={_text(config.sampling.solver.value)})  # {_IMAGES}"
    yield f"Path({_text(PICTURE)}).write_bytes(png_bytes(images[0]))"


def _keywords(chosen: Mapping[str, object]) -> str:
    return "".join(f", {name}={value}" for name, value in chosen.items() if value is not None)


def _steps(config: AlignConfig) -> int:
    return config.evaluation.steps or config.sampling.steps


def _load_options(config: AlignConfig) -> str:
    """Return the keywords of `models.load` with which the run's evaluation draws."""
    chosen = config.drawing | {"t5": None if config.t5 else False}
    given = {name: _text(one) if isinstance(one, str) else one for name, one in chosen.items()}
    return _keywords({"steps": _steps(config)} | given)


def _shown(config: PersonalizeConfig, facts: Facts) -> Iterator[str]:
    """Yield code that draws one picture of a subject as the run's evaluation draws."""
    references = config.references
    placed = {
        "preset": None if references.preset is None else f"Preset.{references.preset.name}",
        "shift": None if references.shift is None else f"Shift.{references.shift.name}",
        "side": references.side,
        "shape": None if references.shape is None else f"ReferenceShape.{references.shape.name}",
    }
    given = ", ".join(f"{name}={value}" for name, value in placed.items() if value is not None)
    cut = "" if references.count is None else f"[:{references.count}]"
    yield "from pathlib import Path"
    yield ""
    yield "from pixrl import models"
    yield "from pixrl.data.pictures import read_pictures, to_tensors"
    yield _DRAWING[0]
    for module, names in (("flux", ("Preset", "Shift")), ("references", ("ReferenceShape",))):
        if named := [name for name in names if f"={name}." in given]:
            yield f"from pixrl.models.{module} import {', '.join(named)}"
    yield _DRAWING[1]
    yield from ("from safetensors.torch import load_file",) if facts.layout == WEIGHTS else ()
    yield ""
    is_pipeline, file = _is_pipeline(config, facts.layout), facts.file
    yield f"policy = models.load({_text(FOLDER if is_pipeline else config.model)}{_load_options(config)})"
    if given:
        yield f"policy.place({given})"
    if facts.layout == WEIGHTS:
        yield f"policy.denoiser.{_weights(facts)}"
    elif not is_pipeline:
        yield f"policy.merge_lora(Path({_text(FOLDER)}) / {_text(file)})"
    yield f"pictures = to_tensors(read_pictures(Path({_text(PICTURES)})){cut})"
    yield "references = [picture[None] for picture in policy.laid_out(pictures)]"
    yield f"prompts = [{_text(PROMPT)}]"
    yield "conditioning = policy.show(policy.encode(prompts), references, prompts)"
    yield from _drawn(config, "policy", "conditioning")


def _text(value: str) -> str:
    """Return a text as a Python literal in double quotes, on one line."""
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in quoted) + '"'
