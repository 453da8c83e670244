"""Fusion as an algorithm of the loop: mixing coefficients are drawn, their pictures scored, the sampler told.

A frozen generator is a policy without slots: what learns is the sampler, over coefficients. When a policy has learned,
the state of it that drew the best batch draws a pool of pictures without learning any more (RMLer: "typically the
best-performing checkpoint"); the selection takes place there.

What a conditional policy has learned of some concepts can serve others: `pixrl fuse A B --policy RUN` begins with it
(RMLer's released code throws its policy away after one pair).
"""

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixrl.algorithms.fusion.base import Feedback, Proposal, Sampler
from pixrl.algorithms.fusion.policy import PolicyKind, PolicySampler
from pixrl.errors import CheckpointError, FailedScoresError, InputError
from pixrl.fusion.config import PAIRS, FuseConfig, FusionReward, open_run, resolve_options, sampler_of
from pixrl.fusion.world import FusionSession
from pixrl.metrics.true_fusion import Fusion, FusionVerdict
from pixrl.rewards.set import Failures
from pixrl.runs import checkpoint
from pixrl.runs.folder import RunFolder
from pixrl.runs.loop import Clock
from pixrl.runs.place import CHILDREN


@dataclass(frozen=True)
class FusionRollouts:
    """The pictures of a step, and the coefficients and noises that they were drawn from."""

    step: int
    first_index: int
    proposal: Proposal
    seeds: tuple[int, ...]
    images_BCHW: Tensor

    def __len__(self) -> int:
        return len(self.seeds)


@dataclass(frozen=True)
class FusionScores:
    """The similarities and rewards of a step's pictures, and the reasons of pictures that have none."""

    feedback: Feedback
    reasons: tuple[str | None, ...]
    truths: tuple[Fusion, ...] = ()
    """What each picture is; () where nothing tells it."""

    @property
    def failed(self) -> int:
        return int(self.feedback.rewards_B.isnan().sum())


BEST = "best/"
"""Before the names of the best state's tensors in a checkpoint."""


@dataclass(frozen=True)
class Snapshot:
    """A sampler's state when it drew a batch, and the batch's mean reward."""

    step: int
    reward: float
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]

    @staticmethod
    def of(sampler: Sampler[Any], step: int, reward: float) -> "Snapshot":
        """Copy a sampler as it is, without its optimizer, which drawing does not need."""
        tensors = {
            name: tensor.detach().clone()
            for name, tensor in sampler.tensors().items()
            if ".optimizer/" not in name
        }
        return Snapshot(step, reward, tensors, copy.deepcopy(sampler.state()))


def make_sampler(config: FuseConfig, session: FusionSession) -> Sampler[Any]:
    """Make the sampler that the recipe names."""
    options = resolve_options(config.sampler, config.options)
    return sampler_of(config.sampler)(session.task(), options)


class FusionTrainer:
    """Fusion as an algorithm of the loop: its sampler, noises, generator and scorer."""

    def __init__(self, session: FusionSession, config: FuseConfig) -> None:
        self.session = session
        self.config = config
        self.sampler = make_sampler(config, session)
        self.noise = config.noise_plan()
        self.best: Snapshot | None = None
        """The sampler as it was when it drew the batch of the highest mean reward; None without a pool."""

    def images(self, step: int) -> int:
        return self.config.count(step)

    def collect(self, step: int, clock: Clock) -> FusionRollouts:
        """Render the pictures of the sampler's coefficients; in the pool, of those of its best state."""
        count = self.config.count(step)
        with clock.phase("sampler"):
            if step == self.config.learning_steps and self.best is not None:
                self.sampler.restore(self.best.tensors, self.best.state)
            proposal = self.sampler.ask(count, step)
            wanted = proposal.noises_B
            seeds = self.noise.seeds(step, count) if wanted is None else self.noise.numbered(wanted.tolist())
        with clock.phase("render"):
            images_BCHW = self.session.render(proposal.coefficients_BND, seeds)
        return FusionRollouts(step, self.config.first_index(step), proposal, seeds, images_BCHW)

    def score(self, rollouts: FusionRollouts, clock: Clock) -> FusionScores:
        """Score pictures by their similarity to each concept, and by RMLer's reward (Eq. 5) or the truth."""
        with clock.phase("score"):
            similarities_BN, reasons = self.session.score(rollouts.images_BCHW)
            truths = self.session.judge(rollouts.images_BCHW)
        feedback = Feedback.of(similarities_BN, self.config.alpha, rollouts.seeds)
        if self.config.reward is FusionReward.TRUE_FUSION:
            balance_B = torch.tensor([truth.balance for truth in truths])
            feedback = replace(
                feedback, rewards_B=balance_B.masked_fill(feedback.rewards_B.isnan(), torch.nan)
            )
        return FusionScores(feedback, reasons, truths)

    def update(self, rollouts: FusionRollouts, scores: FusionScores, clock: Clock) -> dict[str, float]:
        """Let the sampler and the choice of noises learn from the rewards; in the pool nothing learns."""
        figures = step_figures(scores)
        passes = self.session.passes(rollouts.proposal.coefficients_BND)
        figures["network_passes"] = float(passes)
        if rollouts.step >= self.config.learning_steps:
            self.sampler.observe(scores.feedback)
            return figures | ({} if self.best is None else {"pool/from_step": float(self.best.step)})
        with clock.phase("sampler"):
            mean = figures["reward/fusion/mean"]
            best = -math.inf if self.best is None else self.best.reward
            if self.config.pool_images and mean > best:  # no mean of failed scores, which is nan
                self.best = Snapshot.of(self.sampler, rollouts.step, mean)
            learned = self.sampler.tell(rollouts.proposal, scores.feedback)
            self.noise.tell(rollouts.seeds, scores.feedback.rewards_B.tolist())
        return figures | learned

    def tensors(self) -> dict[str, Tensor]:
        kept = {} if self.best is None else self.best.tensors
        return self.sampler.tensors() | {f"{BEST}{name}": tensor for name, tensor in kept.items()}

    def state(self) -> dict[str, Any]:
        best = self.best
        return {
            "sampler": self.sampler.state(),
            "noise": self.noise.state(),
            "best": None if best is None else {"step": best.step, "reward": best.reward, "state": best.state},
        }

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(BEST)}
        self.sampler.restore(own, state["sampler"])
        self.noise.restore(state["noise"])
        best = state.get("best")  # runs of before there was a pool have none
        if best is not None:
            kept = {name.removeprefix(BEST): x for name, x in tensors.items() if name.startswith(BEST)}
            self.best = Snapshot(best["step"], best["reward"], kept, best["state"])


def step_figures(scores: FusionScores) -> dict[str, float]:
    """Return a step's figures: rewards, similarities and balance of the pictures that were scored."""
    rewards_B = scores.feedback.rewards_B
    scored_B = ~rewards_B.isnan()
    rewards = rewards_B[scored_B]
    similarities_BN = scores.feedback.similarities_BN[scored_B]
    spread = similarities_BN.amax(dim=1) - similarities_BN.amin(dim=1)
    has = len(rewards) > 0
    return {
        "reward/fusion/mean": float(rewards.mean()) if has else math.nan,
        "reward/fusion/std": float(rewards.std(correction=0)) if has else math.nan,
        "reward/fusion/best": float(rewards.max()) if has else math.nan,
        "similarity/mean": float(similarities_BN.mean()) if has else math.nan,
        "balance/mean": float(spread.mean()) if has else math.nan,
        "failed_share": scores.failed / len(scores.reasons),
    } | verdict_shares(scores.truths)


def verdict_shares(truths: Sequence[Fusion]) -> dict[str, float]:
    """Return the share of the pictures that each verdict has; {} where nothing tells the truth."""
    if not truths:
        return {}
    counts = Counter(truth.verdict for truth in truths)
    return {f"true_fusion/{verdict.value}": counts[verdict] / len(truths) for verdict in FusionVerdict}


class FailureWatch:
    """A watch that stops a run of which too many pictures could not be scored."""

    def __init__(self, config: FuseConfig, reasons: Sequence[str | None]) -> None:
        """`reasons`: of the pictures that are made already."""
        self.limit = config.max_failed_share
        self.failures = _failures(reasons)

    def check(self, scores: FusionScores) -> None:
        """Raise a FailedScoresError where the share of failed pictures of the whole run so far is above the limit."""
        self.failures += _failures(scores.reasons)
        try:
            self.failures.require_at_most(self.limit, "fusion", "max_failed_share")
        except FailedScoresError as error:
            raise FailedScoresError(
                f"{error}\nWhat is done is saved. Go on all the same with a higher limit in a new run: "
                "--set max_failed_share=0.9"
            ) from None


def _failures(reasons: Sequence[str | None]) -> Failures:
    return Failures(len(reasons), Counter(reason for reason in reasons if reason is not None))


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
        "mixing": config.mixed_by.model_dump(mode="json"),
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
    return {"sampler": config.sampler, **network, "mixing": config.mixed_by.model_dump(mode="json")}
