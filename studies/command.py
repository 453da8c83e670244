"""Which kinds of study there are, and what `pixrl study` does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pixrl import config as recipes
from pixrl.errors import ConfigError
from pixrl.workers import Workers
from studies import fusion_runs, runs
from studies.config import AlignStudyConfig, PersonalizeStudyConfig
from studies.grid import Kind, open_records, run_grid

KINDS: dict[str, Kind[Any]] = {
    "fuse-study": Kind(
        fusion_runs.StudyConfig,
        ("pair", "variant", "seed"),
        fusion_runs.run_cell,
        lambda study, records, out: None,
        fusion_runs.write_results,
        say_every=10,
    ),
    **{
        model.kind: Kind(model, ("variant", "seed"), runs.run_task, runs.finish, runs.write_results)
        for model in (AlignStudyConfig, PersonalizeStudyConfig)
    },
}


def run(
    recipe: str, out: Path | None, overrides: Sequence[str], *, workers: Workers, only_tables: bool
) -> str:
    """Run a study from where it stands, or only write its tables; return them as Markdown.

    Args:
        recipe: a YAML file, or a name under recipes/.
        out: the study's folder; None: runs/ and the recipe's name.
        overrides: texts such as `a.b=c`.
        workers: where its cells are run.
        only_tables: run nothing, write tables and charts of the records so far.

    Raises:
        PixrlError: the recipe is for no study, or the study cannot be run.
    """
    name = recipes.kind_of(recipe)
    if name not in KINDS:
        what = "does not say what it is for" if name is None else f"is a recipe for {name}, which is no study"
        raise ConfigError(f"{recipe} {what}. A study's recipe begins with kind: {' or '.join(KINDS)}.")
    kind = KINDS[name]
    study = recipes.load(kind.model, recipe, overrides, kind=name)
    folder = out or Path("runs") / Path(recipe).stem
    records = (
        open_records(study, name, folder).read()
        if only_tables
        else run_grid(kind, study, folder, workers=workers)
    )
    return kind.tables(study, records, folder)
