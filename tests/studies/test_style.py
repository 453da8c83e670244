"""The look of figures: what is drawn is what was given, whatever its words, and files are equal to the byte."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

import pixrl
from studies.style import PALETTE, Cloud, Curve, Mark, Panel, figure, svg

NAN = float("nan")


def example(entries: int = 1) -> Figure:
    curve = Curve("a <b> $c$", [(0, 1), (1, 2)], PALETTE[0], [(0, 0, 2), (1, 1, 3)])
    others = [Curve(f"a long name {n}", [(0, n), (1, n)], PALETTE[n % 9]) for n in range(entries)]
    cloud = Cloud("dots", [(0, 0), (1, 1)], PALETTE[3])
    return figure(
        [Panel("step", "reward", [curve, *others]), Panel("1", "2", [cloud])], "Title & more", "a note < 1"
    )


def test_the_axes_carry_what_was_given() -> None:
    first, second = example().axes
    assert first.lines[0].get_xydata().tolist() == [[0, 1], [1, 2]]
    (band,) = first.collections
    (path,) = band.get_paths()
    assert {tuple(point) for point in path.vertices} >= {(0, 0), (0, 2), (1, 1), (1, 3)}
    assert second.lines[0].get_xydata().tolist() == [[0, 0], [1, 1]]
    assert (first.get_xlabel(), first.get_title(loc="left")) == ("step", "reward")
    low, high = first.get_ylim()
    assert low < 0 and high > 3  # the band is inside the frame


def test_bounds_that_are_not_known_have_no_bar() -> None:
    mark = Mark("x", (1, NAN, NAN), (2, 1.5, 2.5), PALETTE[0], "beside", listed=False)
    made = figure([Panel("a", "b", [mark])], "")
    (axes,) = made.axes
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[1, 1.5], [1, 2.5]], [[1, 2]]]
    assert [text.get_text() for text in axes.texts] == ["beside"] and not made.legends


@pytest.mark.parametrize("entries", [1, 12])
def test_files_are_well_formed_and_legends_fit_below_the_axes(entries: int) -> None:
    made = example(entries)
    root = ET.fromstring(svg(made))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    words = {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"Title & more", "a note < 1", "a <b> $c$", "dots", "step", "reward"} <= words
    made.draw_without_rendering()  # places the words, at the dots per inch of the screen
    (legend,) = made.legends
    assert len(legend.get_texts()) == 2 + entries
    box, frame = legend.get_window_extent(), made.bbox
    assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0
    assert box.y1 < min(axes.xaxis.label.get_window_extent().y0 for axes in made.axes)


def test_two_runs_write_equal_bytes_whatever_the_users_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = svg(example())
    assert b"date" not in expected.lower()
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 30)
    monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", "black")
    assert svg(example()) == expected


def test_the_colours_are_the_pages() -> None:
    folder = Path(pixrl.__file__).parent / "report/templates"
    style = "".join((folder / name).read_text(encoding="utf-8") for name in ("colours.css", "style.css"))
    light = dict(re.findall(r"--(\w+): (#\w{6});", style.partition("@media")[0]))
    found = re.findall(r"svg \.k\d { stroke: (?:var\(--(\w+)\)|(#\w{6}));", style)
    assert tuple(light.get(name, colour) for name, colour in found) == PALETTE


def test_points_of_a_curve_are_not_thinned() -> None:
    points = [(float(x), float(np.sin(x))) for x in range(3000)]
    (axes,) = figure([Panel("", "", [Curve("sine", points, PALETTE[0])])], "").axes
    assert axes.lines[0].get_xydata().tolist() == [list(point) for point in points]
