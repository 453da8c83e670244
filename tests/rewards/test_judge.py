"""A vision model as the judge: what it is asked, how its answer is read, and that nonsense is a failed score."""

import base64
import io
import json
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.rewards.services import Asked, Say, fake_service, free_port
from torch import Tensor

from pixrl import rewards
from pixrl.conformance import check_reward
from pixrl.errors import ConfigError, ServiceError
from pixrl.rewards import http
from pixrl.rewards.judge import JudgeReward, RatingScale
from pixrl.rewards.set import RewardSet, RewardSetting
from pixrl.types import RewardBatch, Scores


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_PAUSE", 0.02)


@pytest.fixture
def batch(images: Tensor) -> RewardBatch:
    return RewardBatch(images, ["a {low} owl", "b", "c", "d", "e"])


def completion(text: object, **choice: Any) -> bytes:
    """As OpenAI's API gives it."""
    message = {"role": "assistant", "content": text, "refusal": None}
    return json.dumps(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "model": "judge-2026",
            "choices": [{"index": 0, "finish_reason": "stop", "message": message} | choice],
            "usage": {"total_tokens": 7},
        }
    ).encode()


def picture_of(asked: Asked) -> Image.Image:
    content = json.loads(asked.body)["messages"][0]["content"]
    head, _, data = content[1]["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def brightness(asked: Asked, number: int) -> Say:
    """A judge that answers well: ten times the picture's brightness."""
    if asked.path.endswith("/models"):
        return Say(body=b'{"data": []}')
    return Say(body=completion(json.dumps({"score": round(np.asarray(picture_of(asked)).mean() / 25.5, 2)})))


def score(
    answer: Callable[[Asked, int], Say], batch: RewardBatch, **options: Any
) -> tuple[Scores, list[Asked]]:
    settings = {"scale": [0, 10], "patience": 2.0, "time_limit": 5.0, **options}
    with fake_service(answer) as (url, asked):
        return JudgeReward(f"{url}/v1", "judge-1", **settings).score(batch), asked


def test_a_good_judge(batch: RewardBatch) -> None:
    scores, asked = score(brightness, batch)
    expected = ((batch.images_BCHW * 255).round().mean(dim=(1, 2, 3)) / 25.5).double()
    assert torch.allclose(scores.values_B.double(), expected, atol=0.006)
    assert scores.reasons == (None,) * 5
    assert scores.provenance["model"].startswith("judge-1 at http://127.0.0.1:")
    assert scores.provenance["scale"] == "0 to 10"
    bodies = [json.loads(one.body) for one in asked]
    assert {one.path for one in asked} == {"/v1/chat/completions"}
    assert all(body["model"] == "judge-1" and body["temperature"] == 0 for body in bodies)
    texts = sorted(body["messages"][0]["content"][0]["text"] for body in bodies)
    assert "a {low} owl" in texts[0]  # what stands in a prompt is not filled in
    assert "from 0 (worst) to 10 (best)" in texts[0] and '{"score": NUMBER}' in texts[0]


def test_it_keeps_the_promises_of_a_reward(batch: RewardBatch) -> None:
    with fake_service(brightness) as (url, _):
        check_reward(rewards.load("judge", base_url=f"{url}/v1/", model="judge-1", scale=[0, 10]), batch)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"score": 7}', 7.0),
        ('```json\n{"score": 7.5, "why": "fine"}\n```', 7.5),
        ('{ "Score" : "3" }', 3.0),
        ("Score: 8/10", 8.0),
        ("**Score:** 8 / 10.", 8.0),
        ("The owl is red. My score is 4.", 4.0),
        ("10", 10.0),
        (" 6.25\n", 6.25),
        ("7/10", 7.0),
        ('<think>score: 2, or score: 3?</think>{"score": 9}', 9.0),
        ('I first thought score: 5. {"score": 6}', 6.0),
        ('{"score": 6} As said, {"score": 6.0}', 6.0),
        ("score=1", 1.0),
    ],
)
def test_scores_that_are_read(text: str, value: float) -> None:
    assert RatingScale(1, 10).read(text) == (value, None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "gave no score: ''"),
        ("A beautiful owl, well done.", "gave no score: 'A beautiful owl"),
        ("<html><body>Bad gateway</body></html>", "gave no score"),
        ("There are 3 owls in it.", "gave no score"),
        ('{"score": null}', "gave no score"),
        ('{"score": NaN}', "gave no score"),
        ('{"score": "high"}', "gave no score"),
        ('{"score": 1e9}', "gave no score"),
        ("Score: 12", "gave 12, off the scale from 1 to 10"),
        ('{"score": 0}', "gave 0, off the scale"),
        ("score: -3", "gave -3, off the scale"),
        ("Score: 4/5", "gave 4/5, off the scale"),
        ("score: 3 for the owl, score: 9 for the cat", "gave 2 different scores"),
        ('{"score": 3} {"score": 9}', "gave 2 different scores"),
        ("scoreboard: 7", "gave no score"),
        ("<think>score: 7</think>", "gave no score"),
    ],
)
def test_scores_that_are_none(text: str, reason: str) -> None:
    value, why = RatingScale(1, 10).read(text)
    assert math.isnan(value)
    assert why is not None and reason in why


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (completion("What a nice picture!"), "the judge gave no score: 'What a nice picture!'"),
        (completion('{"score": 11}'), "the judge gave 11, off the scale from 0 to 10"),
        (completion(None), "the judge gave no score"),
        (
            completion(None, message={"content": None, "refusal": "I cannot."}),
            "the judge refused: 'I cannot.'",
        ),
        (completion('{"sco', finish_reason="length"), "cut off; raise max_tokens in the option request"),
        (b'{"choices": []}', "the judge gave no choice"),
        (b"<html><body>Please log in</body></html>", "no chat completion: it begins '<html>"),
        (b"", "no chat completion"),
        (b'{"error": {"message": "no such model"}}', "no chat completion"),
        (b'{"choices": [{"message": {"content": 7}}]}', "no chat completion"),
    ],
)
def test_nonsense_fails_its_picture_alone(batch: RewardBatch, body: bytes, reason: str) -> None:
    def answer(asked: Asked, number: int) -> Say:
        sees_second = asked.body and "prompt:\\n\\nb\\n" in asked.body.decode()
        return Say(body=body) if sees_second else brightness(asked, number)

    scores, _ = score(answer, batch)
    assert scores.values_B.isnan().tolist() == [False, True, False, False, False]
    assert scores.reasons[1] is not None and reason in scores.reasons[1]


def test_parts_of_a_message_are_joined(batch: RewardBatch) -> None:
    parts = [{"type": "text", "text": '{"score":'}, {"type": "text", "text": " 2}"}]
    scores, _ = score(lambda asked, number: Say(body=completion(parts)), batch)
    assert scores.values_B.tolist() == [2.0] * 5


@pytest.mark.parametrize(
    "trouble",
    [
        Say(429, b"slow down", {"Retry-After": "0"}),
        Say(500, b"oops"),
        Say(503, b""),
        Say(200, b"x" * 99, cut=True),
    ],
    ids=["429", "500", "503", "cut off"],
)
def test_passing_trouble(batch: RewardBatch, trouble: Say) -> None:
    seen: set[bytes] = set()
    lock = threading.Lock()

    def answer(asked: Asked, number: int) -> Say:
        if not asked.body:
            return Say(body=b"{}")
        with lock:
            first = asked.body not in seen
            seen.add(asked.body)
        return trouble if first else brightness(asked, number)

    scores, asked = score(answer, batch)
    assert scores.values_B.isfinite().all()
    assert len(asked) == 10


def test_lasting_failures_fail_the_score(batch: RewardBatch) -> None:
    def answer(asked: Asked, number: int) -> Say:
        return Say(500, b"out of memory") if asked.body else Say(body=b"{}")

    scores, asked = score(answer, batch, tries=2)
    assert scores.reasons == ("HTTP 500: out of memory",) * 5
    assert len(asked) == 10


def test_a_slow_judge(batch: RewardBatch) -> None:
    def answer(asked: Asked, number: int) -> Say:
        return Say(body=completion("7"), after=0.6) if asked.body else Say(body=b"{}")

    scores, asked = score(answer, batch, tries=2, time_limit=0.2)
    assert scores.reasons == ("no answer within 0.2 s (2 tries)",) * 5
    assert len(asked) == 10


def test_questions_are_asked_side_by_side(batch: RewardBatch) -> None:
    def answer(asked: Asked, number: int) -> Say:
        return Say(body=completion("7"), after=0.3) if asked.body else Say(body=b"{}")

    begun = time.monotonic()
    score(answer, batch, parallel=5)
    assert time.monotonic() - begun < 1.2


def test_a_bad_request_is_not_repeated(batch: RewardBatch) -> None:
    def answer(asked: Asked, number: int) -> Say:
        return Say(400, b'{"error": "content policy"}') if asked.body else Say(body=b"{}")

    scores, asked = score(answer, batch)
    assert scores.reasons == ('HTTP 400: {"error": "content policy"}',) * 5
    assert len(asked) == 5


def test_the_key_comes_from_the_environment(batch: RewardBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(asked: Asked, number: int) -> Say:
        return (
            brightness(asked, number)
            if asked.headers.get("Authorization") == "Bearer abc"
            else Say(401, b"no")
        )

    monkeypatch.setenv("MY_KEY", "abc\n")
    scores, _ = score(answer, batch, key_env="MY_KEY")
    assert scores.values_B.isfinite().all()
    assert not any("abc" in value for value in scores.provenance.values())
    with pytest.raises(
        ServiceError, match=r"does not let us in .* name the environment variable that holds it"
    ):
        score(answer, batch)
    monkeypatch.setenv("MY_KEY", "abd")
    with pytest.raises(ServiceError, match="Is what the environment variable MY_KEY holds its key"):
        score(answer, batch, key_env="MY_KEY")


@pytest.mark.parametrize(
    "say", [Say(429, b"quota", {"Retry-After": "0"}), Say(401, b"expired")], ids=["quota", "expired"]
)
def test_a_judge_that_goes_away_ends_the_run(batch: RewardBatch, say: Say) -> None:
    def answer(asked: Asked, number: int) -> Say:
        return say if number >= 2 else brightness(asked, number)

    with fake_service(answer) as (url, _):
        options = {"base_url": url, "model": "j", "scale": [0, 10], "patience": 0.2}
        setting = RewardSetting(name="judge", options=options)
        with pytest.raises(ServiceError):
            RewardSet([setting], time_limit=0.01, max_failed_share=1.0).score(batch)


def test_nobody_there(batch: RewardBatch) -> None:
    with pytest.raises(ServiceError, match=r"stayed away.*correct the reward's base_url"):
        JudgeReward(f"http://127.0.0.1:{free_port()}/v1", "judge-1", patience=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "api.openai.com/v1"}, "is no address of a service"),
        ({"base_url": "https://api.openai.com/v1?key=abc"}, "is no address of a service"),
        ({"key_env": "NO_SUCH_KEY_HERE"}, "export NO_SUCH_KEY_HERE="),
        ({"prompt": "How good is it?"}, "never says {prompt}"),
        ({"prompt": "{promt}: how good?"}, "field {promt}. Did you mean 'prompt'"),
        ({"scale": [10, 1]}, "least and the greatest number"),
        ({"scale": [1]}, "least and the greatest number"),
        ({"scale": ["a", "b"]}, "least and the greatest number"),
        ({"scale": [0, math.inf]}, "least and the greatest number"),
        ({"request": {"model": "x"}}, "cannot set 'model'"),
        ({"parallel": 0}, "parallel and tries are at least 1"),
        ({"time_limit": 0}, "time_limit is above 0"),
        ({"modle": "x"}, "has no option 'modle'. Did you mean 'model'"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], message: str) -> None:
    given = {"base_url": "http://127.0.0.1:9/v1", "model": "judge-1", "patience": 0.0, **options}
    with pytest.raises(ConfigError) as error:
        rewards.load("judge", **given)
    assert message in str(error.value)


def test_further_fields_of_the_request(batch: RewardBatch) -> None:
    _, asked = score(brightness, batch, request={"max_completion_tokens": 64, "seed": 1})
    body = json.loads(asked[0].body)
    assert (body["max_completion_tokens"], body["seed"]) == (64, 1)
    assert "temperature" not in body
