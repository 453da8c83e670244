"""A vision language model as the judge of a picture, behind any API that is compatible with OpenAI's chat completions.

vLLM, SGLang, Ollama and llama.cpp serve local models so; OpenAI, Gemini and others their own. The judge is asked about
one picture at a time and must give one number on the scale. Any other answer is a failed score with the reason: no
number, two different ones, one off the scale, a refusal. Judges are not exactly repeatable, not even at temperature 0:
a resumed run sees the scores of its own calls, not those of an uninterrupted one.
"""

import hashlib
import json
import math
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from pixrl.errors import ConfigError, did_you_mean
from pixrl.rewards.base import Options, Reward
from pixrl.rewards.http import LONGEST_WAIT, START_WAIT, Patience, Service, Silence
from pixrl.rewards.preprocess import require_images
from pixrl.rewards.wire import png_base64
from pixrl.text import require_text
from pixrl.types import RewardBatch, Scores

TEMPLATE = """\
A text-to-image model made this picture for the prompt:

{prompt}

How well does the picture show what the prompt asks for, and how good does it look? Give one number from {low} (worst) \
to {high} (best). Answer with JSON alone: {"score": NUMBER}"""
"""The default prompt of the judge."""
FIELDS = ("prompt", "low", "high")
"""The fields that a prompt of the judge can hold."""
REQUEST: Mapping[str, object] = {"temperature": 0, "max_tokens": 512}
"""The default further fields of a request's body."""
OWN = ("model", "messages", "stream", "n")
"""The fields that every request's body holds and that the option `request` cannot set."""
_NUMBER = r"([-+]?\d+(?:\.\d+)?)(?!\w|\.\d)(?:\s*/\s*(\d+(?:\.\d+)?))?"
_IN_JSON = re.compile(rf'\{{\s*"score"\s*:\s*"?{_NUMBER}', re.IGNORECASE)
_IN_TEXT = re.compile(rf"\bscore\b[\"'*_\s]*(?:[:=]|is\b)[\"'*_\s]*{_NUMBER}", re.IGNORECASE)
_ALONE = re.compile(rf"[\s*]*{_NUMBER}[\s*.]*")
_THOUGHT = re.compile(r"<(/?)think(?:ing)?>", re.IGNORECASE)
_SECRET = re.compile(r"(.*[_-])?(api_?key|apikey|key|token|secret|password|authorization)", re.IGNORECASE)


@dataclass(frozen=True)
class RatingScale:
    """The range of numbers that a judge may give, both ends included."""

    low: float
    high: float

    def read(self, text: str) -> tuple[float, str | None]:
        """Return the one score in a judge's answer, or nan with the reason why there is none.

        A number in JSON takes precedence over one after the word "score", and that over a lone number; thoughts between
        <think> and </think> do not count.
        """
        said = _without_thoughts(text)
        alone = _ALONE.fullmatch(said)
        found = (
            [match.groups() for match in _IN_JSON.finditer(said)]
            or [match.groups() for match in _IN_TEXT.finditer(said)]
            or ([alone.groups()] if alone else [])
        )
        if not found:
            return math.nan, f"the judge gave no score: {_short(text)}"
        if len({float(number) for number, _ in found}) > 1:
            return math.nan, f"the judge gave {len(found)} different scores: {_short(text)}"
        number, out_of = found[-1]
        value = float(number)
        if not self.low <= value <= self.high or (out_of is not None and float(out_of) != self.high):
            given = number if out_of is None else f"{number}/{out_of}"
            return math.nan, f"the judge gave {given}, off the scale from {self.low:g} to {self.high:g}"
        return value, None


def _without_thoughts(text: str) -> str:
    """Replace each <think> up to the next </think> by a blank, in one pass; one without an end stays."""
    kept, at, begun = [], 0, None
    for tag in _THOUGHT.finditer(text):
        if tag[1] and begun is not None:
            kept.append(text[at:begun])
            at, begun = tag.end(), None
        elif not tag[1] and begun is None:
            begun = tag.start()
    return " ".join([*kept, text[at:]])


class JudgeReward(Reward):
    """The number that a vision language model gives a picture and its prompt.

    Args:
        base_url: the address of the API, with its version: https://api.openai.com/v1, http://127.0.0.1:8000/v1.
        model: the judge's name there.
        key_env: the environment variable that holds the key; None: no key is sent. The key itself is in no recipe.
        prompt: the instruction; {prompt}, {low} and {high} are filled in, other braces stay.
        scale: the least and the greatest number that the judge may give.
        request: further fields of the request's body, in place of temperature 0 and max_tokens 512.
        parallel: the number of requests at once.
        tries: how often a request that fails (HTTP 500) or is too slow is sent; then the picture's score fails.
        time_limit: seconds that one answer may take.
        patience: seconds to wait for a judge that is gone or refuses more requests (429).

    Raises:
        ConfigError: an option is wrong, or the key is not set.
        ServiceError: nothing answers at the address, or the key is refused.
    """

    name = "judge"
    keeps_time = True
    examples: ClassVar[Mapping[str, object]] = {
        "base_url": "http://127.0.0.1:8000/v1",
        "model": "Qwen/Qwen2.5-VL-7B-Instruct",
    }
    key_option = "key_env"

    def __init__(
        self,
        base_url: str,
        model: str,
        key_env: str | None = None,
        prompt: str = TEMPLATE,
        scale: Sequence[float] = (1.0, 10.0),
        request: Mapping[str, object] | None = None,
        parallel: int = 8,
        tries: int = 4,
        time_limit: float = 60.0,
        patience: float = 900.0,
    ) -> None:
        require_text(prompt, "judge: the prompt")
        asked = re.findall(r"\{(\w+)\}", prompt)
        for field in asked:
            if field not in FIELDS:
                raise ConfigError(
                    f"judge: the prompt has the field {{{field}}}.{did_you_mean(field, FIELDS)} "
                    "There are {prompt}, {low} and {high}; in other braces put no single word."
                )
        if "prompt" not in asked:
            raise ConfigError(
                "judge: the prompt never says {prompt}, so the judge would not know what was asked for."
            )
        if parallel < 1 or tries < 1 or not 0 < time_limit <= LONGEST_WAIT or not patience >= 0:
            raise ConfigError(
                "judge: parallel and tries are at least 1, time_limit is above 0 and at most a day of "
                f"{LONGEST_WAIT:g} s, and patience is at least 0 s; got "
                f"{parallel!r}, {tries!r}, {time_limit!r} and {patience!r}."
            )
        ends = [x for x in scale if isinstance(x, int | float) and math.isfinite(x)]
        if len(ends) != 2 or len(scale) != 2 or not ends[0] < ends[1]:
            raise ConfigError(
                f"judge: scale is the least and the greatest number, as in [1, 10]; got {list(scale)!r}."
            )
        self.model = model
        self.template = prompt
        self.scale = RatingScale(float(ends[0]), float(ends[1]))
        self.body: dict[str, Any] = dict(REQUEST if request is None else request)
        for field in OWN:
            if field in self.body:
                raise ConfigError(
                    f"judge: the option request cannot set {field!r}; `model` and `prompt` are options of their own."
                )
        if (named := _secret_in(self.body)) is not None:
            raise ConfigError(
                f"judge: the option request has the field {named!r}. A recipe is copied into the run's folder, so no "
                "key stands in it: put the key into an environment variable and name that as key_env."
            )
        self.parallel, self.tries, self.time_limit, self.patience = parallel, tries, time_limit, patience
        self.service = Service(base_url, name=f"The judge {model!r}", key_env=key_env)
        self.provenance: Mapping[str, str] = {
            "model": f"{model} at {self.service.url}",
            "licence": "that of the service",
            "prompt": hashlib.sha256(prompt.encode()).hexdigest()[:16],
            "scale": f"{self.scale.low:g} to {self.scale.high:g}",
            "request": json.dumps(self.body, sort_keys=True),
            "preprocessing": "PNG of 8 bits",
        }
        waiting = self._patience(min(patience, START_WAIT), threading.Event())
        waiting.ask(self.service, "/models", None, time_limit)

    @classmethod
    def examine(cls, options: Options) -> None:
        super().examine({**options, "patience": 0.0, "tries": 1})

    def score(self, batch: RewardBatch) -> Scores:
        require_images(batch.images_BCHW)
        stop = threading.Event()
        waiting = self._patience(self.patience, stop)
        with ThreadPoolExecutor(self.parallel, thread_name_prefix="pixrl-judge") as pool:
            try:
                jobs = [
                    pool.submit(self._judge, image, prompt, waiting)
                    for image, prompt in zip(batch.images_BCHW, batch.prompts, strict=True)
                ]
                found = [job.result() for job in jobs]
            finally:  # after an error or Ctrl-C nobody goes on asking, or paying, for what is lost
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
        values = torch.tensor([value for value, _ in found])
        return Scores.checked(values, [reason for _, reason in found], self.provenance)

    def _patience(self, seconds: float, stop: threading.Event) -> Patience:
        advice = "Start it again, or correct the reward's base_url."
        return Patience(seconds, self.tries, slow_is_gone=False, advice=advice, stop=stop)

    def _judge(self, image_CHW: Tensor, prompt: str, waiting: Patience) -> tuple[float, str | None]:
        """Return one picture's score, or nan with the reason."""
        if not image_CHW.isfinite().all():
            return math.nan, "the picture is not finite"
        fields = {"prompt": prompt, "low": f"{self.scale.low:g}", "high": f"{self.scale.high:g}"}
        text = re.sub(r"\{(\w+)\}", lambda match: fields[match[1]], self.template)
        picture = {"url": f"data:image/png;base64,{png_base64(image_CHW)}"}
        content = [{"type": "text", "text": text}, {"type": "image_url", "image_url": picture}]
        messages = [{"role": "user", "content": content}]
        question = json.dumps({**self.body, "model": self.model, "messages": messages}).encode()
        found = waiting.ask(self.service, "/chat/completions", question, self.time_limit)
        if isinstance(found, Silence):
            return math.nan, f"{found.reason} ({self.tries} tries)"
        if found.status != 200:
            return math.nan, found.reason
        answer, problem = _said(found.body)
        return (math.nan, problem) if answer is None else self.scale.read(answer)


class _Lenient(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Part(_Lenient):
    text: str = ""


class _Message(_Lenient):
    content: str | list[_Part] | None = None
    refusal: str | None = None


class _Choice(_Lenient):
    message: _Message
    finish_reason: str | None = None


class _Completion(_Lenient):
    choices: list[_Choice]


def _said(body: bytes) -> tuple[str | None, str | None]:
    """Return the text of a completion, or None and why there is none."""
    try:
        completion = _Completion.model_validate_json(body)
    except ValidationError:
        return None, f"no chat completion: it begins {_short(body[:120].decode(errors='replace'))}"
    if not completion.choices:
        return None, "the judge gave no choice"
    choice = completion.choices[0]
    content = choice.message.content
    text = content if isinstance(content, str) else "".join(part.text for part in content or ())
    if choice.message.refusal:
        return None, f"the judge refused: {_short(choice.message.refusal)}"
    if choice.finish_reason == "length":
        return None, f"the judge was cut off; raise max_tokens in the option request: {_short(text)}"
    return text, None


def _secret_in(fields: Mapping[str, object]) -> str | None:
    """Return the name of a field that, by its name, holds a key; None where none does."""
    for name, value in fields.items():
        if isinstance(value, str) and _SECRET.fullmatch(str(name)):
            return str(name)
        if isinstance(value, Mapping) and (inner := _secret_in(value)) is not None:
            return inner
    return None


def _short(text: str) -> str:
    one_line = " ".join(text.split())
    return repr(one_line if len(one_line) <= 100 else f"{one_line[:100]}...")
