"""How a cell of a fuse study is run: a fusion without a folder, measured by the reward's encoder and by another."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from pixrl import config as recipes
from pixrl.data.pairs import parse_pairs
from pixrl.errors import InputError
from pixrl.fusion.config import FuseConfig
from pixrl.fusion.select import choose, choose_thresholds
from pixrl.fusion.trainer import FusionRollouts, FusionScores, FusionTrainer
from pixrl.fusion.world import (
    Calibration,
    Exemplars,
    FusionSession,
    FusionWorld,
    Scorer,
    calibrate_presence,
    load_world,
)
from pixrl.metrics.fusion import figures
from pixrl.rewards.clip import FusionScorer
from pixrl.rewards.encoders import load_encoder
from pixrl.rewards.segmentation import Foreground
from pixrl.runs.loop import Step, take_step
from studies.grid import Record, Study, Task, check_differences
from studies.tables import Grid, layout_of, write

FusionStep = Step[FusionRollouts, FusionScores]


class StudyConfig(Study):
    """A study of fusions: every variant on every pair with every seed."""

    kind = "fuse-study"
    pairs: tuple[str, ...]
    """Pairs of concepts, each as `a & b`."""
    variants: dict[str, dict[str, Any]]
    """Name -> what the variant changes in `fuse`."""
    seeds: tuple[int, ...] = (0, 1, 2)
    fuse: dict[str, Any] = Field(default_factory=dict)
    """The `fuse` recipe that all variants share."""
    alpha: float = 5.0
    """The balance weight that all rewards are reported with, whatever a variant learns from."""
    heldout: str | None = None
    """An encoder that is not the reward: a CLIP or DINO checkpoint."""

    def tasks(self) -> Iterator[Task]:
        """Yield every run, pair by pair, so that a broken-off study has whole pairs."""
        for pair in self.pairs:
            for seed in self.seeds:
                for variant in self.variants:
                    yield pair, variant, seed

    def concepts(self) -> tuple[str, ...]:
        """Return every concept once."""
        return parse_pairs(self.pairs, "the study's pairs").concepts

    def recipe(self, task: Task) -> FuseConfig:
        """Return the recipe of one task."""
        pair, variant, seed = task
        concepts = parse_pairs([pair], "the study's pairs").pairs[0]
        values = {**self.fuse, **self.variants[variant], "concepts": concepts, "seed": seed}
        return recipes.load(FuseConfig, values)

    def check(self) -> None:
        """Raise ConfigError for a pair, a variant or a difference that cannot be."""
        parse_pairs(self.pairs, "the study's pairs")
        check_differences(self.differences, self.variants)
        for variant in self.variants:
            self.recipe((self.pairs[0], variant, 0))


class HeldOut:
    """Scores by another encoder, with thresholds calibrated for it."""

    def __init__(self, scorer: Scorer, calibration: Calibration) -> None:
        self.scorer = scorer
        self.calibration = calibration
        self._features: dict[tuple[str, int], Tensor] = {}

    def similarities(self, images_BCHW: Tensor, exemplars: Sequence[Exemplars]) -> Tensor:
        """Return the similarity of every picture to every concept, [B, N]."""
        features = [self._features_of(one) for one in exemplars]
        return self.scorer.similarities(images_BCHW, features).similarities_BN.float().cpu()

    def _features_of(self, exemplars: Exemplars) -> Tensor:
        key = (exemplars.concept, len(exemplars.seeds))
        if key not in self._features:
            features = self.scorer.exemplar_features(exemplars.images_MCHW)
            self._features[key] = features[~features.isnan().any(dim=1)]
        return self._features[key]


@lru_cache(maxsize=2)
def load_heldout(world: FusionWorld, ref: str, concepts: tuple[str, ...]) -> HeldOut:
    """Load a CLIP or DINO checkpoint as a world's held-out encoder, with thresholds from pictures of the concepts."""
    if ref == world.clip:
        raise InputError(f"{ref!r} is the reward's own encoder; a held-out one must be another.")
    scorer = FusionScorer(load_encoder(ref), Foreground(world.segmenter))
    seen_so = FusionWorld(world.renderer, scorer, world.card, clip=ref, segmenter=world.segmenter)
    calibration = calibrate_presence(seen_so, concepts)
    return HeldOut(scorer, calibration)


def run_task(study: StudyConfig, task: Task, world: FusionWorld, heldout: HeldOut | None) -> dict[str, Any]:
    """Run one fusion and return its record."""
    begun = time.perf_counter()
    config = study.recipe(task)
    session = FusionSession(world, config)
    trainer = FusionTrainer(session, config)
    steps = [take_step(trainer, number) for number in range(config.steps)]
    similarities_BN = torch.cat([step.scores.feedback.similarities_BN for step in steps])
    thresholds = choose_thresholds(config, world.card.presence)
    selection = choose(similarities_BN, config, thresholds, 1)
    limits = (thresholds.presence, thresholds.balance)
    truths = [truth for step in steps for truth in step.scores.truths]
    found = figures(similarities_BN, study.alpha, *limits, selection.indices, truths).to_json()
    if heldout is not None:
        found |= _heldout_figures(study, session, steps, selection.indices or _best(steps), heldout)
    batch_rewards = [round(float(step.scores.feedback.rewards_B.nanmean()), 5) for step in steps]
    pair, variant, seed = task
    return {
        "pair": pair,
        "variant": variant,
        "seed": seed,
        "truth": None if session.truth is None else session.truth.name,
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
    """Measure the figures by the other encoder; the selected picture stays the one that the reward chose."""
    images_BCHW = torch.cat([step.rollouts.images_BCHW for step in steps])
    similarities_BN = heldout.similarities(images_BCHW, session.exemplars)
    limits = (heldout.calibration.threshold, heldout.calibration.balance)
    found = figures(similarities_BN, study.alpha, *limits, chosen).to_json()
    return {f"heldout_{name}": value for name, value in found.items()}


def _best(steps: Sequence[FusionStep]) -> tuple[int, ...]:
    rewards_B = torch.cat([step.scores.feedback.rewards_B for step in steps]).nan_to_num(-torch.inf)
    return (int(rewards_B.argmax()),)


def run_cell(study: StudyConfig, task: Task, out: Path) -> Record:
    """Run one fusion in this process, which loads the models once."""
    config = study.recipe(task)
    world = load_world(*config.world)
    heldout = load_heldout(world, study.heldout, study.concepts()) if study.heldout else None
    return run_task(study, task, world, heldout)


def write_results(study: StudyConfig, records: list[Record], out: Path) -> str:
    """Write table.md and summary.json; return the Markdown."""
    words = {
        "pairs": len({str(record["pair"]) for record in records}),
        "seeds": len({int(record["seed"]) for record in records}),
        "variants": len(study.variants),
        "runs": len(records),
        "heldout": study.heldout,
        "truth": _truth_of(records),
    }
    grid = Grid(layout_of("fusions"), records, list(study.variants), study.differences, words)
    summary = {
        "runs": len(records),
        "seconds_per_run": sum(float(r["seconds"]) for r in records) / max(1, len(records)),
        **grid.summary(),
        "calibration": _calibration(study) if records else {},
    }
    return write(grid.markdown(), summary, out)


def _truth_of(records: Sequence[Record]) -> str | None:
    """Return what told the true fusions, where each of the records has it."""
    told = {str(record.get("truth") or "") for record in records}
    return " and ".join(sorted(told)) or None if "" not in told else None


def _calibration(study: StudyConfig) -> dict[str, Any]:
    """Return the thresholds of both encoders."""
    if study.heldout is None:
        return {}
    world = load_world(*study.recipe(next(study.tasks())).world)
    heldout = load_heldout(world, study.heldout, study.concepts())
    return {
        "reward": json.loads(world.card.presence.model_dump_json()) if world.card.presence else None,
        "heldout": {"encoder": study.heldout, **asdict(heldout.calibration)},
    }
