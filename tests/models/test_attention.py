"""The update's attention kernel: the same velocities and gradients, and only where it cannot do harm."""

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from tests.align.parts import NFT, ODE, aligner, groups, scored
from tests.tolerance import GRADIENT, agree
from torch import Tensor
from torch.nn import functional as F

from pixrl.device import Precision, plain_attention
from pixrl.models.pipeline import SHORT
from pixrl.models.sd3 import SD3Policy


@pytest.fixture
def half(sd3: SD3Policy) -> SD3Policy:
    """The same in bfloat16 autocast, where the fused kernel's backward pass is slow."""
    sd3.precision = Precision(torch.float32, torch.bfloat16)
    return sd3


def learned(policy: SD3Policy, kernels: AbstractContextManager[None]) -> tuple[Tensor, Tensor]:
    """A velocity, and the gradient of its square, drawn with these kernels."""
    assert policy.lora is not None
    rows = policy.encode(["a photo of an owl", "a photo of a snail"])
    with kernels:
        velocity = policy.velocity(policy.initial_noise([1, 2]), torch.tensor([0.9, 0.4]), rows)
    gradients = torch.autograd.grad(velocity.square().mean(), policy.lora.parameters())
    return velocity.detach(), torch.cat([one.flatten() for one in gradients])


def test_velocities_and_gradients_are_equal(sd3: SD3Policy) -> None:
    sd3.attach_lora(rank=4, alpha=8)
    for fast, plain in zip(learned(sd3, plain_attention()), learned(sd3, nullcontext()), strict=True):
        assert agree(fast, plain, GRADIENT)


def is_plain(kernels: AbstractContextManager[None]) -> bool:
    """Whether attention is plain products within: those keep their operands in the graph one by one."""
    x = torch.randn(1, 1, 4, 8, requires_grad=True)
    with kernels:
        graph = F.scaled_dot_product_attention(x, x, x).grad_fn
    return graph is not None and "Flash" not in graph.name()


def test_it_is_another_kernel_within_and_the_usual_one_after(half: SD3Policy) -> None:
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    assert is_plain(half.quick_backward())
    with pytest.raises(ZeroDivisionError), plain_attention():
        assert torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
        _ = 1 / 0
    assert torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed() == allowed
    assert not is_plain(nullcontext())


def test_full_precision_takes_the_fused_kernel(sd3: SD3Policy) -> None:
    assert not is_plain(sd3.quick_backward())


def test_not_for_long_sequences_nor_where_forwards_are_computed_twice(
    half: SD3Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    half.checkpoint_gradients()
    assert not is_plain(half.quick_backward())
    half.denoiser.disable_gradient_checkpointing()  # type: ignore[operator]
    assert is_plain(half.quick_backward())
    half.compiled = True
    assert not is_plain(half.quick_backward())
    half.compiled = False
    monkeypatch.setattr(half, "_shift_tokens", lambda: SHORT + 1)
    assert not is_plain(half.quick_backward())


def test_an_update_by_nft_takes_it_and_sampling_does_not(
    half: SD3Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    half.attach_lora(rank=4, alpha=8)
    inside: list[bool] = []
    velocity = half.velocity

    def spy(*given: Tensor) -> Tensor:
        inside.append(torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed())
        return velocity(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(half, "velocity", spy)
    found = aligner(half, NFT, ODE, noises=2)
    rollouts = found.collect(groups(1), 0)
    assert inside and not any(inside)
    inside.clear()
    found.update(rollouts, scored([1.0, 0.0]), {"r": 1.0})
    assert inside and all(inside)  # of the old policy and the reference too
