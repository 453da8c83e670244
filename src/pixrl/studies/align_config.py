"""What a study of runs compares: methods at equal images and equal updates, over seeds. `AlignStudyConfig` is one."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator

from pixrl.algorithms.sampling import Solver
from pixrl.config import Settings
from pixrl.data.prompts import Prompt, PromptSet
from pixrl.errors import ConfigError, did_you_mean
from pixrl.rewards.settings import RewardSetting, check_rewards
from pixrl.runs.config import AlignConfig, PersonalizeConfig, load_recipe
from pixrl.runs.evaluation import spread_evenly
from pixrl.runs.fuse import slug
from pixrl.studies.budget import check_budgets
from pixrl.studies.runner import check_differences

KIND = "align-study"
BASE = "base"
"""The variant that is there without being named: the model before training."""
Task = tuple[str, int]
"""Variant, seed."""
_SHARED = (
    "model", "resolution", "guidance", "prompts.source", "prompts.column", "evaluation.source", "evaluation.column",
    "rewards", "stages",
)  # fmt: skip
"""What must be the same in all variants, for their figures to mean the same."""
_SHARED_SUBJECTS = ("references",)
"""And where they have subjects."""


class Variant(Settings):
    """One method."""

    recipe: str
    """A YAML file, or a name under recipes/."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Dotted name -> value: what it changes in its recipe, after the study's own settings."""


class Measuring(Settings, ABC):
    """How every variant, and the base, is measured in the end: the same prompts and noise for all of a seed."""

    per_prompt: int = Field(8, ge=2)
    """Pictures of each prompt; two or more, or there would be no diversity."""
    steps: int = Field(10, ge=1)
    """Sampling steps."""
    solver: Solver = Solver.DPM
    features: str = "toy:identity"
    """The encoder of the diversity: a CLIP or DINO checkpoint, best one that is no reward."""
    segmenter: str | None = "toy:segmenter"
    """Whose detections make layouts; none: no layouts."""
    rewards: tuple[RewardSetting, ...] = ()
    """Rewards that no variant trains on or logs: only the study judges by them. Say held_out: true."""

    @field_validator("rewards")
    @classmethod
    def _all_held_out(cls, rewards: tuple[RewardSetting, ...]) -> tuple[RewardSetting, ...]:
        for setting in rewards:
            if not setting.held_out:
                raise ValueError(
                    f"{setting.name!r} is only measured by: add held_out: true. What is trained on stands in the "
                    "variants' recipes."
                )
        return rewards

    @abstractmethod
    def choose(self, held_out: PromptSet) -> tuple[Prompt, ...]:
        """The prompts that are drawn."""

    @abstractmethod
    def in_words(self) -> str:
        """Which prompts those are."""


class PromptMeasuring(Measuring):
    """By prompts that are spread evenly over the held-out ones, which may be sorted by task."""

    prompts: int = Field(48, ge=1)
    """How many."""

    def choose(self, held_out: PromptSet) -> tuple[Prompt, ...]:
        return spread_evenly(held_out, self.prompts)

    def in_words(self) -> str:
        return f"{self.prompts} held-out prompts"


class Projection(Settings):
    """Pictures of the base explored by one variant and by noise alone, in two dimensions."""

    variant: str
    """One with perturbed exploration."""
    prompts: int = Field(3, ge=1)
    """One figure each."""
    rounds: int = Field(2, ge=1)
    """Groups drawn of each prompt."""


class RunStudyConfig(Settings):
    """Every variant with every seed, and the base. What both kinds of study share."""

    kind: ClassVar[str]
    variants: dict[str, Variant]
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    settings: dict[str, Any] = Field(default_factory=dict)
    """Dotted name -> value, for all variants."""
    measuring: Measuring
    differences: tuple[tuple[str, str], ...] = ()
    """Pairs of variants (or the base) whose paired difference is reported."""
    projection: Projection | None = None
    reuse: Path | None = None
    """Folder of another study: a finished run of it with the same recipe and seed is taken, not trained again."""

    @field_validator("variants")
    @classmethod
    def _names(cls, variants: dict[str, Variant]) -> dict[str, Variant]:
        if not variants:
            raise ValueError("name at least one variant, such as e2po: {recipe: toy/e2po}")
        folders = [slug(name) for name in variants]
        for place, name in enumerate(variants):
            if folders[place] == slug(BASE):
                raise ValueError(
                    f"{name!r} is what the untrained model is called; give the variant another name"
                )
            if folders[place] in folders[:place]:
                raise ValueError(
                    f"{name!r} would have the same folder as another variant; give it another name"
                )
        return variants

    @field_validator("differences")
    @classmethod
    def _no_repeats(cls, differences: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        return tuple(dict.fromkeys(differences))

    def names(self) -> list[str]:
        """The base and every variant."""
        return [BASE, *self.variants]

    def drawn(self) -> Sequence[str]:
        """The variants whose curves figures show."""
        return list(self.variants)

    def configs(self) -> dict[str, AlignConfig]:
        """Every variant's recipe with the first seed."""
        return {name: self.recipe((name, self.seeds[0])) for name in self.variants}

    def tasks(self) -> Iterator[Task]:
        """Every run, seed by seed, so that a broken-off study has whole seeds."""
        for seed in self.seeds:
            for variant in self.names():
                yield variant, seed

    def recipe(self, task: Task) -> AlignConfig:
        """The run of a task; of the base: that of the first variant, with which it shares model and prompts."""
        name, seed = task
        variant = next(iter(self.variants.values())) if name == BASE else self._variant(name)
        values = {**self.settings, **variant.settings, "seed": seed}
        return load_recipe(variant.recipe, values=values)

    def judged(self, config: AlignConfig) -> AlignConfig:
        """A variant's recipe with the rewards that only the study judges by."""
        return config.model_copy(update={"rewards": (*config.rewards, *self.measuring.rewards)})

    def check(self) -> None:
        """ConfigError for what cannot be, or would be no fair comparison."""
        configs = self.configs()
        _check_shared(configs)
        check_budgets(configs)
        for config in configs.values():
            check_rewards(self.judged(config).rewards, config.stages)
        check_differences(self.differences, self.names())
        if self.reuse is not None and not self.reuse.is_dir():
            raise ConfigError(
                f"reuse names {self.reuse}, which is no folder. Run that study first, or take it out."
            )
        if self.projection is not None:
            self._check_projection(self.projection.variant)

    def _variant(self, name: str) -> Variant:
        if name not in self.variants:
            raise ConfigError(f"There is no variant {name!r}.{did_you_mean(name, self.variants)}")
        return self.variants[name]

    def _check_projection(self, name: str) -> None:
        self._variant(name)
        if not self.recipe((name, self.seeds[0])).exploration.varies_conditions:
            raise ConfigError(
                f"projection.variant is {name!r}, which explores by noise alone: there would be nothing to compare. "
                "Name one with exploration: perturbed."
            )


class AlignStudyConfig(RunStudyConfig):
    """Alignments, measured on held-out prompts."""

    kind = KIND
    measuring: PromptMeasuring = PromptMeasuring()


def _check_shared(configs: Mapping[str, AlignConfig]) -> None:
    with_subjects = all(isinstance(config, PersonalizeConfig) for config in configs.values())
    for path in (*_SHARED, *(_SHARED_SUBJECTS if with_subjects else ())):
        found = {name: _at(config, path) for name, config in configs.items()}
        first = next(iter(found))
        for name, value in found.items():
            if value != found[first]:
                raise ConfigError(
                    f"{path} differs between variants: {found[first]!r} in {first!r}, {value!r} in {name!r}. "
                    "All must share it, or their figures mean different things."
                )


def _at(config: AlignConfig, path: str) -> object:
    """A setting by its dotted path; of rewards all but their weights, which are a method's own and change no score."""
    found: Any = config.model_dump(mode="json")
    for reward in found["rewards"]:
        del reward["weight"]
    for part in path.split("."):
        found = found[part]
    return found
