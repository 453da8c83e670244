"""Many fusions without folders, for evidence: pairs x seeds x variants, with intervals over pairs.

    python -m pixrl.studies.fusion RECIPE --out DIR

Records go to DIR/records.jsonl, one a run; a study that was broken off goes on where it stopped. DIR/table.md and
DIR/summary.json are written from them at the end, or by `--table` alone.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator

from pixrl import config as recipes
from pixrl.config import Settings
from pixrl.data.pairs import parse_pairs
from pixrl.fusion.select import choose, choose_thresholds
from pixrl.fusion.trainer import FusionRollouts, FusionScores, FusionTrainer
from pixrl.fusion.world import FusionSession, FusionWorld, load_world
from pixrl.metrics.fusion import figures
from pixrl.runs.config import FuseConfig
from pixrl.runs.loop import Step, take_step
from pixrl.studies.fusion_table import write_tables
from pixrl.studies.heldout import HeldOut, load_heldout
from pixrl.studies.runner import check_differences, open_records, run_tasks, study_command

KIND = "fuse-study"
FusionStep = Step[FusionRollouts, FusionScores]
Task = tuple[str, str, int]
"""Pair, variant, seed."""


class StudyConfig(Settings):
    """What is compared: every variant on every pair with every seed."""

    pairs: tuple[str, ...]
    """`a & b`, one a pair."""
    variants: dict[str, dict[str, Any]]
    """Name -> what it changes in `fuse`."""
    seeds: tuple[int, ...] = (0, 1, 2)
    fuse: dict[str, Any] = Field(default_factory=dict)
    """What all variants share, as a `fuse` recipe."""
    alpha: float = 5.0
    """The balance weight that all rewards are reported with, whatever a variant learns from."""
    heldout: str | None = None
    """An encoder that is not the reward: a CLIP or DINO checkpoint."""
    differences: tuple[tuple[str, str], ...] = ()
    """Pairs of variants whose paired difference is reported."""

    @field_validator("differences")
    @classmethod
    def _no_repeats(cls, differences: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        return tuple(dict.fromkeys(differences))

    def tasks(self) -> Iterator[Task]:
        """Every run, pair by pair, so that a broken-off study has whole pairs."""
        for pair in self.pairs:
            for seed in self.seeds:
                for variant in self.variants:
                    yield pair, variant, seed

    def concepts(self) -> tuple[str, ...]:
        """Every concept once."""
        return parse_pairs(self.pairs, "the study's pairs").concepts

    def recipe(self, task: Task) -> FuseConfig:
        """The fusion of one task."""
        pair, variant, seed = task
        concepts = parse_pairs([pair], "the study's pairs").pairs[0]
        values = {**self.fuse, **self.variants[variant], "concepts": concepts, "seed": seed}
        return recipes.load(FuseConfig, values)

    def check(self) -> None:
        """ConfigError for a pair, a variant or a difference that cannot be."""
        parse_pairs(self.pairs, "the study's pairs")
        check_differences(self.differences, self.variants)
        for variant in self.variants:
            self.recipe((self.pairs[0], variant, 0))


def run_task(study: StudyConfig, task: Task, world: FusionWorld, heldout: HeldOut | None) -> dict[str, Any]:
    """One fusion and its figures."""
    begun = time.perf_counter()
    config = study.recipe(task)
    session = FusionSession(world, config)
    trainer = FusionTrainer(session, config)
    steps = [take_step(trainer, number) for number in range(config.steps)]
    similarities_BN = torch.cat([step.scores.feedback.similarities_BN for step in steps])
    thresholds = choose_thresholds(config, world.card.presence)
    selection = choose(similarities_BN, config, thresholds, 1)
    limits = (thresholds.presence, thresholds.balance)
    found = figures(similarities_BN, study.alpha, *limits, selection.indices).to_json()
    if heldout is not None:
        found |= _heldout_figures(study, session, steps, selection.indices or _best(steps), heldout)
    batch_rewards = [round(float(step.scores.feedback.rewards_B.nanmean()), 5) for step in steps]
    pair, variant, seed = task
    return {
        "pair": pair,
        "variant": variant,
        "seed": seed,
        "figures": found,
        "batch_rewards": [None if reward != reward else reward for reward in batch_rewards],
        "seconds": round(time.perf_counter() - begun, 2),
    }


def _heldout_figures(
    study: StudyConfig,
    session: FusionSession,
    steps: Sequence[FusionStep],
    chosen: Sequence[int],
    heldout: HeldOut,
) -> dict[str, float | None]:
    """The same figures by the other encoder; the selected picture stays the one that the reward chose."""
    images_BCHW = torch.cat([step.rollouts.images_BCHW for step in steps])
    similarities_BN = heldout.similarities(images_BCHW, session.exemplars)
    limits = (heldout.calibration.threshold, heldout.calibration.balance)
    found = figures(similarities_BN, study.alpha, *limits, chosen).to_json()
    return {f"heldout_{name}": value for name, value in found.items()}


def _best(steps: Sequence[FusionStep]) -> tuple[int, ...]:
    rewards_B = torch.cat([step.scores.feedback.rewards_B for step in steps]).nan_to_num(-torch.inf)
    return (int(rewards_B.argmax()),)


def run_study(
    study: StudyConfig, out: Path, *, workers: int = 1, quiet: bool = False
) -> list[dict[str, Any]]:
    """All runs that are not yet recorded in `out`; returns all records."""
    study.check()
    log = open_records(study, KIND, out)
    work = partial(_work, study.model_dump_json())
    return run_tasks(log, list(study.tasks()), _task_of, work, workers=workers, quiet=quiet)


def _task_of(row: Mapping[str, Any]) -> Task:
    return row["pair"], row["variant"], row["seed"]


def _work(study_json: str, task: Task) -> dict[str, Any]:
    """One task in this process; the models are loaded once."""
    study = _parse(study_json)
    config = study.recipe(task)
    world = load_world(*config.world)
    heldout = load_heldout(world, study.heldout, study.concepts()) if study.heldout else None
    return run_task(study, task, world, heldout)


@cache
def _parse(study_json: str) -> StudyConfig:
    return StudyConfig.model_validate_json(study_json)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    module = "pixrl.studies.fusion"
    return study_command(module, __doc__, KIND, StudyConfig, _run, _tables, arguments)


def _run(study: StudyConfig, out: Path, workers: int) -> list[dict[str, Any]]:
    return run_study(study, out, workers=workers)


def _tables(study: StudyConfig, records: list[dict[str, Any]], out: Path) -> str:
    return write_tables(study.model_dump(), records, out, _heldout_calibration(study, records))


def _heldout_calibration(study: StudyConfig, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if study.heldout is None or not records:
        return {}
    config = study.recipe(next(study.tasks()))
    world = load_world(*config.world)
    return {
        "reward": json.loads(world.card.presence.model_dump_json()) if world.card.presence else None,
        "heldout": {
            "encoder": study.heldout,
            **asdict(load_heldout(world, study.heldout, study.concepts()).calibration),
        },
    }


if __name__ == "__main__":
    sys.exit(main())
