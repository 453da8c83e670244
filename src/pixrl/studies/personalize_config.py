"""What a study of personalizations compares, and which of the paper's tables and figures it makes."""

from collections.abc import Iterator, Sequence

from pydantic import Field, model_validator

from pixrl.config import Settings
from pixrl.data.prompts import Prompt, PromptSet
from pixrl.errors import ConfigError, did_you_mean
from pixrl.report.charts import COLOURS
from pixrl.runs.config import AlignConfig, PersonalizeConfig
from pixrl.runs.fuse import slug
from pixrl.studies.align_config import BASE, Measuring, RunStudyConfig

KIND = "personalize-study"
SUBJECT = "subject"
"""What the metadata of a prompt calls its subject."""


class SubjectMeasuring(Measuring):
    """By the held-out subjects: DreamBench's protocol, which is all subjects x all their prompts x 4 pictures."""

    per_prompt: int = Field(4, ge=2)
    """Pictures of each prompt; two or more, or there would be no diversity."""
    segmenter: str | None = None
    """Whose detections make layouts; none: no layouts, which say little of pictures of one subject."""
    subjects: int | None = Field(None, ge=1)
    """How many, spread evenly; none: all."""
    per_subject: int | None = Field(None, ge=1)
    """Prompts of each, other ones for each; none: all."""

    def choose(self, held_out: PromptSet) -> tuple[Prompt, ...]:
        return spread_over_subjects(held_out, self.subjects, self.per_subject)

    def in_words(self) -> str:
        subjects = "all" if self.subjects is None else f"{self.subjects}"
        prompts = "all their prompts" if self.per_subject is None else f"{self.per_subject} prompts of each"
        return f"{subjects} held-out subjects × {prompts}"


def spread_over_subjects(
    prompts: PromptSet, subjects: int | None, per_subject: int | None
) -> tuple[Prompt, ...]:
    """Some prompts of some subjects, at even distances; None: all.

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
    """Places at even distances, as many as there are at most."""
    count = total if wanted is None else min(wanted, total)
    return [place * total // count for place in range(count)]


class Table(Settings):
    """Some variants under each other: a table of the paper, and a trade-off figure of the same rows."""

    title: str = Field(min_length=1)
    rows: tuple[str, ...] = Field(min_length=1)
    """Variants, or the base."""

    def names(self) -> list[str]:
        """All variants that it shows."""
        return list(self.rows)


class CrossedTable(Settings):
    """Two settings against each other: identity and prompt reward of each column, and their paths in one figure."""

    title: str = Field(min_length=1)
    corner: str = Field(min_length=1)
    """What the rows are."""
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
        """All variants that it shows."""
        return [variant for cells in self.columns.values() for variant in cells.values()]


class Ordering(Settings):
    """A claim of the paper: one variant is better than another by a reward."""

    better: str
    worse: str
    rewards: tuple[str, ...] = Field(min_length=1)
    """By which rewards, one claim each."""
    paper: str = ""
    """Where the paper says so, with its numbers."""


class SpectrumSettings(Settings):
    """The paper's Fig. 4, of the base: energy of the predicted picture by frequency over the sampling steps."""

    per_subject: int = Field(2, ge=1)
    """Pictures of each held-out subject, each of another prompt."""
    steps: int = Field(25, ge=2)
    """Sampling steps."""
    cut: float = Field(0.125, gt=0, lt=0.5)
    """Cycles a pixel up to which a frequency counts as low; 0.125 is a wave of eight pixels."""
    shown: int = Field(4, ge=1)
    """Rows of the picture of the path."""


class GallerySettings(Settings):
    """Subjects by several variants from the same noise: reference | base | naive | ours."""

    variants: tuple[str, ...] = Field(min_length=1)
    """Columns behind the reference; the base may be one."""
    subjects: int = Field(10, ge=1)
    """Rows, spread evenly over the held-out subjects; the prompt of each is not chosen by hand either."""


class PersonalizeStudyConfig(RunStudyConfig):
    """Personalizations, measured on held-out subjects."""

    kind = KIND
    measuring: SubjectMeasuring = SubjectMeasuring()
    identity: str = "identity"
    """The reward that judges the identity: one axis of the trade-off."""
    prompt: str = "preference"
    """The reward that judges the prompt: the other one."""
    curves: tuple[str, ...] = ()
    """Variants whose curves are drawn, at most as many as there are colours; none: all."""
    tables: tuple[Table, ...] = ()
    crossed: tuple[CrossedTable, ...] = ()
    orderings: tuple[Ordering, ...] = ()
    """What the paper claims; the study says which hold here."""
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
                    "Type: python -m pixrl.studies.align"
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
            if len(names) > COLOURS:
                raise ConfigError(
                    f"{where} has {len(names)} variants, and figures have {COLOURS} colours: name fewer."
                )
        titles = [slug(table.title) for table in self._all_tables()]
        for place, title in enumerate(titles):
            if title in titles[:place]:
                raise ConfigError(f"Two tables would have the same file, tradeoff-{title}.svg; rename one.")

    def _named(self) -> Iterator[tuple[str, str]]:
        """Where a variant is named, and which."""
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
