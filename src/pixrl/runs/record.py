"""The start of an alignment, `start.json`, and what has changed since: what a resumed run is compared with."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from pixrl.algorithms.exploration import shown_pictures
from pixrl.algorithms.trainer import MicroBatches
from pixrl.errors import CheckpointError
from pixrl.models.base import on_square
from pixrl.models.pipeline import FlowPipelinePolicy
from pixrl.plugins import changed_files
from pixrl.runs import checkpoint
from pixrl.runs.config import AlignConfig, PersonalizeConfig
from pixrl.runs.data import data_checksums
from pixrl.runs.evaluation import gallery
from pixrl.runs.files import write_atomic
from pixrl.runs.folder import RunFolder, png_bytes
from pixrl.runs.loaded import LoadedRun
from pixrl.runs.reading import (
    GALLERY,
    HELD_OUT,
    MEASURED,
    START,
    TRAINED,
    RunShape,
    evaluations,
    gallery_on_disk,
    start_if_any,
)

REFERENCES = "samples/references"
"""The folder of pictures of the evaluation's subjects, 0007.png for the prompt of number 7."""
REFERENCE_SIDE = 256
_DRAWING = ("guidance", "negative_prompt", "resolution", "references")


def write_start(
    folder: RunFolder,
    run: LoadedRun,
    micro_batches: MicroBatches,
    notes: Sequence[str],
    *,
    evaluated_from: int = 0,
) -> None:
    """Write what the run begins with, for `go_on` to compare, and the gallery: what the evaluations draw.

    `evaluated_from`: the first step whose evaluation is of these pictures.
    """
    settings = run.config.evaluation
    prompts = run.evaluated()
    shown = gallery(prompts, settings.per_prompt, run.config.seed)
    code = run.config.code
    record = {
        "recipe": run.config.model_dump(mode="json"),
        "model": run.policy.name,
        "fingerprint": run.policy.backbone_fingerprint,
        "merged": [one.digest for one in run.policy.merged],
        "rewards": run.rewards.provenance(),
        "data": data_checksums(run.prompts.prompts, run.held_out),
        **({"code": code} if code else {}),
        "micro_batches": {"rollout": micro_batches.rollout, "train": micro_batches.train},
        "notes": list(notes),
        "trained_on": run.trained_on(),
        "evaluated_from": evaluated_from,
        "gallery": _digest(shown),
        "shape": asdict(shape_of(run.config)),
    }
    for number, prompt in enumerate(prompts):
        if pictures := shown_pictures(prompt.metadata):  # the first one stands for what the model is shown
            name = f"{REFERENCES}/{number:04d}.png"
            (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(folder.path / name, png_bytes(on_square(pictures[0], REFERENCE_SIDE)))
            for entry in shown[number * settings.per_prompt : (number + 1) * settings.per_prompt]:
                entry["reference"] = name
    write_atomic(folder.path / GALLERY, json.dumps(shown, indent=1).encode() + b"\n")
    write_atomic(folder.path / START, json.dumps(record, indent=1).encode() + b"\n")


def shape_of(config: AlignConfig) -> RunShape:
    """Return what a page has to know of a recipe."""
    learned = config.loss.learns_from_scores
    return RunShape(
        config.steps,
        {s.name: (HELD_OUT if s.held_out else TRAINED) if learned else MEASURED for s in config.rewards},
        config.exploration.noises,
        config.group_size,
        config.evaluation.per_prompt,
        config.loss.describe_pictures(shows_references=isinstance(config, PersonalizeConfig)),
    )


def read_start(folder: RunFolder) -> dict[str, Any]:
    """Read what a run began with: recipe, model, fingerprint, merged, rewards, data, code, micro_batches, notes,
    trained_on, evaluated_from, gallery. Where the file is missing or damaged, the newest checkpoint's copy is read.

    `merged` are digests of the LoRAs below the trained one, `rewards` is each reward's provenance, `data` a checksum
    of each source's prompts and reference pictures; runs of before they were recorded have none.

    `trained_on` is the number of the evaluation's prompts that training asks for too; evaluations of before the step
    `evaluated_from` are of other pictures than later ones.
    """
    found = start_if_any(folder)
    if not found:
        raise CheckpointError(
            f"{folder.path / START} is missing or damaged. Type: pixrl resume {folder.path}, which writes it again."
        )
    return found


def read_rewards(folder: RunFolder) -> dict[str, dict[str, str]]:
    """Read the provenance of each reward as the run began; {} of older runs, which did not record it."""
    found: dict[str, dict[str, str]] = read_start(folder).get("rewards", {})
    return found


def require_unchanged(folder: RunFolder, began: Mapping[str, Any], now: AlignConfig, accepted: bool) -> None:
    """Raise a CheckpointError that lists what was edited in recipe.yaml, unless that is accepted."""
    changes = differences(began, now.model_dump(mode="json"))
    if changes and not accepted and folder.is_edited():
        listed = "\n  ".join(changes)
        raise CheckpointError(
            f"{folder.path / 'recipe.yaml'} was changed after the run began:\n  {listed}\n"
            "Put it back; or go on with the changes: add --accept-changes"
        )


def require_unedited(folder: RunFolder, accepted: bool) -> None:
    """Raise a CheckpointError where recipe.yaml was edited and start.json is lost, unless that is accepted."""
    if folder.is_edited() and not accepted:
        raise CheckpointError(
            f"{folder.path / 'recipe.yaml'} was changed after the run began, and {START}, which says what it was, is "
            "gone. Put it back; or go on with it as it is: add --accept-changes"
        )


def differences(before: Mapping[str, Any], after: Mapping[str, Any], at: str = "") -> list[str]:
    """List what differs between two resolved recipes: 'optimizer.lr: 0.001 when the run began, 0.003 now'."""
    found: list[str] = []
    for name in [*before, *(name for name in after if name not in before)]:
        one, other = before.get(name), after.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += differences(one, other, f"{at}{name}.")
        elif one != other:
            found.append(f"{at}{name}: {one!r} when the run began, {other!r} now")
    return found


def require_same_model(folder: RunFolder, began: Mapping[str, Any], policy: FlowPipelinePolicy) -> None:
    """Raise a CheckpointError where the run was trained from other base weights than the loaded ones."""
    if began["fingerprint"] != policy.backbone_fingerprint:
        raise CheckpointError(
            f"{folder.path} was trained from {began['model']} ({began['fingerprint']}), but {policy.name} "
            f"is another model ({policy.backbone_fingerprint}). What it has learned means nothing there: "
            "put the model back, or start a new run."
        )


def changed_code(folder: RunFolder, began: Mapping[str, Any], accepted: bool) -> list[str]:
    """List the files of the user's code that have changed since the run began. None of it is executed.

    Raises:
        CheckpointError: one is, and that is not accepted.
    """
    changes = changed_files(began.get("code", {}))
    if changes and not accepted:
        listed = "\n  ".join(changes)
        raise CheckpointError(
            f"Code that {folder.path} was begun with has changed, so it would go on as another method:\n  {listed}\n"
            "Put it back; or go on with the changes: add --accept-changes"
        )
    return changes


def changed_rewards(folder: RunFolder, began: Mapping[str, Any], run: LoadedRun, accepted: bool) -> list[str]:
    """List what has changed in the rewards' weights, such as `preference.model: ...`, of rewards that are still there.

    Raises:
        CheckpointError: something is, and that is not accepted.
    """
    return _changed(folder, "rewards", began.get("rewards", {}), run.rewards.provenance(), accepted)


def changed_data(folder: RunFolder, began: Mapping[str, Any], run: LoadedRun, accepted: bool) -> list[str]:
    """List the sources whose prompts or pictures have changed since the run began; new sources are not among them.

    Raises:
        CheckpointError: one does, and that is not accepted.
    """
    now = data_checksums(run.prompts.prompts, run.held_out)
    return _changed(folder, "prompts and pictures", began.get("data", {}), now, accepted)


def changed_evaluation(folder: RunFolder, began: Mapping[str, Any], run: LoadedRun) -> list[str]:
    """List why further evaluations will draw other pictures than the earlier ones; [] before the first one."""
    if not evaluations(folder.path):
        return []
    shown = gallery_on_disk(folder)
    known = began.get("gallery") or ("unknown" if shown is None else _digest(shown))
    before = {"prompts and noise": known, **_sampling(began["recipe"])}
    settings = run.config.evaluation
    drawn = gallery(run.evaluated(), settings.per_prompt, run.config.seed)
    now = {"prompts and noise": _digest(drawn), **_sampling(run.config.model_dump(mode="json"))}
    return [
        f"evaluations are of other pictures from here on, and are not compared with the base ({one})"
        for one in differences(before, now)
    ]


def _digest(entries: Sequence[Mapping[str, Any]]) -> str:
    """Sum a gallery up by number of pictures and a checksum, wherever its reference pictures lie."""
    known = [{name: one[name] for name in one if name != "reference"} for one in entries]
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:8]
    return f"{len(known)} pictures, checksum {digest}"


def _sampling(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a recipe that decide how an evaluation draws."""
    sampling = recipe["sampling"]
    return {
        "evaluation.steps": recipe["evaluation"]["steps"] or sampling["steps"],
        "sampling.solver": sampling["solver"],
        **{name: recipe[name] for name in _DRAWING if name in recipe},
    }


def _changed(
    folder: RunFolder, what: str, before: Mapping[str, Any], now: Mapping[str, Any], accepted: bool
) -> list[str]:
    common = [name for name in before if name in now]
    changes = differences({name: before[name] for name in common}, {name: now[name] for name in common})
    if changes and not accepted:
        listed = "\n  ".join(changes)
        raise CheckpointError(
            f"The {what} of {folder.path} are not what they were, so its scores would not be comparable:\n  {listed}\n"
            "Put them back; or go on with the changes: add --accept-changes"
        )
    return changes


def find_place(folder: RunFolder) -> tuple[int, int, tuple[dict[str, torch.Tensor], dict[str, Any]] | None]:
    """Find the newest whole checkpoint whose images are all in the manifest.

    Returns:
        Its step, the number of images then, and its tensors and state; `(0, 0, None)` where there is none.
    """
    rows = len(folder.manifest())
    found = checkpoint.latest(folder.path)
    while found is not None:
        tensors, state = checkpoint.load(found)
        step = checkpoint.step_of(found)
        if state["images"] <= rows:
            return step, state["images"], (tensors, state)
        found = checkpoint.latest(folder.path, at_most=step - 1)
    return 0, 0, None
