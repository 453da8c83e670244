"""`pixrl doctor` for callers: any recipe, examined before anything loads. The command line calls this."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pixrl import align_api, config
from pixrl.device import quiet_loading
from pixrl.errors import ConfigError
from pixrl.training.align_kinds import ALIGN, KINDS
from pixrl.training.diagnosis import Diagnosis
from pixrl.training.doctor import examine as examine_training
from pixrl.training.doctor_fuse import examine_fusion
from pixrl.training.fuse_config import FuseConfig

FUSE = "fuse"


def examine(
    recipe: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    steps: int | None = None,
    seed: int | None = None,
    processes: int = 1,
) -> Diagnosis:
    """What a recipe needs and what is missing here.

    Args:
        recipe: a YAML file, a name under recipes/, or the settings themselves, with `kind`: align where it has none.
        overrides: further settings, `a.b=c`.
        steps: training steps, in place of the recipe's.
        seed: of everything random, in place of the recipe's.
        processes: how many would share the work.

    Raises:
        ConfigError: the recipe is wrong, or is not that of a single run.
    """
    with quiet_loading():
        return _examine(recipe, overrides, steps, seed, processes)


def _examine(
    recipe: str | Path | Mapping[str, Any],
    overrides: Sequence[str],
    steps: int | None,
    seed: int | None,
    processes: int,
) -> Diagnosis:
    kind = config.kind_of(recipe) or ALIGN
    if kind == FUSE:
        if steps is not None:
            raise ConfigError("A fusion has no training steps: leave --steps out, and set budget=N.")
        values = {} if seed is None else {"seed": seed}
        fusion = config.load(FuseConfig, recipe, overrides, values=values, kind=FUSE)
        return examine_fusion(fusion, processes=processes)
    if kind not in KINDS:
        raise ConfigError(
            f"{recipe} is a recipe for {kind!r}, not for one run. doctor takes those of {FUSE}, {', '.join(KINDS)}."
        )
    return examine_training(align_api.load(recipe, overrides, steps=steps, seed=seed), processes=processes)
