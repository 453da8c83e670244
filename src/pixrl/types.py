"""Shared types and the axis legend.

Tensors that cross functions carry axis suffixes:

    B batch    P prompts    G samples of one prompt    K semantic variants    N concepts
    L tokens   D embedding columns   T sampling steps   C, H, W image channels, rows, columns

`images_BCHW` are RGB, float32 in [0, 1].
"""

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pixrl.text import require_text


def sample_seed(run_seed: int, epoch: int, prompt_index: int, sample_index: int) -> int:
    """Return the 63-bit seed of one sample's noise.

    It depends on nothing else, so the same pictures come out for any micro-batch size and number of processes.
    """
    key = f"{run_seed}/{epoch}/{prompt_index}/{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class Scores:
    """One reward's scores of a batch, higher is better; nan where scoring failed, with the reason.

    `detail` holds further per-sample figures ([B] each), `provenance` what produced them (model id,
    preprocessing, background colour).
    """

    values_B: Tensor
    reasons: tuple[str | None, ...]
    detail: Mapping[str, Tensor] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def checked(
        values_B: Tensor,
        reasons: Sequence[str | None],
        provenance: Mapping[str, str],
        detail: Mapping[str, Tensor] | None = None,
    ) -> "Scores":
        """Return the scores with nan and a reason for each value that is not finite: it failed, it is not 0."""
        given = tuple(
            reason or (None if ok else "the score is not finite")
            for reason, ok in zip(reasons, values_B.isfinite().tolist(), strict=True)
        )
        failed_B = torch.tensor([reason is not None for reason in given])
        return Scores(values_B.float().masked_fill(failed_B, torch.nan), given, detail or {}, provenance)


@dataclass(frozen=True)
class Origin:
    """The place of a picture among those of a training run."""

    step: int
    group: int
    """The number of its group in the step; a group's pictures have one prompt and are compared with each other."""
    seed: int
    variant: int


@dataclass(frozen=True)
class RewardBatch:
    """A batch to be scored: pictures [B, 3, H, W] with one prompt and one metadata mapping each.

    Raises:
        InputError: a prompt holds what is no text, such as half an emoji; no tokenizer and no service could take it.
    """

    images_BCHW: Tensor
    prompts: Sequence[str]
    metadata: Sequence[Mapping[str, object]] = ()
    origins: Sequence[Origin] = ()
    """Where each picture stands in a training run; empty of pictures that no run trains on."""
    findings: dict[Hashable, Any] = field(default_factory=dict, init=False, compare=False, repr=False)
    """Results that rewards share about these pictures, such as a detector's objects, so that they are found once."""

    def __post_init__(self) -> None:
        for prompt in self.prompts:
            require_text(prompt, f"the prompt {prompt!r}")
