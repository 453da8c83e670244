"""An align run in words, for reports: its method, sizes, subjects, evaluation pictures, and how to make it again."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixrl.algorithms.sampling import StepNoise
from pixrl.data.subjects import CLASS_FILE
from pixrl.errors import InputError
from pixrl.runs.config import AlignConfig, PersonalizeConfig, Train
from pixrl.runs.folder import RunFolder
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
        ("model", f"{config.model} ({start.get('fingerprint', 'not started')})"),
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


def _references(config: AlignConfig) -> list[tuple[str, str]]:
    """Say how subjects are shown to the model; nothing for a run without subjects."""
    if not isinstance(config, PersonalizeConfig):
        return []
    r = config.references
    count = "all pictures" if r.count is None else f"{r.count} picture{'s' if r.count > 1 else ''}"
    parts = [f"{count} of each subject"]
    parts += [] if r.side is None else [f"on {r.side} × {r.side} pixels"]
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
