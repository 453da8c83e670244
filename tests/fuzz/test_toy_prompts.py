"""Prompts of the toy world."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzz.budget import ANYTHING, fuzz, soup, unless_refused

from pixrl.data.prompts import load_prompts
from pixrl.toy.language import caption, parse
from pixrl.toy.random_scenes import random_scene
from pixrl.toy.scene import Task

SOUP = soup(
    "a photo of ",
    "a ",
    "two ",
    "owl",
    "snails",
    " and ",
    " on the beach",
    " wearing ",
    "red ",
    ", ",
    "left of ",
    ".",
)


@fuzz
@given(ANYTHING | SOUP)
def test_any_text_is_parsed_or_refused(text: str) -> None:
    found = unless_refused(lambda: parse(text))
    assert found is None or found.metadata["prompt"] == text


@fuzz
@given(st.sampled_from([*Task]), st.integers(0, 2**32 - 1))
def test_captions_are_parsed(task: Task, seed: int) -> None:
    drawer = np.random.default_rng(seed)
    scene = random_scene(drawer, task)
    text = caption(scene, drawer)
    assert parse(text).metadata["prompt"] == text


@fuzz
@given(soup("toy:", "geneval", "/", "counting", ",", "colors", "list", ".txt", "\0", most=6))
def test_any_source_is_found_or_refused(source: str) -> None:
    unless_refused(lambda: load_prompts(source))
