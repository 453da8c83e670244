"""Image generators behind two interfaces: a `Renderer` draws pictures, a `FlowPolicy` can also be trained.

`load("toy:sd3")`, `load("/my/folder")`, `load("stabilityai/sdxl-turbo@main")`, `load("model.safetensors")` and
`load("my_adapter.py:Mine@/my/folder")` go the same way. Importing this package imports no torch.
"""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixrl.config import parse_yaml
from pixrl.errors import CheckpointError, ConfigError, InputError
from pixrl.hub import TOY_PREFIX, Card, Checkpoint, locate, read_card, resolve, split_adapter, split_revision
from pixrl.hub_check import read_json
from pixrl.plugins import Registry

if TYPE_CHECKING:
    from pixrl.models.base import Renderer
    from pixrl.models.memory.plan import MemoryPlan

__all__ = ["REGISTRY", "RENDERERS", "Card", "load", "read_card", "resolve"]

RENDERERS = {
    "sd3": "pixrl.models.sd3:SD3Policy",
    "sdxl": "pixrl.models.sdxl:SDXLPolicy",
    "flux": "pixrl.models.flux:FluxPolicy",
    "flux2-klein": "pixrl.models.flux2:Flux2KleinPolicy",
    "z-image": "pixrl.models.z_image:ZImagePolicy",
    "qwen-image": "pixrl.models.qwen_image:QwenImagePolicy",
    "qwen-image-edit": "pixrl.models.qwen_edit:QwenImageEditPolicy",
}
"""The adapter of each kind of generator."""
REGISTRY = Registry("kind", "pixrl.models", RENDERERS)
"""The registry of all adapters: the table, installed packages' entry points, and classes in files of yours."""
NOT_STATED = "not stated: see the model's page"
TOY = "Apache-2.0 (part of pixrl)"
"""The licence of the toy world's generators; `NOT_STATED` stands where none is known."""


def load(
    ref: str | Path,
    *,
    kind: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    resolution: int | str | None = None,
    t5: bool = True,
    plan: "MemoryPlan | None" = None,
    lora: str | Path | None = None,
) -> "Renderer":
    """Load a generator from `toy:NAME`, a local folder, a hub id with or without `@revision`, or one safetensors file.

    Args:
        ref: the checkpoint, as `pixrl.hub` describes.
        kind: an adapter: a name of `REGISTRY`, or one of your own as `path/to/file.py:Name`; None: the one that `ref`
            names, else the one that loads pipelines of the class in the checkpoint's model_index.json.
        device: "auto" (a GPU when there is one), "cpu", "cuda" or "cuda:N".
        dtype: "auto", "float32", "bfloat16" or "float16" (GPU only).
        steps, guidance, resolution: in place of what the checkpoint's card or the adapter's default says; a resolution
            is the side of a square, or width x height: "832x1216".
        negative_prompt: the text that guidance leads away from, of models whose guidance is a second pass; None: what
            the model's pipeline does without one.
        t5: load SD3's third text encoder, where the checkpoint has it.
        plan: what to do to save memory (`pixrl.models.memory.plan.MemoryPlan`); nothing when None.
        lora: a file or folder that is merged into the denoiser, as `pixrl.models.lora.files` reads it.

    Raises:
        CheckpointError: the checkpoint, or the LoRA, is missing, half written or of an unknown kind.
        ConfigError: an adapter of your own cannot be imported, or is none.
        InputError: an argument is wrong.
    """
    if kind is not None:
        REGISTRY.require(kind)
    checkpoint = locate(ref, t5=t5)
    adapter: Any = adapter_of(checkpoint, kind)
    if negative_prompt is not None:
        adapter.require_negative_prompt(str(ref))
    renderer: Renderer = adapter(
        checkpoint,
        name=str(ref),
        device=device,
        dtype=dtype,
        steps=steps,
        guidance=guidance,
        resolution=resolution,
        t5=t5,
        plan=plan,
        **({} if negative_prompt is None else {"negative_prompt": negative_prompt}),
    )
    if plan is not None and renderer.base is not plan.base:
        raise InputError(
            f"base={plan.base.value} has no effect on {ref}: its adapter {type(renderer).__name__} keeps its weights "
            f"as {renderer.base.value}. Leave it out."
        )
    if lora is not None:
        renderer.merge_lora(Path(lora))
    return renderer


def adapter_of(checkpoint: Checkpoint, kind: str | None = None) -> "type[Renderer]":
    """Return the class that loads a checkpoint: by `kind`, else the one it names, else by its pipeline's class.

    Raises:
        CheckpointError: no adapter loads pipelines of its class.
        ConfigError: an adapter of yours cannot be imported, or is none.
        InputError: there is no such kind.
    """
    named = kind or checkpoint.adapter
    if named is not None:
        return _find(named)
    class_name = str(read_json(checkpoint.folder / "model_index.json").get("_class_name"))
    known: list[str] = []
    for name in REGISTRY.names():
        adapter = _find(name)
        if class_name in adapter.pipelines:
            return adapter
        known += adapter.pipelines
    raise CheckpointError(
        f"{checkpoint.folder} is a {class_name}, which pixrl has no adapter for. It loads {', '.join(known)}. Where "
        "the parts are those of one of them, write its name as _class_name into a copy's model_index.json and give "
        f"the copy's folder; in Python, models.load(..., kind=...) takes {', '.join(REGISTRY.names())}. An adapter of "
        "your own is given as path/to/file.py:Name@FOLDER."
    )


def _find(name: str) -> "type[Renderer]":
    from pixrl.models.base import Renderer

    found: Any = REGISTRY.find(name)
    if not (isinstance(found, type) and issubclass(found, Renderer)):
        raise ConfigError(f"{name} is {found!r}, which is no class that extends pixrl.models.base.Renderer.")
    if inspect.isabstract(found):
        raise ConfigError(f"The adapter {name} lacks {', '.join(sorted(found.__abstractmethods__))}.")
    return found


def generator_licence(ref: str) -> str:
    """Return the licence of a generator's weights: its README's, the published one, or that none is stated."""
    if ref.startswith(TOY_PREFIX):
        return TOY
    adapter, place = split_adapter(ref)
    stated = _front_matter(Path(place) / "README.md")
    adapters = map(_find, REGISTRY.names() if adapter is None else (adapter,))
    published = {repo: licence for one in adapters for repo, licence in one.licences.items()}
    return stated or published.get(split_revision(place)[0], NOT_STATED)


def _front_matter(readme: Path) -> str | None:
    """Return `license_name` or `license` of a README's front matter."""
    if not readme.is_file():
        return None
    parts = readme.read_text(encoding="utf-8", errors="replace").split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        fields = parse_yaml(parts[1], str(readme))
    except ConfigError:
        return None
    found = fields.get("license_name") or fields.get("license") if isinstance(fields, dict) else None
    return None if found is None else str(found)
