"""`pixrl doctor RECIPE --gpu 24`: with which plans a recipe would fit a card that need not be here, and how fast.

Everything is found out from configs: no weight is read, and of a model of the hub only its configs are downloaded. The
memory is `estimate.fit`'s, with a card of the given size in place of the machine's. Time is arithmetic: the floating
point operations of drawing, training and evaluation, counted by torch on tensors without content, at an assumed share
of the card's published peak; and the bytes that a plan moves to the card and back.
"""

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from typing import Any, TypeVar

import torch

from pixrl import config as recipes
from pixrl import models
from pixrl.device import DType, Precision, choose_precision
from pixrl.doctor.diagnosis import Findings, Hardware, Trained, size
from pixrl.doctor.estimate import Estimate, Fitted, empty_renderer, fit, refuse_misfits
from pixrl.doctor.examine import condition_row
from pixrl.doctor.rewards import find_rewards
from pixrl.errors import ConfigError, InputError, did_you_mean
from pixrl.hub import Checkpoint, locate_configs
from pixrl.models.loading import DENOISERS
from pixrl.models.memory.estimate import VAE, PartSize, imagined_headers, sizes_of
from pixrl.models.memory.placement import TEXT_PARTS
from pixrl.models.memory.plan import Base, Offload
from pixrl.runs.config import AlignConfig, kind_of
from pixrl.runs.loaded import not_trainable, require_trainable

SettingsT = TypeVar("SettingsT", bound=recipes.Settings)
GPU = torch.device("cuda")
ATTAINED, LINK_ATTAINED = 0.4, 0.7
"""Shares of the peak rate that networks, and of the link's rate that copies, are taken to attain: assumptions."""
RESERVED = 2**30
"""Bytes of a card that are left to CUDA's context and libraries: an assumption."""
_AMPERE = "NVIDIA Ampere GA102 whitepaper, appendix A"
_ADA = "NVIDIA Ada GPU architecture whitepaper, appendix A"
_BLACKWELL = "NVIDIA RTX Blackwell GPU architecture whitepaper, appendix A"
_PCIE4, _PCIE5 = 31.5e9, 63e9


@dataclass(frozen=True)
class Gpu:
    """A graphics card, by its maker's figures: rates without sparsity, in floating point operations a second."""

    name: str
    gib: float
    """Memory in GiB."""
    half: float
    """Of matrix products in bfloat16 or float16, summed in float32."""
    single: float
    """Of float32, which torch computes without tensor cores by default."""
    link: float
    """Bytes a second from the machine's memory, by the PCIe standard."""
    source: str

    @property
    def free(self) -> int:
        """The bytes that a process may use."""
        return max(0, int(self.gib * 2**30) - RESERVED)


CARDS = {
    one.name: one
    for one in (
        Gpu("3090", 24, 71e12, 35.6e12, _PCIE4, _AMPERE),
        Gpu("4090", 24, 165.2e12, 82.6e12, _PCIE4, _ADA),
        Gpu("5090", 32, 209.5e12, 104.8e12, _PCIE5, _BLACKWELL),
        Gpu("a100-40", 40, 312e12, 19.5e12, _PCIE4, "NVIDIA A100 data sheet"),
        Gpu("l40s", 48, 362e12, 91.6e12, _PCIE4, "NVIDIA L40S data sheet"),
        Gpu("a100-80", 80, 312e12, 19.5e12, _PCIE4, "NVIDIA A100 data sheet"),
        Gpu("h100", 80, 989e12, 67e12, _PCIE5, "NVIDIA H100 SXM data sheet"),
        Gpu("h200", 141, 989e12, 67e12, _PCIE5, "NVIDIA H200 SXM data sheet"),
    )
}  # fmt: skip


def parse_card(text: str) -> Gpu:
    """Return the card of a name, or one of a size in GiB, as fast as the slowest card in the table that is as large.

    Raises:
        InputError: there is no such card, or no such size.
    """
    name = text.strip().lower()
    if name in CARDS:
        return CARDS[name]
    try:
        gib = float(name)
    except ValueError:
        raise InputError(
            f"There is no card {text!r} in the table.{did_you_mean(name, CARDS)} Give {', '.join(CARDS)}, or a size in "
            "GiB: --gpu 24"
        ) from None
    if not 1 <= gib <= 1024:
        raise InputError(f"--gpu {text}: a card has 1 to 1024 GiB. Type, for example: --gpu 24")
    large = [card for card in CARDS.values() if card.gib >= gib] or [CARDS["h200"]]
    like = min(large, key=lambda card: card.half)
    return replace(like, name=f"{gib:g} GiB", gib=gib, source=f"as fast as a {like.name}: {like.source}")


WAYS: tuple[Mapping[str, Any], ...] = (
    {},
    {"offload": Offload.PARTS},
    {"gradient_checkpointing": True},
    {"gradient_checkpointing": True, "offload": Offload.PARTS},
    {"gradient_checkpointing": True, "offload": Offload.PARTS, "base": Base.INT8},
    {"gradient_checkpointing": True, "offload": Offload.PARTS, "base": Base.NF4},
    {"gradient_checkpointing": True, "offload": Offload.SEQUENTIAL},
)
"""Plans in the order of preference: the same results with ever less memory; another base; the slow one."""
_PLAIN: Mapping[str, Any] = {"gradient_checkpointing": False, "offload": Offload.NONE, "base": Base.DTYPE}


@dataclass(frozen=True)
class Plan:
    """One way to hold a run on a card."""

    changes: tuple[str, ...]
    """The settings by which it differs from the recipe, as `--set` takes them; () is the recipe as it is."""
    peak: int
    """Bytes of a process at its peak."""
    fits: bool
    sharded: bool
    """Whether processes divide the denoiser's weights among them."""
    rollout_batch: int
    train_batch: int | None
    """None: nothing is trained on, as in a fusion."""
    seconds: float
    """Of a training step, or of a batch of a fusion's pictures, without scoring."""
    hours: float
    """Of the run with its evaluations, without scoring."""


@dataclass(frozen=True)
class CardPlans:
    """All plans of a recipe for a card, with the one to take."""

    kind: str
    model: str
    card: Gpu
    processes: int
    dtype: str
    """Of the weights, as the recipe has it."""
    parts: Mapping[str, PartSize]
    trained: Trained | None
    plans: tuple[Plan, ...]
    """The recipe as it is, then the others in the order in which they are preferred."""
    notes: tuple[str, ...]
    concepts: tuple[str, ...] = ()
    """Of a fusion, as they are typed."""

    @property
    def chosen(self) -> Plan | None:
        """The recipe as it is where it fits, else the first other plan that does; None: none fits."""
        return next((plan for plan in self.plans if plan.fits), None)

    @property
    def faster(self) -> Plan | None:
        """The fastest plan that fits, where it takes less time than the chosen one."""
        fitting = [plan for plan in self.plans if plan.fits]
        best = min(fitting, key=lambda plan: plan.seconds, default=None)
        return best if best and self.chosen and best.seconds < 0.99 * self.chosen.seconds else None

    def to_json(self) -> dict[str, Any]:
        """Return the plans as one JSON object."""
        chosen = None if self.chosen is None else asdict(self.chosen)
        return {"fits": self.chosen is not None, "chosen": chosen, **asdict(self)}

    def lines(self, recipe: str) -> Iterator[str]:
        """Yield the plans as lines for people; `recipe`: how it was named on the command line."""
        card = self.card
        half = self.dtype != "float32"
        rate = (card.half if half else card.single) / 1e12
        yield f"{self.kind}  {self.model}"
        yield f"card        {card.name} x {self.processes}: {card.gib:g} GiB, {size(card.free)} of them for the run"
        yield (
            f"speed       {rate:g} TFLOP/s {'bfloat16' if half else 'float32'} ({card.source}); {ATTAINED:.0%} are "
            "assumed to be attained"
        )
        for name, part in self.parts.items():
            yield f"{'weights':<12}{name:<18}{part.parameters / 1e6:>10.2f} M parameters{size(part.bytes):>12}"
        if (t := self.trained) is not None:
            taken = t.slots + t.gradients + t.optimizer
            yield f"{'training':<12}{t.what:<18}{t.parameters / 1e6:>10.2f} M parameters{size(taken):>12}"
        yield ""
        yield f"{'':<6}{'peak':>10}  {'rollout':>7}  {'train':>5}  {'s a step':>8}  {'hours':>7}  plan"
        for plan in self.plans:
            how = " ".join(plan.changes) or "as the recipe says"
            batches = f"{plan.rollout_batch:>7}  {'-' if plan.train_batch is None else plan.train_batch:>5}"
            yield (
                f"{'fits' if plan.fits else '-':<6}{size(plan.peak):>10}  {batches}  "
                f"{plan.seconds:>8.3g}  {plan.hours:>7.3g}  {how}{', sharded' if plan.sharded else ''}"
            )
        yield ""
        yield from (f"note        {note}" for note in self.notes)
        chosen, faster = self.chosen, self.faster
        if chosen is None:
            least = min(self.plans, key=lambda plan: plan.peak)
            gib = math.ceil((least.peak + RESERVED) / 2**30)
            names = [one.name for one in CARDS.values() if one.gib >= gib]
            known = f" ({', '.join(names)})" if names else ""
            yield (
                f"No plan fits {card.gib:g} GiB. The smallest needs a card of {gib} GiB{known}: "
                f"{self._command(recipe, least)}; or take a smaller resolution or model."
            )
            return
        yield f"It fits{'' if not chosen.changes else ' so'}. Type: {self._command(recipe, chosen)}"
        if faster is not None:
            yield f"Faster, {faster.seconds:.3g} s a step: {self._command(recipe, faster)}"

    def _command(self, recipe: str, plan: Plan) -> str:
        command = f"pixrl {self.kind} {recipe}"
        if self.concepts:
            command = f"pixrl {self.kind} {shlex.join(self.concepts)} --recipe {recipe}"
        if self.processes > 1:
            command += f" --processes {self.processes}"
        return " ".join([command, *(f"--set {change}" for change in plan.changes)])


def plans_for(config: AlignConfig, card: Gpu, processes: int = 1) -> CardPlans:
    """Find the plans with which a recipe fits a card.

    Args:
        config: an align or personalize recipe.
        card: of each process.
        processes: how many share the run, on one host.

    Raises:
        CheckpointError: the model's configs cannot be had, or contradict each other.
        InputError: the model cannot be trained, or the recipe does not fit it.
    """
    checkpoint = locate_configs(config.model)
    adapter = models.adapter_of(checkpoint)
    if adapter.pipeline_class is None:
        raise not_trainable(adapter, config.model)
    missing = Findings()
    rewards = find_rewards(config.rewards, (), missing)
    notes = ["Scoring takes time of its own, and so do very small micro-batches: neither is counted."]
    if missing.problems or missing.notes:
        notes.append(
            "Models of rewards that are not on this machine are not counted: they take memory of their own."
        )
    plans: list[Plan] = []
    weighed: dict[tuple[Precision, bool], Weighed] = {}
    half = {"dtype": DType.BFLOAT16.value} if config.machine.dtype == DType.FLOAT32 else {}
    ways = [{f"machine.{name}": value for name, value in {**_PLAIN, **way, **half}.items()} for way in WAYS]
    for changed, changes in variants(config, ways):
        precision = choose_precision(GPU, changed.machine.dtype)
        key = (precision, changed.machine.gradient_checkpointing)
        if key not in weighed:
            weighed[key] = weigh(changed, checkpoint, precision)
        plans.append(weighed[key].plan(changed, changes, card, processes, rewards))
    first = next(iter(weighed.values()))
    return CardPlans(
        kind=kind_of(config),
        model=config.model,
        card=card,
        processes=processes,
        dtype=str(first.precision.weights).removeprefix("torch."),
        parts=first.parts(config.machine.base),
        trained=first.estimate.trained,
        plans=tuple(plans),
        notes=tuple(notes),
    )


def variants(
    config: SettingsT, ways: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[SettingsT, tuple[str, ...]]]:
    """Yield the recipe as it is, and with the settings of each way that it allows, with what `--set` changes."""
    yield config, ()
    for way in ways:
        changes = {name: value for name, value in way.items() if attrgetter(name)(config) != value}
        if not changes:
            continue
        try:
            changed = recipes.load(type(config), config.model_dump(mode="json"), values=changes)
        except ConfigError:
            continue  # such as offload beside dropped text encoders: no plan of this recipe
        yield changed, tuple(f"{name}={str(value).lower()}" for name, value in changes.items())


@dataclass(frozen=True)
class Weighed:
    """What a pass takes, at one dtype and with or without gradient checkpointing."""

    checkpoint: Checkpoint
    precision: Precision
    headers: Mapping[str, Any]
    estimate: Estimate
    training_operations: int
    """Of one picture at one noise level."""

    def parts(self, base: Base) -> dict[str, PartSize]:
        """Return the size of each part of the model with this base."""
        return sizes_of(self.headers, self.checkpoint, self.precision, base)

    def plan(
        self,
        config: AlignConfig,
        changes: tuple[str, ...],
        card: Gpu,
        processes: int,
        rewards: dict[str, int],
    ) -> Plan:
        """Return how a variant of the recipe fits the card, and the time that it takes."""
        precision, parts = self.precision, self.parts(config.machine.base)
        computing = precision.autocast or precision.weights
        names = (str(precision.weights).removeprefix("torch."), str(computing).removeprefix("torch."))
        place = Hardware(card.name, processes, *names, card.free, processes)
        found = fit(config, GPU, place, parts, rewards, self.estimate)
        rate = ATTAINED * (card.single if computing is torch.float32 else card.half)
        link = LINK_ATTAINED * card.link
        step, evaluation = operations(config, self, processes)
        seconds = step / rate + moved(config, parts, found, processes) / link
        times = 2 if config.evaluation.every is None else 2 + config.steps // config.evaluation.every
        hours = (config.steps * seconds + times * evaluation / rate) / 3600
        batches = found.batches
        return Plan(
            changes,
            found.peak,
            found.fits,
            found.sharded,
            batches.rollout,
            batches.train or 1,
            seconds,
            hours,
        )


def weigh(config: AlignConfig, checkpoint: Checkpoint, precision: Precision) -> Weighed:
    """Make the model without content and find out what its passes take."""
    findings = Findings()
    plan = config.machine.model_copy(update={"base": Base.DTYPE})
    with refuse_misfits(checkpoint):
        made = empty_renderer(
            config.model, checkpoint, precision, GPU, plan, findings, weights=False,
            steps=config.sampling.steps, **config.drawing,
        )  # fmt: skip
        policy = require_trainable(made, config.model)
        headers = imagined_headers(checkpoint, policy.pipeline, t5=config.t5)
        estimate = Estimate(policy, condition_row(policy, config, ()), config, precision)
        operations = estimate.training_operations()
    if findings.problems:
        raise InputError(findings.problems[0].message)
    return Weighed(checkpoint, precision, headers, estimate, operations)


def operations(config: AlignConfig, weighed: Weighed, processes: int = 1) -> tuple[int, int]:
    """Return the floating point operations of one process in a training step, and in an evaluation."""
    estimate = weighed.estimate
    groups = -(-config.prompts.per_step // processes)
    spent = config.loss.spending(groups * config.group_size, groups, config.sampling)
    beside = config.loss.passes_beside() * estimate.pass_operations
    step = spent.scores * estimate.operations + spent.gradient_terms * (weighed.training_operations + beside)
    held = config.evaluation
    more = (held.steps or config.sampling.steps) - config.sampling.steps
    pictures = -(-held.prompts // processes) * held.per_prompt
    return step, pictures * (estimate.operations + more * estimate.pass_operations)


def moved(config: AlignConfig, parts: Mapping[str, PartSize], found: Fitted, processes: int = 1) -> int:
    """Return the bytes that the plan's offloading moves between the machine's memory and a card in a step."""
    offload = config.machine.offload
    if offload is Offload.NONE:
        return 0
    beside = sum(part.bytes for name, part in parts.items() if name in (*TEXT_PARTS, VAE))
    if offload is Offload.PARTS:
        return 2 * beside  # there and back
    groups = -(-config.prompts.per_step // processes)
    spent = config.loss.spending(groups * config.group_size, groups, config.sampling)
    drawing = -(-spent.scores // found.batches.rollout) * config.sampling.steps
    # forwards, computed again, and backwards; nothing goes back, since the weights do not change
    training = -(-spent.gradient_terms // (found.batches.train or 1)) * (3 + config.loss.passes_beside())
    denoiser = sum(part.bytes for name, part in parts.items() if name in DENOISERS)
    return 2 * beside + (drawing + training) * denoiser
