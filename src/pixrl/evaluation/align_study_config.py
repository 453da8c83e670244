"""What an align study compares: methods at equal images and equal updates, over seeds."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field, field_validator

from pixrl.algorithms.stepping import Solver
from pixrl.config import Settings
from pixrl.errors import ConfigError, did_you_mean
from pixrl.evaluation.align_words import images_of, updates_of
from pixrl.evaluation.study_runner import check_differences
from pixrl.training.align_config import AlignConfig, PerturbedExploration
from pixrl.training.align_kinds import load_recipe
from pixrl.training.fuse_job import slug

KIND = "align-study"
BASE = "base"
"""The variant that is there without being named: the model before training."""
Task = tuple[str, int]
"""Variant, seed."""
_SHARED = ("model", "resolution", "guidance", "prompts.source", "evaluation.source", "rewards", "stages")
"""What must be the same in all variants, for their figures to mean the same."""


class Variant(Settings):
    """One method."""

    recipe: str
    """A YAML file, or a name under recipes/."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Dotted name -> value: what it changes in its recipe, after the study's own settings."""


class Measuring(Settings):
    """How every variant, and the base, is measured in the end: the same prompts and noise for all of a seed."""

    prompts: int = Field(48, ge=1)
    """Held-out prompts, spread evenly over the set."""
    per_prompt: int = Field(8, ge=2)
    """Pictures of each; two or more, or there would be no diversity."""
    steps: int = Field(10, ge=1)
    """Sampling steps."""
    solver: Solver = Solver.DPM
    features: str = "toy:identity"
    """The encoder of the diversity: a CLIP or DINO checkpoint, best one that is no reward."""
    segmenter: str | None = "toy:segmenter"
    """Whose detections make layouts; none: no layouts."""


class Projection(Settings):
    """Pictures of the base explored by one variant and by noise alone, in two dimensions."""

    variant: str
    """One with perturbed exploration."""
    prompts: int = Field(3, ge=1)
    """One figure each."""
    rounds: int = Field(2, ge=1)
    """Groups drawn of each prompt."""


class AlignStudyConfig(Settings):
    """Every variant with every seed, and the base."""

    variants: dict[str, Variant]
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    settings: dict[str, Any] = Field(default_factory=dict)
    """Dotted name -> value, for all variants."""
    measuring: Measuring = Measuring()
    differences: tuple[tuple[str, str], ...] = ()
    """Pairs of variants (or the base) whose paired difference is reported."""
    projection: Projection | None = None

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

    def check(self) -> None:
        """ConfigError for what cannot be, or would be no fair comparison."""
        configs = {name: self.recipe((name, self.seeds[0])) for name in self.variants}
        _check_shared(configs)
        _check_budgets(configs)
        check_differences(self.differences, self.names())
        if self.projection is not None:
            self._check_projection(self.projection.variant)

    def _variant(self, name: str) -> Variant:
        if name not in self.variants:
            raise ConfigError(f"There is no variant {name!r}.{did_you_mean(name, self.variants)}")
        return self.variants[name]

    def _check_projection(self, name: str) -> None:
        self._variant(name)
        if not isinstance(self.recipe((name, self.seeds[0])).exploration, PerturbedExploration):
            raise ConfigError(
                f"projection.variant is {name!r}, which explores by noise alone: there would be nothing to compare. "
                "Name one with exploration: perturbed."
            )


def _check_budgets(configs: Mapping[str, AlignConfig]) -> None:
    budgets = {name: (images_of(config), updates_of(config)) for name, config in configs.items()}
    if len(set(budgets.values())) > 1:
        listed = "\n  ".join(
            f"{name}: {images} images, {updates} updates" for name, (images, updates) in budgets.items()
        )
        raise ConfigError(
            f"The variants are not compared at equal images and equal updates:\n  {listed}\n"
            "images = steps × prompts.per_step × G × K, updates = steps × optimizer.updates. "
            "Change them in the variants' settings."
        )


def _check_shared(configs: Mapping[str, AlignConfig]) -> None:
    for path in _SHARED:
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
