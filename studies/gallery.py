"""Subjects side by side: the reference, then each variant's picture of the same prompt from the same noise.

Which subjects and prompts are shown is fixed by their numbers, not chosen by hand.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from pixrl.algorithms.exploration import shown_pictures
from pixrl.data.prompts import Prompt
from pixrl.errors import RunError
from pixrl.models.base import on_square
from pixrl.models.slots import Slot
from pixrl.report.page import SMALL
from pixrl.runs.files import write_atomic
from pixrl.runs.folder import png_bytes
from pixrl.runs.loaded import LoadedRun, load_run
from pixrl.runs.measure import Drawing, draw, evaluated_slot, open_run
from studies.config import BASE, PersonalizeStudyConfig, spread_over_subjects
from studies.figures import FIGURES
from studies.grid import Record

GALLERY = "gallery.png"
TILE, GAP, HEAD, WORDS = 192, 8, 30, 220
"""Pixels of a picture, between pictures, of the headings, and of the column of prompts."""
LETTERS = 30
"""In a line of a prompt."""
REFERENCE = "reference"


def write_gallery(study: PersonalizeStudyConfig, records: Sequence[Record], out: Path) -> None:
    """figures/gallery.png of the first seed, unless it is there.

    Raises:
        RunError: a run whose pictures it shows is gone.
    """
    place = out / FIGURES / GALLERY
    if study.gallery is None or place.is_file():
        return
    columns: dict[str, Sequence[Tensor]] = {}
    prompts: tuple[Prompt, ...] = ()
    for name in study.gallery.variants:
        shop, slot = _opened(study, records, out, name)
        prompts = spread_over_subjects(shop.held_out, study.gallery.subjects, 1)
        columns[name] = _drawn(study, shop, slot, prompts)
    references = [on_square(shown_pictures(prompt.metadata)[0], TILE) for prompt in prompts]
    picture = sheet({REFERENCE: references, **columns}, [prompt.text for prompt in prompts])
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    place.parent.mkdir(exist_ok=True)
    write_atomic(place, buffer.getvalue())


def _opened(
    study: PersonalizeStudyConfig, records: Sequence[Record], out: Path, name: str
) -> tuple[LoadedRun, Slot]:
    """A variant's model with its trained slot; of the base, the model itself."""
    seed = study.seeds[0]
    if name == BASE:
        return load_run(study.recipe((name, seed))), Slot.REFERENCE
    runs = [record["run"] for record in records if (record["variant"], record["seed"]) == (name, seed)]
    if not runs or not (out / runs[0]).is_dir():
        raise RunError(
            f"The gallery needs the run of {name!r} with seed {seed}, and its folder is gone. Put it back, or "
            "start the study in a new folder."
        )
    shop = open_run(out / runs[0])
    return shop, evaluated_slot(shop.config)


def _drawn(
    study: PersonalizeStudyConfig, shop: LoadedRun, slot: Slot, prompts: Sequence[Prompt]
) -> Sequence[Tensor]:
    """One picture [3, H, W] a prompt, from noise that is the same for every variant."""
    m = study.measuring
    drawing = Drawing(1, m.steps, m.solver, study.seeds[0], shop.policy.micro_batch)
    return list(draw(shop.policy, slot, prompts, drawing).images_BCHW)


def sheet(columns: Mapping[str, Sequence[Tensor]], prompts: Sequence[str]) -> Image.Image:
    """A picture with a heading a column, and a row a prompt with its words on the left.

    Args:
        columns: heading -> pictures [3, H, W], one a prompt.
        prompts: one a row.
    """
    size = WORDS + len(columns) * (TILE + GAP), HEAD + len(prompts) * (TILE + GAP)
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    for row, prompt in enumerate(prompts):
        words = textwrap.fill(prompt.removeprefix("a photo of "), LETTERS)
        pen.text((GAP, HEAD + row * (TILE + GAP) + GAP), words, fill="black", font_size=14)
    for column, (heading, pictures) in enumerate(columns.items()):
        left = WORDS + column * (TILE + GAP)
        pen.text((left, GAP), heading, fill="black", font_size=15)
        for row, picture_CHW in enumerate(pictures):
            image.paste(_tile(picture_CHW), (left, HEAD + row * (TILE + GAP)))
    return image


def _tile(picture_CHW: Tensor) -> Image.Image:
    """Small pictures are enlarged in blocks, as on the pages; large ones are scaled down."""
    with Image.open(io.BytesIO(png_bytes(picture_CHW))) as picture:
        way = Image.Resampling.NEAREST if max(picture.size) <= SMALL else Image.Resampling.LANCZOS
        return picture.convert("RGB").resize((TILE, TILE), way)
