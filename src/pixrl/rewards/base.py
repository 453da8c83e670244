"""The reward interface."""

from abc import ABC, abstractmethod

from pixrl.types import RewardBatch, Scores


class Reward(ABC):
    """Scores pictures, higher is better. A sample that cannot be scored gets nan and a reason, never 0."""

    name: str

    @abstractmethod
    def score(self, batch: RewardBatch) -> Scores:
        """One float a sample. Scores do not depend on how a set is cut into batches."""
