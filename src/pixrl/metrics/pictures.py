"""Statistics of pictures that need no network: what a reward is gamed with shows in them first."""

import math

import torch
from torch import Tensor

from pixrl.errors import ShapeError

DARK, VIVID = 0.1, 0.8
"""A pixel is dark below this luma, and saturated where its largest and smallest channel are further apart than this."""
LEVELS = 4
"""Levels of each channel in the histogram of colours."""
QUARTER = 0.25 * 0.5
"""A quarter of the Nyquist frequency, in cycles a pixel."""
LUMA = (0.299, 0.587, 0.114)


def picture_statistics(images_BCHW: Tensor) -> dict[str, Tensor]:
    """Return statistics of RGB pictures [B, 3, H, W] in [0, 1], float64 [B] each.

    * `brightness`: the mean luma (ITU-R BT.601).
    * `dark` and `saturated`: the shares of dark and of saturated pixels.
    * `edges`: the mean absolute difference of the luma of neighbouring pixels.
    * `colours`: the entropy in bits of the histogram of 64 colours.
    * `fine_detail`: the share of the luma's power, its mean left out, above a quarter of the Nyquist frequency.

    Raises:
        ShapeError: the pictures are not [B, 3, H, W] with at least two rows and columns.
    """
    if images_BCHW.ndim != 4 or images_BCHW.shape[1] != 3 or min(images_BCHW.shape[-2:]) < 2:
        raise ShapeError(f"Pictures are [B, 3, H, W], at least 2 x 2 pixels; got {list(images_BCHW.shape)}.")
    images = images_BCHW.double().clamp(0, 1)
    luma_BHW = torch.einsum("bchw,c->bhw", images, images.new_tensor(LUMA))
    rows, columns = luma_BHW.diff(dim=1).abs(), luma_BHW.diff(dim=2).abs()
    levels_BCHW = (images * LEVELS).long().clamp(max=LEVELS - 1)
    colour_BHW = (levels_BCHW[:, 0] * LEVELS + levels_BCHW[:, 1]) * LEVELS + levels_BCHW[:, 2]
    colour_BP = colour_BHW.flatten(1)
    share_BC = images.new_zeros(len(images), LEVELS**3)
    share_BC.scatter_add_(
        1, colour_BP, images.new_full((1, 1), 1 / colour_BP.shape[1]).expand(colour_BP.shape)
    )
    power_BHW = torch.fft.fft2(luma_BHW - luma_BHW.mean(dim=(1, 2), keepdim=True)).abs().square()
    down, right = (torch.fft.fftfreq(size, dtype=torch.float64) for size in luma_BHW.shape[-2:])
    fine_HW = (down[:, None].square() + right.square()).sqrt() > QUARTER
    whole_B = power_BHW.sum(dim=(1, 2))
    return {
        "brightness": luma_BHW.mean(dim=(1, 2)),
        "dark": (luma_BHW < DARK).double().mean(dim=(1, 2)),
        "saturated": (images.amax(dim=1) - images.amin(dim=1) > VIVID).double().mean(dim=(1, 2)),
        "edges": torch.cat((rows.flatten(1), columns.flatten(1)), dim=1).mean(dim=1),
        "colours": -torch.special.xlogy(share_BC, share_BC).sum(dim=1) / math.log(2) + 0.0,
        "fine_detail": power_BHW[:, fine_HW].sum(dim=1) / whole_B.clamp_min(torch.finfo(torch.float64).tiny),
    }
