"""How to make a run again, in words: command lines, Python, and the facts of its machine and models."""

import json
import shlex
from typing import Any

import yaml

from pixrl.config import Settings
from pixrl.runs import fuse as fuse_job
from pixrl.runs.config import FuseConfig, resolve_options
from pixrl.runs.fuse import FinishedRun
from pixrl.runs.fuse_many import COMPARE, FinishedRuns

_FLAGS = ("model", "sampler", "budget", "exemplars", "seed", "alpha", "keep", "presence", "balance", "device")


def command_line(run: FinishedRun) -> str:
    """The `pixrl fuse` command of a run: what differs from the defaults."""
    return shlex.join(["pixrl", "fuse", *run.config.concepts, *_arguments(run.config)])


def many_command(runs: FinishedRuns) -> str:
    """The command of a folder of fusions."""
    config = runs.config
    base = FuseConfig.model_validate({**config.fuse, "sampler": config.samplers[0]})
    usual = resolve_options(base.sampler, {}).model_dump(mode="json")
    given = {n: v for n, v in config.options.items() if v != usual.get(n)}
    extra = [f"--set=options.{name}={_yaml(value)}" for name, value in given.items()]
    if runs.folder.kind == COMPARE:
        arguments = [a for a in _arguments(base) if not a.startswith("--sampler")]
        compared = ["--compare", ",".join(config.samplers)]
        return shlex.join(["pixrl", "fuse", *config.concepts[0], *compared, *arguments, *extra])
    return shlex.join(["pixrl", "fuse", "--pairs", "FILE", *_arguments(base), *extra])


def python_lines(run: FinishedRun) -> str:
    """The same from Python."""
    config = run.config
    given = dict(_changed(config, FuseConfig(sampler=config.sampler)))
    given.pop("sampler", None)
    parts = [repr(list(config.concepts)), f"budget={config.budget}", f"seed={config.seed}"]
    parts += [f"sampler={str(config.sampler)!r}", f"model={config.model!r}"]
    parts += [f"{k}={v!r}" for k, v in given.items() if k not in ("budget", "seed", "model", "concepts")]
    return f"import pixrl\nresult = pixrl.fuse({', '.join(parts)})"


def run_facts(run: FinishedRun) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The environment record, and rows for the page."""
    world = fuse_job.read_world(run.folder)
    path = run.folder.path / "environment.json"
    environment: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    facts = [
        ("generator", f"{world.model} ({world.fingerprint})"),
        ("similarity", world.clip),
        ("foreground", f"{world.segmenter}, on white"),
        ("pooled features", str(run.config.pooled)),
        ("noise", str(run.config.noise)),
    ]
    options = {k: v for k, v in run.config.options.items() if v is not None}
    if options:
        facts.append((f"{run.config.sampler} options", ", ".join(f"{k} {v}" for k, v in options.items())))
    return environment, [(key, value) for key, value in facts if value]


def _arguments(config: FuseConfig) -> list[str]:
    changed = _changed(config, FuseConfig())
    flags = [f"--{name}={changed[name]}" for name in _FLAGS if name in changed]
    sets = [(k, v) for k, v in changed.items() if k not in (*_FLAGS, "options", "concepts")]
    defaults: Settings = resolve_options(config.sampler, {})
    usual = defaults.model_dump(mode="json")
    sets += [(f"options.{k}", v) for k, v in config.options.items() if v != usual.get(k)]
    return flags + [f"--set={name}={_yaml(value)}" for name, value in sets]


def _changed(config: FuseConfig, usual: FuseConfig) -> dict[str, Any]:
    before = usual.model_dump(mode="json")
    return {name: value for name, value in config.model_dump(mode="json").items() if value != before[name]}


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
