"""A reward that scores on a Ray cluster, in a process of its own and on other devices, while the run draws on."""

import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch

from pixrl import rewards
from pixrl.errors import ConfigError, Failure, ServiceError
from pixrl.rewards.base import ComparingReward, Reward
from pixrl.rewards.settings import RewardSetting
from pixrl.types import RewardBatch, Scores
from pixrl.workers import LOSSES, Place, connect, share_of


class RewardOnRay(Reward):
    """A stand-in for a reward whose `on` names a share of a Ray cluster.

    Pictures that it is told to expect are on their way to the actor at once, and their scores are fetched when they are
    asked for. An actor whose process or node is lost is made again elsewhere, up to `LOSSES` times.

    Args:
        setting: the reward's, with its share of the cluster.

    Raises:
        ConfigError: the reward compares the pictures of a group, and so belongs into the run's own process.
        RunError: Ray is not installed, the cluster does not answer, or no node has room.
        PixrlError: whatever making the reward raises.
    """

    def __init__(self, setting: RewardSetting) -> None:
        assert setting.on is not None
        rewards.checked_options(setting.reward, setting.options)
        if issubclass(rewards.kind_of(setting.reward), ComparingReward):
            raise ConfigError(
                f"The reward {setting.name!r} compares a group's pictures in the run's own process: take `on` out."
            )
        self._ray = connect(setting.on.ray)
        share = share_of(self._ray, setting.on.cpus, setting.on.gpus)
        make = self._ray.remote(_Actor).options(max_restarts=LOSSES, max_task_retries=LOSSES, **share)
        self._actor = make.remote(Place.own(setting.on.cpus), setting.model_dump_json())
        self._expected: list[tuple[RewardBatch, Any]] = []
        self.name, self.provenance = self._get(self._actor.describe.remote())

    def expect(self, batch: RewardBatch) -> None:
        """Send pictures to the actor, unless they are those that it was sent since the last scores."""
        if not self._is_expected(batch):
            self._expected.append((batch, self._actor.score.remote(*_sent(batch))))

    def score(self, batch: RewardBatch) -> Scores:
        if not self._is_expected(batch):
            self._expected.clear()
            self.expect(batch)
        parts: list[Scores] = self._get([answer for _, answer in self._expected])
        self._expected.clear()
        return Scores(
            torch.cat([part.values_B for part in parts]),
            tuple(reason for part in parts for reason in part.reasons),
            {name: torch.cat([part.detail[name] for part in parts]) for name in parts[0].detail},
            parts[0].provenance,
        )

    def rehearse(self, batch: RewardBatch) -> Scores | Failure:
        found: Scores | Failure = self._get(self._actor.rehearse.remote(*_sent(batch)))
        return found

    def reference_problem(self, metadata: Mapping[str, object]) -> str | None:
        found: str | None = self._get(self._actor.reference_problem.remote(metadata))
        return found

    def unused_references(self, metadata: Mapping[str, object]) -> list[int]:
        found: list[int] = self._get(self._actor.unused_references.remote(metadata))
        return found

    def _is_expected(self, batch: RewardBatch) -> bool:
        parts = [part for part, _ in self._expected]
        if not parts or [prompt for part in parts for prompt in part.prompts] != list(batch.prompts):
            return False
        return torch.equal(torch.cat([part.images_BCHW for part in parts]), batch.images_BCHW)

    def _get(self, answer: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(answer)
        except errors.RayTaskError as error:
            raise error.cause from error
        except errors.ActorDiedError as error:
            raise ServiceError(
                f"its process on the Ray cluster was lost {LOSSES + 1} times. Look at its memory (ray list actors)"
            ) from error
        except errors.RayError as error:
            raise ServiceError(f"the Ray cluster failed: {str(error).splitlines()[0]}") from error


def _sent(batch: RewardBatch) -> tuple[Any, ...]:
    """Return what a batch is made of; what others have found in its pictures stays here."""
    return batch.images_BCHW.cpu(), list(batch.prompts), list(batch.metadata), list(batch.origins)


class _Actor:
    """The reward itself, in a process of the cluster."""

    def __init__(self, place: Place, setting: str) -> None:
        place.take()
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._setting = RewardSetting.model_validate_json(setting)

    @cached_property
    def reward(self) -> Reward:
        """The reward, made when it is first asked for, since what is raised then reaches the run as it is."""
        return rewards.load(self._setting.reward, **self._setting.options)

    def describe(self) -> tuple[str, dict[str, str]]:
        return self.reward.name, dict(self.reward.provenance)

    def score(self, *sent: Any) -> Scores:
        found = self.reward.score(RewardBatch(*sent))
        return Scores(
            found.values_B.detach().cpu(),
            found.reasons,
            {name: figure.detach().cpu() for name, figure in found.detail.items()},
            dict(found.provenance),
        )

    def rehearse(self, *sent: Any) -> Scores | Failure:
        return self.reward.rehearse(RewardBatch(*sent))

    def reference_problem(self, metadata: Mapping[str, object]) -> str | None:
        return self.reward.reference_problem(metadata)

    def unused_references(self, metadata: Mapping[str, object]) -> list[int]:
        return self.reward.unused_references(metadata)
