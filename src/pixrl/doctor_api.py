"""`pixrl doctor` for callers: any recipe, examined before anything loads. The command line calls this."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pixrl import align_api, config
from pixrl.device import quiet_loading
from pixrl.doctor.diagnosis import Diagnosis
from pixrl.doctor.fusion import examine_fusion
from pixrl.doctor.training import examine as examine_training
from pixrl.errors import ConfigError
from pixrl.runs.align import try_out
from pixrl.runs.align_config import AlignConfig
from pixrl.runs.fuse_config import FuseConfig
from pixrl.runs.kinds import ALIGN, KINDS

FUSE = "fuse"


def examine(
    recipe: str | Path | Mapping[str, Any] | None,
    overrides: Sequence[str] = (),
    *,
    subject: Path | str | None = None,
    steps: int | None = None,
    seed: int | None = None,
    processes: int = 1,
    out: Path | str | None = None,
    force: bool = False,
    score: bool = False,
) -> Diagnosis:
    """What a recipe needs and what is missing here: what a run of it would be refused for.

    Args:
        recipe: a YAML file, a name under recipes/, or the settings themselves, with `kind`: align where it has none.
            None: `toy/subject`, which needs a subject.
        overrides: further settings, `a.b=c`.
        subject: a subject's folder in place of the recipe's subjects.
        steps: training steps, in place of the recipe's.
        seed: of everything random, in place of the recipe's.
        processes: how many would share the work.
        out: the run's folder, to be checked too.
        force: whether a run that is there would be replaced.
        score: also load the rewards and let them score a synthetic batch, as a run does; code of the user's never.

    Raises:
        ConfigError: the recipe is wrong, is not that of a single run, or there is neither a recipe nor a subject.
    """
    with quiet_loading():
        place = None if out is None else Path(out)
        settings = _settings(recipe, overrides, subject, steps, seed)
        if isinstance(settings, FuseConfig):
            if score:
                raise ConfigError("A fusion has no rewards to try out: leave --score out.")
            return examine_fusion(settings, processes=processes, out=place, force=force)
        found = examine_training(settings, processes=processes, out=place, force=force)
        return try_out(settings, found) if score and found.can_run else found


def _settings(
    recipe: str | Path | Mapping[str, Any] | None,
    overrides: Sequence[str],
    subject: Path | str | None,
    steps: int | None,
    seed: int | None,
) -> AlignConfig | FuseConfig:
    """What the recipe's own command would run."""
    if recipe is None or subject is not None:
        return align_api.load_either(recipe, overrides, subject=subject, steps=steps, seed=seed)
    kind = config.kind_of(recipe) or ALIGN
    if kind == FUSE:
        if steps is not None:
            raise ConfigError("A fusion has no training steps: leave --steps out, and set budget=N.")
        values = {} if seed is None else {"seed": seed}
        return config.load(FuseConfig, recipe, overrides, values=values, kind=FUSE)
    if kind not in KINDS:
        raise ConfigError(
            f"{recipe} is a recipe for {kind!r}, not for one run. doctor takes those of {FUSE}, {', '.join(KINDS)}."
        )
    return align_api.load(recipe, overrides, steps=steps, seed=seed)
