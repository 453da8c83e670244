"""`vae`: an AutoencoderKL that shrinks pictures eightfold, shared by all three generators.

It learns on crops that show ink, then on whole pictures; then the decoder alone learns in two rounds against a small
critic of patches (Isola et al. 2017), in the second also to keep the spectrum's power, so that edges are sharp. The
first three latent channels are held to twice the eightfold shrunk picture: such latents are smooth, and generators
learn them faster (docs/log.md, "Anchored latents").
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from pixrl.toy.scene import SIDE
from toy_build.pictures import Pictures, pictures
from toy_build.training import Build, Draw, Lesson, Plan, save_half

SCENES, SUBJECTS = 30_000, 12_000
LATENT_CHANNELS, FACTOR, CROP = 16, 8, 64
KL_WEIGHT, ANCHOR_WEIGHT, ANCHOR_SCALE = 1e-3, 1.0, 2.0
CROPS = Plan(steps=5_000, batch=32, lr=2e-3, warmup=100, weight_decay=0.0, level=0.8, ema=0.998)
WHOLE = Plan(steps=1_500, batch=8, lr=6e-4, warmup=50, weight_decay=0.0, level=0.3, ema=0.995)
SHARP = Plan(
    steps=3_000, batch=8, lr=4e-4, warmup=50, weight_decay=0.0, level=0.5, ema=0.998, betas=(0.5, 0.95)
)
SPECTRUM = Plan(
    steps=1_800, batch=8, lr=3e-4, warmup=30, weight_decay=0.0, level=0.3, ema=0.99, betas=(0.5, 0.95)
)
CRITIC_RATE, CRITIC_FROM, CRITIC_WEIGHT = 4e-4, 200, 0.02
SPECTRUM_WEIGHT, BANDS = 0.5, 8
"""Beside the reconstruction. The critic alone reached 0.82 of the drawings' high frequencies (docs/log.md)."""


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96), layers_per_block=1, latent_channels=LATENT_CHANNELS, norm_num_groups=4,
        sample_size=SIDE, mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def edges(images: Tensor) -> Tensor:
    """Differences to the right and downward neighbour, side by side [B, n]."""
    down, right = images[..., 1:, :] - images[..., :-1, :], images[..., :, 1:] - images[..., :, :-1]
    return torch.cat((down.flatten(1), right.flatten(1)), 1)


def crops(data: Pictures, draw: Draw, batch: int) -> Tensor:
    """Windows [B, 3, 64, 64] in [0, 1], most of them around ink, at multiples of eight pixels."""
    out = []
    for row in draw.rows(len(data), batch):
        ys, xs = np.nonzero(data.labels[row][::8, ::8])
        top, left = (int(v) for v in draw.rng.integers((SIDE - CROP) // 8 + 1, size=2))
        if len(ys) and draw.rng.random() < 0.8:
            k = int(draw.rng.integers(len(ys)))
            top, left = (int(np.clip(v[k] - draw.rng.integers(8), 0, 8)) for v in (ys, xs))
        out.append(data.images[row, 8 * top : 8 * top + CROP, 8 * left : 8 * left + CROP])
    return (
        torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).float().div_(255)
    )  # channels last, as the convolutions like it


def reconstruction(decoded: Tensor, target: Tensor) -> Tensor:
    """The distance of pictures in [-1, 1]: absolute, squared, and that of their edges."""
    error = F.l1_loss(decoded, target) + F.mse_loss(decoded, target)
    return error + 0.5 * F.l1_loss(edges(decoded), edges(target))


def spectrum_error(decoded: Tensor, target: Tensor) -> Tensor:
    """How far the power of pictures [B, 3, H, W] is from the drawings' in rings of the spectrum, and in all of them.

    The rings divide the frequencies from a quarter of the Nyquist frequency up to it. The error of each is relative to
    the whole batch's power: that of each picture's logarithm left the strong edges too weak.
    """
    rows, columns = (
        torch.fft.fftfreq(size, device=target.device).abs() * 2 for size in target.shape[-2:]
    )  # in shares of the Nyquist frequency
    radius = (rows[:, None].square() + columns[None, :].square()).sqrt()
    ring = ((radius - 0.25) / 0.75 * BANDS).floor().clamp(-1, BANDS)
    rings = torch.stack([(ring == k).float() for k in range(BANDS)])

    def power(images: Tensor) -> Tensor:
        spectrum = torch.fft.fft2(images.mean(1), norm="ortho").abs().square()
        found = torch.einsum("bhw,khw->k", spectrum, rings)
        return torch.cat((found, found.sum()[None]))

    wanted = power(target)
    return ((power(decoded) - wanted).abs() / wanted).mean()


class Critic(nn.Module):
    """Tells drawn from decoded patches of 22 pixels."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        sizes = ((3, width, 2), (width, 2 * width, 2), (2 * width, 2 * width, 1))
        layers: list[nn.Module] = []
        for inputs, outputs, stride in sizes:
            layers += [
                nn.utils.parametrizations.spectral_norm(nn.Conv2d(inputs, outputs, 4, stride, 1)),
                nn.LeakyReLU(0.2),
            ]
        self.body = nn.Sequential(*layers, nn.Conv2d(2 * width, 1, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        judged: Tensor = self.body(images)
        return judged


def build_vae(build: Build) -> None:
    """Train and save `vae`; its config says how to scale latents to zero mean and unit variance."""
    torch.manual_seed(build.seed)
    sets = [
        pictures(build.work, "scenes", SCENES, build.seed),
        pictures(build.work, "subjects", SUBJECTS, build.seed),
    ]
    vae = new_vae().to(build.device, memory_format=torch.channels_last)

    def chosen(draw: Draw) -> Pictures:
        return sets[int(draw.rng.random() < 0.3)]

    def both(target: Tensor, noise: Tensor) -> Tensor:
        with build.autocast():
            latents = vae.encode(target).latent_dist
            decoded = vae.decode(latents.mean + latents.std * noise).sample.float()
        divergence: Tensor = latents.kl().float().mean() / latents.mean[0].numel()
        smooth = ANCHOR_SCALE * F.avg_pool2d(target, FACTOR)
        anchor = F.mse_loss(latents.mean[:, :3].float(), smooth)
        return reconstruction(decoded, target) + KL_WEIGHT * divergence + ANCHOR_WEIGHT * anchor

    def crop_lesson(draw: Draw) -> Lesson:
        target = crops(chosen(draw), draw, CROPS.batch) * 2 - 1
        return target, draw.normal(len(target), LATENT_CHANNELS, CROP // FACTOR, CROP // FACTOR)

    def whole_lesson(draw: Draw) -> Lesson:
        data = chosen(draw)
        target = data.tensor(draw.rows(len(data), WHOLE.batch)) * 2 - 1
        return target, draw.normal(len(target), LATENT_CHANNELS, SIDE // FACTOR, SIDE // FACTOR)

    build.fit("vae_crops", vae, CROPS, crop_lesson, both)
    build.fit("vae_whole", vae, WHOLE, whole_lesson, both)
    _sharpen(build, vae, chosen, "vae_sharp", SHARP, 0.0)
    _sharpen(build, vae, chosen, "vae_spectrum", SPECTRUM, SPECTRUM_WEIGHT)
    vae.eval()
    with torch.no_grad():
        rows = list(range(512))
        latents = torch.cat(
            [vae.encode(sets[0].tensor(rows[k : k + 64]) * 2 - 1).latent_dist.mean for k in range(0, 512, 64)]
        )
    scaling, shift = round(1 / float(latents.std()), 4), round(float(latents.mean()), 4)
    vae.register_to_config(scaling_factor=scaling, shift_factor=shift)
    save_half(vae, build.out / "vae")
    build.provenance(
        "vae", {"vae_crops": CROPS, "vae_whole": WHOLE, "vae_sharp": SHARP, "vae_spectrum": SPECTRUM}
    )


def _sharpen(
    build: Build,
    vae: AutoencoderKL,
    chosen: Callable[[Draw], Pictures],
    stage: str,
    plan: Plan,
    spectrum_weight: float,
) -> None:
    """A last round: the encoder stays, the decoder learns to pass for a drawing."""
    vae.encoder.requires_grad_(False)
    critic = Critic().to(build.device)
    seen = 0  # by this critic, which starts anew when the build was killed
    optimizer = torch.optim.Adam(critic.parameters(), CRITIC_RATE, betas=(0.5, 0.95))

    def lesson(draw: Draw) -> Lesson:
        return (crops(chosen(draw), draw, 2 * plan.batch) * 2 - 1,)

    def loss(target: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        with torch.no_grad():
            latents = vae.encode(target).latent_dist.mean
        decoded = vae.decode(latents).sample.float()
        judged = F.relu(1 - critic(target)).mean() + F.relu(1 + critic(decoded.detach())).mean()
        optimizer.zero_grad()
        judged.backward()
        optimizer.step()
        critic.requires_grad_(False)
        error = reconstruction(decoded, target)
        if spectrum_weight:
            error = error + spectrum_weight * spectrum_error(decoded, target)
        if seen > CRITIC_FROM:
            error = error - CRITIC_WEIGHT * critic(decoded).mean()
        critic.requires_grad_(True)
        return error

    build.fit(stage, vae, plan, lesson, loss)
    vae.encoder.requires_grad_(True)


@torch.inference_mode()
def encode(build: Build, vae: AutoencoderKL, images: Tensor) -> Tensor:
    """The scaled latent means of pictures [B, 3, 128, 128], [B, 16, 16, 16]."""
    with build.autocast():
        means: Tensor = vae.encode(images.to(build.device) * 2 - 1).latent_dist.mean.float().cpu()
    return (means - float(vae.config.shift_factor)) * float(vae.config.scaling_factor)
