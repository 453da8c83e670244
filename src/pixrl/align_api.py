"""`pixrl align` and `pixrl personalize` for callers: run, go on, check. The command line calls these."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixrl.errors import ConfigError
from pixrl.report.align import write_align_report
from pixrl.runs import align as align_job
from pixrl.runs.align_config import AlignConfig
from pixrl.runs.align_log import evaluations
from pixrl.runs.display import Monitor, Silent, for_terminal
from pixrl.runs.distributed import Team
from pixrl.runs.folder import RunFolder
from pixrl.runs.kinds import ALIGN, PERSONALIZE, load_recipe
from pixrl.runs.selfcheck import Report

RUNS = Path("runs")
PERSONALIZE_RECIPE = "toy/customized-nft"
"""What `pixrl personalize` does where no recipe is given."""
SUBJECT_RECIPE = "toy/subject"
"""The same where a subject is."""


@dataclass(frozen=True)
class AlignResult:
    """A finished alignment."""

    run: Path
    """The run's folder."""

    @property
    def metrics(self) -> list[dict[str, float]]:
        """One line a training step."""
        return RunFolder.open(self.run).metrics()

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Scores of held-out prompts, before training first and after it last."""
        return evaluations(self.run)

    @property
    def report(self) -> Path:
        return self.run / "report.html"


def align(
    recipe: str | Path | Mapping[str, Any],
    steps: int | None = None,
    seed: int | None = None,
    out: Path | str | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    force: bool = False,
    live: bool = False,
) -> AlignResult:
    """Align a flow model with rewards.

    Args:
        recipe: a YAML file, a name under recipes/ such as `toy/e2po`, or the settings themselves.
        steps: training steps, in place of the recipe's.
        seed: of everything random, in place of the recipe's.
        out: the run's folder; none: a new one under runs/.
        settings: further ones by dotted name, `{"optimizer.lr": 1e-4}`.
        force: replace a run that is there already.
        live: show progress on standard error.

    Raises:
        InputError: the recipe, or something that it names, is wrong.
        RunError: the folder is taken, or the run had to stop.
    """
    config = load(recipe, steps=steps, seed=seed, settings=settings, kind=ALIGN)
    place = default_out(recipe, config) if out is None else Path(out)
    return run_align(config, place, force=force, live=live)


def personalize(
    recipe: str | Path | Mapping[str, Any] | None = None,
    steps: int | None = None,
    seed: int | None = None,
    out: Path | str | None = None,
    *,
    subject: Path | str | None = None,
    settings: Mapping[str, Any] | None = None,
    force: bool = False,
    live: bool = False,
) -> AlignResult:
    """Train a model to keep a subject's identity while it follows the prompt.

    Args:
        recipe: a YAML file, a name under recipes/, or the settings themselves; none: `toy/customized-nft`, and
            `toy/subject` where a subject is given.
        steps: training steps, in place of the recipe's.
        seed: of everything random, in place of the recipe's.
        out: the run's folder; none: a new one under runs/.
        subject: a subject's folder (pictures, class.txt, prompts.txt) in place of the recipe's subjects, for training
            and evaluation.
        settings: further ones by dotted name, `{"advantage.synergy.alpha": 0.8}`.
        force: replace a run that is there already.
        live: show progress on standard error.

    Raises:
        InputError: the recipe, or something that it names, is wrong.
        RunError: the folder is taken, or the run had to stop.
    """
    config, name = load_personalize(recipe, subject=subject, steps=steps, seed=seed, settings=settings)
    place = default_out(name, config) if out is None else Path(out)
    return run_align(config, place, force=force, live=live)


def load_personalize(
    recipe: str | Path | Mapping[str, Any] | None,
    overrides: Sequence[str] = (),
    *,
    subject: Path | str | None = None,
    steps: int | None = None,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> tuple[AlignConfig, str | Path | Mapping[str, Any]]:
    """The settings of a personalization, and what to name its folder after."""
    chosen = {text.partition("=")[0].strip() for text in overrides}
    sources = () if subject is None else ("prompts.source", "evaluation.source")
    own = {name: str(subject) for name in sources if name not in chosen}
    usual = PERSONALIZE_RECIPE if subject is None else SUBJECT_RECIPE
    source = usual if recipe is None else recipe
    config = load(
        source, overrides, steps=steps, seed=seed, settings={**own, **(settings or {})}, kind=PERSONALIZE
    )
    return config, source if subject is None else Path(subject).resolve().name


def load(
    recipe: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    steps: int | None = None,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
    kind: str | None = None,
) -> AlignConfig:
    """The settings of a recipe with what was given besides; `kind`: the job to do, none: the recipe's own."""
    given = {"steps": steps, "seed": seed, **(settings or {})}
    values = {name: value for name, value in given.items() if value is not None}
    return load_recipe(recipe, overrides, values=values, kind=kind)


def load_either(
    recipe: str | Path | Mapping[str, Any] | None,
    overrides: Sequence[str] = (),
    *,
    subject: Path | str | None = None,
    steps: int | None = None,
    seed: int | None = None,
) -> AlignConfig:
    """The settings that `pixrl align RECIPE` or `pixrl personalize --subject SUBJECT` would train with.

    Raises:
        ConfigError: neither a recipe nor a subject, or the recipe is wrong.
    """
    if subject is not None:
        return load_personalize(recipe, overrides, subject=subject, steps=steps, seed=seed)[0]
    if recipe is None:
        raise ConfigError("Neither a recipe nor a subject was given. Type toy/e2po, or --subject FOLDER.")
    return load(recipe, overrides, steps=steps, seed=seed)


def run_align(config: AlignConfig, out: Path, *, force: bool = False, live: bool = True) -> AlignResult:
    """One alignment from the start, with its report."""
    return _finish(align_job.start(config, out, force=force, monitor=_monitor(live)))


def resume(
    run: Path, overrides: Sequence[str] = (), *, accept_changes: bool = False, live: bool = True
) -> AlignResult:
    """Goes on with an interrupted alignment."""
    monitor = _monitor(live)
    done = align_job.go_on(run, overrides=overrides, accept_changes=accept_changes, monitor=monitor)
    return _finish(done)


def selfcheck(config: AlignConfig) -> Report:
    """Whether a run of this recipe can be trusted, before it starts."""
    return align_job.check(config)


def default_out(recipe: str | Path | Mapping[str, Any], config: AlignConfig) -> Path:
    """A folder under runs/ that does not exist yet."""
    name = "align" if isinstance(recipe, Mapping) else Path(recipe).with_suffix("").name
    number, place = 1, RUNS / f"{name}-{config.seed}"
    while place.exists():
        number += 1
        place = RUNS / f"{name}-{config.seed}-{number}"
    return place


def _finish(run: Path) -> AlignResult:
    if Team("cpu").leads:
        write_align_report(run)
    return AlignResult(run)


def _monitor(live: bool) -> Monitor:
    return for_terminal() if live else Silent()
