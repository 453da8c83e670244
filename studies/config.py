"""What studies of runs compare, at equal images and equal updates, and which tables and figures they make."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from pixrl.algorithms.sampling import Solver
from pixrl.config import Settings
from pixrl.data.prompts import Prompt, PromptSet
from pixrl.errors import ConfigError, did_you_mean
from pixrl.jobs.fuse import slug
from pixrl.report.align import images_of, updates_of
from pixrl.rewards.settings import RewardSetting, check_rewards
from pixrl.runs.config import AlignConfig, PersonalizeConfig, load_recipe
from pixrl.runs.evaluation import spread_evenly
from studies.grid import Study, Task, check_differences
from studies.style import PALETTE

BASE = "base"
"""The variant that is there without being named: the model before training."""
_SHARED = (
    "model", "resolution", "guidance", "negative_prompt", "prompts.source", "prompts.column", "evaluation.source",
    "evaluation.column", "rewards", "stages",
)  # fmt: skip
"""What must be the same in all variants, for their figures to mean the same."""
_SHARED_SUBJECTS = ("references",)
"""What must be the same as well where variants have subjects."""


class Variant(Settings):
    """A method that is compared: a recipe and what is changed in it."""

    recipe: str
    """A YAML file, or a name under recipes/."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Dotted name -> value: what it changes in its recipe, after the study's own settings."""


class Measuring(Settings, ABC):
    """How the base and every trained variant are measured: by the same prompts and noise for all of a seed."""

    per_prompt: int = Field(8, ge=2)
    """Pictures of each prompt; two or more, or there would be no diversity."""
    steps: int = Field(10, ge=1)
    """Sampling steps."""
    solver: Solver = Solver.DPM
    features: str = "toy:identity"
    """The encoder by which diversity is measured: a CLIP or DINO checkpoint, best one that is no reward."""
    segmenter: str | None = "toy:segmenter"
    """The checkpoint whose detections make layouts; with none, layouts are not measured."""
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
        """Return the prompts that are drawn."""

    @abstractmethod
    def in_words(self) -> str:
        """Say in words which prompts `choose` takes."""


class PromptMeasuring(Measuring):
    """Measuring by prompts that are spread evenly over the held-out ones, which may be sorted by task."""

    prompts: int = Field(48, ge=1)
    """Number of prompts."""

    def choose(self, held_out: PromptSet) -> tuple[Prompt, ...]:
        return spread_evenly(held_out, self.prompts)

    def in_words(self) -> str:
        return f"{self.prompts} held-out prompts"


class Projection(Settings):
    """Pictures of the base explored by one variant and by noise alone, in two dimensions."""

    variant: str
    """A variant with perturbed exploration."""
    prompts: int = Field(3, ge=1)
    """Number of prompts, with a figure for each."""
    rounds: int = Field(2, ge=1)
    """Groups drawn of each prompt."""


class RunStudyConfig(Study):
    """A study of run folders: every variant, and the base, with every seed."""

    variants: dict[str, Variant]
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    settings: dict[str, Any] = Field(default_factory=dict)
    """Dotted name -> value: what is changed in the recipes of all variants."""
    measuring: Measuring
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

    def names(self) -> list[str]:
        """Return the names of the base and of every variant."""
        return [BASE, *self.variants]

    def drawn(self) -> Sequence[str]:
        """Return the variants whose curves the figures show."""
        return list(self.variants)

    def configs(self) -> dict[str, AlignConfig]:
        """Return every variant's recipe with the first seed."""
        return {name: self.recipe((name, self.seeds[0])) for name in self.variants}

    def tasks(self) -> Iterator[Task]:
        """Yield every run, seed by seed, so that a broken-off study has whole seeds."""
        for seed in self.seeds:
            for variant in self.names():
                yield variant, seed

    def recipe(self, task: Task) -> AlignConfig:
        """Return the recipe of a task; the base has the first variant's, with which it shares model and prompts."""
        name, seed = task
        variant = next(iter(self.variants.values())) if name == BASE else self._variant(name)
        values = {**self.settings, **variant.settings, "seed": seed}
        return load_recipe(variant.recipe, settings=values)

    def judged(self, config: AlignConfig) -> AlignConfig:
        """Add to a variant's recipe the rewards that only the study judges by."""
        return config.model_copy(update={"rewards": (*config.rewards, *self.measuring.rewards)})

    def check(self) -> None:
        """Raise ConfigError for what cannot be, or would be no fair comparison."""
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
    """A study of alignments, measured on held-out prompts."""

    kind = "align-study"
    measuring: PromptMeasuring = PromptMeasuring()


@dataclass(frozen=True)
class Budget:
    """What a run spends, so that methods are compared at equal budgets and the rest of what differs is said.

    Two figures must be equal in a study: pictures and updates. Not every method draws its pictures itself:

    | method       | its pictures are                                           | their scores are for             |
    |--------------|------------------------------------------------------------|----------------------------------|
    | clipped, nft | drawn by the model in training                             | learning, every one              |
    | draft        | drawn by the model in training, the last K steps twice     | the log; learns from gradients   |
    | rpo          | drawn by the frozen base                                   | finding a group's best and worst |
    | sft          | targets of the data set, each with G noises of its own     | the log alone                    |

    So equal pictures mean equal numbers of (picture, noise) pairs, not equal costs; a study's table has the minutes.
    """

    images: int
    """The number of pictures: steps x prompts x G x K."""
    source: str
    """Who draws the pictures."""
    scores: int
    """Pictures whose scores say what is learned."""
    gradient_terms: int
    """Pairs of a picture and a noise level that go through a gradient."""
    updates: int
    """Optimizer steps."""

    @property
    def comparable(self) -> tuple[int, int]:
        """What a study holds equal."""
        return self.images, self.updates


def budget_of(config: AlignConfig) -> Budget:
    """Return what a recipe's run spends."""
    images, updates, groups = images_of(config), updates_of(config), config.steps * config.prompts.per_step
    spent = config.loss.spending(images, groups, config.sampling)
    return Budget(images, spent.source, spent.scores, spent.gradient_terms, updates)


def check_budgets(configs: Mapping[str, AlignConfig]) -> None:
    """Raise ConfigError, with the sizes of all, unless variants have equal pictures and equal updates."""
    budgets = {name: budget_of(config).comparable for name, config in configs.items()}
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
    """Look up a setting by its dotted path; weights of rewards, which change no score, are left out."""
    found: Any = config.model_dump(mode="json")
    for reward in found["rewards"]:
        del reward["weight"]
    for part in path.split("."):
        found = found[part]
    return found


SUBJECT = "subject"
"""The key of a prompt's metadata that holds its subject."""


class SubjectMeasuring(Measuring):
    """Measuring by the held-out subjects, as DreamBench does: all subjects x all their prompts x 4 pictures."""

    per_prompt: int = Field(4, ge=2)
    """Pictures of each prompt; two or more, or there would be no diversity."""
    segmenter: str | None = None
    """The checkpoint whose detections make layouts; none by default, since they say little of one subject."""
    subjects: int | None = Field(None, ge=1)
    """Number of subjects, spread evenly; with none, all."""
    per_subject: int | None = Field(None, ge=1)
    """Number of prompts of each subject, other ones for each; with none, all."""

    def choose(self, held_out: PromptSet) -> tuple[Prompt, ...]:
        return spread_over_subjects(held_out, self.subjects, self.per_subject)

    def in_words(self) -> str:
        subjects = "all" if self.subjects is None else f"{self.subjects}"
        prompts = "all their prompts" if self.per_subject is None else f"{self.per_subject} prompts of each"
        return f"{subjects} held-out subjects × {prompts}"


def spread_over_subjects(
    prompts: PromptSet, subjects: int | None, per_subject: int | None
) -> tuple[Prompt, ...]:
    """Choose some prompts of some subjects, at even distances; all where the number is None.

    Each subject's places begin at its own number, so that subjects with the same list of prompts show different ones.
    """
    by_subject: dict[object, list[Prompt]] = {}
    for prompt in prompts:
        by_subject.setdefault(prompt.metadata[SUBJECT], []).append(prompt)
    whole = list(by_subject.values())
    numbers = _spread(len(whole), subjects)
    return tuple(
        whole[number][(number + place) % len(whole[number])]
        for number in numbers
        for place in _spread(len(whole[number]), per_subject)
    )


def _spread(total: int, wanted: int | None) -> list[int]:
    """Return places at even distances, as many as there are at most."""
    count = total if wanted is None else min(wanted, total)
    return [place * total // count for place in range(count)]


class Table(Settings):
    """A table of the paper: some variants under each other, and a trade-off figure of the same rows."""

    title: str = Field(min_length=1)
    rows: tuple[str, ...] = Field(min_length=1)
    """The variants of the rows; the base may be one."""

    def names(self) -> list[str]:
        """Return all variants that it shows."""
        return list(self.rows)


class CrossedTable(Settings):
    """A table of two settings against each other, with both rewards of each column, and their paths in one figure."""

    title: str = Field(min_length=1)
    corner: str = Field(min_length=1)
    """The heading of the column that names the rows."""
    columns: dict[str, dict[str, str]] = Field(min_length=1)
    """Column -> row -> variant."""

    @model_validator(mode="after")
    def _same_rows(self) -> "CrossedTable":
        rows = {column: list(cells) for column, cells in self.columns.items()}
        first = next(iter(rows))
        for column, own in rows.items():
            if not own or own != rows[first]:
                raise ValueError(
                    f"every column of {self.title!r} needs the same rows, {rows[first]} in {first!r} is not "
                    f"{own} in {column!r}"
                )
        return self

    def names(self) -> list[str]:
        """Return all variants that it shows."""
        return [variant for cells in self.columns.values() for variant in cells.values()]


class Ordering(Settings):
    """A claim of the paper: one variant is better than another by a reward."""

    better: str
    worse: str
    rewards: tuple[str, ...] = Field(min_length=1)
    """The rewards by which it is better, with a verdict for each."""
    paper: str = ""
    """The place where the paper says so, with its numbers."""


class SpectrumSettings(Settings):
    """The settings of Fig. 4: energy of the base's predicted picture by frequency over the sampling steps."""

    per_subject: int = Field(2, ge=1)
    """Pictures of each held-out subject, each of another prompt."""
    steps: int = Field(25, ge=2)
    """Sampling steps."""
    cut: float = Field(0.125, gt=0, lt=0.5)
    """Cycles a pixel up to which a frequency counts as low; 0.125 is a wave of eight pixels."""
    shown: int = Field(4, ge=1)
    """Number of rows of the picture of the path."""


class GallerySettings(Settings):
    """The settings of the gallery: subjects as several variants draw them from the same noise."""

    variants: tuple[str, ...] = Field(min_length=1)
    """The variants of the columns behind the reference; the base may be one."""
    subjects: int = Field(10, ge=1)
    """Number of rows, spread evenly over the held-out subjects; nobody chooses the prompts by hand either."""


class PersonalizeStudyConfig(RunStudyConfig):
    """A study of personalizations, measured on held-out subjects."""

    kind = "personalize-study"
    measuring: SubjectMeasuring = SubjectMeasuring()
    identity: str = "identity"
    """The reward that judges the identity: one axis of the trade-off."""
    prompt: str = "preference"
    """The reward that judges the prompt: the other axis."""
    curves: tuple[str, ...] = ()
    """The variants whose curves are drawn, at most as many as there are colours; with none, all."""
    tables: tuple[Table, ...] = ()
    crossed: tuple[CrossedTable, ...] = ()
    orderings: tuple[Ordering, ...] = ()
    """The paper's claims; the study says which hold here."""
    spectrum: SpectrumSettings | None = None
    gallery: GallerySettings | None = None

    def drawn(self) -> Sequence[str]:
        return self.curves or super().drawn()

    def check(self) -> None:
        super().check()
        configs = self.configs()
        for name, config in configs.items():
            if not isinstance(config, PersonalizeConfig):
                raise ConfigError(
                    f"The variant {name!r} has a recipe for align, which has no subjects. "
                    "Say kind: align-study"
                )
        self._check_names()
        self._check_rewards(self.judged(next(iter(configs.values()))))
        self._check_figures()

    def _check_names(self) -> None:
        for where, name in self._named():
            if name not in self.names():
                raise ConfigError(
                    f"{where} names {name!r}, which is no variant.{did_you_mean(name, self.names())}"
                )
        if BASE in self.curves:
            raise ConfigError("curves names the base, which is not trained and has none: take it out.")

    def _check_figures(self) -> None:
        shown = {
            "curves": self.drawn(),
            **{f"the table {table.title!r}": table.rows for table in self.tables},
        }
        for where, names in shown.items():
            if len(names) > len(PALETTE):
                raise ConfigError(
                    f"{where} has {len(names)} variants, and figures have {len(PALETTE)} colours: name fewer."
                )
        titles = [slug(table.title) for table in self._all_tables()]
        for place, title in enumerate(titles):
            if title in titles[:place]:
                raise ConfigError(f"Two tables would have the same file, tradeoff-{title}.svg; rename one.")

    def _named(self) -> Iterator[tuple[str, str]]:
        """Yield every place where a variant is named, and the name."""
        yield from (("curves", name) for name in self.curves)
        for table in self._all_tables():
            yield from ((f"the table {table.title!r}", name) for name in table.names())
        yield from (("orderings", name) for one in self.orderings for name in (one.better, one.worse))
        if self.gallery is not None:
            yield from (("gallery", name) for name in self.gallery.variants)

    def _all_tables(self) -> tuple[Table | CrossedTable, ...]:
        return (*self.tables, *self.crossed)

    def _check_rewards(self, config: AlignConfig) -> None:
        known = [setting.name for setting in config.rewards]
        asked = [("identity", self.identity), ("prompt", self.prompt)]
        asked += [("orderings", name) for one in self.orderings for name in one.rewards]
        for where, name in asked:
            if name not in known:
                raise ConfigError(
                    f"{where} names {name!r}, which is no reward.{did_you_mean(name, known)} There are "
                    f"{', '.join(known)}."
                )
