"""Image generators behind two interfaces: `Renderer` draws, `FlowPolicy` can also be trained.

`load("toy:sd3")`, `load("/my/folder")`, `load("stabilityai/sdxl-turbo@main")` and `load("model.safetensors")` go the
same way. Importing this package imports no torch.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixrl.errors import CheckpointError, InputError, did_you_mean
from pixrl.hub import Card, locate, read_card, read_json, resolve

if TYPE_CHECKING:
    from pixrl.models.base import Renderer
    from pixrl.models.memory_plan import MemoryPlan

__all__ = ["PIPELINES", "RENDERERS", "Card", "load", "read_card", "resolve"]

RENDERERS = {
    "sd3": "pixrl.models.sd3:SD3Policy",
    "sdxl": "pixrl.models.sdxl:SDXLRenderer",
    "flux": "pixrl.models.flux:FluxPolicy",
}
"""Kind -> adapter."""

PIPELINES = {
    "StableDiffusion3Pipeline": "sd3",
    "StableDiffusionXLPipeline": "sdxl",
    "FluxPipeline": "flux",
    "FluxKontextPipeline": "flux",
}
"""`_class_name` of a checkpoint's model_index.json -> kind."""


def load(
    ref: str | Path,
    *,
    kind: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    steps: int | None = None,
    guidance: float | None = None,
    resolution: int | None = None,
    t5: bool = True,
    plan: "MemoryPlan | None" = None,
    lora: str | Path | None = None,
) -> "Renderer":
    """A generator from `toy:NAME`, a local folder, a hub id with or without `@revision`, or one safetensors file.

    Args:
        ref: the checkpoint, as `pixrl.hub` describes.
        kind: a name of `RENDERERS`; found from the checkpoint's model_index.json when None.
        device: "auto" (a GPU when there is one), "cpu", "cuda" or "cuda:N".
        dtype: "auto", "float32", "bfloat16" or "float16" (GPU only).
        steps, guidance, resolution: in place of what the checkpoint's card or the adapter's default says.
        t5: load SD3's third text encoder, where the checkpoint has it.
        plan: what to do to save memory (`pixrl.models.memory_plan.MemoryPlan`); nothing when None.
        lora: a file or folder that is merged into an SD3 or FLUX, as `pixrl.models.lora_files` reads it.

    Raises:
        CheckpointError: the checkpoint, or the LoRA, is missing, half written or of an unknown kind.
        InputError: an argument is wrong.
    """
    if kind is not None and kind not in RENDERERS:
        raise InputError(
            f"Unknown kind {kind!r}.{did_you_mean(kind, RENDERERS)} There are {', '.join(RENDERERS)}."
        )
    checkpoint = locate(ref, t5=t5)
    renderer: Renderer = adapter_of(kind or kind_of(checkpoint.folder))(
        checkpoint,
        name=str(ref),
        device=device,
        dtype=dtype,
        steps=steps,
        guidance=guidance,
        resolution=resolution,
        t5=t5,
        plan=plan,
    )
    if lora is not None:
        _merge(renderer, Path(lora))
    return renderer


def _merge(renderer: "Renderer", lora: Path) -> None:
    from pixrl.models.pipeline import FlowPipelinePolicy

    if not isinstance(renderer, FlowPipelinePolicy):
        raise InputError(
            f"The LoRA {lora} cannot be merged into {renderer.name}, a {type(renderer).__name__}: pixrl reads those of "
            "SD3 and FLUX. Leave it out."
        )
    renderer.merge_lora(lora)


def adapter_of(kind: str) -> Any:
    """The adapter class of a kind."""
    module, _, name = RENDERERS[kind].partition(":")
    return importlib.import_module(module).__dict__[name]


def kind_of(path: Path) -> str:
    """The kind of a pipeline's folder. CheckpointError where there is no adapter for it."""
    class_name = str(read_json(path / "model_index.json").get("_class_name"))
    if class_name not in PIPELINES:
        raise CheckpointError(
            f"{path} is a {class_name}, which pixrl has no adapter for. It loads {', '.join(PIPELINES)}. Where the "
            f"parts are those of one of them, write its name as _class_name into a copy's model_index.json and give "
            f"the copy's folder; in Python, models.load(..., kind=...) takes {', '.join(RENDERERS)}."
        )
    return PIPELINES[class_name]
