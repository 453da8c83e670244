"""Progressive distillation of a flow model (Salimans and Ho 2022): guidance and the steps between go into the weights.

From noise level t a teacher goes to t - stride in two evaluations, with guidance where it has any; the student learns
the one velocity that leads there. Its noisy latents are those of training pictures, as in the paper.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pixrl.equations import interpolate
from toy_build.training import Build, Draw, Lesson, Plan

Velocity = Callable[..., Tensor]
"""The velocity [B, C, H, W] of noisy latents [B, C, H, W] at levels [B] under conditions, each a tensor [B, ...]."""
Conditions = tuple[Tensor, ...]
Captioned = tuple[Tensor, Conditions, Conditions]
"""Clean latents [B, C, H, W], and what the teacher and the student are told: as many tensors each."""


@dataclass(frozen=True)
class Guided:
    """A teacher's velocity, led away from what it answers without the caption."""

    velocity: Velocity
    without: Callable[[Conditions], Conditions]
    """The same conditions without their caption."""
    scale: float

    def __call__(self, x: Tensor, t: Tensor, *given: Tensor) -> Tensor:
        both = (torch.cat(pair) for pair in zip(given, self.without(given), strict=True))
        told, untold = self.velocity(torch.cat((x, x)), torch.cat((t, t)), *both).chunk(2)
        return untold + self.scale * (told - untold)


def midpoint(teacher: Velocity, x: Tensor, t: Tensor, stride: Tensor, *given: Tensor) -> Tensor:
    """The one velocity that leads where a teacher of instant velocities leads from t to t - stride, all [B]."""
    half = x - _wide(stride / 2) * teacher(x, t, *given)
    return teacher(half, t - stride / 2, *given)


def _wide(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def levels(draw: Draw, batch: int, steps: int, on_grid: float) -> Tensor:
    """Noise levels in (0, 1] [batch]: this share of them where a sampler of so many even steps asks."""
    grid = torch.from_numpy(draw.rng.integers(1, steps + 1, size=batch)).float() / steps
    anywhere = 1 - torch.from_numpy(draw.rng.random(batch)).float() * (1 - 1e-3)
    return torch.where(torch.from_numpy(draw.rng.random(batch)) < on_grid, grid, anywhere)


def distil(
    build: Build,
    stage: str,
    plan: Plan,
    student: torch.nn.Module,
    velocities: tuple[Velocity, Velocity],
    given: Callable[[Draw], Captioned],
    *,
    steps: int,
    on_grid: float = 0.5,
) -> None:
    """Train `student` in place until each of `steps` even steps leads where the teacher leads.

    `velocities` are the student's and the teacher's.
    """
    own, teacher = velocities

    def lesson(draw: Draw) -> Lesson:
        x0, told, asked = given(draw)
        return x0, draw.normal(*x0.shape), levels(draw, len(x0), steps, on_grid), *told, *asked

    def loss(x0: Tensor, noise: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        told, asked = conditions[: len(conditions) // 2], conditions[len(conditions) // 2 :]
        x, stride = interpolate(x0, noise, t), t.clamp(max=1 / steps)
        with build.autocast():
            with torch.no_grad():
                wanted = midpoint(teacher, x, t, stride, *told).float()
            return F.mse_loss(own(x, t, *asked).float(), wanted)

    build.fit(stage, student, plan, lesson, loss)


def compiled(network: torch.nn.Module) -> Callable[..., Any]:
    """The network, compiled for the one shape that a stage trains on."""
    run: Callable[..., Any] = torch.compile(network, dynamic=False)
    return run
