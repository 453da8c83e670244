"""Aligning a flow model with rewards: `collect` draws groups of pictures, `update` learns from their scores.

A method is a combination of parts, none of which knows the others:

    exploration x stochastic step x advantage x loss
    (exploration.py)  (sampling.py)   (advantages.py)  (loss.py)

Flow-GRPO is noise only x flow_sde x group or global x clipped (grpo.py); DiffusionNFT is noise only x none x group x
nft (nft.py); E2PO is perturbed embeddings (e2po.py) with DiffusionNFT's rest. E2PO's algorithm box, with a prompt's G K
samples as one group:

    1. learn K - 1 perturbed conditions per prompt, keep c_0 (Eqs. 9 to 12)       exploration.prepare
    2. draw x ~ pi_old(. | c_k(t)) for every noise g and condition k (Eqs. 8, 13)  collect, sampling.roll_out
    3. r(x), A(x, t) within the group                                             Loss.advantages
    4. descend the loss (Eqs. 3 to 7), conditioned on c_0 alone                   update, Loss.terms
    5. old <- d old + (1 - d) current                                             update, at its end

Customized-GRPO is Flow-GRPO with reference pictures in every condition and its two shapings of the advantage, SARS and
TDW (customized_grpo.py); SFT, RPO and DRaFT are other losses (sft.py, rpo.py, draft.py).

Processes share a step's groups; gradients are summed over them and divided by the number of terms of all, so the
update does not depend on how many there are, nor on the micro-batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from pixrl.algorithms.advantages import AdvantageEstimator, conflict_metrics, reward_metrics
from pixrl.algorithms.exploration import Exploration, Group, prepare
from pixrl.algorithms.loss import Loss, Rollouts
from pixrl.algorithms.optim import adamw, adamw_8bit, moments, restore_moments
from pixrl.algorithms.sampling import RolloutSettings, Samples, Schedule, StepPlan
from pixrl.algorithms.world import Alone, Tally, World, disagreement, sum_gradients
from pixrl.config import MOST, Count, Settings
from pixrl.errors import RunError
from pixrl.models.base import FlowPolicy
from pixrl.models.memory.sharding import whole
from pixrl.models.pipeline import chunks
from pixrl.models.slots import Slot, Slots
from pixrl.types import RewardBatch, Scores, sample_seed

_PARTS_KEY = -3
"""The prompt index of the random draw that assigns a step's samples to its optimizer steps; prompts use 0 and up."""

MOST_RATE = 100.0
"""The largest learning rate that is accepted; above it is a slip of the finger."""
Share = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSettings(Settings):
    """The settings of AdamW on the trained parameters, and of the averaged weights."""

    eight_bit: bool = False
    """Keep its moments in 8 bits, a quarter of the memory (needs the extra: pip install 'pixrl[quantized]')."""

    lr: float = Field(3e-4, gt=0, le=MOST_RATE)
    warmup: int = Field(0, ge=0, le=MOST)
    """Training steps over which the learning rate rises to `lr`."""
    decay_steps: Count | Literal["all"] | None = None
    """Training steps at whose end the learning rate has fallen to 0, in a straight line; none: it does not fall.

    all: those of the run, however many they are.
    """
    weight_decay: float = Field(1e-4, ge=0)
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    grad_clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    updates: Count = 1
    """Optimizer steps that a training step's samples are shared out to."""
    ema: float | None = Field(0.9, ge=0, lt=1)
    """Decay of the averaged weights that are evaluated; none: the trained ones are evaluated."""
    max_skipped: int = Field(10, ge=0, le=MOST)
    """The run stops after more than this many optimizer steps in a row without a finite loss and gradient."""

    def of_run(self, steps: int) -> "OptimizerSettings":
        """Return the settings with the run's number of steps in place of `all`."""
        return self if self.decay_steps != "all" else self.model_copy(update={"decay_steps": steps})

    def rate(self, step: int) -> float:
        """Return the learning rate of a training step, counted from 0.

        Raises:
            ValueError: it falls over all steps of a run, and nobody has said how many those are (`of_run`).
        """
        if self.decay_steps == "all":
            raise ValueError("decay_steps: all needs a number of steps: optimizer.of_run(steps)")
        left = 1.0 if self.decay_steps is None else max(0.0, 1 - step / self.decay_steps)
        return self.lr * min(1.0, (step + 1) / (self.warmup + 1)) * left


@dataclass(frozen=True)
class Method:
    """The four parts whose combination is a method, and how it is optimized."""

    exploration: Exploration
    sampling: RolloutSettings
    advantage: AdvantageEstimator
    loss: Loss
    optimizer: OptimizerSettings
    noises: int
    """G: noises of a prompt."""
    shared_start: bool = False
    """Whether a group's samples differ in their random steps alone."""

    @property
    def group_size(self) -> int:
        """The number of samples of a group, G times K."""
        return self.noises * self.exploration.variants


@dataclass(frozen=True)
class MicroBatches:
    """The number of pictures that go through the model at once. No result depends on it but for rounding."""

    rollout: int
    train: int


class Aligner:
    """The trainer of a policy's slot `current` by a method. It holds the optimizer; everything else is given."""

    def __init__(
        self,
        policy: FlowPolicy,
        slots: Slots,
        method: Method,
        micro_batches: MicroBatches,
        *,
        seed: int,
        world: World | None = None,
        scale_loss: bool = False,
    ) -> None:
        """Make the optimizer. `scale_loss` scales the loss, against underflow of float16 gradients."""
        self.policy = policy
        self.slots = slots
        self.method = method
        self.micro_batches = micro_batches
        self.seed = seed
        self.world: World = world or Alone()
        s = method.optimizer
        self.parameters = slots.parameters()
        make = adamw_8bit if s.eight_bit else adamw
        self.optimizer = make(self.parameters, lr=s.lr, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay)
        self.scaler = torch.amp.GradScaler(policy.device.type, enabled=scale_loss)
        self.skipped_in_a_row = 0

    def collect(
        self, groups: Sequence[Group], step: int, watch: Callable[[RewardBatch], None] | None = None
    ) -> Rollouts:
        """Draw this process's groups of a training step; `watch` is given its pictures as they are drawn."""
        method = self.method
        plan = StepPlan.make(self.policy, method.sampling, seed=self.seed, step=step)
        samples = Samples.of(
            groups,
            method.noises,
            method.exploration.variants,
            self.seed,
            shared_start=method.shared_start,
        )
        if watch is not None:
            plan = replace(plan, watch=lambda rows, images: watch(samples.batch(images, step, rows)))
        variants = prepare(method.exploration, self.policy, groups)
        drawn = method.loss.draw(self.policy, variants, samples, plan, self.micro_batches.rollout)
        return Rollouts(step, samples, plan, variants.anchor, *drawn, variants.metrics)

    def update(
        self, rollouts: Rollouts, scores: Mapping[str, Scores], weights: Mapping[str, float]
    ) -> dict[str, float]:
        """Learn from the scores of the rollouts.

        Args:
            rollouts: of the last `collect`.
            scores: reward name -> scores of this process's pictures, in their order; nan marks a failure.
            weights: reward name -> weight; names that are missing are logged and not trained on.

        Returns:
            Figures of all processes for the log.

        Raises:
            RunError: the rollouts were drawn on another schedule, or too many updates in a row were not finite.
        """
        own = Schedule.of(self.policy, self.method.sampling.steps)
        if rollouts.schedule != own:
            raise RunError(
                f"The rollouts were drawn on the noise levels {rollouts.schedule.sigmas}, but training uses "
                f"{own.sigmas}. "
                "Sampling and training share one schedule: collect again with the policy as it is now."
            )
        size, places = rollouts.samples.per_group, [group.place for group in rollouts.samples.groups]
        groups = int(self.world.sum(torch.tensor(float(len(places)))).item())
        rewards = {}
        for name, one in scores.items():  # of all processes, [P, S]: each adds its own rows to zeros
            own_PS = torch.zeros(groups, size)
            own_PS[places] = one.values_B.to(own_PS).view(-1, size)
            rewards[name] = self.world.sum(own_PS)
        tally = Tally()
        tally.add({name: torch.full((len(places),), value) for name, value in rollouts.metrics.items()})
        metrics = reward_metrics(rewards, weights) | tally.over(self.world).means()
        advantages = self.method.loss.advantages(
            rewards, weights, self.method.advantage, rollouts.schedule.steps
        )
        metrics |= {
            **conflict_metrics(rewards, weights, self.method.advantage.settings),
            **advantages.figures,
        }
        advantage_TB = advantages.advantage_TPS[:, places].flatten(1)
        rollouts = rollouts.with_advantages(advantages)
        lr = self.method.optimizer.rate(rollouts.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        tally, norms, skipped = Tally(), [], 0
        for number in range(self.method.optimizer.updates):
            rows = self._rows(rollouts, advantages.advantage_TPS, number)
            norm = self._descend(rollouts, rows, advantage_TB, tally, with_kl=number == 0)
            skipped += norm is None
            norms += [] if norm is None else [norm]
        self._finish(rollouts.step)
        figures = {"lr": lr, "skipped_updates": float(skipped)}
        if norms:
            figures["grad_norm"] = sum(norms) / len(norms)
        return metrics | tally.over(self.world).means(spread="ratio") | figures

    def gradient_disagreement(self) -> float:
        """Return how far the processes' last gradients are apart; 0 when they agree."""
        return disagreement(self.world, (whole(p.grad) for p in self.parameters if p.grad is not None))

    def _rows(self, rollouts: Rollouts, advantage_TPS: Tensor, number: int) -> list[int]:
        """Return this process's samples of one optimizer step: shuffled over all processes, failed ones left out.

        With `skip_flat` also those of groups whose samples are all as good as each other at every step.
        """
        failed_PS, some_TPS = advantage_TPS[0].isnan(), advantage_TPS.nan_to_num() != 0
        samples, size = rollouts.samples, rollouts.samples.per_group
        drawer = torch.Generator().manual_seed(sample_seed(self.seed, rollouts.step, _PARTS_KEY, 0))
        lot_PS = torch.randperm(failed_PS.numel(), generator=drawer).view(failed_PS.shape)
        chosen_PS = (lot_PS % self.method.optimizer.updates == number) & ~failed_PS
        if self.method.advantage.settings.leaves_flat_out:
            chosen_PS &= some_TPS.any(dim=0).any(dim=1, keepdim=True)
        mine = chosen_PS[[group.place for group in samples.groups]].view(-1, size).flatten()
        return [int(row) for row in mine.nonzero().flatten()]

    def _descend(
        self, rollouts: Rollouts, rows: Sequence[int], advantage_TB: Tensor, tally: Tally, *, with_kl: bool
    ) -> float | None:
        """Take one optimizer step; return the gradient's norm, or None where it was not finite and nothing was changed.

        Each term takes the advantage of its own true step.
        """
        loss = self.method.loss
        parts = loss.parts(rollouts)
        count = self.world.sum(torch.tensor(float(len(rows) * parts))).item()
        if count == 0:
            return 0.0
        pieces: list[tuple[Sequence[int], int]]
        pieces = [(rows[piece], 1) for piece in chunks(len(rows), self.micro_batches.train)]
        if self.policy.in_step:
            # all processes make the same passes: one with fewer rows, since pictures of it failed, repeats a row with
            # the weight 0
            spare = list(rows[:1]) or list(range(len(rollouts)))[:1]
            missing = max(self.world.gather(len(pieces))) - len(pieces)
            pieces += [(spare, 0)] * missing
        self.optimizer.zero_grad()
        not_finite = 0
        for part in range(parts):
            for number, (own, weight) in enumerate(pieces):
                advantage_B = advantage_TB[loss.steps(rollouts, own, part), list(own)]
                if not weight:
                    advantage_B = advantage_B.nan_to_num()
                terms = loss.terms(self.policy, rollouts, own, advantage_B, part, with_kl and number == 0)
                is_finite = bool(terms.loss_B.isfinite().all())
                if is_finite or self.policy.in_step:  # others wait for this pass
                    self.scaler.scale(terms.loss_B.sum() * weight / count).backward()
                not_finite += not is_finite
                if is_finite and weight:
                    tally.add({"loss": terms.loss_B, **terms.figures})
        # every process decides alike: the sums are those of all
        not_finite_of_all = sum_gradients(self.world, self.parameters, not_finite)
        self.scaler.unscale_(self.optimizer)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters, self.method.optimizer.grad_clip))
        good = bool(norm.isfinite()) and not_finite_of_all == 0
        if good:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.skipped_in_a_row = 0 if good else self.skipped_in_a_row + 1
        limit = self.method.optimizer.max_skipped
        if self.skipped_in_a_row > limit:
            raise RunError(
                f"{self.skipped_in_a_row} updates in a row had no finite loss and gradient, above "
                f"optimizer.max_skipped ({limit}). The weights are those before them. Lower "
                "optimizer.lr, or compute in float32: --set machine.dtype=float32"
            )
        return norm.item() if good else None

    def _finish(self, step: int) -> None:
        """The other slots follow `current`."""
        decay = self.method.loss.old_decay(step)
        if decay is not None:
            self.slots.blend(Slot.OLD, Slot.CURRENT, decay)
        if self.method.optimizer.ema is not None:
            self.slots.blend(Slot.EMA, Slot.CURRENT, self.method.optimizer.ema)

    def tensors(self) -> dict[str, Tensor]:
        """Return all that a checkpoint must hold as tensors: slots, optimizer, exploration.

        All processes call it; the one of rank 0 writes, and the others get no slots and no optimizer.
        """
        writes = self.world.rank == 0
        optimizer = {f"optimizer/{name}": x for name, x in moments(self.optimizer, keep=writes).items()}
        slots = {f"slots/{name}": x for name, x in self.slots.state(keep=writes).items()}
        exploration = {f"exploration/{name}": x for name, x in self.method.exploration.state().items()}
        return slots | optimizer | exploration

    def state(self) -> dict[str, float]:
        """Return the rest of the state, as JSON."""
        return {"skipped_in_a_row": self.skipped_in_a_row, **self.scaler.state_dict()}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, float]) -> None:
        """Take up what `tensors` and `state` gave. Raises CheckpointError where they do not fit."""
        self.slots.load_state(_below("slots/", tensors))
        self.method.exploration.load_state(_below("exploration/", tensors))
        restore_moments(self.optimizer, _below("optimizer/", tensors))
        left = dict(state)
        self.skipped_in_a_row = int(left.pop("skipped_in_a_row"))
        if left:
            self.scaler.load_state_dict(left)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
