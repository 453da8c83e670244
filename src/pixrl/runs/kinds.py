"""The kinds of runs that the one loop plays, by the `kind` of their recipe."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pixrl import config as recipes
from pixrl.errors import RunError
from pixrl.runs.align_config import AlignConfig
from pixrl.runs.folder import RunFolder
from pixrl.runs.personalize_config import PersonalizeConfig

ALIGN, PERSONALIZE = "align", "personalize"
KINDS: Mapping[str, type[AlignConfig]] = {ALIGN: AlignConfig, PERSONALIZE: PersonalizeConfig}


def kind_of(config: AlignConfig) -> str:
    """What its recipe calls it."""
    return next(kind for kind, settings in KINDS.items() if type(config) is settings)


def load_recipe(
    recipe: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    values: Mapping[str, Any] | None = None,
    kind: str | None = None,
) -> AlignConfig:
    """A recipe as what its own `kind` says it is.

    Args:
        recipe: a YAML file, a name under recipes/, or a mapping.
        overrides, values: see `config.load`.
        kind: the job to do; None: the recipe's own, align where it does not say.

    Raises:
        ConfigError: it is wrong, or for another job than `kind`.
    """
    wanted = kind or recipes.kind_of(recipe) or ALIGN
    return recipes.load(KINDS.get(wanted, AlignConfig), recipe, overrides, values=values, kind=wanted)


def require_kind(folder: RunFolder) -> str:
    """A run's kind. RunError where the loop did not play it."""
    if folder.kind not in KINDS:
        raise RunError(
            f"{folder.path} is a run of kind {folder.kind!r}, not {' or '.join(map(repr, KINDS))}. "
            f"Type: pixrl report {folder.path}"
        )
    return folder.kind


def read_config(folder: RunFolder) -> AlignConfig:
    """The recipe of a run of one of these kinds."""
    return load_recipe(folder.recipe(), kind=require_kind(folder))
