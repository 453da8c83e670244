"""The report of an alignment, finished or not: one HTML page that needs nothing but itself.

Its figures and charts are those of `figures.py`, which the studio shows too; what only a report says is here, and the
run in words, which the model card says too.
"""

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixrl.algorithms.sampling import StepNoise
from pixrl.config import parse_resolution
from pixrl.data.subjects import CLASS_FILE
from pixrl.errors import InputError
from pixrl.fusion.config import FuseConfig
from pixrl.hub import TOY_PREFIX
from pixrl.models.references import ReferenceShape
from pixrl.report.figures import (
    SHOWN,
    ScoredPair,
    changes_of,
    failures,
    first_trained,
    guard_findings,
    movement,
    newest_group,
    panels,
    phases,
    reward_panels,
    scored_pairs,
    warnings,
)
from pixrl.report.page import THUMBNAIL, inline, render
from pixrl.runs.config import (
    ALIGN,
    PERSONALIZE,
    AlignConfig,
    PersonalizeConfig,
    Train,
    read_config,
    require_kind,
)
from pixrl.runs.files import write_atomic
from pixrl.runs.folder import RunFolder
from pixrl.runs.reading import comparable_evaluations, start_if_any
from pixrl.runs.record import shape_of
from pixrl.text import read_text, shown_name


def learned_by(config: AlignConfig) -> str:
    """Return what the weights were trained by, as part of a sentence."""
    if not config.loss.learns_from_scores:
        return "supervised flow matching on target pictures (no score was learned from)"
    names = " and ".join(setting.name for setting in config.rewards if not setting.held_out)
    return f"reinforcement learning on {names}"


def images_of(config: AlignConfig) -> int:
    """Return the number of pictures drawn for training in the whole run."""
    return config.steps * config.prompts.per_step * config.group_size


def updates_of(config: AlignConfig) -> int:
    """Return the number of optimizer steps of the whole run."""
    return config.steps * config.optimizer.updates


def method_parts(config: AlignConfig) -> list[tuple[str, str]]:
    """Return name and description of the four parts whose combination is the method."""
    s = config.sampling
    where = s.placing.value.replace("_", " ")
    noise = f"{s.noise.value} with eta {s.scale:g} on {where}, else {s.solver.value}"
    is_random = s.noise is not StepNoise.NONE
    steps = f"{s.steps} steps, {noise}" if is_random else f"{s.steps} {s.solver.value} steps, not random"
    return [
        ("exploration", config.exploration.describe()),
        ("sampling", steps),
        ("advantage", config.loss.describe_advantage(config.advantage)),
        ("loss", config.loss.describe(shows_references=isinstance(config, PersonalizeConfig))),
    ]


def facts(config: AlignConfig, start: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return sizes and settings of a run as (name, value) rows; `start` is the content of start.json."""
    s = config.optimizer
    rises = f", rising over {s.warmup} steps" if s.warmup else ""
    over = "the run" if s.decay_steps == "all" else f"{s.decay_steps} steps"
    falls = "" if s.decay_steps is None else f", falling to 0 over {over}"
    notes = [str(note) for note in start.get("notes", ())]
    trained = "all weights of the denoiser"
    if config.train is Train.LORA:
        trained = f"LoRA of rank {config.lora.rank}, alpha {config.lora.alpha:g}"
    below = "" if config.lora.base is None else f", on top of {config.lora.base}"
    return [
        ("model", f"{config.model} ({start.get('fingerprint', 'not started')}){drawing(config)}"),
        ("prompts", f"{config.prompts.source}, {config.prompts.per_step} a step"),
        *_references(config),
        ("pictures", f"{config.prompts.per_step} × {config.group_size} a step, {images_of(config)} in all"),
        ("updates", f"{s.updates} a step, {updates_of(config)} in all"),
        ("optimizer", f"AdamW, lr {s.lr:g}{rises}{falls}, gradient norm at most {s.grad_clip:g}"),
        ("averaged weights", "none" if s.ema is None else f"decay {s.ema:g}"),
        ("trained", f"{trained}{below}"),
        ("seed", str(config.seed)),
        *([("plan", "; ".join(notes))] if notes else []),
    ]


def drawing(config: AlignConfig | FuseConfig) -> str:
    """Say behind a model's name how it was asked to draw; nothing where its own settings were left."""
    size, scale, away = config.resolution, config.guidance, config.negative_prompt
    said = "" if size is None else ", {} × {} pixels".format(*parse_resolution(size))
    said += "" if scale is None else f", guidance {scale:g}"
    return said + ("" if away is None else f", away from {away!r}")


def _references(config: AlignConfig) -> list[tuple[str, str]]:
    """Say how subjects are shown to the model; nothing for a run without subjects."""
    if not isinstance(config, PersonalizeConfig):
        return []
    r = config.references
    count = "all pictures" if r.count is None else f"{r.count} picture{'s' if r.count > 1 else ''}"
    parts = [f"{count} of each subject"]
    own = r.shape is ReferenceShape.OWN
    parts += ["in their own shape"] if own else []
    parts += [] if r.side is None else [f"{r.side} pixels long" if own else f"on {r.side} × {r.side} pixels"]
    parts += [] if r.preset is None else [f"position ids {r.preset.value}"]
    parts += [] if r.shift is None else [f"schedule shift {r.shift.value}"]
    return [("references", ", ".join(parts))]


def machine_facts(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what environment.json says as (name, value) rows."""
    machine, versions = environment["machine"], environment["versions"]
    gpus = ", ".join(machine["gpus"])
    cores = f"{machine['cpu']}, {machine['cores']} core(s)"
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
    return [
        ("machine", f"{gpus}; {cores}" if gpus else cores),
        ("threads", str(environment["threads"]["torch"])),
        ("versions", known),
        ("source", str(environment["git_commit"] or "installed package")),
        ("began as", shlex.join(environment["command"])),
    ]


def commands(run: Path, finished: bool, kind: str) -> str:
    """Return the commands that finish the run or make it again, with whole paths: a reader may stand anywhere."""
    run = run.absolute()
    recipe = str(run / "recipe.yaml")
    lines = [] if finished else [shlex.join(["pixrl", "resume", str(run)]) + "    # to its end"]
    lines.append(shlex.join(["pixrl", kind, recipe, "--out", str(run.with_name(f"{run.name}-again"))]))
    lines.append(shlex.join(["pixrl", "selfcheck", recipe]) + "    # is it on-policy here?")
    return "\n".join(lines)


NAMED = 3
"""A heading names up to so many subjects; of more it gives the number."""


def subjects_in_words(folder: RunFolder, config: AlignConfig) -> str:
    """Return the subjects that were trained on so far, such as `my_mug (mug)`; empty for a run without subjects."""
    names = sorted({str(row.extra["subject"]) for row in folder.manifest() if "subject" in row.extra})
    if len(names) > NAMED:
        return f"{len(names)} subjects"
    return ", ".join(in_words(name, class_word(config.prompts.source, name)) for name in names)


def in_words(subject: str, word: str | None) -> str:
    """Return a subject's name and, where it differs, what prompts call it."""
    return subject if word in (None, subject) else f"{subject} ({word})"


def class_word(source: str, subject: str) -> str | None:
    """Return what prompts call a subject of a source; None where that is no folder, or is not there any more."""
    folder = Path(source)
    if not folder.is_dir():
        return None
    # a subject is called what its folder is shown as, which need not be how the folder's name is written
    own = (one / CLASS_FILE for one in folder.iterdir() if shown_name(one.name) == subject)
    file = next((one for one in (*own, folder / CLASS_FILE) if one.is_file()), None)
    try:
        return None if file is None else " ".join(read_text(file).split())
    except InputError:
        return None


DONE = {ALIGN: "aligned", PERSONALIZE: "personalized"}
"""What a kind of run does to a model, for headings."""


def write_align_report(path: Path, refresh: float | None = None) -> Path:
    """Write report.html into an align run's folder, whether it is finished or not; return the page's path.

    `refresh`: seconds after which the page loads itself again.

    Raises:
        RunError: it is no align run.
        CheckpointError: its logs or its recipe are damaged.
    """
    folder = RunFolder.open(path)
    require_kind(folder)
    write_atomic(folder.report_path, render("align.html.j2", align_view(folder), refresh).encode())
    return folder.report_path


def align_view(folder: RunFolder) -> dict[str, Any]:
    """Return everything that the page's template shows."""
    config = read_config(folder)
    shape = shape_of(config)
    metrics, evaluated, manifest = folder.metrics(), comparable_evaluations(folder), folder.manifest()
    environment = json.loads((folder.path / "environment.json").read_text(encoding="utf-8"))
    start = start_if_any(folder)
    pairs = scored_pairs(folder, shape)
    moved = movement(pairs, first_trained(shape)) if shape.roles else None
    finished = len(metrics) >= config.steps and any(row["step"] == config.steps for row in evaluated)
    changes = changes_of(folder, shape)
    doubts = warnings(changes)
    if since := start.get("evaluated_from", 0):
        doubts.append(
            f"From step {since} on the evaluation draws other pictures than it drew of the base, so nothing is set "
            "beside the base. The plan below says what changed."
        )
    return {
        "model": config.model,
        "done_to_it": DONE[folder.kind],
        "subjects": subjects_in_words(folder, config),
        "parts": method_parts(config),
        "done": len(metrics),
        "steps": config.steps,
        "finished": finished,
        "images": len(manifest),
        "changes": changes,
        "intervals": any(change.interval for change in changes),
        "evaluated": [evaluated[0]["step"], evaluated[-1]["step"]] if evaluated else [],
        "warnings": doubts,
        "moved": moved,
        "most": [_shown_pair(folder, pair) for pair in moved.most] if moved else [],
        "pairs": [_shown_pair(folder, pair) for pair in pairs[:SHOWN]],
        "more": max(len(pairs) - SHOWN, 0),
        "unseen": is_unseen(config, start),
        "shown": "subjects" if folder.kind == PERSONALIZE else "prompts",
        "slot": "trained" if config.optimizer.ema is None else "averaged",
        "reward_panels": reward_panels(shape, metrics, evaluated),
        "panels": panels(metrics, evaluated, learned=shape.learned),
        "group": newest_group(
            folder.path, shape, manifest, lambda file: inline(file, THUMBNAIL, folder.path)
        ),
        "group_note": shape.pictures,
        "phases": phases(metrics),
        "failures": failures(manifest),
        "guard": guard_findings(folder),
        "facts": facts(config, start),
        "machine": machine_facts(environment),
        "recipe": folder.recipe_text(),
        "commands": commands(folder.path, finished, folder.kind),
        "date": environment["date"],
    }


def _shown_pair(folder: RunFolder, pair: ScoredPair) -> dict[str, Any]:
    """What the page shows of a pair: its prompt, its pictures as they are embedded, and how its scores changed."""
    return {
        "prompt": pair.prompt,
        "seed": pair.seed,
        "pictures": [inline(file, THUMBNAIL, folder.path) for file in pair.pictures],
        "scores": [
            (name, before, after, pair.gain(name))
            for name, (before, after) in pair.scores.items()
            if not math.isnan(pair.gain(name))
        ],
    }


def is_unseen(config: AlignConfig, start: Mapping[str, Any] | None = None) -> bool:
    """Return whether the evaluation's prompts are others than those of training.

    Where `start`, the content of start.json, counted those that are trained on, it decides; else the sources do.
    """
    if start is not None and "trained_on" in start:
        return bool(start["trained_on"] == 0)
    source = config.prompts.source
    return config.evaluation.source not in (None, source) or source.startswith(TOY_PREFIX)
