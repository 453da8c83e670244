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
    recipe: str | Path | Mapping[str, Any] | None,
    overrides: Sequence[str] = (),
    *,
    subject: Path | str | None = None,
    steps: int | None = None,
    seed: int | None = None,
    processes: int = 1,
) -> Diagnosis:
    """What a recipe needs and what is missing here.

    Args:
        recipe: a YAML file, a name under recipes/, or the settings themselves, with `kind`: align where it has none.
            None: `toy/subject`, which needs a subject.
        overrides: further settings, `a.b=c`.
        subject: a subject's folder in place of the recipe's subjects.
        steps: training steps, in place of the recipe's.
        seed: of everything random, in place of the recipe's.
        processes: how many would share the work.

    Raises:
        ConfigError: the recipe is wrong, is not that of a single run, or there is neither a recipe nor a subject.
    """
    with quiet_loading():
        if recipe is not None and subject is None:
            return _examine(recipe, overrides, steps, seed, processes)
        training = align_api.load_either(recipe, overrides, subject=subject, steps=steps, seed=seed)
        return examine_training(training, processes=processes)


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
