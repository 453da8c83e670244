"""BiRefNet's foreground without remote code: ZhengPeng7/BiRefNet (MIT) and briaai/RMBG-2.0 (non-commercial).

Zheng et al. 2024 (Bilateral Reference for High-Resolution Dichotomous Image Segmentation). The
sizes of its Swin backbone are read off the weights, so that large and lite checkpoints load.

The picture is scaled to 1024 x 1024 with ImageNet's statistics, whatever its ratio. The mask becomes 8-bit levels, as
the published code has them, and is scaled back bicubically.

A Swin backbone sees the picture whole and at half size; the two feature pyramids are joined. The decoder climbs it from
coarse to fine, and at every level is shown the picture itself once more, cut into patches (the inward reference) and
multiplied by an attention that training taught the gradient of the mask (the outward one). What serves training alone
is left out: side outputs (`conv_ms_spvn_*`) and gradient predictions (`gdt_convs_pred_*`).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixrl.device import choose_device, choose_precision, quiet_loading
from pixrl.errors import CheckpointError
from pixrl.hub import folder, read_card
from pixrl.hub_check import Layout, read_json
from pixrl.rewards.preprocess import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
    batches,
    require_images,
    resize_8_bit,
)
from pixrl.rewards.weights import (
    describe,
    load_weights,
    read_weights,
    refuse_misfits,
    under,
    weight_shards,
)

if TYPE_CHECKING:
    from transformers import SwinBackbone, SwinConfig

ARCHITECTURE = "BiRefNet"
SIDE = 1024
"""The rows and columns that the network sees; a card's `resolution` overrides it."""
MULTIPLE = 32
"""The number that the network's side must be a multiple of."""
BATCH = 4
LEVELS = 4
HIDDEN = 64
"""The channels within a decoder block and within a convolution of the picture's patches."""
SCALE_CHANNELS = 256
"""The channels of each scale of a block's pyramid."""
KERNELS = (1, 3, 7)
GRADIENT_CHANNELS = 16
_PARTS = ("bb", "squeeze_module", "decoder")
_STAGES = ("stage1", "stage2", "stage3", "stage4")
_TRAINING = ("relative_position_index", "conv_ms_spvn", "gdt_convs_pred", "cls_head")
_BACKBONE_NAMES = (
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("patch_embed.norm.", "embeddings.norm."),
    (".attn.proj.", ".attention.output.dense."),
    (".attn.relative_position_bias_table", ".attention.self.relative_position_bias_table"),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)
"""Parts of the published names -> those that transformers keeps on disk."""
_OF_A_CLASSIFIER = "swin.layernorm."
"""A weight that a backbone has and does not use."""


def is_birefnet(path: Path) -> bool:
    """Return whether a folder's config.json names BiRefNet, as RMBG-2.0's does too."""
    named = read_json(path / "config.json").get("architectures")
    return isinstance(named, list) and ARCHITECTURE in named


class BiRefNetForeground:
    """BiRefNet's foreground masks of pictures, from a folder or a hub id.

    Raises:
        CheckpointError: the folder is missing, half written, or holds other weights.
    """

    licences: ClassVar[Mapping[str, str]] = {
        "ZhengPeng7/BiRefNet": "MIT",
        "ZhengPeng7/BiRefNet_lite": "MIT",
    }

    def __init__(
        self, ref: str | Path, *, device: str = "auto", dtype: str = "float32", batch: int = BATCH
    ) -> None:
        path = folder(ref, Layout.REWARD)
        self.name = str(ref)
        self.device = choose_device(device)
        self.precision = choose_precision(self.device, dtype)
        self.batch = batch
        side = read_card(path).resolution or SIDE
        if side % MULTIPLE:
            raise CheckpointError(
                f"{path}: BiRefNet's resolution must be a multiple of {MULTIPLE}, got {side}."
            )
        self.preprocess = Preprocessing(None, (side, side), None, IMAGENET_MEAN, IMAGENET_STD, "bilinear")
        with quiet_loading():
            model = load(read_weights(weight_shards(path)), path)
        self.model = model.to(self.device, self.precision.weights)
        self.provenance: Mapping[str, str] = {
            **describe(ref, path, self.licences),
            "preprocessing": self.preprocess.describe(),
        }

    @torch.inference_mode()
    def foreground(self, images_BCHW: Tensor) -> Tensor:
        """Return P(foreground) [B, H, W] on 256 levels, float32 on the CPU."""
        require_images(images_BCHW)
        return torch.cat([self._masks(part).cpu() for part in batches(images_BCHW, self.batch)])

    def _masks(self, images_BCHW: Tensor) -> Tensor:
        pixels = self.preprocess(images_BCHW.to(self.device)).to(self.precision.weights)
        with self.precision.context(self.device):
            logits_B1HW = self.model(pixels)
        # the published code cuts off, it does not round
        levels: Tensor = (logits_B1HW.float().sigmoid() * 255).floor() / 255
        rows, columns = images_BCHW.shape[-2:]
        # PIL's order: columns first, 8 bits after each pass
        for size in ((levels.shape[-2], columns), (rows, columns)):
            if size != tuple(levels.shape[-2:]):
                levels = resize_8_bit(levels, size, "bicubic")
        return levels[:, 0]


def backbone_config(weights: Mapping[str, Tensor], source: Path) -> "SwinConfig":
    """Return the Swin's configuration: width, depths, heads and window, read off the weights' shapes.

    Raises:
        CheckpointError: they hold no Swin backbone.
    """
    from transformers import SwinConfig

    blocks = [re.match(r"bb\.layers\.(\d)\.blocks\.(\d+)\.norm1\.weight$", name) for name in weights]
    depths = [0] * LEVELS
    for found in blocks:
        if found and int(found[1]) < LEVELS:
            depths[int(found[1])] += 1
    tables = [
        weights.get(f"bb.layers.{level}.blocks.0.attn.relative_position_bias_table")
        for level in range(LEVELS)
    ]
    width = weights.get("bb.patch_embed.proj.weight")
    if width is None or 0 in depths or any(table is None for table in tables):
        raise CheckpointError(
            f"{source} holds no BiRefNet with a Swin backbone; other backbones are not supported."
        )
    sizes = [table.shape for table in tables if table is not None]
    return SwinConfig(
        embed_dim=len(width),
        depths=depths,
        num_heads=[heads for _, heads in sizes],
        window_size=(isqrt(sizes[0][0]) + 1) // 2,
        patch_size=width.shape[-1],
        out_features=list(_STAGES),
    )


def load(weights: Mapping[str, Tensor], source: Path) -> "BiRefNet":
    """Build the network from published weights, frozen, in float32 on the CPU.

    Raises:
        CheckpointError: they do not fit: another backbone, another decoder, another model.
    """
    from transformers import SwinBackbone

    needed = {name: w for name, w in weights.items() if not any(part in name for part in _TRAINING)}
    refuse_misfits([], [name for name in needed if name.partition(".")[0] not in _PARTS], source)
    renamed = dict(pair for item in under("bb.", needed).items() for pair in _renamed(*item))
    try:
        backbone, report = SwinBackbone.from_pretrained(
            None, config=backbone_config(needed, source), state_dict=renamed, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise CheckpointError(f"{source} could not be loaded as a BiRefNet: {error}") from error
    missing = sorted(key for key in report["missing_keys"] if _OF_A_CLASSIFIER not in key)
    refuse_misfits(missing, sorted(report["unexpected_keys"]), source)
    model = BiRefNet(backbone)
    for name in ("squeeze_module", "decoder"):
        load_weights(model.get_submodule(name), under(f"{name}.", needed), source)
    return model.requires_grad_(False).eval()


def _renamed(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield transformers' names of one tensor of the backbone, with query, key and value apart."""
    name = re.sub(r"^norm(\d)\.", lambda found: f"hidden_states_norms.stage{int(found[1]) + 1}.", name)
    for published, ours in _BACKBONE_NAMES:
        name = name.replace(published, ours)
    if name.startswith("layers."):
        name = f"encoder.{name}"
    if ".attn.qkv." in name:
        for word, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
            yield name.replace(".attn.qkv.", f".attention.self.{word}."), third
    else:
        yield name, tensor


def _to_size(x_BCHW: Tensor, like: Tensor) -> Tensor:
    """Scale a map to the rows and columns of another one."""
    return F.interpolate(x_BCHW, like.shape[-2:], mode="bilinear", align_corners=True)


class DeformableConv2d(nn.Module):
    """A convolution whose sampling positions are offset by its input (DCNv2)."""

    def __init__(self, channels: int, out: int, kernel: int) -> None:
        super().__init__()
        self.padding = kernel // 2
        taps = kernel * kernel
        self.offset_conv = nn.Conv2d(channels, 2 * taps, kernel, padding=self.padding)
        self.modulator_conv = nn.Conv2d(channels, taps, kernel, padding=self.padding)
        self.regular_conv = nn.Conv2d(channels, out, kernel, padding=self.padding, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        offset, mask = self.offset_conv(x_BCHW), 2 * self.modulator_conv(x_BCHW).sigmoid()
        return deform_conv2d(x_BCHW, offset, mask, self.regular_conv.weight, self.padding)


class ScaleModule(nn.Module):
    """One scale of the pyramid: a deformable convolution, normalized."""

    def __init__(self, channels: int, out: int, kernel: int) -> None:
        super().__init__()
        self.atrous_conv = DeformableConv2d(channels, out, kernel)
        self.bn = nn.BatchNorm2d(out)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.relu(self.bn(self.atrous_conv(x_BCHW)))


class DeformablePyramid(nn.Module):
    """BiRefNet's ASPPDeformable: several kernel sizes and the mean of the whole map, side by side."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.aspp1 = ScaleModule(channels, SCALE_CHANNELS, 1)
        self.aspp_deforms = nn.ModuleList([ScaleModule(channels, SCALE_CHANNELS, k) for k in KERNELS])
        self.global_avg_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, SCALE_CHANNELS, 1, bias=False),
            nn.BatchNorm2d(SCALE_CHANNELS),
            nn.ReLU(),
        )
        self.conv1 = nn.Conv2d(SCALE_CHANNELS * (2 + len(KERNELS)), channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        scales = [self.aspp1(x_BCHW), *(module(x_BCHW) for module in self.aspp_deforms)]
        whole = _to_size(self.global_avg_pool(x_BCHW), like=x_BCHW)
        return F.relu(self.bn1(self.conv1(torch.cat([*scales, whole], dim=1))))


class DecoderBlock(nn.Module):
    """BiRefNet's BasicDecBlk: narrow the channels, apply the pyramid, widen them."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, HIDDEN, 3, padding=1)
        self.bn_in = nn.BatchNorm2d(HIDDEN)
        self.dec_att = DeformablePyramid(HIDDEN)
        self.conv_out = nn.Conv2d(HIDDEN, out, 3, padding=1)
        self.bn_out = nn.BatchNorm2d(out)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        hidden = self.dec_att(F.relu(self.bn_in(self.conv_in(x_BCHW))))
        widened: Tensor = self.bn_out(self.conv_out(hidden))
        return widened


class LateralBlock(nn.Module):
    """BiRefNet's BasicLatBlk: a projection of the backbone's features of a level."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        features: Tensor = self.conv(x_BCHW)
        return features


class PatchConvs(nn.Module):
    """BiRefNet's SimpleConvs: two convolutions of the picture's patches."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, HIDDEN, 3, padding=1)
        self.conv_out = nn.Conv2d(HIDDEN, out, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        features: Tensor = self.conv_out(self.conv1(x_BCHW))
        return features


def as_patches(image_BCHW: Tensor, like: Tensor) -> Tensor:
    """Cut the picture into patches of another map's size, patches as channels (channel first, then row, column)."""
    rows, columns = (a // b for a, b in zip(image_BCHW.shape[-2:], like.shape[-2:], strict=True))
    height, width = like.shape[-2:]
    cut: Tensor = image_BCHW.unflatten(3, (columns, width)).unflatten(2, (rows, height))
    # B C rows h columns w
    return cut.permute(0, 1, 2, 4, 3, 5).flatten(1, 3)


class Decoder(nn.Module):
    """The decoder from the coarsest features to the mask's logits.

    Its parts are numbered as published: 4 is the coarsest level, and the picture's patches go in from 5 down to 1.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        """`channels`: of the joined features, the coarsest first."""
        super().__init__()
        first, second, third, fourth = channels
        shown = [width // 8 for width in channels]
        self.ipt_blk5 = PatchConvs(3 * 32**2, shown[0])
        self.ipt_blk4 = PatchConvs(3 * 16**2, shown[0])
        self.ipt_blk3 = PatchConvs(3 * 8**2, shown[1])
        self.ipt_blk2 = PatchConvs(3 * 4**2, shown[2])
        self.ipt_blk1 = PatchConvs(3, shown[3])
        self.decoder_block4 = DecoderBlock(first + shown[0], second)
        self.decoder_block3 = DecoderBlock(second + shown[0], third)
        self.decoder_block2 = DecoderBlock(third + shown[1], fourth)
        self.decoder_block1 = DecoderBlock(fourth + shown[2], fourth // 2)
        self.conv_out1 = nn.Sequential(nn.Conv2d(fourth // 2 + shown[3], 1, 1))
        for number, width in ((4, second), (3, third), (2, fourth)):
            self.add_module(f"lateral_block{number}", LateralBlock(width))
            features = nn.Conv2d(width, GRADIENT_CHANNELS, 3, padding=1)
            self.add_module(
                f"gdt_convs_{number}", nn.Sequential(features, nn.BatchNorm2d(GRADIENT_CHANNELS), nn.ReLU())
            )
            self.add_module(f"gdt_convs_attn_{number}", nn.Sequential(nn.Conv2d(GRADIENT_CHANNELS, 1, 1)))

    def forward(self, image_BCHW: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Logits [B, 1, H, W]. `features`: the joined ones, the finest first."""
        *finer, coarsest = features
        x = torch.cat([coarsest, self.ipt_blk5(as_patches(image_BCHW, coarsest))], dim=1)
        for number, level in zip((4, 3, 2), reversed(finer), strict=True):
            x = self._part("decoder_block", number)(x)
            attention = self._part("gdt_convs_attn_", number)(self._part("gdt_convs_", number)(x)).sigmoid()
            x = _to_size(x * attention, like=level) + self._part("lateral_block", number)(level)
            x = torch.cat([x, self._part("ipt_blk", number)(as_patches(image_BCHW, x))], dim=1)
        x = _to_size(self.decoder_block1(x), like=image_BCHW)
        logits: Tensor = self.conv_out1(torch.cat([x, self.ipt_blk1(image_BCHW)], dim=1))
        return logits

    def _part(self, name: str, number: int) -> nn.Module:
        return self.get_submodule(f"{name}{number}")


class BiRefNet(nn.Module):
    """The network from normalized pictures [B, 3, H, W], sides multiples of 32, to logits [B, 1, H, W]."""

    def __init__(self, backbone: "SwinBackbone") -> None:
        super().__init__()
        self.bb = backbone
        channels = [2 * backbone.config.embed_dim * 2**level for level in reversed(range(LEVELS))]
        self.squeeze_module = nn.Sequential(DecoderBlock(sum(channels), channels[0]))
        self.decoder = Decoder(channels)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        rows, columns = image_BCHW.shape[-2:]
        half = F.interpolate(image_BCHW, (rows // 2, columns // 2), mode="bilinear", align_corners=True)
        whole, halved = self.bb(image_BCHW).feature_maps, self.bb(half).feature_maps
        joined = [torch.cat([a, _to_size(b, like=a)], dim=1) for a, b in zip(whole, halved, strict=True)]
        *finer, coarsest = joined
        context = torch.cat([*(_to_size(level, like=coarsest) for level in finer), coarsest], dim=1)
        logits: Tensor = self.decoder(image_BCHW, [*finer, self.squeeze_module(context)])
        return logits


def deform_conv2d(
    x_BCHW: Tensor, offset_BOHW: Tensor, mask_BKHW: Tensor, weight_OCkk: Tensor, padding: int
) -> Tensor:
    """Apply modulated deformable convolution (DCNv2, Zhu et al. 2019), stride 1, one offset group; [B, O, H', W'].

        y(p) = sum_k w_k · m_k(p) · x(p + p_k + Δp_k(p))

    Every tap k of the kernel looks at a place that is moved by a learned offset Δp_k and weighs it by a learned m_k.
    Between pixels x is bilinear; outside the picture it is 0. In plain torch; torchvision's operator is not needed.

    One tap at a time, so that memory stays at two feature maps, not at k·k of them. Differentiable, on any device.

    Args:
        x_BCHW: the input.
        offset_BOHW: [B, 2K, H', W'], (down, right) of every tap, row by row of the kernel, in pixels.
        mask_BKHW: [B, K, H', W'], the weight of every tap.
        weight_OCkk: [O, C, rows, columns], K = rows · columns.
        padding: the zero padding of rows and columns, on every side.
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
        # bilinear, 0 outside; in this form of grid_sample, pixel n of N lies at (2 n + 1) / N - 1, for N = 1 too
        grid = torch.stack(
            ((2 * x_at_BHW + 1) / x_BCHW.shape[-1] - 1, (2 * y_BHW + 1) / x_BCHW.shape[-2] - 1), dim=-1
        )
        seen_BCHW = F.grid_sample(
            x_BCHW, grid.to(x_BCHW.dtype), mode="bilinear", padding_mode="zeros", align_corners=False
        )
        seen_BCHW = seen_BCHW * mask_BKHW[:, tap, None]
        total = total + torch.einsum("bchw,oc->bohw", seen_BCHW, weight_OCkk[:, :, row, column])
    return total
