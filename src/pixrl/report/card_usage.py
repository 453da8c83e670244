"""The section of a model card that says how to load the LoRA: code that runs as it stands, once FOLDER is filled in."""

from collections.abc import Iterator, Sequence

from pixrl.hub import TOY_PREFIX, split_adapter, split_single_file
from pixrl.hub_fetch import is_hub_id
from pixrl.runs.config import AlignConfig, PersonalizeConfig
from pixrl.untrusted import fenced

FOLDER, PICTURES, PROMPT = "FOLDER", "PICTURES", "PROMPT"
"""What the reader fills in."""
COMFYUI, UNO = "comfyui", "uno"
UNO_RANK = 512
"""That UNO's published file and app have."""
PICTURE = "picture.png"
_DRAWING = ("from pixrl.studies.slots import sample", "from pixrl.runs.folder import png_bytes")
_IMAGES = "of seed 0: [1, 3, rows, columns] in [0, 1]"


def usage(config: AlignConfig, *, file: str, layout: str, pipeline: str, without: Sequence[str] = ()) -> str:
    """The section, as markdown.

    Args:
        config: the run's recipe.
        file: the LoRA's name.
        layout: diffusers, comfyui or uno.
        pipeline: diffusers' class of the base model.
        without: parts that the base model is loaded without.
    """
    parts = ["## Use"]
    if layout == COMFYUI:
        parts.append(
            f"Put `{file}` into `ComfyUI/models/loras` and load it with the node *Load LoRA* (model alone)."
        )
    elif layout == UNO:
        parts.append(
            f"`{file}` has the keys of the file that UNO is published as. pixrl takes it as the base of a run: "
            f"`lora.base: {FOLDER}/{file}`. UNO's own code needs a change for it: the last section."
        )
        return "\n\n".join(parts)
    else:
        parts += [
            f"{FOLDER} is where this file lies, {PROMPT} what to draw.{_sampler_note(config)}",
            _code(_loaded(config, file, pipeline, without)),
        ]
    if isinstance(config, PersonalizeConfig):
        parts += _references(config, file, layout, pipeline)
    return "\n\n".join(parts)


def _sampler_note(config: AlignConfig) -> str:
    """Where diffusers draws other pictures than the run showed."""
    if _needs_pixrl(config):
        return ""
    return (
        " diffusers draws with its own sampler, from noise of its own: the pictures are not those of the run, which "
        f"were drawn with pixrl's {config.sampling.solver.value}."
    )


def _needs_pixrl(config: AlignConfig) -> bool:
    """diffusers cannot load the base alone."""
    adapter, place = split_adapter(config.model)
    return bool(adapter) or place.startswith(TOY_PREFIX) or split_single_file(place) is not None


def in_unos_code(file: str, rank: int) -> str:
    """A section on what must be set in UNO's code, as markdown: `rank` is that of every module of the file."""
    of_app = "the rank that its `app.py` sets" if rank == UNO_RANK else f"where its `app.py` sets {UNO_RANK}"
    return (
        f"## UNO's own code\n\nEvery LoRA layer of `{file}` has rank {rank}, {of_app}. UNO's code builds its layers of "
        f"one rank before it reads the file, and a file of another rank does not load: set `lora_rank={rank}` in "
        "`UNOPipeline(...)`. Its loader takes the published file from the hub first: in `load_flow_model_only_lora` "
        f"(`uno/flux/util.py`) set `hf_download=False`, and the environment variable `LORA={FOLDER}/{file}`. Layers "
        "that were not trained are in the file as zeros, so that no key of the published layout is missing. It was "
        "not run with UNO's code."
    )


def _references(config: PersonalizeConfig, file: str, layout: str, pipeline: str) -> list[str]:
    """What becomes of the reference pictures."""
    who = "ComfyUI draws" if layout == COMFYUI else f"A plain {pipeline} draws"
    what = f"{who} with these weights, but shows the model no reference pictures, which it was trained to look at."
    if layout == COMFYUI:
        return [
            f"{what} pixrl shows them; the code is in the card of the layout diffusers, which "
            "`pixrl export RUN --format diffusers` writes to `RUN/export/diffusers/README.md`."
        ]
    return [
        f"{what} pixrl shows them as in training ({PICTURES} is a folder with pictures of the subject):",
        _code(_shown(config, file)),
    ]


def _code(lines: Iterator[str]) -> str:
    return fenced("\n".join(lines), "python")


def _loaded(config: AlignConfig, file: str, pipeline: str, without: Sequence[str]) -> Iterator[str]:
    """diffusers' pipeline with the LoRA, or pixrl's model where diffusers cannot load the base alone."""
    ref = config.model
    lora = f"load_lora_weights({_text(FOLDER)}, weight_name={_text(file)})"
    if _needs_pixrl(config):
        yield "from pathlib import Path"
        yield ""
        yield "from pixrl import models"
        yield from _DRAWING
        yield ""
        yield f"model = models.load({_text(ref)}{_options(config)})"
        yield f"model.pipeline.{lora}"
        yield from _drawn(config, "model", f"model.encode([{_text(PROMPT)}])")
        return
    base, _, revision = ref.partition("@") if is_hub_id(ref) else (ref, "", "")
    pinned = f", revision={_text(revision)}" if revision else ""
    absent = "".join(f", {name}=None" for name in without)
    yield f"from diffusers import {pipeline}"
    yield ""
    yield f"pipeline = {pipeline}.from_pretrained({_text(base)}{pinned}{absent})"
    yield f"pipeline.{lora}"
    yield f"image = pipeline({_text(PROMPT)}{_call_options(config)}).images[0]"
    yield f"image.save({_text(PICTURE)})"


def _drawn(config: AlignConfig, policy: str, conditioning: str) -> Iterator[str]:
    """A picture of the run's solver, saved."""
    yield f"images = sample({policy}, {conditioning}, [0], solver={_text(config.sampling.solver.value)})  # {_IMAGES}"
    yield f"Path({_text(PICTURE)}).write_bytes(png_bytes(images[0]))"


def _call_options(config: AlignConfig) -> str:
    """Of diffusers' pipeline, as far as the recipe says them."""
    side = config.resolution
    chosen = {
        "num_inference_steps": _steps(config),
        "guidance_scale": config.guidance,
        "height": side,
        "width": side,
    }
    return "".join(f", {name}={value}" for name, value in chosen.items() if value is not None)


def _steps(config: AlignConfig) -> int:
    """Of the run's evaluation."""
    return config.evaluation.steps or config.sampling.steps


def _options(config: AlignConfig) -> str:
    """Of models.load, as the run's evaluation draws."""
    chosen = {"steps": _steps(config), "guidance": config.guidance, "resolution": config.resolution}
    chosen |= {} if config.t5 else {"t5": False}
    return "".join(f", {name}={value}" for name, value in chosen.items() if value is not None)


def _shown(config: PersonalizeConfig, file: str) -> Iterator[str]:
    """One picture of a subject, drawn as the run's evaluation draws."""
    references = config.references
    placed = {
        "preset": None if references.preset is None else f"Preset.{references.preset.name}",
        "shift": None if references.shift is None else f"Shift.{references.shift.name}",
        "side": references.side,
    }
    given = ", ".join(f"{name}={value}" for name, value in placed.items() if value is not None)
    cut = "" if references.count is None else f"[:{references.count}]"
    yield "from pathlib import Path"
    yield ""
    yield "from pixrl import models"
    yield "from pixrl.data.pictures import read_pictures, to_tensors"
    yield _DRAWING[0]
    if named := [name for name in ("Preset", "Shift") if f"={name}." in given]:
        yield f"from pixrl.models.flux import {', '.join(named)}"
    yield "from pixrl.models.base import on_square"
    yield _DRAWING[1]
    yield ""
    yield f"policy = models.load({_text(config.model)}{_options(config)})"
    if given:
        yield f"policy.place({given})"
    yield f"policy.merge_lora(Path({_text(FOLDER)}) / {_text(file)})"
    yield f"pictures = to_tensors(read_pictures(Path({_text(PICTURES)})){cut})"
    yield "references = [on_square(picture, policy.reference_side)[None] for picture in pictures]"
    yield f"conditioning = policy.with_references(policy.encode([{_text(PROMPT)}]), references)"
    yield from _drawn(config, "policy", "conditioning")


def _text(value: str) -> str:
    """A Python literal in double quotes, on one line."""
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in quoted) + '"'
