"""An align recipe in words, for reports: the method, its sizes, how to make it again."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixrl.algorithms.sampling import StepNoise
from pixrl.algorithms.trainer import OptimizerSettings
from pixrl.rewards.settings import RewardSetting
from pixrl.runs.config import AlignConfig, PersonalizeConfig

TRAINED, MEASURED, HELD_OUT = "trained on", "only measured", "never trained on"
"""What a run makes of a reward; `MEASURED` where it learns from no score at all."""


def role_of(config: AlignConfig, setting: RewardSetting) -> str:
    """What the run makes of a reward."""
    if not config.loss.learns_from_scores:
        return MEASURED
    return HELD_OUT if setting.held_out else TRAINED


def learned_by(config: AlignConfig) -> str:
    """What the LoRA was trained by, for a sentence."""
    if not config.loss.learns_from_scores:
        return "supervised flow matching on target pictures (no score was learned from)"
    names = " and ".join(setting.name for setting in config.rewards if not setting.held_out)
    return f"reinforcement learning on {names}"


def training_pictures(config: AlignConfig) -> str:
    """Whose pictures training scored, as a sentence, where the trained model did not draw them; else empty."""
    return config.loss.describe_pictures(shows_references=isinstance(config, PersonalizeConfig))


def variants_of(config: AlignConfig) -> int:
    """K: semantic variants of a prompt; 1 with noise alone."""
    return config.exploration.per_noise


def group_size(config: AlignConfig) -> int:
    """G times K."""
    return config.exploration.noises * variants_of(config)


def images_of(config: AlignConfig) -> int:
    """Pictures drawn for training in the whole run."""
    return config.steps * config.prompts.per_step * group_size(config)


def updates_of(config: AlignConfig) -> int:
    """Optimizer steps of the whole run."""
    return config.steps * config.optimizer.updates


def method_parts(config: AlignConfig) -> list[tuple[str, str]]:
    """The four parts whose combination is the method."""
    return [
        ("exploration", config.exploration.describe()),
        ("sampling", _sampling(config)),
        ("advantage", config.loss.describe_advantage(config.advantage)),
        ("loss", config.loss.describe(shows_references=isinstance(config, PersonalizeConfig))),
    ]


def facts(config: AlignConfig, start: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Sizes and settings of a run, for the page; `start` is start.json."""
    s = config.optimizer
    return [
        ("model", f"{config.model} ({start.get('fingerprint', 'not started')})"),
        ("prompts", f"{config.prompts.source}, {config.prompts.per_step} a step"),
        *_references(config),
        ("pictures", f"{config.prompts.per_step} × {group_size(config)} a step, {images_of(config)} in all"),
        ("updates", f"{s.updates} a step, {updates_of(config)} in all"),
        ("optimizer", f"AdamW, lr {_rate(s)}, gradient norm at most {s.grad_clip:g}"),
        ("averaged weights", "none" if s.ema is None else f"decay {s.ema:g}"),
        ("LoRA", f"rank {config.lora.rank}, alpha {config.lora.alpha:g}{_on_top_of(config)}"),
        ("seed", str(config.seed)),
        *_plan(start),
    ]


def _plan(start: Mapping[str, Any]) -> list[tuple[str, str]]:
    notes = [str(note) for note in start.get("notes", ())]
    return [("plan", "; ".join(notes))] if notes else []


def _rate(s: OptimizerSettings) -> str:
    """The learning rate and how it changes."""
    rises = f", rising over {s.warmup} steps" if s.warmup else ""
    over = "the run" if s.decay_steps == "all" else f"{s.decay_steps} steps"
    falls = "" if s.decay_steps is None else f", falling to 0 over {over}"
    return f"{s.lr:g}{rises}{falls}"


def _on_top_of(config: AlignConfig) -> str:
    return "" if config.lora.base is None else f", on top of {config.lora.base}"


def _references(config: AlignConfig) -> list[tuple[str, str]]:
    """How subjects are shown; nothing for a run without."""
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
    """What environment.json says, for the page."""
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
    """How to make the run again, or to its end; with whole paths, since nothing says where a reader stands."""
    run = run.absolute()
    recipe = str(run / "recipe.yaml")
    lines = [] if finished else [shlex.join(["pixrl", "resume", str(run)]) + "    # to its end"]
    lines.append(shlex.join(["pixrl", kind, recipe, "--out", str(run.with_name(f"{run.name}-again"))]))
    lines.append(shlex.join(["pixrl", "selfcheck", recipe]) + "    # is it on-policy here?")
    return "\n".join(lines)


def _sampling(config: AlignConfig) -> str:
    s = config.sampling
    if s.noise is StepNoise.NONE:
        return f"{s.steps} {s.solver.value} steps, not random"
    where = s.placing.value.replace("_", " ")
    return f"{s.steps} steps, {s.noise.value} with eta {s.scale:g} on {where}, else {s.solver.value}"
