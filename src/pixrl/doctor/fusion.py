"""`pixrl doctor` for fusions: a frozen generator and its scorer."""

from collections.abc import Sequence
from pathlib import Path

import torch

from pixrl.doctor.diagnosis import Batches, Diagnosis, Findings, Need, Work, size
from pixrl.doctor.needs import (
    find_parts,
    find_pipeline,
    model_bytes,
    require_disk,
    require_tokenizers,
    total,
)
from pixrl.doctor.preflight import require_out, require_own_world, require_texts
from pixrl.doctor.training import (
    can_be_estimated,
    contradiction,
    empty_renderer,
    find_place,
    is_small,
    on_device,
    parameters_of,
)
from pixrl.errors import CheckpointError, PixrlError
from pixrl.fusion.world import PUBLISHED_CLIP, PUBLISHED_SEGMENTER
from pixrl.hub import Checkpoint, read_card
from pixrl.models import adapter_of
from pixrl.models.base import Renderer
from pixrl.models.estimate import CONTRADICTIONS, Cost, PartSize, cost_of, imagined
from pixrl.models.pipeline import FlowPipelinePolicy, micro_batch_for
from pixrl.models.sdxl import SDXLRenderer
from pixrl.models.text import PromptCache, check_words
from pixrl.runs.config import FuseConfig
from pixrl.runs.planner import trial


def examine_fusion(
    config: FuseConfig,
    *,
    processes: int = 1,
    concepts: Sequence[str] | None = None,
    out: Path | None = None,
    force: bool = False,
    about_to_run: bool = False,
) -> Diagnosis:
    """What a fusion needs, estimated, and what stands against it: the same for `pixrl doctor` and for the run.

    Args:
        config: the recipe.
        processes: how many would share the work.
        concepts: all of a folder of fusions; None: the recipe's.
        out: the run's folder; None: a new one.
        force: whether a run that is there would be replaced.
        about_to_run: download what is missing of the generator; a small model's memory is in no doubt.
    """
    findings = Findings()
    require_out(out, force, findings)
    checkpoint = find_pipeline(config.model, findings, fetch=about_to_run)
    adapter = None if checkpoint is None else adapter_of(checkpoint)
    device, place, precision = find_place(
        config.device, config.dtype, processes, findings, on_gpu=(adapter or Renderer).gpu_dtype
    )
    parts: dict[str, PartSize] = {}
    cost: Cost | None = None
    side, batch = 0, 1
    if checkpoint is not None:
        require_tokenizers(checkpoint, findings)
        parts = find_parts(checkpoint, precision, findings)
    if checkpoint is not None and adapter is not None and can_be_estimated(adapter, config.model, findings):
        try:
            made = empty_renderer(config.model, checkpoint, precision, device, config.memory, findings)
            assert isinstance(made, SDXLRenderer | FlowPipelinePolicy)
            _check_prompts(made, checkpoint, config.concepts if concepts is None else concepts, findings)
            judges = {"clip": config.clip, "segmenter": config.segmenter}
            require_own_world(made, parameters_of(parts), judges.items(), findings)
            made.precision = precision
            side = made.settings.resolution
            cost = None if about_to_run and is_small(parts, side, device) else _cost(made)
            batch = min(micro_batch_for(device, side), config.batch)
        except PixrlError as error:
            findings.miss(Need.WEIGHTS if isinstance(error, CheckpointError) else Need.SETTING, error)
        except CONTRADICTIONS as error:
            findings.miss(Need.WEIGHTS, contradiction(checkpoint.folder, error))
    models = _scorer(config, checkpoint, findings)
    needed = None
    if cost is not None:
        needed = on_device(parts, config.memory) + total(models) + cost.bytes(batch)
        if needed > place.free:
            findings.miss(
                Need.MEMORY,
                f"{size(needed)} are needed and {size(place.free)} are free. Save memory with memory.offload=parts or "
                "sequential, memory.vae_slicing=true, or a smaller checkpoint.",
            )
    disk = None if not side else (config.budget + config.exemplars * len(config.concepts)) * 3 * side**2
    if disk is not None:
        require_disk(disk, findings)
    reason = f"rollout: {batch} at a time, what suits the device at {side} x {side}"
    return Diagnosis(
        kind="fuse",
        model=config.model,
        place=place,
        parts=parts,
        rewards=models,
        trained=None,
        side=side or None,
        drawing=cost,
        training=None,
        batches=None if cost is None else Batches(batch, None, (reason,)),
        needed=needed,
        disk=disk,
        work=Work(None, config.batch, None, None, config.budget),
        problems=findings.problems,
        notes=findings.notes,
    )


def _check_prompts(
    renderer: Renderer, checkpoint: Checkpoint, concepts: Sequence[str], findings: Findings
) -> None:
    prompt = read_card(checkpoint.folder).exemplar_prompt
    texts = [prompt.format(concept=one) for one in concepts]
    check_words(texts, renderer.vocabulary, renderer.name)
    require_texts(renderer, checkpoint, texts, findings, t5=True)


def _cost(renderer: SDXLRenderer | FlowPipelinePolicy) -> Cost:
    if isinstance(renderer, SDXLRenderer):
        modules: tuple[torch.nn.Module, ...] = (renderer.pipeline.unet, renderer.vae)
        with imagined(*modules):
            return cost_of(renderer.trial, modules)
    row = renderer.blank()
    renderer._cache = PromptCache(lambda prompt: row)
    modules = (renderer.transformer, renderer.vae)
    with imagined(*modules):
        return cost_of(trial(renderer, row), modules)


def _scorer(config: FuseConfig, checkpoint: Checkpoint | None, findings: Findings) -> dict[str, int]:
    """The encoder and the segmenter -> bytes of their weights."""
    named = [config.clip, config.segmenter]
    if checkpoint is not None:  # without one nobody knows which encoder it is calibrated for
        card = read_card(checkpoint.folder)
        named = [
            config.clip or card.clip or PUBLISHED_CLIP,
            config.segmenter or card.segmenter or PUBLISHED_SEGMENTER,
        ]
    sizes = {ref: model_bytes(ref, findings) for ref in named if ref is not None}
    return {ref: taken for ref, taken in sizes.items() if taken is not None}
