"""Modulated deformable convolution (DCNv2, Zhu et al. 2019) in plain torch; torchvision's operator is not needed.

    y(p) = sum_k w_k · m_k(p) · x(p + p_k + Δp_k(p))

Every tap k of the kernel looks at a place that is moved by a learned offset Δp_k and weighs it by a learned m_k.
Between pixels x is bilinear; outside the picture it is 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def deform_conv2d(
    x_BCHW: Tensor, offset_BOHW: Tensor, mask_BKHW: Tensor, weight_OCkk: Tensor, padding: int
) -> Tensor:
    """Deformable convolution with stride 1, dilation 1 and one offset group; [B, O, H', W'].

    One tap at a time, so that memory stays at two feature maps, not at k·k of them. Differentiable, on any device.

    Args:
        x_BCHW: input.
        offset_BOHW: [B, 2K, H', W'], (down, right) of every tap, row by row of the kernel, in pixels.
        mask_BKHW: [B, K, H', W'], the weight of every tap.
        weight_OCkk: [O, C, rows, columns], K = rows · columns.
        padding: of rows and columns, on every side.
    """
    rows, columns = weight_OCkk.shape[-2:]
    height, width = offset_BOHW.shape[-2:]
    top_H1 = torch.arange(height).to(offset_BOHW)[:, None] - padding
    left_W = torch.arange(width).to(offset_BOHW) - padding
    total = x_BCHW.new_zeros(len(x_BCHW), len(weight_OCkk), height, width)
    for tap in range(rows * columns):
        row, column = divmod(tap, columns)
        y_BHW = top_H1 + row + offset_BOHW[:, 2 * tap]
        x_at_BHW = left_W + column + offset_BOHW[:, 2 * tap + 1]
        seen_BCHW = _bilinear(x_BCHW, y_BHW, x_at_BHW) * mask_BKHW[:, tap, None]
        total = total + torch.einsum("bchw,oc->bohw", seen_BCHW, weight_OCkk[:, :, row, column])
    return total


def _bilinear(x_BCHW: Tensor, row_BHW: Tensor, column_BHW: Tensor) -> Tensor:
    """x at fractional (row, column), pixel centres at whole numbers; 0 outside."""
    height, width = x_BCHW.shape[-2:]
    # in this form of grid_sample, pixel n of N lies at (2 n + 1) / N - 1, for N = 1 too
    grid = torch.stack(((2 * column_BHW + 1) / width - 1, (2 * row_BHW + 1) / height - 1), dim=-1)
    return F.grid_sample(
        x_BCHW, grid.to(x_BCHW.dtype), mode="bilinear", padding_mode="zeros", align_corners=False
    )
