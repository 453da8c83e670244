"""What a finished fusion has learned, for another one to begin with: `pixrl fuse A B --policy RUN`.

The policy that carries over is `policy: conditional`: it is shown what the concepts are, so that what it learned on
some of them can serve others (RMLer's policy, which its released code throws away after one pair).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pixrl.algorithms.fusion.policy import PolicyKind, PolicySampler
from pixrl.errors import CheckpointError, InputError
from pixrl.fusion.config import PAIRS, FuseConfig, open_run, sampler_of
from pixrl.fusion.trainer import BEST
from pixrl.runs import checkpoint
from pixrl.runs.folder import RunFolder
from pixrl.runs.place import CHILDREN

NETWORK = ("policy", "hidden", "groups")
"""Options of a sampler that say what its network is."""


@dataclass(frozen=True)
class LearnedPolicy:
    """A policy, and the run that it was learned in."""

    run: Path
    config: FuseConfig
    fingerprint: str
    """Of the generator that it was learned with."""
    tensors: Mapping[str, Tensor]
    """The sampler's, of the state that drew the best batch; of the last state where the run had no pool."""

    def require_fits(self, config: FuseConfig) -> None:
        """Raise an InputError where a run of this recipe cannot begin with the policy."""
        old, new = _what_it_is(self.config), _what_it_is(config)
        differing = [name for name in old if old[name] != new[name]]
        if differing:
            learned, given = (", ".join(f"{name} {side[name]}" for name in differing) for side in (old, new))
            raise InputError(
                f"--policy {self.run}: it was learned with {learned}, and this fusion has {given}. Leave these out: "
                "they are taken from the run."
            )

    def require_same_generator(self, fingerprint: str) -> None:
        """Raise an InputError where the generator is not the one that the policy was learned with."""
        if fingerprint != self.fingerprint:
            raise InputError(
                f"--policy {self.run}: it was learned with a generator whose fingerprint is {self.fingerprint}, and "
                f"this one's is {fingerprint}. Take the model that the run names: {self.config.model}."
            )


def settings_of(learned: LearnedPolicy) -> dict[str, object]:
    """Return the settings that a run takes over from the policy's run, where nothing else is given."""
    config = learned.config
    return {
        "model": config.model,
        "sampler": config.sampler,
        "options": config.options,
        "mixing": config.mixing.model_dump(mode="json"),
    }


def read_policy(run: Path) -> LearnedPolicy:
    """Read the policy of a finished fusion, or of the last one in a folder of pairs.

    Raises:
        InputError: the run is not finished, or what it learned serves its own concepts alone.
        RunError: `run` is no fusion.
    """
    path = Path(run)
    if RunFolder.open(path).kind == PAIRS:
        children = [(one, checkpoint.latest(one)) for one in sorted((path / CHILDREN).iterdir())]
        finished = [
            one
            for one, last in children
            if last is not None and checkpoint.step_of(last) >= open_run(one)[1].steps
        ]
        if not finished:
            raise InputError(f"--policy {run}: no fusion of it is finished. Type: pixrl resume {run}")
        path = finished[-1]
    _, config = open_run(path)
    kind = sampler_of(config.sampler)
    if not issubclass(kind, PolicySampler) or config.options["policy"] != PolicyKind.CONDITIONAL:
        how = f"sampler {config.sampler}" + (
            f" with policy {config.options['policy']}" if issubclass(kind, PolicySampler) else ""
        )
        raise InputError(
            f"--policy {run}: it was made by the {how}, which learns for its own concepts alone. What carries over is "
            "learned with --set options.policy=conditional."
        )
    found = checkpoint.latest(path)
    if found is None or checkpoint.step_of(found) < config.steps:
        raise InputError(f"--policy {run}: it is not finished. Type: pixrl resume {path}")
    tensors, state = checkpoint.load(found)
    best = {name.removeprefix(BEST): x for name, x in tensors.items() if name.startswith(BEST)}
    try:
        fingerprint = str(state["world"]["fingerprint"])
    except (KeyError, TypeError):
        raise CheckpointError(f"{found} does not say what it was made with; take another run.") from None
    return LearnedPolicy(path, config, fingerprint, best or tensors)


def _what_it_is(config: FuseConfig) -> dict[str, object]:
    network = {f"options.{name}": config.options.get(name) for name in NETWORK}
    return {"sampler": config.sampler, **network, "mixing": config.mixing.model_dump(mode="json")}
