"""`pixrl align` and `pixrl personalize` as a run folder: start it, go on with it, check it.

The report is written a layer above.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from pixrl import config as recipes
from pixrl.algorithms.exploration import prepare
from pixrl.algorithms.trainer import MicroBatches
from pixrl.algorithms.world import Team
from pixrl.doctor.diagnosis import Findings, require
from pixrl.doctor.examine import examine_training, try_rewards
from pixrl.errors import FailedScoresError, InputError, RunError
from pixrl.models.memory.plan import Shard
from pixrl.rewards.set import MAX_FAILED_SHARE, RewardSet
from pixrl.runs.config import AlignConfig, kind_of, read_config
from pixrl.runs.data import with_full_paths
from pixrl.runs.display import Extent, Monitor, Silent
from pixrl.runs.folder import RunFolder
from pixrl.runs.guard import Guard
from pixrl.runs.loaded import (
    LoadedRun,
    check_references,
    load_rewards,
    load_run,
    make_evaluator,
    plan_batches,
)
from pixrl.runs.log import AlignLog, cut_back
from pixrl.runs.loop import Loop, Pace
from pixrl.runs.place import replacing
from pixrl.runs.reading import START, evaluations, gallery_on_disk, start_if_any, start_on_disk
from pixrl.runs.record import (
    changed_code,
    changed_data,
    changed_evaluation,
    changed_rewards,
    differences,
    find_place,
    read_start,
    require_same_model,
    require_unchanged,
    require_unedited,
    write_start,
)
from pixrl.runs.trackers import require_trackers, tracked
from pixrl.runs.training import ROWS, Deviation, Report, Training, computing_in, deviations, possible_dtypes

LOST = f"{START} was lost: whether model, rewards and prompts are those that the run began with is not known"


def start(config: AlignConfig, out: Path, *, force: bool = False, monitor: Monitor | None = None) -> Path:
    """Begin a run, train it to its end and return its folder. Ctrl-C leaves a run that `go_on` finishes.

    Raises:
        ConfigError, InputError: the recipe, or something that it names, is wrong; nothing was written.
        RunError: the folder is taken, or the run had to stop.
    """
    config, rewards, sharded, found = get_ready(config, out, force=force)
    run = load_run(config, rewards, sharded=sharded)
    # what an exploration needs and the model lacks shows here, before there is a folder; what it learns is kept
    prepare(run.method.exploration, run.policy, run.first_groups()[:1])
    left_out = check_references(run)
    micro_batches, notes = plan_batches(run)
    notes = tuple(dict.fromkeys((*found, *notes, *left_out)))
    team = run.team
    out = team.gather(out)[0]  # each process may have seen another folder as the first free one
    if team.leads:
        RunFolder.create(out, kind=kind_of(config), recipe=config, force=force)
    with replacing(out) if team.leads else nullcontext():
        if team.leads:
            write_start(RunFolder.open(out), run, micro_batches, notes)
        team.wait()
        # by listing: a network disk may remember that the folder was not there
        is_there = out.parent.is_dir() and any(one.name == out.name for one in out.parent.iterdir())
        seen = team.gather(is_there)
        if not all(seen):
            raise RunError(
                f"Process 0 made {out}, and process {seen.index(False)} does not see it there. All hosts of a run "
                "write into one folder: give --out as a full path on a disk that they share."
            )
        folder = RunFolder.open(out)
        _play(folder, run, micro_batches, notes, 0, 0, None, monitor if team.leads else None)
    return folder.path


def get_ready(
    config: AlignConfig, out: Path | None = None, *, force: bool = False
) -> tuple[AlignConfig, RewardSet, bool, tuple[str, ...]]:
    """Check a recipe and this machine, and load and try the rewards, before the generator is loaded.

    Returns:
        The recipe with whole paths, its rewards, whether the weights are sharded, and notes for the user.

    Raises:
        PixrlError: what `pixrl doctor` says stands against the run, or a reward can score nothing; nothing was
            written, and the generator is not loaded.
    """
    team = Team(config.machine.device)
    found = examine_training(
        config,
        processes=team.size,
        local=team.local,
        out=out if team.leads else None,
        force=force,
        about_to_run=True,
    )
    notes = require(found)
    config = with_full_paths(config)
    rewards = load_rewards(config, team.device)
    rewards.require_comparable(team.size)
    findings = Findings()
    try_rewards(rewards, config, found.size, findings)
    require(findings)
    return config, rewards, any(team.gather(found.sharded)), notes


def go_on(
    path: Path, *, overrides: Sequence[str] = (), accept_changes: bool = False, monitor: Monitor | None = None
) -> Path:
    """Finish an interrupted run and return its folder; its weights end as those of an uninterrupted one.

    Args:
        path: the run's folder.
        overrides: settings to change from here on, `a.b=c`.
        accept_changes: go on though recipe.yaml was edited, or a reward's weights, prompts, reference pictures or code
            of yours are others, after the run began.

    Raises:
        CheckpointError: one of these changed (it says what differs), or the model is another one.
        InputError: fewer steps are wanted than are done.
    """
    folder = RunFolder.open(path, allow_changed=True)
    began = start_if_any(folder)
    code = changed_code(folder, began, accept_changes)  # before any of it runs
    edited = read_config(folder)
    if began:
        require_unchanged(folder, began["recipe"], edited, accept_changes)
    else:
        require_unedited(folder, accept_changes)
    config = recipes.load(type(edited), edited.model_dump(mode="json"), overrides)
    config = with_full_paths(config, edited)
    require_trackers(config.log)
    team, sharded = Team(config.machine.device), config.machine.divides
    if config.machine.shard is Shard.AUTO and team.size > 1:
        needs = examine_training(config, processes=team.size, local=team.local, about_to_run=True)
        sharded = any(team.gather(needs.sharded))
    run = load_run(config, sharded=sharded)
    run.rewards.require_comparable(run.team.size)
    evaluation, changes = _changes(folder, began, run, accept_changes) if began else ([], [])
    changes += [f"changed: {one}" for one in code]
    step, images, saved = find_place(folder)
    if config.steps < step:
        raise InputError(
            f"{path} has done {step} steps, and steps is {config.steps}. Leave it out, or give {step} or more; "
            "for fewer steps start another run."
        )
    is_evaluated = any(row["step"] == step for row in evaluations(folder.path))
    finished = step == config.steps and not changes and is_evaluated
    run.team.wait()  # all have read the logs before the first one cuts them back
    if run.team.leads:
        folder.tidy()
        if not finished:
            cut_back(folder, step, images)
    lost = (LOST,) if images and not began else ()
    if began and not changes:
        micro_batches, notes = MicroBatches(**began["micro_batches"]), tuple(began["notes"])
    else:
        left_out = check_references(run)
        micro_batches, planned = plan_batches(run)
        notes = (*planned, *left_out, *lost, *changes)
    whole = began and start_on_disk(folder) == began and gallery_on_disk(folder) is not None
    if run.team.leads and (changes or not whole):
        folder.adopt_recipe(config)
        since = step if evaluation else began.get("evaluated_from", 0)
        write_start(folder, run, micro_batches, notes, evaluated_from=since)
    run.team.wait()  # nobody writes before it is done
    if finished:
        (monitor or Silent()).say(f"{folder.path.name} is finished: nothing is drawn again.")
        return folder.path
    _play(folder, run, micro_batches, notes, step, images, saved, monitor if run.team.leads else None)
    return folder.path


def _changes(
    folder: RunFolder, began: Mapping[str, Any], run: LoadedRun, accept_changes: bool
) -> tuple[list[str], list[str]]:
    """How further evaluations draw other pictures, and all that is another thing than when the run began."""
    require_same_model(folder, began, run.policy)
    changed = [
        *changed_rewards(folder, began, run, accept_changes),
        *changed_data(folder, began, run, accept_changes),
    ]
    evaluation = changed_evaluation(folder, began, run)
    settings = differences(began["recipe"], run.config.model_dump(mode="json"))
    return evaluation, [f"changed: {one}" for one in (*settings, *changed, *evaluation)]


def check(config: AlignConfig) -> Report:
    """Check whether a recipe's first update is on-policy, by dtype and batch size, and the same on all processes.

    One update is taken and nothing is written.
    """
    config, rewards, sharded, said = get_ready(config)
    run = load_run(config, rewards, sharded=sharded)
    micro_batches, planned = plan_batches(run)
    notes = tuple(dict.fromkeys((*said, *planned)))
    aligner = run.aligner(micro_batches)
    groups, own = run.prompts.groups(0), run.groups(0)
    found: list[Deviation] = []
    dtypes = possible_dtypes(run.policy)
    for dtype in dtypes:
        with computing_in(run.policy, dtype):
            drawn = aligner.collect((own or groups)[:1], 0)
        sizes = [micro_batches.train, 1, 2, ROWS]
        found += deviations(aligner, drawn, [dtype], sizes)
    rollouts = aligner.collect(own, 0)
    scores = run.rewards.score(rollouts.samples.batch(rollouts.images_BCHW, 0), run.team.gather)
    aligner.update(rollouts, scores, run.rewards.weights(0))
    agreement = aligner.gradient_disagreement()
    return Report(aligner.method.loss.on_policy_measure, tuple(found), agreement, run.team.size, notes)


def _play(
    folder: RunFolder,
    run: LoadedRun,
    micro_batches: MicroBatches,
    notes: Sequence[str],
    step: int,
    images: int,
    saved: tuple[Mapping[str, torch.Tensor], Mapping[str, Any]] | None,
    monitor: Monitor | None,
) -> None:
    config, team = run.config, run.team
    monitor = tracked(monitor or Silent(), folder, config.log if team.leads else ())
    training = Training(run, run.aligner(micro_batches), monitor.say, first=step)
    if saved is not None:
        training.restore(*saved)
    output = config.output
    log = AlignLog(
        folder,
        team,
        images_every=output.images_every,
        keep=output.keep_checkpoints,
        from_step=step,
        images=images,
    )
    evaluator = make_evaluator(run, micro_batches)
    began = read_start(folder)
    guard = Guard(
        folder,
        config.monitor,
        {s.name: s.held_out for s in config.rewards if s.name in evaluator.rewards.names},
        per_prompt=config.evaluation.per_prompt,
        first=began.get("evaluated_from", 0),
        world=team,
        say=monitor.say,
        raise_kl=training.raise_kl,
    )

    def evaluate(step: int) -> Mapping[str, float]:
        figures = evaluator.run(log, step, guard.look)
        guard.act(step, is_last=step == config.steps)
        return figures

    loop = Loop(
        algorithm=training,
        record=log,
        monitor=monitor,
        pace=Pace(config.steps, output.checkpoint_every, config.evaluation.every),
        kept={"start": began},
        evaluate=evaluate,
        world=team,
    )
    monitor.begin(folder.path.name, Extent(config.steps, step), folder.metrics())
    for note in notes:
        monitor.say(note)
    try:
        with run.rewards.attending(folder.path, monitor.say):
            loop.run(folder.path, step, images)
    except FailedScoresError as error:
        raise FailedScoresError(
            f"{error}\nThe run is kept up to its last checkpoint. Mend the cause, then type: "
            f"pixrl resume {folder.path}\n"
            f"Or go on all the same with a higher limit, up to 1: pixrl resume {folder.path} --set {MAX_FAILED_SHARE}=1"
        ) from None
