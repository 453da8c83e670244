"""A reward that another process computes, in another environment or on another machine: `pixrl serve-rewards` there.

A server that dies in the middle of a run is waited for: what was scored stays, the rest is asked again when it is back.
It must then be the same one: a server that comes back with other weights ends the run instead of mixing two rewards.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from pixrl.errors import ConfigError, ServiceError, did_you_mean
from pixrl.rewards import wire
from pixrl.rewards.base import Options, Reward
from pixrl.rewards.http import START_WAIT, Patience, Reply, Service, Silence
from pixrl.rewards.preprocess import require_images
from pixrl.types import RewardBatch, Scores
from pixrl.untrusted import plain

TOKEN_ENV = "PIXRL_REWARD_TOKEN"
DESCRIBE_LIMIT = 30.0
TRANSFER = 60.0
"""Seconds for a request's way there and back, over what the server itself takes."""


class RemoteReward(Reward):
    """The scores of one reward of a reward server.

    Pictures travel as PNG of 8 bits, to which most rewards round them anyway, or exactly as they are.

    Args:
        url: the server's address.
        reward: what the server calls the reward.
        token_env: the environment variable that holds the server's token.
        exact: send float32 tensors instead, ten times as large.
        batch: pictures of one request; fewer where they would pass the server's limit.
        patience: seconds that a server which is gone is waited for, with growing pauses.

    Raises:
        ConfigError: the token is not set, there is no reward server at the address, or it has no such reward.
        ServiceError: nothing answers there, or it refuses the token.
    """

    name = "remote"
    keeps_time = True
    examples: ClassVar[Mapping[str, object]] = {"url": "http://127.0.0.1:8765", "reward": "geneval"}
    key_option = "token_env"

    def __init__(
        self,
        url: str,
        reward: str,
        token_env: str = TOKEN_ENV,
        exact: bool = False,
        batch: int = 16,
        patience: float = 900.0,
    ) -> None:
        if batch < 1 or not patience >= 0:
            raise ConfigError(
                f"remote: batch is at least 1 and patience at least 0 s, got {batch!r} and {patience!r}."
            )
        self.reward = reward
        self.exact = exact
        self.batch = batch
        self.service = Service(url, name=f"The reward server of {reward!r}", key_env=token_env)
        advice = "Start it where it ran before: pixrl serve-rewards FILE."
        self._stop = threading.Event()
        self._patience = Patience(patience, 3, slow_is_gone=True, advice=advice, stop=self._stop)
        description = self._describe(min(patience, START_WAIT), advice)
        self._limit, self._pixels = description.max_body, description.max_pixels
        self._longest = description.longest_answer + TRANSFER
        served = _find(description, reward, self.service.url)
        self._began: Mapping[str, str] | None = None if served.problem else served.provenance
        self.provenance: Mapping[str, str] = self._with_way(served.provenance)

    @classmethod
    def examine(cls, options: Options) -> None:
        super().examine({**options, "patience": 0.0})

    def score(self, batch: RewardBatch) -> Scores:
        require_images(batch.images_BCHW)
        finite_B = batch.images_BCHW.isfinite().flatten(1).all(dim=1)
        rows = finite_B.nonzero().flatten().tolist()
        values_B = torch.full((len(finite_B),), torch.nan)
        reasons: list[str | None] = [None if ok else "the picture is not finite" for ok in finite_B.tolist()]
        detail: dict[str, torch.Tensor] = {}
        for start in range(0, len(rows), self.batch):
            for part, found in self._ask(batch, rows[start : start + self.batch]):
                values_B[list(part)] = found.values_B
                for name, x in found.detail.items():
                    detail.setdefault(name, torch.full((len(finite_B),), torch.nan))[list(part)] = x
                for row, reason in zip(part, found.reasons, strict=True):
                    reasons[row] = reason
        return Scores.checked(values_B, reasons, self.provenance, detail)

    def _describe(self, patience: float, advice: str) -> wire.Description:
        waiting = Patience(patience, 3, slow_is_gone=True, advice=advice, stop=self._stop)
        found = waiting.ask(self.service, "/describe", None, DESCRIBE_LIMIT)
        problem = found.reason
        if isinstance(found, Reply) and found.status == 200:
            try:
                return wire.read_description(found.body)
            except wire.WireError as error:
                problem = str(error)
        raise ConfigError(
            f"remote: {self.service.url} is no reward server of this version ({problem}). Give the address that "
            "`pixrl serve-rewards` prints."
        )

    def _ask(self, batch: RewardBatch, rows: Sequence[int]) -> list[tuple[Sequence[int], Scores]]:
        """The scores of some rows, in as many requests as the server's limit wants."""
        images = batch.images_BCHW[list(rows)]
        prompts = [batch.prompts[row] for row in rows]
        metadata = [batch.metadata[row] for row in rows] if batch.metadata else []
        whole = RewardBatch(images, prompts, metadata)
        try:
            body = wire.request(self.reward, whole, exact=self.exact, max_pixels=self._pixels)
        except wire.WireError as error:  # of all rows together, or of one
            return self._ask_halves(batch, rows, f"it cannot be sent: {error}")
        if len(body) <= self._limit:
            return [(rows, self._answer(body, rows))]
        reason = f"a request of {len(body)} bytes is above the server's limit of {self._limit} (its max_body)"
        return self._ask_halves(batch, rows, reason)

    def _ask_halves(
        self, batch: RewardBatch, rows: Sequence[int], reason: str
    ) -> list[tuple[Sequence[int], Scores]]:
        """`reason` why they cannot be asked together."""
        if len(rows) == 1:
            return [(rows, _failed(rows, reason))]
        middle = len(rows) // 2
        return [*self._ask(batch, rows[:middle]), *self._ask(batch, rows[middle:])]

    def _answer(self, body: bytes, rows: Sequence[int]) -> Scores:
        found = self._patience.ask(self.service, "/score", body, self._longest)
        if isinstance(found, Silence):
            return _failed(rows, found.reason)
        if found.status == 404:
            raise ServiceError(
                f"{self.service.name} at {self.service.url} no longer has it ({found.text}). Start the server again "
                "with the rewards that the run began with."
            )
        if found.status != 200:
            return _failed(rows, found.reason)
        try:
            scores = wire.read_answer(found.body, len(rows))
        except wire.WireError as error:
            return _failed(rows, str(error))
        if bool(scores.values_B.isfinite().any()):
            began = scores.provenance if self._began is None else self._began
            for key in {**began, **scores.provenance}:
                if began.get(key) != scores.provenance.get(key):
                    raise ServiceError(
                        f"{self.service.name} at {self.service.url} is another one now: its {key} was "
                        f"{began.get(key)!r} when the run began and is {scores.provenance.get(key)!r}. Start the "
                        "server with what it had."
                    )
            if self._began is None:
                self._began, self.provenance = began, self._with_way(began)
        return scores

    def _with_way(self, provenance: Mapping[str, str]) -> Mapping[str, str]:
        way = "float32" if self.exact else "PNG of 8 bits"
        return {**provenance, "served_by": self.service.url, "sent_as": way}


def _find(description: wire.Description, reward: str, url: str) -> wire.Served:
    served = {one.name: one for one in description.rewards}
    if reward not in served:
        raise ConfigError(
            f"remote: the server at {url} has no reward {reward!r}.{did_you_mean(reward, served)} "
            f"It has {plain(', '.join(served))}."
        )
    return served[reward]


def _failed(rows: Sequence[int], reason: str) -> Scores:
    return Scores(torch.full((len(rows),), torch.nan), (reason,) * len(rows))
