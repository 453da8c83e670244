"""Fusions by hand: a pad of weights, the picture that follows it, favourites, a learned search.

A mixture is what `pixrl fuse` draws where every column of a concept has the same coefficient, its weight. torch is
loaded with the first picture.
"""

import base64
import io
import itertools
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from pixrl import config as recipes
from pixrl.data.pairs import is_wordless
from pixrl.data.pictures import read_picture
from pixrl.errors import InputError, PixrlError
from pixrl.report.page import render
from pixrl.studio.folders import HERE, sentence
from pixrl.studio.style import asset

if TYPE_CHECKING:
    from torch import Tensor

    from pixrl.algorithms.fusion.mixing import Mixing
    from pixrl.fusion.config import FuseConfig
    from pixrl.studio.app import Studio

MOST = 4
"""Concepts of a pad, at most."""
CORNERS = {
    2: ((0.0, 0.5), (1.0, 0.5)),
    3: ((0.5, 0.0), (0.0, 1.0), (1.0, 1.0)),
    4: ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)),
}
"""Where the concepts stand on the pad, from the left and from the top: on a line, a triangle or a square."""
FRAMES = 12
"""Pictures of a morph."""
FRAME_MS = 110
MORE = 8
"""Pictures of `more like this`."""
BUDGET = 64
"""Pictures of a learned search."""


@dataclass(frozen=True)
class Blend:
    """One mixture: its concepts, their weights, and the seed of its noise."""

    concepts: tuple[str, ...]
    weights: tuple[float, ...]
    """They sum to 1."""
    seed: int
    parent: int | None = None
    """The number of the favourite whose coefficients it has."""
    pictures: tuple[tuple[str, str], ...] = ()
    """The concepts that are pictures, and their files."""

    @property
    def title(self) -> str:
        """Its concepts as a part of a file's name."""
        return "-".join(re.sub(r"[^\w.+-]+", "_", concept) for concept in self.concepts)

    @property
    def name(self) -> str:
        """A name for files."""
        return f"{self.title}-{self.seed}"


def weights_at(count: int, x: float, y: float) -> tuple[float, ...]:
    """Return the weights of 2 to 4 concepts at a point of their pad, which sum to 1; outside, those of its edge.

    Two divide the line, three have barycentric coordinates of the triangle, four bilinear ones of the square.
    """
    x, y = (min(max(at, 0.0), 1.0) for at in (x, y))
    if count == 2:
        return (1 - x, x)
    if count == 4:
        return ((1 - x) * (1 - y), x * (1 - y), (1 - x) * y, x * y)
    top = 1 - y
    right = x - top / 2
    inside = [max(weight, 0.0) for weight in (top, 1 - top - right, right)]
    return tuple(weight / sum(inside) for weight in inside)


def point_of(weights: Sequence[float]) -> tuple[float, float]:
    """Return where the point of the pad stands for weights that `weights_at` returned."""
    corners = CORNERS[len(weights)]
    x, y = (sum(w * corner[axis] for w, corner in zip(weights, corners, strict=True)) for axis in (0, 1))
    return x, y


def check(concepts: Sequence[str], model: str, pictures: Sequence[tuple[str, str]] = ()) -> "FuseConfig":
    """Return the recipe of a mixture; `pictures`: the concepts that are pictures, and their files.

    Raises:
        InputError: there are fewer than two concepts or more than four, or one is empty, given twice, or the name of a
            picture that was not added.
    """
    from pixrl.fusion.config import FuseConfig

    if len(concepts) > MOST:
        raise InputError(
            f"The pad has room for {MOST} concepts, and {len(concepts)} were chosen: take some out."
        )
    files = dict(pictures)
    for concept in concepts:
        if is_wordless(concept) and concept not in files:
            raise InputError(
                f"{concept!r} is a picture, and the page has none: add it with the button below."
            )
    given = {"concepts": tuple(concepts), "model": model, "pictures": files}
    return recipes.load(FuseConfig, None, values=given, kind="fuse")


class Mixer:
    """Draws mixtures with one model, one at a time."""

    def __init__(self, model: str, device: str = "auto") -> None:
        self.model, self.device = model, device
        self._lock = threading.Lock()

    def draw(self, children: Sequence[Blend], size: int | str | None = None) -> list[Image.Image]:
        """Draw mixtures of the same concepts.

        Args:
            children: what is drawn.
            size: in pixels, the side of a square or WIDTHxHEIGHT; None: the model's.

        Raises:
            InputError: a concept is unknown to the model, or the concepts or the size do not fit it.
        """
        import torch

        from pixrl.fusion.world import mixing_of, render

        config = check(children[0].concepts, self.model, children[0].pictures)
        with self._lock, torch.inference_mode():
            renderer, card = _load(self.model, self.device, size)
            mixing = mixing_of(renderer, card, config)
            pictures = []
            for child in children:  # alone, so that a picture depends on nothing beside it
                image_CHW = render(renderer, mixing, _coefficients(child, mixing), [child.seed])[0]
                pixels = image_CHW.float().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu()
                pictures.append(Image.fromarray(pixels.numpy()))
        return pictures

    def coefficients(self, child: Blend) -> bytes:
        """Return a mixture's coefficients as the file that ComfyUI's node pack reads (`pixrl.report.export`).

        Raises:
            InputError: a concept is unknown to the model.
            ConfigError: no conditioning can say what the model mixes.
        """
        from pixrl.fusion.world import mixing_of, prompt_of
        from pixrl.report.export import coefficients_bytes, require_taken

        config = check(child.concepts, self.model, child.pictures)
        with self._lock:
            renderer, card = _load(self.model, self.device, None)
            config = config.with_mixing(card.mixing)
            require_taken(config)
            values_1ND = _coefficients(child, mixing_of(renderer, card, config))
        prompts = [prompt_of(card, concept) for concept in child.concepts]
        return coefficients_bytes(values_1ND[0], config, prompts, child.seed)

    def size(self) -> tuple[int, int]:
        """Return the width and height of the model's pictures in pixels."""
        settings = _load(self.model, self.device, None)[0].settings
        return settings.width, settings.height


@lru_cache(maxsize=2)
def _load(model: str, device: str, size: int | str | None) -> tuple[Any, Any]:
    from pixrl import models
    from pixrl.hub import read_card
    from pixrl.hub_check import Layout

    return models.load(model, device=device, resolution=size), read_card(model, Layout.PIPELINE)


def _coefficients(child: Blend, mixing: "Mixing[Any]") -> "Tensor":
    """Return the coefficients [1, N, D] of a mixture: a concept's weight in every column."""
    features_ND = mixing.features_ND
    weights_N = features_ND.new_tensor(child.weights)
    return weights_N[None, :, None].expand(1, -1, features_ND.shape[1])


def morph(child: Blend) -> list[Blend]:
    """Return the mixtures from one concept to the next and back to the first, all from the child's noise."""
    count = len(child.concepts)
    stops = [*range(count), 0]
    legs = len(stops) - 1
    found = []
    for frame in range(FRAMES):
        leg, share = divmod(frame * legs / FRAMES, 1)
        weights = [0.0] * count
        weights[stops[int(leg)]] += 1 - share
        weights[stops[int(leg) + 1]] += share
        found.append(replace(child, weights=tuple(weights), parent=None))
    return found


def gif(pictures: Sequence[Image.Image]) -> bytes:
    """Return an animation that repeats."""
    buffer = io.BytesIO()
    first, *rest = pictures
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=FRAME_MS, loop=0)
    return buffer.getvalue()


def png(picture: Image.Image, child: Blend) -> bytes:
    """Return a picture as PNG, which says how it was made."""
    from PIL.PngImagePlugin import PngInfo

    about = PngInfo()
    parts = [f"{concept} {weight:.4f}" for concept, weight in zip(child.concepts, child.weights, strict=True)]
    about.add_text("pixrl", f"{', '.join(parts)}, seed {child.seed}")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=about)
    return buffer.getvalue()


def uri(content: bytes, kind: str) -> str:
    """Return a file as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


Shown = tuple[Blend, str]
"""A mixture and its picture as a data URI."""


class FuseTab:
    """The parts of the tab, and what they do."""

    def __init__(self, studio: "Studio", concepts: Sequence[str], model: str) -> None:
        """Make the tab inside an open `gr.Tab`; `concepts` are those that the list offers."""
        self.studio, self.mixer = studio, Mixer(model)
        with gr.Row(elem_classes="fuse"):
            with gr.Column(scale=1, min_width=280):
                self.concepts = gr.Dropdown(
                    list(concepts),
                    value=[],
                    multiselect=True,
                    max_choices=MOST,
                    allow_custom_value=True,
                    label="Concepts, two to four: choose, or type your own",
                )
                self.add = gr.UploadButton(
                    "Add a picture as a concept", file_types=["image"], size="sm", elem_classes="add"
                )
                self.pad = gr.HTML(_pad(None), js_on_load=asset("pad.js"), apply_default_css=False)
                with gr.Row(elem_classes="buttons"):
                    self.noise = gr.Button("Other noise", size="sm", min_width=90)
                    self.keep = gr.Button("Keep", size="sm", min_width=90)
                    self.more = gr.Button("More like this", size="sm", min_width=90)
                with gr.Row(elem_classes="buttons"):
                    self.larger = gr.Button("Draw larger", size="sm", min_width=90)
                    self.morph = gr.Button("Morph", size="sm", min_width=90)
                    self.comfyui = gr.Button("For ComfyUI", size="sm", min_width=90)
                with gr.Row(elem_classes="buttons"):
                    self.search = gr.Button("Learn it", size="sm", min_width=90)
                self.note = gr.HTML("", elem_classes="note", apply_default_css=False)
            with gr.Column(scale=1, min_width=280):
                self.picture = gr.HTML(_mixture(None, ""), apply_default_css=False)
                self.animation = gr.HTML("", apply_default_css=False)
            with gr.Column(scale=1, min_width=280):
                lists: dict[str, Any] = {"js_on_load": asset("pick.js"), "apply_default_css": False}
                self.kept, self.similar = gr.HTML("", **lists), gr.HTML("", **lists)
                self.learned = studio.html()
        self.child, self.searched, self.mark = gr.State(None), gr.State(None), gr.State(0)
        self.similar_children, self.favourites, self.pictures = gr.State([]), gr.State([]), gr.State({})
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        drawn = [self.child, self.picture, self.note]
        last: dict[str, Any] = {"trigger_mode": "always_last", **quiet}
        chosen = [self.concepts, self.pictures]
        self.concepts.input(self.choose, chosen, [self.pad, *drawn], **last)
        self.add.upload(self.add_picture, [self.add, *chosen], [*chosen, self.pad, *drawn], **quiet)
        self.pad.input(self.move, [self.child], drawn, **last)
        self.noise.click(self.redraw, [self.child], drawn, **quiet)
        kept = [self.favourites, self.kept, self.child]
        self.keep.click(self.favour, [self.child, self.picture, self.favourites], kept, **quiet)
        similar = [self.similar_children, self.similar, self.note]
        self.more.click(self.vary, [self.child, self.favourites], similar, **quiet)
        self.larger.click(self.enlarge, [self.child], [self.picture, self.note], **quiet)
        self.morph.click(self.animate, [self.child], [self.animation, self.note], **quiet)
        self.comfyui.click(self.hand_over, [self.child], [self.note], **quiet)
        for one in (self.similar, self.kept):
            taken = [self.concepts, self.pad, *drawn]
            one.select(self.take, [self.similar_children, self.favourites], taken, **quiet)
        self.search.click(self.learn, [self.child], [self.searched, self.note], **quiet)

    def tick(self, searched: str | None, mark: int) -> list[Any]:
        """Return the learned search as it stands, and a mark of it; nothing where the mark is still the same."""
        if searched is None:
            return [gr.skip(), gr.skip()]
        shown = self._learned(searched)
        return [gr.skip(), gr.skip()] if hash(shown) == mark else [shown, hash(shown)]

    def _learned(self, searched: str) -> str:
        try:
            data = self.studio.look(searched)
        except InputError:  # its process has not made the folder yet, or could not
            path = self.studio.runs.root / searched
            said = self.studio.processes.outcome(path) or "The search is starting."
            return _note(said)
        page = self.studio.page_of(searched)
        return page.head(data) + page.group(data)

    def choose(self, concepts: Sequence[str], pictures: Mapping[str, str]) -> list[Any]:
        """Begin with equal weights of the chosen concepts: return the pad, the child, its picture and a note."""
        if len(concepts) < 2:
            return [_pad(None), None, _mixture(None, ""), ""]
        names = tuple(" ".join(one.split()) for one in concepts)
        weights = (1 / len(names),) * len(names)
        files = tuple((name, pictures[name]) for name in names if name in pictures)
        shown = self._show(Blend(names, weights, 0, pictures=files))
        return [_pad(shown[0]), *shown]

    def add_picture(self, file: str, concepts: Sequence[str], pictures: Mapping[str, str]) -> list[Any]:
        """Choose a picture too: return the concepts, the pictures and what `choose` returns.

        It is kept in `pictures` beside the runs, where a search finds it again.
        """
        place = Path(file)
        try:
            read_picture(place)
        except InputError as error:
            return [*[gr.skip()] * 5, self._refused(error)]
        if self.studio.runs.names() != [HERE]:
            place = keep_picture(place, self.studio.runs.root / "pictures")
        pictures = {**pictures, place.name: str(place)}
        concepts = [*concepts, *([] if place.name in concepts else [place.name])]
        return [concepts, pictures, *self.choose(concepts, pictures)]

    def move(self, child: Blend | None, event: gr.EventData) -> list[Any]:
        """Return the child of the point on the pad, its picture and a note."""
        if child is None:
            return [gr.skip()] * 3
        x, y = float(event._data["x"]), float(event._data["y"])
        return self._show(replace(child, weights=weights_at(len(child.concepts), x, y), parent=None))

    def redraw(self, child: Blend | None) -> list[Any]:
        """Return the child of the next noise, its picture and a note."""
        return [gr.skip()] * 3 if child is None else self._show(replace(child, seed=child.seed + 1))

    def _show(self, child: Blend) -> list[Any]:
        try:
            (picture,) = self.mixer.draw([child])
        except PixrlError as error:
            return [None, _mixture(None, ""), self._refused(error)]
        return [child, _mixture(child, uri(png(picture, child), "png")), ""]

    def favour(self, child: Blend | None, picture: str, favourites: list[Shown]) -> list[Any]:
        """Return the favourites with the child, and how they are shown; nothing where it is among them already."""
        if child is None or any(one == child for one, _ in favourites):
            return [gr.skip()] * 3
        (image,) = self.mixer.draw([child])
        favourites = [*favourites, (child, uri(png(image, child), "png"))]
        return [favourites, _children("Favourites", "kept", favourites, numbered=True), gr.skip()]

    def vary(self, child: Blend | None, favourites: list[Shown]) -> list[Any]:
        """Draw the same coefficients from new noises: return the children, how they are shown, and a note."""
        if child is None:
            return [gr.skip()] * 3
        numbers = [at for at, (one, _) in enumerate(favourites, 1) if one == child]
        parent = numbers[0] if numbers else child.parent
        children = [replace(child, seed=child.seed + 1 + at, parent=parent) for at in range(MORE)]
        pictures = self.mixer.draw(children)
        shown = [(one, uri(png(image, one), "png")) for one, image in zip(children, pictures, strict=True)]
        return [shown, _children("More like this", "similar", shown), ""]

    def enlarge(self, child: Blend | None) -> list[Any]:
        """Return the child's picture at twice the size, and a note of its pixels or of why there is none."""
        if child is None:
            return [gr.skip()] * 2
        try:
            width, height = self.mixer.size()
            (picture,) = self.mixer.draw([child], size=f"{2 * width}x{2 * height}")
        except PixrlError as error:
            return [gr.skip(), self._refused(error)]
        return [
            _mixture(child, uri(png(picture, child), "png")),
            f"{picture.width} × {picture.height} pixels",
        ]

    def animate(self, child: Blend | None) -> list[Any]:
        """Return the animation from concept to concept, and an empty note."""
        if child is None:
            return [gr.skip()] * 2
        image = uri(gif(self.mixer.draw(morph(child))), "gif")
        return [render("studio/morph.html.j2", {"image": image, "name": child.name}), ""]

    def hand_over(self, child: Blend | None) -> Any:
        """Return a note with the child's coefficients as a file for ComfyUI, or of why there is none."""
        if child is None:
            return gr.skip()
        try:
            content = base64.b64encode(self.mixer.coefficients(child)).decode()
        except PixrlError as error:
            return self._refused(error)
        file = {"name": f"{child.name}.safetensors", "uri": f"data:application/octet-stream;base64,{content}"}
        return render("studio/coefficients.html.j2", file)

    def take(self, similar: list[Shown], favourites: list[Shown], event: gr.EventData) -> list[Any]:
        """Return the chosen child of a list: its concepts, the pad, itself, its picture and an empty note."""
        shown = favourites if event._data["list"] == "kept" else similar
        child, image = shown[int(event._data["at"])]
        return [list(child.concepts), _pad(child), child, _mixture(child, image), ""]

    def learn(self, child: Blend | None) -> list[Any]:
        """Start `pixrl fuse` on the same concepts as a process of its own, and return its run's name and a note."""
        if child is None:
            return [gr.skip()] * 2
        root = self.studio.runs.root
        if self.studio.runs.names() == [HERE]:
            text = "Start the studio on a folder of runs, not on a run: a search is a run beside the others."
            return [gr.skip(), _note(text)]
        name = next(one for n in itertools.count(1) if not (root / (one := f"{child.title}-{n}")).exists())
        typed = check(child.concepts, self.mixer.model, child.pictures).typed
        given = [*typed, "--budget", str(BUDGET), "--model", self.mixer.model, "--out"]
        try:
            self.studio.processes.begin("fuse", root / name, given)
        except PixrlError as error:
            return [gr.skip(), self._refused(error)]
        return [name, ""]

    def _refused(self, error: PixrlError) -> str:
        return _note(sentence(error, self.studio.runs.root))


def keep_picture(file: Path, folder: Path) -> Path:
    """Copy a picture into a folder, under another name where another one has its own; return the copy."""
    content = file.read_bytes()
    folder.mkdir(exist_ok=True)
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    for number in numbers:
        place = folder / f"{file.stem}{number}{file.suffix}"
        if not place.exists():
            place.write_bytes(content)
        if place.read_bytes() == content:
            break
    return place


def _note(text: str) -> str:
    return render("studio/note.html.j2", {"text": text})


def _pad(child: Blend | None) -> str:
    if child is None:
        return render("studio/pad.html.j2", {"concepts": ()})
    x, y = point_of(child.weights)
    corners = list(zip(child.concepts, CORNERS[len(child.concepts)], strict=True))
    return render("studio/pad.html.j2", {"concepts": child.concepts, "corners": corners, "x": x, "y": y})


def _mixture(child: Blend | None, image: str) -> str:
    return render("studio/mixture.html.j2", {"child": child, "image": image})


def _children(heading: str, name: str, shown: Sequence[Shown], *, numbered: bool = False) -> str:
    rows = [(at if numbered else None, child, image) for at, (child, image) in enumerate(shown, 1)]
    return render("studio/children.html.j2", {"heading": heading, "list": name, "children": rows})
