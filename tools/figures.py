#!/usr/bin/env python3
"""Makes the pictures of the docs again, from what the package does now. Run it as `make figures`."""

import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from pixrl import api, config
from pixrl.cli import demo
from pixrl.data.pairs import parse_pairs
from pixrl.fusion.config import FuseConfig
from pixrl.fusion.world import FusionSession, load_world
from pixrl.jobs import fuse as fuse_job
from pixrl.rewards.python import to_pil
from pixrl.runs.folder import RunFolder
from toy_build import sheet

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
TILE, GAP, LABEL = 128, 8, 20
CHILDREN = 4
PROMPTS = 8
SHARES = (0.25, 0.4, 0.5, 0.6, 0.75)
MIXED_PAIRS = (("owl", "snail"), ("penguin", "cactus"))
MIXINGS = {
    "columns": {"kind": "columns"},
    "tokens": {"kind": "tokens"},
    "steps": {"kind": "steps"},
    "steps, in turn": {"kind": "steps", "order": "alternate"},
    "velocity": {"kind": "velocity"},
    "spatial,\ntop down": {"kind": "spatial"},
    "spatial,\ninside out": {"kind": "spatial", "shape": "inside_out"},
    "regions,\ntop down": {"kind": "regions"},
    "regions,\ninside out": {"kind": "regions", "shape": "inside_out"},
}


def main() -> None:
    """Every picture, by the command that makes it."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    sheet.main(IMAGES)
    sheet.save(mixing_sheet(), IMAGES / "mixings.png")
    with tempfile.TemporaryDirectory() as folder:
        sheet.save(demo_sheet(Path(folder) / "demo"), IMAGES / "fused.png")
        sheet.save(aligned_sheet(Path(folder) / "aligned"), IMAGES / "aligned.png")
    print(f"pictures in {IMAGES}")


def demo_sheet(out: Path) -> Image.Image:
    """The pairs of `pixrl demo`: a row each, the parents and then the selected children."""
    api.run_pairs(FuseConfig(), demo.DEMO_PAIRS, out)
    runs = [RunFolder.open(path) for path in sorted((out / "runs").iterdir())]
    pairs = parse_pairs(demo.DEMO_PAIRS).pairs
    rows = [_row(run, concepts) for run, concepts in zip(runs, pairs, strict=True)]
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    for k, row in enumerate(rows):
        sheet.paste(row, (0, k * row.height))
    return sheet


def aligned_sheet(out: Path) -> Image.Image:
    """The alignment of `pixrl demo`: the first held-out prompts, none chosen, before training and after it."""
    run = api.align(demo.ALIGN_RECIPE, out=out).run
    steps = sorted((run / "samples").glob("step-*"))
    tiles = [sorted(step.glob("[0-9]*.png"))[:PROMPTS] for step in (steps[0], steps[-1])]
    image = Image.new("RGB", (PROMPTS * (TILE + GAP), len(tiles) * (TILE + GAP)), "white")
    for row, files in enumerate(tiles):
        for place, file in enumerate(files):
            picture = Image.open(file).convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS)
            image.paste(picture, (place * (TILE + GAP), row * (TILE + GAP)))
    return image


def mixing_sheet() -> Image.Image:
    """Every mixing on one noise, from the second concept to the first; seeds and shares are not chosen."""
    world, seed = load_world("toy:turbo"), 0
    left, columns = 128, len(SHARES) * len(MIXED_PAIRS)
    size = (left + columns * (TILE + GAP) + GAP * 3 * len(MIXED_PAIRS), (TILE + GAP) * len(MIXINGS) + LABEL)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for row, (label, mixing) in enumerate(MIXINGS.items()):
        draw.text((GAP, LABEL + row * (TILE + GAP) + TILE // 2 - 10), label, fill="black", font_size=15)
        for block, concepts in enumerate(MIXED_PAIRS):
            recipe = {"concepts": concepts, "mixing": mixing}
            session = FusionSession(world, config.load(FuseConfig, recipe))
            columns = session.task().columns
            mixed = torch.tensor([[a, 1 - a] for a in SHARES])[:, :, None].expand(-1, -1, columns)
            start = left + block * (len(SHARES) * (TILE + GAP) + GAP * 3)
            for place, image in enumerate(to_pil(session.render(mixed, [seed] * len(SHARES)))):
                picture = image.resize((TILE, TILE), Image.Resampling.LANCZOS)
                sheet.paste(picture, (start + place * (TILE + GAP), LABEL + row * (TILE + GAP)))
                if row == 0:
                    said = f"{SHARES[place]:.0%} {concepts[0]}"
                    draw.text((start + place * (TILE + GAP), 0), said, fill="black", font_size=13)
    return sheet


def _row(run: RunFolder, concepts: tuple[str, ...]) -> Image.Image:
    """Parents with their names, then children; the nearest to qualifying where none did."""
    rows = run.manifest()
    selection = fuse_job.read_selection(run)
    chosen = list(selection.indices) or [near.index for near in selection.nearest]
    files = [str(rows[index].file) for index in chosen][:CHILDREN]
    parents = [(name, fuse_job.exemplar_files(run, name)[0]) for name in concepts]
    tiles = [*parents, *((" x ".join(concepts), run.path / file) for file in files)]
    places = len(parents) + CHILDREN
    image = Image.new("RGB", (places * (TILE + GAP) + GAP * 3, TILE + LABEL + GAP), "white")
    draw = ImageDraw.Draw(image)
    for place, (name, file) in enumerate(tiles):
        left = GAP + place * (TILE + GAP) + (0 if place < len(parents) else GAP * 2)
        image.paste(
            Image.open(file).convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS), (left, LABEL)
        )
        if place <= len(parents):
            draw.text((left, 3), name, fill="black", font_size=13)
    return image


if __name__ == "__main__":
    main()
