"""Fusions by hand: the pad's weights, what is drawn by them, what is refused, and what lists and files keep."""

import base64
import io
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
import safetensors.torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pixrl import models
from pixrl.data.toy import toy_subjects
from pixrl.errors import InputError
from pixrl.studio.app import Studio
from pixrl.studio.fuse import (
    CORNERS,
    FRAMES,
    Blend,
    FuseTab,
    Mixer,
    check,
    gif,
    morph,
    png,
    point_of,
    weights_at,
)
from tests import tiny

UNIT = st.floats(0, 1)
MODEL = "toy:sd3"


@given(st.sampled_from([2, 3, 4]), st.floats(-2, 3), st.floats(-2, 3))
def test_weights_are_shares(count: int, x: float, y: float) -> None:
    weights = weights_at(count, x, y)
    assert len(weights) == count and min(weights) >= 0 and sum(weights) == pytest.approx(1)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_corner_is_a_concept_and_the_middle_is_all_alike(count: int) -> None:
    for number, (x, y) in enumerate(CORNERS[count]):
        expected = [float(at == number) for at in range(count)]
        assert weights_at(count, x, y) == pytest.approx(expected)
    middle = (0.5, 2 / 3) if count == 3 else (0.5, 0.5)
    assert weights_at(count, *middle) == pytest.approx([1 / count] * count)


@given(st.sampled_from([2, 4]), UNIT, UNIT)
def test_the_point_is_the_mean_of_the_corners_by_their_weights(count: int, x: float, y: float) -> None:
    weights = weights_at(count, x, y)
    found = [
        sum(w * corner[axis] for w, corner in zip(weights, CORNERS[count], strict=True)) for axis in (0, 1)
    ]
    assert found[0] == pytest.approx(x) and (count == 2 or found[1] == pytest.approx(y))


@given(st.lists(st.floats(0.01, 1), min_size=3, max_size=3))
def test_a_triangles_point_has_the_weights_that_made_it(raw: list[float]) -> None:
    weights = [one / sum(raw) for one in raw]
    x, y = (sum(w * corner[axis] for w, corner in zip(weights, CORNERS[3], strict=True)) for axis in (0, 1))
    assert weights_at(3, x, y) == pytest.approx(weights)
    assert point_of(weights) == pytest.approx((x, y))


def test_a_morph_begins_at_the_first_concept_passes_all_and_can_repeat() -> None:
    frames = morph(Blend(("owl", "snail", "cup"), (0.2, 0.3, 0.5), 7))
    assert len(frames) == FRAMES and frames[0].weights == (1.0, 0.0, 0.0)
    assert all(sum(frame.weights) == pytest.approx(1) and frame.seed == 7 for frame in frames)
    steps = np.abs(np.diff([frame.weights for frame in [*frames, frames[0]]], axis=0)).sum(axis=1)
    assert steps.max() < 2 * 3 / FRAMES + 1e-9
    assert all(max(frame.weights[at] for frame in frames) > 1 - 3 / FRAMES for at in range(3))


@pytest.fixture(scope="module")
def mixer() -> Mixer:
    return Mixer(MODEL, "cpu")


def test_a_corner_draws_the_concept_itself_and_the_middle_neither(mixer: Mixer) -> None:
    concepts = ("owl", "snail")
    left, middle, right = mixer.draw(
        [Blend(concepts, weights, 3) for weights in ((1.0, 0.0), (0.5, 0.5), (0.0, 1.0))]
    )
    renderer = models.load(MODEL, device="cpu")
    for concept, picture in (("owl", left), ("snail", right)):
        from pixrl.hub import read_card
        from pixrl.hub_check import Layout

        prompt = read_card(MODEL, Layout.PIPELINE).exemplar_prompt.format(concept=concept)
        alone = renderer.sample(renderer.encode([prompt]), [3])[0].clamp(0, 1).mul(255).round().byte()
        assert np.abs(np.asarray(picture).astype(int) - alone.permute(1, 2, 0).numpy().astype(int)).max() <= 1
    apart = np.abs(np.asarray(left).astype(int) - np.asarray(right).astype(int)).mean()
    for side in (left, right):
        assert np.abs(np.asarray(middle).astype(int) - np.asarray(side).astype(int)).mean() > 0.05 * apart


def test_what_the_model_cannot_do_is_refused_with_the_reason(mixer: Mixer) -> None:
    with pytest.raises(InputError, match="dragon"):
        mixer.draw([Blend(("owl", "dragon"), (0.5, 0.5), 0)])
    for name in ("photo.png", "/etc/photo.png"):
        with pytest.raises(InputError, match=rf"'{name}' is a picture, and the page has none: add it"):
            check(["owl", name], MODEL)
    with pytest.raises(InputError, match="given twice"):
        check(["owl", "Owl"], MODEL)
    with pytest.raises(InputError, match="room for 4 concepts, and 5"):
        check(["owl", "snail", "cup", "bee", "car"], MODEL)


def test_files_say_how_they_were_made() -> None:
    picture, child = Image.new("RGB", (8, 8), "red"), Blend(("owl", "snail"), (0.25, 0.75), 5)
    again = Image.open(io.BytesIO(png(picture, child)))
    assert again.info["pixrl"] == "owl 0.2500, snail 0.7500, seed 5" and again.size == (8, 8)
    frames = [Image.new("RGB", (8, 8), (20 * n, 0, 0)) for n in range(4)]
    moving = Image.open(io.BytesIO(gif(frames)))
    assert moving.n_frames == 4 and moving.info["loop"] == 0


def event(**data: Any) -> Any:
    return SimpleNamespace(_data=data)


def test_favourites_keep_their_lineage(root: Path) -> None:
    studio = Studio(root, ("owl", "snail"))
    tab: FuseTab = studio.fuse
    pad, child, picture, note = tab.choose(["owl", "snail"], {})
    assert 'class="pad n2"' in pad and note == "" and child == Blend(("owl", "snail"), (0.5, 0.5), 0)
    assert "owl 50 %" in picture and 'download="owl-snail-0.png"' in picture
    child, picture, _ = tab.move(child, event(x=0.25, y=0.5))
    assert child.weights == (0.75, 0.25) and "owl 75 %" in picture
    favourites, html, _ = tab.favour(child, picture, [])
    assert [one for one, _ in favourites] == [child] and "<b>1</b>" in html
    assert tab.favour(child, picture, favourites)[0] == gr.skip()  # it is kept already
    similar, html, _ = tab.vary(child, favourites)
    assert len({one.seed for one, _ in similar} | {child.seed}) == len(similar) + 1
    assert (
        all(one.weights == child.weights and one.parent == 1 for one, _ in similar) and "from&nbsp;1" in html
    )
    concepts, pad, taken, shown, _ = tab.take(similar, favourites, event(list="similar", at=2))
    assert concepts == ["owl", "snail"] and "--x:0.25;" in pad
    assert taken == similar[2][0] and "the coefficients of favourite 1" in shown
    favourites, html, _ = tab.favour(taken, shown, favourites)
    assert favourites[1][0].parent == 1
    uri = re.search(r'<img src="data:image/png;base64,([^"]+)"', shown)
    assert uri is not None and Image.open(io.BytesIO(base64.b64decode(uri[1]))).info["pixrl"].startswith(
        "owl 0.75"
    )


def picture_in(html: str) -> Image.Image:
    found = re.search(r'<img src="data:image/png;base64,([^"]+)"', html)
    assert found is not None
    return Image.open(io.BytesIO(base64.b64decode(found[1])))


def test_draw_larger_shows_the_same_mixture_at_twice_the_side(root: Path) -> None:
    tab: FuseTab = Studio(root, ("owl", "snail"), "toy:flux").fuse
    child = Blend(("owl", "snail"), (1.0, 0.0), 4)
    _, small, _ = tab.redraw(replace(child, seed=3))
    large, note = tab.enlarge(child)
    before, after = picture_in(small), picture_in(large)
    width, height = tab.mixer.size()
    assert before.size == (width, height) and after.size == (2 * width, 2 * height)
    assert note == f"{2 * width} × {2 * height} pixels" and 'download="owl-snail-4.png"' in large
    assert after.info["pixrl"] == before.info["pixrl"] == "owl 1.0000, snail 0.0000, seed 4"
    assert np.asarray(after).std() > 0.25 * np.asarray(before).std()  # a picture, no plain colour
    assert np.array_equal(
        picture_in(tab.redraw(replace(child, seed=3))[1]), before
    )  # nothing else has changed
    assert tab.enlarge(None) == [gr.skip()] * 2


def test_a_model_that_draws_no_larger_says_so(root: Path, tmp_path: Path) -> None:
    model = str(tiny.sd3(tmp_path / "tiny", card={**tiny.SD3_CARD, "resolution": 64}))
    kept, said = Studio(root, ("owl", "snail"), model).fuse.enlarge(Blend(("owl", "snail"), (0.5, 0.5), 0))
    assert kept == gr.skip() and "it draws pictures of up to 64 x 64" in said


def test_a_mixtures_coefficients_are_a_file_for_comfyui(root: Path, mixer: Mixer) -> None:
    tab: FuseTab = Studio(root, ("owl", "snail"), MODEL).fuse
    html = tab.hand_over(Blend(("owl", "snail"), (0.25, 0.75), 5))
    found = re.search(
        r'download="owl-snail-5.safetensors" href="data:application/octet-stream;base64,([^"]+)"', html
    )
    assert found is not None and tab.hand_over(None) == gr.skip()
    values_ND = safetensors.torch.load(base64.b64decode(found[1]))["coefficients_ND"]
    renderer = models.load(MODEL, device="cpu")
    width = renderer.encode(["a photo of an owl"]).tokens_BLD.shape[2]
    assert values_ND.tolist() == [[0.25] * width, [0.75] * width]
    refused = Studio(root, ("owl", "snail")).fuse.hand_over(Blend(("owl", "snail"), (0.25, 0.75), 5))
    assert "mixed by regions here" in refused and "--mixing columns" in refused


def test_a_picture_is_a_concept_where_the_model_is_shown_pictures(root: Path, tmp_path: Path) -> None:
    photo = tmp_path / "my teapot.png"
    teapot = next(one for one in toy_subjects("subjects", held_out=True) if one[0] == "teapot_22")
    teapot[3][0].save(photo)  # a blue one
    tab: FuseTab = Studio(root, ("owl", "snail"), "toy:flux").fuse
    concepts, pictures, pad, child, picture, note = tab.add_picture(str(photo), ["owl"], {})
    kept = root / "pictures" / "my teapot.png"
    assert concepts == ["owl", "my teapot.png"] and pictures == {"my teapot.png": str(kept)} and not note
    assert kept.read_bytes() == photo.read_bytes() and str(tmp_path) not in pad + picture
    assert child.weights == (0.5, 0.5) and "data:image/png" in picture
    (shown,) = tab.mixer.draw([replace(child, weights=(0.0, 1.0))])
    (hidden,) = tab.mixer.draw([Blend(("owl", "snail"), (1.0, 0.0), 0)])
    assert blue(shown) > blue(hidden) + 5, "the picture's colour is drawn"
    assert 'download="owl-my_teapot.png-0.safetensors"' in tab.hand_over(child)
    assert all(one.pictures == child.pictures for one in morph(child))
    typed = check(child.concepts, "toy:flux", child.pictures).typed
    assert typed == ("owl", str(kept)), "what a search is started with"
    again = tab.add_picture(str(photo), concepts, pictures)
    assert again[0] == concepts and len(list(kept.parent.iterdir())) == 1


def blue(picture: Image.Image) -> float:
    """How much bluer than red the middle of a picture is, in levels."""
    side = picture.width
    levels = np.asarray(picture).astype(float)[side // 4 : -side // 4, side // 4 : -side // 4]
    return float((levels[..., 2] - levels[..., 0]).mean())


def test_another_picture_of_the_same_name_and_one_that_cannot_be_read(root: Path, tmp_path: Path) -> None:
    tab: FuseTab = Studio(root, ("owl", "snail"), "toy:flux").fuse
    sent, known = [], {}
    for number, colour in enumerate(("red", "blue")):
        (tmp_path / str(number)).mkdir()
        Image.new("RGB", (64, 64), colour).save(tmp_path / str(number) / "one.png")
        sent, known, *_ = tab.add_picture(str(tmp_path / str(number) / "one.png"), sent, known)
    assert sent == ["one.png", "one-2.png"] and len(set(known.values())) == 2
    (tmp_path / "text.png").write_text("no picture")
    *unchanged, note = tab.add_picture(str(tmp_path / "text.png"), ["owl"], {})
    assert unchanged == [gr.skip()] * 5 and "text.png" in note
    told = Studio(root, ("owl", "snail"), MODEL).fuse.add_picture(str(tmp_path / "0/one.png"), ["owl"], {})
    assert "takes no picture for a concept" in told[-1]


def test_an_unknown_concept_is_a_sentence_and_a_search_is_a_run(root: Path) -> None:
    studio = Studio(root, ("owl", "snail"))
    tab: FuseTab = studio.fuse
    pad, child, picture, note = tab.choose(["owl", "dragon"], {})
    assert child is None and "appears here" in picture and "dragon" in note and "Choose two" in pad
    begun: list[Any] = []
    studio.processes.begin = lambda command, run, given=(): begun.append((command, run, list(given)))  # type: ignore[method-assign]
    name, _ = tab.learn(Blend(("owl", "snail"), (0.5, 0.5), 0))
    (command, run, given) = begun[0]
    assert command == "fuse" and run == root / name and given[:2] == ["owl", "snail"] and given[-1] == "--out"
    assert "starting" in tab.tick(name, 0)[0] and tab.tick(None, 0) == [gr.skip(), gr.skip()]
