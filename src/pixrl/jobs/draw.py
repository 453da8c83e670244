"""`pixrl draw`: further pictures with what a run has learned, by a LoRA or plain model, or of a child of a fusion.

Every picture goes through the model alone, so it depends on its prompt, seed and size, and on nothing beside it: eight
pictures begin with the four that `--n 4` draws, bit for bit.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from pixrl import models
from pixrl.algorithms.exploration import Group, NoiseOnly, prepare
from pixrl.algorithms.world import Team
from pixrl.config import MOST_GUIDANCE, plain_resolution
from pixrl.data.prompts import Split
from pixrl.data.subject_prompts import subject_prompts
from pixrl.data.subjects import Subject, SubjectSet, load_subjects
from pixrl.errors import CheckpointError, InputError, RunError, did_you_mean
from pixrl.fusion.config import KIND as FUSE
from pixrl.fusion.config import open_run as open_fusion
from pixrl.fusion.world import mixing_of, render
from pixrl.hub import read_card
from pixrl.hub_check import Layout
from pixrl.jobs.fuse import read_world, require_same_code, require_same_pictures
from pixrl.models.base import Renderer
from pixrl.runs import checkpoint
from pixrl.runs.config import KINDS, PersonalizeConfig, read_config
from pixrl.runs.files import fsync_folder, write_atomic
from pixrl.runs.folder import RunFolder, png_bytes
from pixrl.runs.loaded import load_policy, load_slot
from pixrl.runs.log import coefficients_file, load_coefficients
from pixrl.runs.measure import evaluated_slot, sample
from pixrl.runs.place import RECIPE
from pixrl.runs.record import read_start, require_same_model
from pixrl.text import require_text
from pixrl.types import sample_seed

EPOCH = -7
"""The epoch of these pictures' seeds; training uses 0 and up, evaluations -5 and -6."""
MANIFEST = "manifest.jsonl"
INDEX = "model_index.json"
"""What a folder with a whole model holds, and one with a LoRA alone does not."""


@dataclass(frozen=True)
class DrawRequest:
    """The request of what is to be drawn."""

    prompt: str | None = None
    """None for a child of a fusion, which has no prompt."""
    count: int = 4
    size: int | str | None = None
    """Pixels: the side of a square, or WIDTHxHEIGHT; None: as the run, or else the model, has it."""
    seed: int = 0
    guidance: float | None = None
    """The scale; None: as the run, or else the model, has it."""
    negative_prompt: str | None = None
    """What guidance leads away from; None: the same."""
    subject: str | None = None
    """Of a personalization: the subject whose references the model is shown; None: its only one."""
    child: int | None = None
    """Of a fusion: the number of a picture in its manifest."""
    base: str | None = None
    """The model that a LoRA belongs to."""
    device: str | None = None
    """None: the run's, or "auto"."""

    @property
    def drawing(self) -> dict[str, Any]:
        """The settings of drawing that were given, as recipes name them."""
        given = {"resolution": self.size, "guidance": self.guidance, "negative_prompt": self.negative_prompt}
        return {name: value for name, value in given.items() if value is not None}

    def seeds(self, group: int = 0) -> tuple[int, ...]:
        """Return one seed a picture."""
        return tuple(sample_seed(self.seed, EPOCH, group, number) for number in range(self.count))


@dataclass(frozen=True)
class Source:
    """A source of pictures: one [3, H, W] in [0, 1] a seed."""

    picture: Callable[[int], Tensor]
    seeds: tuple[int, ...]
    about: dict[str, object]
    """What the manifest says of every picture."""


def draw(what: str | Path, request: DrawRequest, out: Path) -> tuple[Path, ...]:
    """Draw PNGs and their manifest into a new folder; return the pictures' paths.

    Args:
        what: an align, personalize or fuse run's folder; a LoRA's file or folder, with `request.base`; or a model.
        request: prompt, number, size and seed.
        out: the folder, which must not exist or be empty.

    Raises:
        InputError: an argument does not fit `what`, the model does not know a word, or `out` is taken.
        RunError: the run has no checkpoint yet.
        CheckpointError: weights are missing, damaged or others than the run began with.
    """
    if request.count < 1:
        raise InputError(f"n must be at least 1, got {request.count}. Type: --n 4")
    if request.guidance is not None and not 0 <= request.guidance <= MOST_GUIDANCE:
        raise InputError(f"guidance is a number from 0 to {MOST_GUIDANCE}, got {request.guidance:g}.")
    if request.negative_prompt is not None:
        require_text(request.negative_prompt, f"the negative prompt {request.negative_prompt!r}")
    if request.size is not None:
        request = replace(request, size=plain_resolution(request.size))
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} is there already, and nothing is overwritten. Give another --out.")
    source = _source(what, request)
    out.mkdir(parents=True, exist_ok=True)
    files, rows = [], []
    for number, seed in enumerate(source.seeds):
        file = out / f"{number:04d}.png"
        write_atomic(file, png_bytes(source.picture(seed)), sync_folder=False)
        files.append(file)
        rows.append(json.dumps({"file": file.name, "seed": seed, **source.about}, ensure_ascii=False))
    write_atomic(out / MANIFEST, ("\n".join(rows) + "\n").encode())
    fsync_folder(out)
    return tuple(files)


def _source(what: str | Path, request: DrawRequest) -> Source:
    """Return what draws, after every check that needs no picture."""
    place = Path(what)
    if not (place / RECIPE).is_file():
        _require_prompt(request)
        if request.subject is not None or request.child is not None:
            option = "child" if request.subject is None else "subject"
            raise InputError(
                f"--{option} is for runs, and {what} is none: leave it out, or give a run's folder."
            )
        ref, lora = (str(what), None) if request.base is None else (request.base, str(what))
        if lora is None and not (place / INDEX).is_file() and any(place.glob("*lora*.safetensors")):
            raise InputError(f"{what} holds a LoRA, which draws on its model alone. Add it: --model REF")
        renderer = models.load(ref, device=request.device or "auto", lora=lora, **request.drawing)
        row = renderer.encode([str(request.prompt)])
        about = {"prompt": request.prompt, "model": ref, "fingerprint": renderer.fingerprint()}
        about |= {} if lora is None else {"lora": lora}
        return Source(lambda seed: renderer.sample(row, [seed])[0], request.seeds(), about | _how(renderer))
    if request.base is not None:
        raise InputError(f"{what} is a run, which says its own model: leave --model out.")
    folder = RunFolder.open(place, allow_changed=True)
    if folder.kind == FUSE:
        return _of_child(folder.path, request)
    if folder.kind not in KINDS:
        raise InputError(
            f"{what} is a run of kind {folder.kind!r}, which nothing is drawn with. Give one of its fusions: "
            f"{what}/children/NAME"
        )
    _require_prompt(request)
    if request.child is not None:
        raise InputError(
            f"--child is for fusions, and {what} is a run of kind {folder.kind!r}: leave it out."
        )
    return _of_run(folder, request)


def _require_prompt(request: DrawRequest) -> None:
    if not (request.prompt or "").strip():
        raise InputError('There is no prompt. Type: pixrl draw RUN "a photo of an owl"')
    require_text(str(request.prompt), f"the prompt {request.prompt!r}")


def _of_run(folder: RunFolder, request: DrawRequest) -> Source:
    """What a run learned, drawn as its evaluation draws: its slot, steps, solver and references."""
    saved = checkpoint.latest(folder.path)
    if saved is None:
        broken = checkpoint.all_folders(folder.path)
        if broken:
            checkpoint.load(broken[-1])  # says what is wrong with it
        raise RunError(f"{folder.path} has no checkpoint yet. Type: pixrl resume {folder.path}")
    config = read_config(folder)
    machine: dict[str, object] = {"gradient_checkpointing": False}
    machine |= {} if request.device is None else {"device": request.device}
    steps = config.evaluation.steps or config.sampling.steps
    asked = request.drawing
    asked["sampling"] = config.sampling.model_copy(update={"steps": steps})
    asked["machine"] = config.machine.model_copy(update=machine)
    config = config.model_copy(update=asked)
    about: dict[str, object] = {}
    metadata: Mapping[str, object] = {}
    if isinstance(config, PersonalizeConfig):
        subject = replace(_subject(config, request.subject), prompts=(str(request.prompt),), targets=())
        chosen = SubjectSet(subject.name, (subject,))
        metadata = subject_prompts(chosen, count=config.references.count)[0].metadata
        about["subject"] = subject.name
    elif request.subject is not None:
        raise InputError(f"--subject is for personalizations, and {folder.path} is none: leave it out.")
    policy = load_policy(config, Team(config.machine.device))
    require_same_model(folder, read_start(folder), policy)
    group = Group(0, EPOCH, 0, str(request.prompt), metadata)
    row = prepare(NoiseOnly(), policy, [group]).anchor
    slot = evaluated_slot(config)
    loaded = load_slot(policy, config, checkpoint.load(saved)[0], slot)

    def picture(seed: int) -> Tensor:
        with policy.slot(loaded):
            return sample(policy, row, [seed], solver=config.sampling.solver)[0]

    about |= {"prompt": request.prompt, "model": config.model, "run": str(folder.path), "slot": slot.value}
    about |= {"step": checkpoint.step_of(saved), "solver": config.sampling.solver.value}
    return Source(picture, request.seeds(), about | _how(policy))


def _subject(config: PersonalizeConfig, name: str | None) -> Subject:
    """Return the subject of that name among those of the run's evaluation and training; None: the only one."""
    known: dict[str, Subject] = {}
    for split in Split:
        known |= {one.name: one for one in load_subjects(config.prompts_of(split)[0], split=split)}
    if name is None and len(known) == 1:
        return next(iter(known.values()))
    if name not in known:
        said = "has several subjects" if name is None else f"has no subject {name!r}"
        meant = "" if name is None else did_you_mean(name, list(known))
        raise InputError(f"The run {said}.{meant} Give one: --subject {' | '.join(sorted(known))}")
    return known[name]


def _of_child(path: Path, request: DrawRequest) -> Source:
    """A child of a fusion again: its own noise first, then others."""
    if request.prompt is not None or request.subject is not None:
        wrong = "a prompt" if request.prompt is not None else "--subject"
        raise InputError(
            f"{path} is a fusion, whose children are mixtures without {wrong}. Leave it out: "
            f"pixrl draw {path} --child N"
        )
    require_same_code(path)
    folder, config = open_fusion(path)
    rows = folder.manifest()
    if request.child is None or not 0 <= request.child < len(rows):
        given = "No child was given" if request.child is None else f"There is no child {request.child}"
        raise InputError(
            f"{given}: {path} has {len(rows)}, numbered from 0 as in its report. "
            f"Type: pixrl draw {path} --child 0"
        )
    row = rows[request.child]
    file = coefficients_file(folder, row.step)
    try:
        of_step_BND = load_coefficients(folder, row.step)
    except (OSError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{file} is missing or damaged. Type: pixrl check {path}") from error
    own = request.child - min(one.index for one in rows if one.step == row.step)
    coefficients_1ND = of_step_BND[own : own + 1]
    world = read_world(folder)
    require_same_pictures(world, config, path)
    renderer = models.load(
        config.model,
        device=request.device or config.device,
        dtype=config.dtype,
        plan=config.memory,
        **{**config.drawing, **request.drawing},
    )
    if renderer.fingerprint() != world.fingerprint:
        raise CheckpointError(f"{config.model} has changed since {path} was drawn. Put the old one back.")
    mixing = mixing_of(renderer, read_card(config.model, Layout.PIPELINE), config)
    about = {"concepts": config.concepts, "child": request.child, "model": config.model, "run": str(path)}
    seeds = (row.seed, *request.seeds(request.child))[: request.count]
    return Source(
        lambda seed: render(renderer, mixing, coefficients_1ND, [seed])[0], seeds, about | _how(renderer)
    )


def _how(renderer: Renderer) -> dict[str, object]:
    settings = renderer.settings
    negative = {} if settings.negative_prompt is None else {"negative_prompt": settings.negative_prompt}
    return {
        "size": settings.resolution,
        "steps": settings.steps,
        "guidance": settings.guidance,
        **negative,
    }
