"""`pixrl doctor` for a fusion: what it needs, whether it can run here, and with which plans it would fit a card."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pixrl import models
from pixrl.algorithms import make_mixing
from pixrl.device import DType, Precision, choose_precision, quiet_loading
from pixrl.doctor.cards import ATTAINED, GPU, LINK_ATTAINED, CardPlans, Gpu, Plan, variants
from pixrl.doctor.diagnosis import Batches, Diagnosis, Findings, Need, Work
from pixrl.doctor.estimate import (
    can_be_estimated,
    empty_renderer,
    find_place,
    is_small,
    on_device,
    pixels_of,
    refuse_misfits,
    report_lack,
    report_misfits,
    without_encoders,
)
from pixrl.doctor.generator import find_parts, find_pipeline, require_texts
from pixrl.doctor.needs import find_trackers, local_folder, model_bytes, require_disk, require_out
from pixrl.doctor.rewards import require_own_world
from pixrl.errors import InputError, PixrlError
from pixrl.fusion.config import FuseConfig
from pixrl.fusion.trainer import read_policy
from pixrl.fusion.world import asks_for_truth, judges_of, prompt_of, require_mixing, require_reward
from pixrl.hub import Checkpoint, locate_configs, read_card
from pixrl.metrics.true_fusion import require_truth
from pixrl.models.base import Conditioning, Mixture, Renderer
from pixrl.models.loading import DENOISERS
from pixrl.models.memory.estimate import (
    VAE,
    Cost,
    PartSize,
    cost_of,
    imagined,
    imagined_headers,
    operations_of,
    sizes_of,
)
from pixrl.models.memory.plan import Base, Offload
from pixrl.models.pipeline import FlowPipelinePolicy, micro_batch_for
from pixrl.models.references import TokenReferences
from pixrl.runs.planner import SAFE_SHARE, trial

WAYS: tuple[Mapping[str, Any], ...] = (
    {},
    {"offload": Offload.PARTS},
    {"offload": Offload.PARTS, "base": Base.INT8},
    {"offload": Offload.PARTS, "base": Base.NF4},
    {"offload": Offload.SEQUENTIAL},
)
"""Plans of `memory` in the order of preference: the same pictures with less memory; another base; the slow one."""
_PLAIN: Mapping[str, Any] = {"offload": Offload.NONE, "base": Base.DTYPE}
BATCH = "memory.rollout_batch"


@dataclass(frozen=True)
class FusionEstimate:
    """A generator without content, and what it takes to draw one child of a fusion."""

    policy: FlowPipelinePolicy
    rows: int
    """Rows of a pass for each child: the number of concepts where predictions are averaged."""
    passes: int
    """Passes of one row through the network for a child of even shares."""
    drawing: Cost
    """Of so many rows at a time."""
    pass_operations: int
    """Floating point operations of one pass of one row."""
    decode_operations: int

    def operations(self, passes: int) -> int:
        """Return the floating point operations of a picture that takes so many passes."""
        return passes * self.pass_operations + self.decode_operations

    def at_once(self, config: FuseConfig, device: torch.device) -> tuple[int, str]:
        """Return the rows that are drawn at a time, and why: what suits the device, or fewer as the recipe says."""
        size = (self.policy.settings.width, self.policy.settings.height)
        suited, asked = micro_batch_for(device, *size), config.memory.rollout_batch
        if asked is not None and asked <= suited:
            return self.whole(asked, config), "the recipe says so"
        return self.whole(suited, config), f"what suits the device at {size[0]} x {size[1]}"

    def whole(self, rows: int, config: FuseConfig) -> int:
        """Return so many rows as those of whole children, at least of one and at most of a batch."""
        return min(max(1, rows // self.rows), config.batch) * self.rows

    def most(self, room: int, config: FuseConfig) -> int:
        """Return the most rows of whole children that so many bytes hold, and those of one where they hold none."""
        return self.whole(self.drawing.most(int(SAFE_SHARE * room)), config)

    def ways(self, room: int, config: FuseConfig) -> list[str]:
        """Return the settings that save memory, first of them fewer pictures at a time where those fit."""
        fewer = self.most(room, config)
        found = [f"{BATCH}={fewer}"] if self.drawing.bytes(fewer) <= room else []
        return [
            *found,
            "memory.offload=parts or sequential",
            "memory.vae_slicing=true",
            "a smaller checkpoint",
        ]


def estimate_fusion(policy: FlowPipelinePolicy, config: FuseConfig, precision: Precision) -> FusionEstimate:
    """Find out what a policy without content takes to draw a child of a recipe's concepts.

    Raises:
        InputError: the mixing does not fit the generator.
    """
    row = policy.blank()
    concepts = config.concepts or ("", "")
    shown = row
    if config.pictures and isinstance(policy, TokenReferences):
        shown = replace(row, references=(policy.blank_reference(),))
    sources = Conditioning.cat([shown if one in config.pictures else row for one in concepts])
    mixing = make_mixing(config.mixed_by, sources, policy.settings.steps, config.pooled)
    shape = (1, len(concepts), mixing.features_ND.shape[1])
    source = mixing.mix(torch.full(shape, 1 / len(concepts)))
    if isinstance(source, Mixture):
        condition, rows, passes = shown, len(concepts), source.passes
    else:
        condition, rows, passes = source, 1, policy.settings.steps
    without_encoders(policy, row, precision)

    @torch.no_grad()
    def decode(count: int) -> None:
        with policy.decoder_present():
            policy.decode(policy.initial_noise(range(count)))

    modules = (policy.denoiser, policy.vae)
    with imagined(*modules, pixels=pixels_of(policy, condition)):
        return FusionEstimate(
            policy,
            rows,
            passes,
            drawing=cost_of(trial(policy, condition), modules),
            pass_operations=operations_of(trial(policy, condition, decode=False)),
            decode_operations=operations_of(decode),
        )


@quiet_loading()
def examine_fusion(
    config: FuseConfig,
    *,
    processes: int = 1,
    concepts: Sequence[str] | None = None,
    out: Path | None = None,
    force: bool = False,
    about_to_run: bool = False,
) -> Diagnosis:
    """Estimate what a fusion needs, and find what stands against it; for `pixrl doctor` and for the run alike.

    Args:
        config: the recipe.
        processes: number of processes that would share the work.
        concepts: all concepts of a folder of fusions; None: the recipe's.
        out: the run's folder; None: a new one.
        force: whether a run that lies there would be replaced.
        about_to_run: download what is missing of the generator; a small model's memory is in no doubt.
    """
    findings = Findings()
    require_out(out, force, findings)
    find_trackers(config.log, findings)
    checkpoint = find_pipeline(config.model, findings, fetch=about_to_run)
    adapter = None
    if checkpoint is not None:
        adapter = models.adapter_of(checkpoint)
        config = config.with_mixing(read_card(checkpoint.folder).mixing)
        with findings.catch(Need.SETTING):
            require_mixing(adapter, config.model, config)
    if config.policy_from is not None:
        with findings.catch(Need.SETTING):
            read_policy(Path(config.policy_from)).require_fits(config)
    on_gpu = (adapter or Renderer).gpu_dtype
    device, place, precision = find_place(config.device, config.dtype, processes, findings, on_gpu=on_gpu)
    parts = {} if checkpoint is None else find_parts(checkpoint, precision, findings, base=config.memory.base)
    estimate: FusionEstimate | None = None
    drawn = (0, 0)
    if checkpoint is not None and adapter is not None and can_be_estimated(adapter, config.model, findings):
        with report_misfits(checkpoint, findings):
            how = (config.model, checkpoint, precision, device, config.memory)
            made = empty_renderer(*how, findings, **config.drawing)
            assert isinstance(made, FlowPipelinePolicy)
            texts = [prompt_of(made.card, one) for one in concepts or config.concepts]
            require_texts(made, checkpoint, texts, findings, t5=True)
            judging = {"clip": config.clip, "segmenter": config.segmenter, "truth": config.truth}
            require_own_world(made, parts, judging, findings)
            drawn = (made.settings.width, made.settings.height)
            if not (about_to_run and is_small(parts, max(drawn), device)):
                estimate = estimate_fusion(made, config, precision)
    named: tuple[str | None, ...] = (config.clip, config.segmenter, config.truth)
    if checkpoint is not None:  # without one nobody knows which encoder it is calibrated for
        named = judges_of(read_card(checkpoint.folder), config.clip, config.segmenter, config.truth)
        find_truth(config, named[-1], concepts or config.concepts, findings)
    judges = {ref: taken for ref in named if ref and (taken := model_bytes(ref, findings)) is not None}
    beside = on_device(parts, config.memory) + sum(judges.values())
    needed, batches = None, None
    if estimate is not None:
        rows, why = estimate.at_once(config, device)
        batches = Batches(rows, None, (f"rollout: {rows} at a time, {why}",))
        needed = beside + estimate.drawing.bytes(rows)
        if needed > place.free:
            report_lack(needed, place.free, estimate.ways(place.free - beside, config), findings)
    disk = (config.budget + config.exemplars * len(config.concepts)) * 3 * math.prod(drawn) or None
    require_disk(disk, findings)
    return Diagnosis(
        kind="fuse",
        model=config.model,
        place=place,
        parts=parts,
        rewards=judges,
        size=drawn if drawn[0] else None,
        drawing=None if estimate is None else estimate.drawing,
        batches=batches,
        needed=needed,
        disk=disk,
        work=Work(None, config.batch, None, None, config.budget),
        problems=findings.problems,
        notes=findings.notes,
    )


def find_truth(config: FuseConfig, ref: str | None, concepts: Sequence[str], findings: Findings) -> None:
    """Find what stands against telling true fusions of the concepts, where it can be told by files that are here."""
    with findings.catch(Need.SETTING):
        require_reward(config, ref is not None)
    place = None
    with contextlib.suppress(PixrlError):  # what is not there is found with the other models
        place = None if ref is None else local_folder(ref)
    if place is None:
        return
    try:
        require_truth(place, str(ref), concepts)
    except PixrlError as error:
        if asks_for_truth(config):
            findings.miss(Need.SETTING, error)
        else:
            findings.note(f"Nothing tells which children are true fusions. {error}")


def plan_fusion(config: FuseConfig, card: Gpu) -> CardPlans:
    """Find the plans with which a fusion fits a card that need not be here, and their time, from configs alone.

    Raises:
        CheckpointError: the model's configs cannot be had, or contradict each other.
        InputError: the model's memory cannot be told from configs, or the recipe does not fit it.
    """
    checkpoint = locate_configs(config.model)
    adapter = models.adapter_of(checkpoint)
    missing = Findings()
    if not can_be_estimated(adapter, config.model, missing):
        raise InputError(missing.notes[0])
    card_file = read_card(checkpoint.folder)
    config = config.with_mixing(card_file.mixing)
    require_mixing(adapter, config.model, config)
    named = judges_of(card_file, config.clip, config.segmenter, config.truth)
    judged = [ref for ref in named if ref is not None]
    judges = {ref: taken for ref in judged if (taken := model_bytes(ref, missing)) is not None}
    notes = ["Scoring takes time of its own, which is not counted."]
    if len(judges) < len(judged):
        notes.append(
            "Models that score and are not on this machine are not counted: they take memory of their own."
        )
    plans: list[Plan] = []
    weighed: dict[Precision, tuple[FusionEstimate, Mapping[str, Any]]] = {}
    half = {"dtype": DType.BFLOAT16.value} if config.dtype == DType.FLOAT32 else {}
    ways = [{f"memory.{name}": value for name, value in {**_PLAIN, **way}.items()} | half for way in WAYS]
    for changed, changes in variants(config, ways):
        precision = choose_precision(GPU, adapter.gpu_dtype if changed.dtype == "auto" else changed.dtype)
        if precision not in weighed:
            weighed[precision] = _weigh(changed, checkpoint, precision)
        estimate, headers = weighed[precision]
        parts = sizes_of(headers, checkpoint, precision, changed.memory.base)
        beside = on_device(parts, changed.memory) + sum(judges.values())
        plans.append(_plan(changed, changes, card, precision, estimate, parts, beside))
    first = next(iter(weighed))
    return CardPlans(
        kind="fuse",
        model=config.model,
        card=card,
        processes=1,
        dtype=str(first.weights).removeprefix("torch."),
        parts=sizes_of(weighed[first][1], checkpoint, first, config.memory.base),
        trained=None,
        plans=tuple(plans),
        notes=tuple(notes),
        concepts=config.typed or ("CONCEPT", "CONCEPT"),
    )


def _weigh(
    config: FuseConfig, checkpoint: Checkpoint, precision: Precision
) -> tuple[FusionEstimate, Mapping[str, Any]]:
    """Return what a child takes in this precision, and the tensors of every part of the model."""
    findings = Findings()
    plain = config.memory.model_copy(update={"base": Base.DTYPE})
    with refuse_misfits(checkpoint):
        made = empty_renderer(
            config.model, checkpoint, precision, GPU, plain, findings, weights=False, **config.drawing
        )
        assert isinstance(made, FlowPipelinePolicy)  # can_be_estimated
        headers = imagined_headers(checkpoint, made.pipeline, t5=True)
        estimate = estimate_fusion(made, config, precision)
    if findings.problems:
        raise InputError(findings.problems[0].message)
    return estimate, headers


def _plan(
    config: FuseConfig,
    changes: tuple[str, ...],
    card: Gpu,
    precision: Precision,
    estimate: FusionEstimate,
    parts: Mapping[str, PartSize],
    beside: int,
) -> Plan:
    """Return how a variant of the recipe fits the card, with fewer pictures at a time if need be, and its time."""
    rows, _ = estimate.at_once(config, GPU)
    if beside + estimate.drawing.bytes(rows) > card.free:
        rows = min(rows, estimate.most(card.free - beside, config))
        changes = (*changes, f"{BATCH}={rows}")
    peak = beside + estimate.drawing.bytes(rows)
    computing = precision.autocast or precision.weights
    rate = ATTAINED * (card.single if computing is torch.float32 else card.half)
    link = LINK_ATTAINED * card.link
    batches = -(-config.batch * estimate.rows // rows)
    carried = moved(config, parts, estimate.policy.settings.steps) / link
    seconds = config.batch * estimate.operations(estimate.passes) / rate + batches * carried
    exemplars = config.exemplars * (len(config.concepts or ("", "")) - len(config.pictures))
    alone = estimate.operations(estimate.policy.settings.steps) / rate
    hours = (config.budget / config.batch * seconds + exemplars * alone) / 3600
    return Plan(changes, peak, peak <= card.free, False, rows, None, seconds, hours)


def moved(config: FuseConfig, parts: Mapping[str, PartSize], steps: int) -> int:
    """Return the bytes that offloading moves to the card and back while some pictures are drawn together."""
    if config.memory.offload is Offload.NONE:
        return 0
    decoder = 2 * sum(part.bytes for name, part in parts.items() if name == VAE)  # there and back
    if config.memory.offload is Offload.PARTS:
        return decoder
    return decoder + steps * sum(part.bytes for name, part in parts.items() if name in DENOISERS)
