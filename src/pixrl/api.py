"""What a person calls: `pixrl.fuse`, `pixrl.align`, `pixrl.personalize`; and what the command line calls."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pixrl import config as recipes
from pixrl.algorithms.world import Team
from pixrl.data.pairs import check_concepts, parse_pairs, read_pairs
from pixrl.device import quiet_loading
from pixrl.doctor.cards import CardPlans, parse_card, plans_for
from pixrl.doctor.diagnosis import Diagnosis
from pixrl.doctor.examine import examine_training, try_out
from pixrl.doctor.fusion import examine_fusion, plan_fusion
from pixrl.errors import ConfigError, InputError
from pixrl.fusion.config import COMPARE, PAIRS, FuseConfig, resolve_options
from pixrl.fusion.config import KIND as FUSE
from pixrl.fusion.select import Selection
from pixrl.fusion.trainer import read_policy, settings_of
from pixrl.jobs import align as align_job
from pixrl.jobs import draw as draw_job
from pixrl.jobs import fuse as fuse_job
from pixrl.jobs import fuse_many
from pixrl.jobs.fuse import FinishedRun
from pixrl.report.align import write_align_report
from pixrl.report.fuse import write_fuse_report, write_many_report
from pixrl.report.watch import write_report as write_report
from pixrl.runs.config import (
    ALIGN,
    KINDS,
    AlignConfig,
    load_either,
    load_personalize,
    load_recipe,
    read_config,
)
from pixrl.runs.display import Monitor, Silent, for_terminal
from pixrl.runs.folder import RunFolder
from pixrl.runs.place import free_place
from pixrl.runs.reading import Pictures as Pictures
from pixrl.runs.reading import evaluations
from pixrl.runs.training import Report
from pixrl.workers import HERE, Workers

RUNS = Path("runs")
DRAWN = Path("drawn")
"""Where `pixrl draw` puts its folders."""
load = load_recipe


@dataclass(frozen=True)
class AlignResult:
    """A finished alignment."""

    run: Path
    """The run's folder."""

    @property
    def metrics(self) -> list[dict[str, float]]:
        """The figures of each training step, one row a step."""
        return RunFolder.open(self.run).metrics()

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The scores of held-out prompts, those of before training first and those of after it last."""
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
    config = load_recipe(recipe, steps=steps, seed=seed, settings=settings, kind=ALIGN)
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


def read_recipe(run: Path, overrides: Sequence[str] = ()) -> AlignConfig:
    """Read what `resume` goes on with: the recipe of an alignment or personalization, and what is set besides."""
    return read_config(RunFolder.open(run, allow_changed=True), overrides)


def run_align(config: AlignConfig, out: Path, *, force: bool = False, live: bool = True) -> AlignResult:
    """Run one alignment from the start, with its report."""
    return _finish(align_job.start(config, out, force=force, monitor=_monitor(live)))


def resume(
    run: Path, overrides: Sequence[str] = (), *, accept_changes: bool = False, live: bool = True
) -> "AlignResult | FusionResult | Path":
    """Go on with an interrupted run of any kind, or choose again in a finished fusion.

    Args:
        run: the run's folder.
        overrides: settings to change from here on, `a.b=c`; an alignment's or personalization's alone.
        accept_changes: go on though recipe.yaml, weights, prompts or pictures have changed.
        live: show progress.

    Returns:
        The run's result; of a folder of fusions, its path.

    Raises:
        InputError: settings are given for a fusion, whose settings are fixed once it began.
        CheckpointError: something changed that the run began with.
    """
    kind = RunFolder.open(run, allow_changed=True).kind
    if kind in KINDS:
        done = align_job.go_on(
            run, overrides=overrides, accept_changes=accept_changes, monitor=_monitor(live)
        )
        return _finish(done)
    if overrides or accept_changes:
        raise InputError(f"{run} is a run of kind {kind!r}, whose settings are fixed once it began.")
    if kind == FUSE:
        return _finish_fusion(fuse_job.go_on(run, monitor=_monitor(live)))
    return write_many_report(fuse_many.go_on_many(run, monitor=lambda: _monitor(live))).parent


def selfcheck(config: AlignConfig) -> Report:
    """Check whether a run of this recipe can be trusted, before it starts."""
    return align_job.check(config)


def default_out(recipe: str | Path | Mapping[str, Any], config: AlignConfig) -> Path:
    """Name a folder under runs/ that does not exist yet."""
    name = "align" if isinstance(recipe, Mapping) else Path(recipe).with_suffix("").name
    return free_place(RUNS, f"{name}-{config.seed}")


def _finish(run: Path) -> AlignResult:
    if Team("cpu").leads:
        write_align_report(run)
    return AlignResult(run)


def _monitor(live: bool) -> Monitor:
    return for_terminal() if live else Silent()


@dataclass(frozen=True)
class FusionResult:
    """A finished fusion."""

    images: Pictures
    """Every picture, in the order they were made; PIL images."""
    scores: tuple[Mapping[str, float | None], ...]
    """Of every picture: `S/CONCEPT`, `reward` and `balance`; None where scoring failed."""
    selected: tuple[int, ...]
    """Indices of the selected pictures, best first; empty when none qualifies."""
    run: Path
    """The run's folder."""
    selection: Selection = field(repr=False)
    """Thresholds, number of candidates, and how far the nearest fell short."""

    @property
    def report(self) -> Path:
        return self.run / "report.html"


def fuse(
    concepts: Sequence[str],
    budget: int = 128,
    seed: int = 0,
    sampler: str = "rmler",
    model: str = "toy:turbo",
    out: Path | str | None = None,
    *,
    policy: Path | str | None = None,
    force: bool = False,
    live: bool = False,
    **settings: Any,
) -> FusionResult:
    """Fuse two or more concepts into one new object.

    Args:
        concepts: two or more different ones.
        budget: pictures in all.
        seed: of everything random.
        sampler: rmler, ppo, grpo, random, mean, bass, agswap, golden, search, bisect or cmaes.
        model: toy:NAME, a folder in diffusers' layout, or a hub id.
        out: the run's folder; None makes a new one under runs/.
        policy: a finished fusion whose learned policy this one begins with, or a folder of fusions of pairs; model,
            sampler, its options and the mixing are that run's then.
        force: replace a run that is there already.
        live: show progress.
        settings: any other setting of `FuseConfig`, such as alpha=3 or options={"lr": 0.1}.
    """
    if isinstance(concepts, str):
        raise InputError(
            f"concepts is a list of names, got the one string {concepts!r}: fuse([{concepts!r}, ...])"
        )
    if not isinstance(concepts, Iterable):
        raise InputError(f'concepts is a list of names, got {concepts!r}: fuse(["owl", "snail"])')
    given = {"concepts": tuple(concepts), "budget": budget, "seed": seed}
    own = {"sampler": sampler, "model": model} if policy is None else with_policy(Path(policy))
    config = recipes.load(FuseConfig, {**own, **given, **settings})
    return run_fuse(config, None if out is None else Path(out), force=force, live=live)


def with_policy(run: Path) -> dict[str, Any]:
    """Return the settings of a fusion that begins with what a finished one has learned.

    Raises:
        InputError: the run is not finished, or what it learned serves its own concepts alone.
    """
    return {**settings_of(read_policy(run)), "policy_from": str(run)}


def run_fuse(
    config: FuseConfig, out: Path | None = None, *, force: bool = False, live: bool = True
) -> FusionResult:
    """Run one fusion from the start, with its report."""
    check_concepts(config.concepts)
    run = fuse_job.start(config, out or default_fuse_out(config), force=force, monitor=_monitor(live))
    return _finish_fusion(run)


def run_compare(
    config: FuseConfig,
    samplers: Sequence[str] | str,
    out: Path | None = None,
    *,
    force: bool = False,
    live: bool = True,
) -> Path:
    """Fuse the same concepts by several samplers, or "all" of them, and return the folder.

    Options go to the samplers that know them.
    """
    usual = resolve_options(config.sampler, {}).model_dump(mode="json")
    given = {name: value for name, value in config.options.items() if value != usual.get(name)}
    many = fuse_many.compare_config(config, samplers, given)
    place = out or default_fuse_out(config, compare=True)
    done = fuse_many.start_many(many, COMPARE, place, force=force, monitor=lambda: _monitor(live))
    return write_many_report(done).parent


def run_pairs(
    config: FuseConfig,
    pairs: Path | Sequence[str],
    out: Path | None = None,
    *,
    carry: bool = False,
    force: bool = False,
    live: bool = True,
    workers: Workers = HERE,
) -> Path:
    """Fuse every line of a file, or of a list of `a & b`, in a run of its own, and return the folder.

    With `carry` each begins with the policy that the one before it has learned; `workers` says where they run.
    """
    if config.concepts:
        raise InputError("The concepts come from the list of pairs: leave them out of the recipe.")
    found = read_pairs(pairs) if isinstance(pairs, Path) else parse_pairs(pairs)
    many = fuse_many.pairs_config(config, found, carry)
    place = out or default_fuse_out(config, pairs=pairs if isinstance(pairs, Path) else None)
    done = fuse_many.start_many(
        many, PAIRS, place, force=force, monitor=lambda: _monitor(live), workers=workers
    )
    return write_many_report(done).parent


def draw(
    what: str | Path,
    prompt: str | None = None,
    n: int = 4,
    size: int | str | None = None,
    seed: int = 0,
    out: Path | str | None = None,
    *,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    model: str | None = None,
    subject: str | None = None,
    child: int | None = None,
    device: str | None = None,
) -> Pictures:
    """Draw with what a run has learned, by a LoRA or a plain model; or draw a child of a fusion again.

    Args:
        what: a run's folder; a LoRA's file or folder, with `model`; or a model.
        prompt: what to draw; None for a fusion.
        n: how many pictures.
        size: in pixels: the side of a square, or width x height as "832x1216"; None: the run's, or the model's.
        seed: of the noises; picture i is the same for any n.
        out: a new folder for PNGs and manifest.jsonl; None: one under drawn/.
        guidance, negative_prompt: the scale, and what it leads away from; None: the run's, or the model's.
        model: the one that a LoRA belongs to.
        subject: of a personalization of several subjects: whose references the model is shown.
        child: of a fusion: the number of the child, whose own noise comes first.
        device: auto, cpu, cuda or cuda:1; None: the run's.

    Raises:
        InputError: an argument does not fit, the model does not know a word, or `out` is taken.
        RunError, CheckpointError: what was learned is not there, is damaged, or belongs to another model.
    """
    name = fuse_job.slug("-".join([Path(what).name, *([] if child is None else [str(child)]), str(seed)]))
    request = draw_job.DrawRequest(
        prompt, n, size, seed, guidance, negative_prompt, subject, child, model, device
    )
    with quiet_loading():
        return Pictures(draw_job.draw(what, request, free_place(DRAWN, name) if out is None else Path(out)))


def select_run(
    run: Path,
    *,
    keep: int | None = None,
    presence: float | None = None,
    balance: float | None = None,
    everywhere: bool = False,
) -> Selection:
    """Choose again from a run's pictures and rewrite its report; makes no pictures.

    Args:
        run: the folder of a fusion.
        keep, presence, balance: as in the recipe; None leaves what it says.
        everywhere: choose among all pictures, those that a policy learned from too.
    """
    chosen = fuse_job.select_again(run, keep=keep, presence=presence, balance=balance, everywhere=everywhere)
    write_fuse_report(chosen)
    return chosen.selection


def default_fuse_out(config: FuseConfig, *, pairs: Path | None = None, compare: bool = False) -> Path:
    """Name a folder for a fusion under runs/ that does not exist yet."""
    name = fuse_job.slug("+".join(config.concepts)) if pairs is None else fuse_job.slug(pairs.stem)
    return free_place(RUNS, f"{name}-{'compare' if compare else config.sampler}-{config.seed}")


def _finish_fusion(run: FinishedRun) -> FusionResult:
    write_fuse_report(run)
    path = run.folder.path
    return FusionResult(
        images=Pictures([path / row.file for row in run.rows if row.file is not None]),
        scores=tuple(row.scores for row in run.rows),
        selected=run.selection.indices,
        run=path,
        selection=run.selection,
    )


def examine(
    recipe: str | Path | Mapping[str, Any] | None,
    overrides: Sequence[str] = (),
    *,
    subject: Path | str | None = None,
    steps: int | None = None,
    seed: int | None = None,
    processes: int = 1,
    out: Path | str | None = None,
    force: bool = False,
    score: bool = False,
) -> Diagnosis:
    """Find what a recipe needs and what is missing here, for which a run of it would be refused.

    Args:
        recipe: a YAML file, a name under recipes/, or the settings themselves, with `kind`: align where it has none.
            None: `toy/subject`, which needs a subject.
        overrides: further settings, `a.b=c`.
        subject: a subject's folder in place of the recipe's subjects.
        steps: training steps, in place of the recipe's.
        seed: of everything random, in place of the recipe's.
        processes: how many would share the work.
        out: the run's folder, to be checked too.
        force: whether a run that is there would be replaced.
        score: also load the rewards and let them score a synthetic batch, as a run does; code of the user's never.

    Raises:
        ConfigError: the recipe is wrong, is not that of a single run, or there is neither a recipe nor a subject.
    """
    with quiet_loading():
        place = None if out is None else Path(out)
        settings = _settings(recipe, overrides, subject, steps, seed)
        if isinstance(settings, FuseConfig):
            if score:
                raise ConfigError("A fusion has no rewards to try out: leave --score out.")
            return examine_fusion(settings, processes=processes, out=place, force=force)
        found = examine_training(settings, processes=processes, out=place, force=force)
        return try_out(settings, found) if score and found.can_run else found


def plan_card(
    recipe: str | Path | Mapping[str, Any] | None,
    gpu: str,
    overrides: Sequence[str] = (),
    *,
    subject: Path | str | None = None,
    steps: int | None = None,
    seed: int | None = None,
    processes: int = 1,
) -> CardPlans:
    """Find the plans with which a recipe would fit a card that need not be here, and their time, from configs alone.

    Args:
        recipe, overrides, subject, steps, seed, processes: as for `examine`.
        gpu: a name in the table of cards, such as 4090, or a size in GiB.

    Raises:
        ConfigError: the recipe is wrong, or a fusion for several processes.
        InputError: there is no such card, or the model cannot be trained, or its memory not be told from configs.
        CheckpointError: the model's configs cannot be had.
    """
    card = parse_card(gpu)
    with quiet_loading():
        settings = _settings(recipe, overrides, subject, steps, seed)
        if isinstance(settings, FuseConfig):
            if processes > 1:
                raise ConfigError("One process draws a fusion: leave --processes out.")
            return plan_fusion(settings, card)
        return plans_for(settings, card, processes)


def _settings(
    recipe: str | Path | Mapping[str, Any] | None,
    overrides: Sequence[str],
    subject: Path | str | None,
    steps: int | None,
    seed: int | None,
) -> AlignConfig | FuseConfig:
    """Load what the recipe's own command would run."""
    kind = ALIGN if recipe is None or subject is not None else recipes.kind_of(recipe) or ALIGN
    if recipe is not None and kind == FUSE:
        if steps is not None:
            raise ConfigError("A fusion has no training steps: leave --steps out, and set budget=N.")
        values = {} if seed is None else {"seed": seed}
        return recipes.load(FuseConfig, recipe, overrides, values=values, kind=FUSE)
    if kind not in KINDS:
        raise ConfigError(
            f"{recipe} is a recipe for {kind!r}, not for one run. doctor takes those of "
            f"{FUSE}, {', '.join(KINDS)}."
        )
    return load_either(recipe, overrides, subject=subject, steps=steps, seed=seed)
