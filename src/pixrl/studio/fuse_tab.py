"""The studio's tab of fusions by hand: a pad of weights, the picture that follows it, favourites, a learned search."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import gradio as gr

from pixrl.errors import InputError, PixrlError
from pixrl.report.page import render
from pixrl.studio.folders import HERE, sentence
from pixrl.studio.fuse import CORNERS, MORE, MOST, Blend, Mixer, gif, morph, png, point_of, uri, weights_at
from pixrl.studio.style import asset

if TYPE_CHECKING:
    from pixrl.studio.app import Studio

BUDGET = 64
"""Pictures of a learned search."""
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
                self.pad = gr.HTML(_pad(None), js_on_load=asset("pad.js"), apply_default_css=False)
                with gr.Row(elem_classes="buttons"):
                    self.noise = gr.Button("Other noise", size="sm", min_width=90)
                    self.keep = gr.Button("Keep", size="sm", min_width=90)
                    self.more = gr.Button("More like this", size="sm", min_width=90)
                with gr.Row(elem_classes="buttons"):
                    self.larger = gr.Button("Draw larger", size="sm", min_width=90)
                    self.morph = gr.Button("Morph", size="sm", min_width=90)
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
        self.similar_children, self.favourites = gr.State([]), gr.State([])
        self._listen()

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

    def _listen(self) -> None:
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        drawn = [self.child, self.picture, self.note]
        last: dict[str, Any] = {"trigger_mode": "always_last", **quiet}
        self.concepts.input(self._choose, [self.concepts], [self.pad, *drawn], **last)
        self.pad.input(self._move, [self.child], drawn, **last)
        self.noise.click(self._other_noise, [self.child], drawn, **quiet)
        kept = [self.favourites, self.kept, self.child]
        self.keep.click(self._keep, [self.child, self.picture, self.favourites], kept, **quiet)
        similar = [self.similar_children, self.similar, self.note]
        self.more.click(self._more, [self.child, self.favourites], similar, **quiet)
        self.larger.click(self._larger, [self.child], [self.picture, self.note], **quiet)
        self.morph.click(self._morph, [self.child], [self.animation, self.note], **quiet)
        for one in (self.similar, self.kept):
            taken = [self.concepts, self.pad, *drawn]
            one.select(self._take, [self.similar_children, self.favourites], taken, **quiet)
        self.search.click(self._search, [self.child], [self.searched, self.note], **quiet)

    def _choose(self, concepts: Sequence[str]) -> list[Any]:
        """Begin with equal weights."""
        if len(concepts) < 2:
            return [_pad(None), None, _mixture(None, ""), ""]
        names = tuple(" ".join(one.split()) for one in concepts)
        weights = (1 / len(names),) * len(names)
        shown = self._show(Blend(names, weights, 0))
        return [_pad(shown[0]), *shown]

    def _move(self, child: Blend | None, event: gr.EventData) -> list[Any]:
        if child is None:
            return [gr.skip()] * 3
        x, y = float(event._data["x"]), float(event._data["y"])
        return self._show(replace(child, weights=weights_at(len(child.concepts), x, y), parent=None))

    def _other_noise(self, child: Blend | None) -> list[Any]:
        return [gr.skip()] * 3 if child is None else self._show(replace(child, seed=child.seed + 1))

    def _show(self, child: Blend) -> list[Any]:
        try:
            (picture,) = self.mixer.draw([child])
        except PixrlError as error:
            return [None, _mixture(None, ""), self._refused(error)]
        return [child, _mixture(child, uri(png(picture, child), "png")), ""]

    def _keep(self, child: Blend | None, picture: str, favourites: list[Shown]) -> list[Any]:
        if child is None or any(one == child for one, _ in favourites):
            return [gr.skip()] * 3
        (image,) = self.mixer.draw([child])
        favourites = [*favourites, (child, uri(png(image, child), "png"))]
        return [favourites, _children("Favourites", "kept", favourites, numbered=True), gr.skip()]

    def _more(self, child: Blend | None, favourites: list[Shown]) -> list[Any]:
        """Draw the same coefficients from new noises."""
        if child is None:
            return [gr.skip()] * 3
        numbers = [at for at, (one, _) in enumerate(favourites, 1) if one == child]
        parent = numbers[0] if numbers else child.parent
        children = [replace(child, seed=child.seed + 1 + at, parent=parent) for at in range(MORE)]
        pictures = self.mixer.draw(children)
        shown = [(one, uri(png(image, one), "png")) for one, image in zip(children, pictures, strict=True)]
        return [shown, _children("More like this", "similar", shown), ""]

    def _larger(self, child: Blend | None) -> list[Any]:
        if child is None:
            return [gr.skip()] * 2
        try:
            (picture,) = self.mixer.draw([child], size=2 * self.mixer.side())
        except PixrlError as error:
            return [gr.skip(), self._refused(error)]
        return [
            _mixture(child, uri(png(picture, child), "png")),
            f"{picture.width} × {picture.height} pixels",
        ]

    def _morph(self, child: Blend | None) -> list[Any]:
        if child is None:
            return [gr.skip()] * 2
        image = uri(gif(self.mixer.draw(morph(child))), "gif")
        return [render("studio/morph.html.j2", {"image": image, "name": child.name}), ""]

    def _take(self, similar: list[Shown], favourites: list[Shown], event: gr.EventData) -> list[Any]:
        shown = favourites if event._data["list"] == "kept" else similar
        child, image = shown[int(event._data["at"])]
        return [list(child.concepts), _pad(child), child, _mixture(child, image), ""]

    def _search(self, child: Blend | None) -> list[Any]:
        """Start `pixrl fuse` on the same concepts as a process of its own; its run appears among the runs."""
        if child is None:
            return [gr.skip()] * 2
        root = self.studio.runs.root
        if self.studio.runs.names() == [HERE]:
            text = "Start the studio on a folder of runs, not on a run: a search is a run beside the others."
            return [gr.skip(), _note(text)]
        base = "-".join("_".join(concept.split()) for concept in child.concepts)
        name = next(one for n in itertools.count(1) if not (root / (one := f"{base}-{n}")).exists())
        given = [*child.concepts, "--budget", str(BUDGET), "--model", self.mixer.model, "--out"]
        try:
            self.studio.processes.begin("fuse", root / name, given)
        except PixrlError as error:
            return [gr.skip(), self._refused(error)]
        return [name, ""]

    def _refused(self, error: PixrlError) -> str:
        return _note(sentence(error, self.studio.runs.root))


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
