"""What a judge answers: the number in its text, and the text in its JSON."""

import json
import math

from hypothesis import given
from hypothesis import strategies as st
from tests.fuzz.budget import ANY_BYTES, ANYTHING, fuzz, soup

from pixrl.rewards.judge import RatingScale, _said

SCALE = RatingScale(1.0, 10.0)
SOUP = soup(
    "<think>",
    "</think>",
    "<thinking>",
    '{"score": ',
    "score",
    ": ",
    "7",
    "/10",
    ".",
    "-",
    "9" * 400,
    "**",
    '"',
    "}",
    "is ",
)
FORMS = (
    '{{"score": {}}}',
    "Score: {}",
    "<think>score: 1, or 2?</think> {}",
    "The **score** is {}/10.",
    " {} ",
)


@fuzz
@given(st.integers(1, 10), st.sampled_from(FORMS))
def test_a_score_is_read(score: int, form: str) -> None:
    assert SCALE.read(form.format(score)) == (float(score), None)


@fuzz
@given(ANYTHING | SOUP)
def test_any_text_is_a_score_or_a_reason(text: str) -> None:
    value, reason = SCALE.read(text)
    assert (reason is None and 1 <= value <= 10) or (math.isnan(value) and reason)


@fuzz
@given(
    ANY_BYTES
    | SOUP.map(lambda text: json.dumps({"choices": [{"message": {"content": text}}]}).encode())
    | soup('{"choices":', "[", "]", '{"message":', '{"content":', '"', "\\ud83d", "null", "}", ",").map(
        lambda text: text.encode("utf-8", "surrogatepass")
    )
)
def test_any_body_is_a_text_or_a_reason(body: bytes) -> None:
    text, problem = _said(body)
    assert (text is None) != (problem is None)
