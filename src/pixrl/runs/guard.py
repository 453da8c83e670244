"""The guard: is a run gaming its reward? Every evaluation's pictures are held against those of the first one.

Both show the same prompts drawn from the same noises, so each signal is a paired difference with one value a prompt. A
signal is *found* where its mean has moved past chance (a one-sided t-test over prompts, `CHANCE` shared among all
signals of an evaluation) and by more than its bound:

* `reward/NAME` of every held-out reward: fell by more than `fall` standard deviations of its first scores;
* `disagreement/NAME`: a held-out reward fell past chance while the trained ones rose, and the two gains are further
  apart than `shift` standard deviations;
* `picture/NAME` (`metrics.pictures`): moved by more than `shift` standard deviations of the first pictures;
* `diversity`: the mean distance of a prompt's pictures fell below the share `diversity` of the first one's;
* `distance`: the pictures are further from the first ones than `distance`, where the recipe says so.

All of it is read from the run's folder, so a resumed run finds what an unbroken one finds, and a report needs no run.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from scipy import stats
from torch import Tensor

from pixrl.algorithms.world import World
from pixrl.config import Settings
from pixrl.errors import GuardError
from pixrl.metrics.diversity import mean_pairwise_distance, pixel_features
from pixrl.metrics.intervals import gains_by_prompt
from pixrl.metrics.pictures import picture_statistics
from pixrl.runs import checkpoint
from pixrl.runs.files import write_atomic
from pixrl.runs.folder import RunFolder
from pixrl.runs.log import cut_back
from pixrl.runs.reading import (
    FINDINGS,
    Signal,
    evaluated_places,
    read_findings,
    sample_scores,
    samples_of,
    step_of_place,
)

CHANCE = 0.01
"""The probability that an evaluation of an unchanged model finds anything."""
LEAST = 4
"""Prompts below which nothing is found: their differences say too little about chance."""
FLOORS = {"colours": 0.1}
"""The least standard deviation of a picture statistic that counts; 0.02 for those in [0, 1]."""
FLOOR = 0.02


class Action(StrEnum):
    """What the guard does when it finds something."""

    WARN = "warn"
    STOP = "stop"
    ROLLBACK = "rollback"
    RAISE_KL = "raise_kl"


class MonitorSettings(Settings):
    """The bounds by which the guard finds that a run games its reward, and what it does then."""

    action: Action = Action.WARN
    """warn; stop: end the run; rollback: end it at the weights of the last evaluation in which nothing was found;
    raise_kl: multiply loss.kl and go on."""
    shift: float = Field(1.0, gt=0)
    """Standard deviations of the first pictures by which a statistic may move."""
    fall: float = Field(0.3, gt=0)
    """Standard deviations of its first scores by which a held-out reward may fall."""
    diversity: float = Field(0.7, gt=0, le=1)
    """Share of the first diversity that has to stay."""
    distance: float | None = Field(None, gt=0, le=2)
    """1 - cosine of small pictures to the first ones of the same prompt and noise; none: only logged."""
    kl_factor: float = Field(2.0, gt=1)
    """With raise_kl: what loss.kl is multiplied by each time."""


@dataclass(frozen=True)
class Looked:
    """The pictures and scores of one evaluation, with one row a prompt."""

    statistics: Mapping[str, Tensor]
    """Name -> [P, S]."""
    scores: Mapping[str, Tensor]
    """Reward -> [P, S]; nan where scoring failed."""
    features_PSE: Tensor

    @staticmethod
    def of(folder: RunFolder, step: int, per_prompt: int) -> "Looked":
        """Read an evaluation from the run's folder, a picture at a time: all of them may be larger than the memory."""
        of_pictures, features = list[Mapping[str, Tensor]](), list[Tensor]()
        for file in sorted(samples_of(folder, step).glob("[0-9]*.png")):
            image_BCHW = _read(file)[None]
            of_pictures.append(picture_statistics(image_BCHW))
            features.append(pixel_features(image_BCHW).double())
        shape = (-1, per_prompt)
        scores = {
            name: torch.tensor([math.nan if x is None else x for x in values], dtype=torch.float64).view(
                shape
            )
            for name, values in sample_scores(folder, step).items()
        }
        statistics = {
            name: torch.cat([one[name] for one in of_pictures]).view(shape) for name in of_pictures[0]
        }
        features_BE = torch.cat(features)
        return Looked(statistics, scores, features_BE.view(-1, per_prompt, features_BE.shape[1]))


def compare(
    first: Looked, now: Looked, settings: MonitorSettings, trained: Sequence[str], held_out: Sequence[str]
) -> tuple[Signal, ...]:
    """Hold an evaluation against the first one of the run.

    Args:
        first, now: of the same prompts and noises.
        settings: the bounds.
        trained, held_out: the rewards that the run learns from, and those that it only logs.
    """
    names = [
        *(f"picture/{name}" for name in first.statistics),
        *(f"reward/{name}" for name in held_out),
        "diversity",
    ]
    names += [f"disagreement/{name}" for name in held_out] if trained else []
    chance = CHANCE / len(names)
    found = []
    for name, before_PS in first.statistics.items():
        spread = max(float(before_PS.std(correction=0)), FLOORS.get(name, FLOOR))
        change_P = (now.statistics[name] - before_PS).mean(dim=1)
        moved = float(change_P.mean()) / spread
        p = min(1.0, 2 * _p_value(change_P if moved > 0 else -change_P))
        means = float(before_PS.mean()), float(now.statistics[name].mean())
        found.append(Signal(f"picture/{name}", *means, moved, p, abs(moved) > settings.shift and p < chance))
    gain_P = torch.stack([_gain(first, now, name) for name in trained]).mean(dim=0) if trained else None
    for name in held_out:
        own_P = _gain(first, now, name)
        means = float(first.scores[name].nanmean()), float(now.scores[name].nanmean())
        moved, p = float(own_P.nanmean()), _p_value(-own_P)
        found.append(Signal(f"reward/{name}", *means, moved, p, moved < -settings.fall and p < chance))
        if gain_P is not None:
            apart_P = gain_P - own_P
            apart, p_apart = float(apart_P.nanmean()), max(_p_value(apart_P), p, _p_value(gain_P))
            is_found = apart > settings.shift and p_apart < chance
            found.append(Signal(f"disagreement/{name}", *means, apart, p_apart, is_found))
    if first.features_PSE.shape[1] > 1:
        before_P, after_P = (mean_pairwise_distance(one.features_PSE) for one in (first, now))
        share = float(after_P.mean() / before_P.mean().clamp_min(1e-12))
        p = _p_value(before_P - after_P)
        lost = share < settings.diversity and p < chance
        found.append(Signal("diversity", float(before_P.mean()), float(after_P.mean()), share, p, lost))
    distance = float((1 - (first.features_PSE * now.features_PSE).sum(dim=-1)).mean())
    far = settings.distance is not None and distance > settings.distance
    return (*found, Signal("distance", 0.0, distance, distance, math.nan, far))


class Guard:
    """A guard that looks at every evaluation of a run, writes down what it finds, and acts as the recipe says."""

    def __init__(
        self,
        folder: RunFolder,
        settings: MonitorSettings,
        rewards: Mapping[str, bool],
        *,
        per_prompt: int,
        first: int,
        world: World,
        say: Callable[[str], None],
        raise_kl: Callable[[float], float],
    ) -> None:
        """Look at the evaluations of a run.

        Args:
            folder: the run's.
            settings: bounds and action.
            rewards: name -> whether it is held out.
            per_prompt: pictures of a prompt in an evaluation.
            first: the step from which on evaluations draw the same pictures; later ones are held against its first.
            world: the processes; the leading one looks, all act alike.
            say: tells the user what was found.
            raise_kl: multiplies the weight of the loss's KL and returns it.
        """
        self.folder, self.settings, self.world = folder, settings, world
        self.trained = [name for name, only_logged in rewards.items() if not only_logged]
        self.held_out = [name for name, only_logged in rewards.items() if only_logged]
        self.per_prompt, self.first = per_prompt, first
        self.say, self.raise_kl = say, raise_kl
        self.found: list[Signal] = []
        self._base: tuple[int, Looked] | None = None
        """The evaluation that others are held against, behind its step."""

    def look(self, step: int) -> None:
        """Look at the pictures of the evaluation before training step `step`, and write down what is found.

        It comes before the evaluation's line in the log, so that a run that has the line has been looked at.
        """
        signals: tuple[Signal, ...] = ()
        steps = map(step_of_place, evaluated_places(self.folder)) if self.world.rank == 0 else ()
        if earlier := [at for at in steps if self.first <= at < step]:
            if self._base is None or self._base[0] != min(earlier):
                self._base = min(earlier), Looked.of(self.folder, min(earlier), self.per_prompt)
            now = Looked.of(self.folder, step, self.per_prompt)
            signals = compare(self._base[1], now, self.settings, self.trained, self.held_out)
            content = json.dumps([_finite(asdict(one)) for one in signals], indent=1)
            write_atomic(samples_of(self.folder, step) / FINDINGS, content.encode() + b"\n")
        self.found = [one for one in self.world.gather(signals)[0] if one.found]

    def act(self, step: int, *, is_last: bool = False) -> None:
        """Act on what was found in the evaluation before training step `step`.

        Raises:
            GuardError: the recipe says that the run ends here; its newest checkpoint is the one to go on from.
        """
        if not self.found:
            return
        what = f"The guard, step {step}: {'; '.join(one.text() for one in self.found)}."
        action = self.settings.action
        if action is Action.WARN or (is_last and action is not Action.ROLLBACK):
            self.say(f"{what} The run may be gaming its reward: look at its pictures.")
        elif action is Action.RAISE_KL:
            self.say(f"{what} loss.kl is {self.raise_kl(self.settings.kl_factor):g} from here on.")
        else:
            where = "Its newest checkpoint is kept."
            if action is Action.ROLLBACK:
                good = self.first
                if self.world.rank == 0:
                    # all after the last evaluation in which nothing was found is dropped
                    places = [at for at in map(step_of_place, evaluated_places(self.folder)) if at < step]
                    clean = [at for at in places if not any(x.found for x in read_findings(self.folder, at))]
                    kept = checkpoint.latest(self.folder.path, at_most=max(clean, default=self.first))
                    good = 0 if kept is None else checkpoint.step_of(kept)
                    images = 0 if kept is None else int((checkpoint.read_state(kept) or {})["images"])
                    cut_back(self.folder, good, images)
                good = self.world.gather(good)[0]
                where = f"Its weights are those of step {good}, the last in which nothing was found."
            raise GuardError(
                f"{what} The run ends here, as monitor.action={action} says. {where} To go on all the same: pixrl "
                f"resume {self.folder.path} --set monitor.action=warn"
            )


def _gain(first: Looked, now: Looked, name: str) -> Tensor:
    """How much a reward rose for each prompt [P], in standard deviations of its first scores."""
    before_PS = first.scores[name]
    known = before_PS[before_PS.isfinite()]
    spread = float(known.std(correction=0)) if len(known) else math.nan
    before, after = (one.scores[name].flatten().tolist() for one in (first, now))
    gains = gains_by_prompt(before, after, before_PS.shape[1])
    return torch.tensor(gains, dtype=torch.float64) / (spread or torch.finfo(torch.float64).eps)


def _p_value(change_P: Tensor) -> float:
    """The probability that values whose true mean is 0 have a mean as large as this; 1 of fewer than `LEAST`."""
    known = change_P[change_P.isfinite()]
    if len(known) < LEAST:
        return 1.0
    if float(known.std()) == 0:
        return 0.0 if float(known.mean()) > 0 else 1.0
    return float(stats.ttest_1samp(known.numpy(), 0, alternative="greater").pvalue)


def _read(file: Path) -> Tensor:
    with Image.open(file) as picture:
        return torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1).double() / 255


def _finite(row: dict[str, object]) -> dict[str, object]:
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in row.items()}
