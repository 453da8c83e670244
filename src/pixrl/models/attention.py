"""The attention kernel whose backward pass is fast on a CPU.

torch's fused kernel saves memory that short sequences do not need, and its backward pass is slow in bfloat16. In an
update plain matrix products are faster and no farther from float32; forwards alone, the fused kernel is
(`benchmarks/align.py`, "fused attention").
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

SHORT = 256
"""Tokens of a picture up to which the table of all pairs is small beside the other activations."""


@contextmanager
def plain_attention() -> Iterator[None]:
    """Within it `scaled_dot_product_attention` is plain matrix products in the dtype that it is given."""
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)
