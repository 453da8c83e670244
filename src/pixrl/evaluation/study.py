"""Many fusions without folders, for evidence: pairs x seeds x variants, with intervals over pairs.

    python -m pixrl.evaluation.study RECIPE --out DIR

Records go to DIR/records.jsonl, one a run; a study that was broken off goes on where it stopped. DIR/table.md and
DIR/summary.json are written from them at the end, or by `--table` alone.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator

from pixrl import config as recipes
from pixrl.config import Settings
from pixrl.data.pairs import parse_pairs
from pixrl.errors import ConfigError, PixrlError, did_you_mean
from pixrl.evaluation.fusion_metrics import figures
from pixrl.evaluation.heldout import HeldOut, load_heldout
from pixrl.evaluation.study_table import write_tables
from pixrl.training.environment import describe
from pixrl.training.files import sha256, write_atomic
from pixrl.training.fuse_config import FuseConfig
from pixrl.training.fuse_loop import FusionStep, make_sampler, play
from pixrl.training.fuse_noise import NoisePlan
from pixrl.training.fuse_select import choose, choose_thresholds
from pixrl.training.fuse_world import FusionSession, FusionWorld, load_world
from pixrl.training.jsonl import JsonLines

RECORDS, RECIPE, ENVIRONMENT = "records.jsonl", "recipe.yaml", "environment.json"
KIND = "fuse-study"
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
        for names in self.differences:
            for name in names:
                if name not in self.variants:
                    hint = did_you_mean(name, self.variants)
                    raise ConfigError(f"differences names {name!r}, which is no variant.{hint}")
        for variant in self.variants:
            self.recipe((self.pairs[0], variant, 0))


def run_task(study: StudyConfig, task: Task, world: FusionWorld, heldout: HeldOut | None) -> dict[str, Any]:
    """One fusion and its figures."""
    begun = time.perf_counter()
    config = study.recipe(task)
    session = FusionSession(world, config)
    steps = list(play(session, make_sampler(config, session), config, NoisePlan(config.noise, config.seed)))
    similarities_BN = torch.cat([step.feedback.similarities_BN for step in steps])
    thresholds = choose_thresholds(config, world.card.presence)
    selection = choose(similarities_BN, config, thresholds, 1)
    limits = (thresholds.presence, thresholds.balance)
    found = figures(similarities_BN, study.alpha, *limits, selection.indices).to_json()
    if heldout is not None:
        found |= _heldout_figures(study, session, steps, selection.indices or _best(steps), heldout)
    batch_rewards = [round(float(step.feedback.rewards_B.nanmean()), 5) for step in steps]
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
    images_BCHW = torch.cat([step.images_BCHW for step in steps])
    similarities_BN = heldout.similarities(images_BCHW, session.exemplars)
    limits = (heldout.calibration.threshold, heldout.calibration.balance)
    found = figures(similarities_BN, study.alpha, *limits, chosen).to_json()
    return {f"heldout_{name}": value for name, value in found.items()}


def _best(steps: Sequence[FusionStep]) -> tuple[int, ...]:
    rewards_B = torch.cat([step.feedback.rewards_B for step in steps]).nan_to_num(-torch.inf)
    return (int(rewards_B.argmax()),)


def run_study(
    study: StudyConfig, out: Path, *, workers: int = 1, quiet: bool = False
) -> list[dict[str, Any]]:
    """All runs that are not yet recorded in `out`; returns all records."""
    study.check()
    log = _open(study, out)
    done = {(row["pair"], row["variant"], row["seed"]) for row in log.read()}
    todo = [task for task in study.tasks() if task not in done]
    begun = time.monotonic()
    for number, record in enumerate(_records(study, todo, workers), 1):
        log.append([record])
        if not quiet and (number % 10 == 0 or number == len(todo)):
            left = (time.monotonic() - begun) / number * (len(todo) - number)
            print(
                f"{len(done) + number}/{len(done) + len(todo)} runs, {left / 60:.1f} min left",
                file=sys.stderr,
            )
    return log.read()


def _records(study: StudyConfig, todo: Sequence[Task], workers: int) -> Iterator[dict[str, Any]]:
    if workers <= 1:
        for task in todo:
            yield _work(study.model_dump_json(), task)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        text = study.model_dump_json()
        futures = [pool.submit(_work, text, task) for task in todo]
        for future in as_completed(futures):
            yield future.result()


def _work(study_json: str, task: Task) -> dict[str, Any]:
    """One task in this process; the models are loaded once."""
    study = _parse(study_json)
    config = study.recipe(task)
    world = load_world(config.model, config.clip, config.segmenter, config.device)
    heldout = load_heldout(world, study.heldout, study.concepts()) if study.heldout else None
    return run_task(study, task, world, heldout)


@cache
def _parse(study_json: str) -> StudyConfig:
    return StudyConfig.model_validate_json(study_json)


def _open(study: StudyConfig, out: Path) -> JsonLines:
    """The study's records; a folder of another study is refused."""
    out.mkdir(parents=True, exist_ok=True)
    text = f"kind: {KIND}\n{recipes.dump(study)}"
    path = out / RECIPE
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise ConfigError(f"{out} holds another study (its {path.name} differs). Choose another --out.")
    if not path.is_file():
        write_atomic(path, text.encode())
        write_atomic(out / ENVIRONMENT, describe(None, sha256(text.encode())))
    return JsonLines(out / RECORDS, out)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m pixrl.evaluation.study", description=__doc__)
    parser.add_argument("recipe", help="a YAML file, or a name under recipes/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--table", action="store_true", help="only write the tables of the records so far")
    given = parser.parse_args(arguments)
    try:
        study = recipes.load(StudyConfig, given.recipe, given.set, kind=KIND)
        records = (
            _open(study, given.out).read()
            if given.table
            else run_study(study, given.out, workers=given.workers)
        )
        calibration = _heldout_calibration(study, records)
        print(write_tables(study.model_dump(), records, given.out, calibration))
    except PixrlError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on where it stopped.", file=sys.stderr)
        return 130
    return 0


def _heldout_calibration(study: StudyConfig, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if study.heldout is None or not records:
        return {}
    config = study.recipe(next(study.tasks()))
    world = load_world(config.model, config.clip, config.segmenter, config.device)
    return {
        "reward": json.loads(world.card.presence.model_dump_json()) if world.card.presence else None,
        "heldout": {
            "encoder": study.heldout,
            **asdict(load_heldout(world, study.heldout, study.concepts()).calibration),
        },
    }


if __name__ == "__main__":
    sys.exit(main())
