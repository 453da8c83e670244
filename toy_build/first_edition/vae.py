"""`vae`: an AutoencoderKL that shrinks pictures fourfold, shared by both generators."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from pixrl.toy.pictures import SIDE
from toy_build.first_edition.pictures import DrawnPictures, pictures
from toy_build.first_edition.workshop import Draw, Plan, Workshop, save_half

PLAN = Plan(steps=2000, batch=16, lr=2e-3, warmup=100, weight_decay=0.0, ema=0.998)
DECODER_PLAN = Plan(steps=2000, batch=16, lr=2e-3, warmup=50, weight_decay=0.0, ema=0.998)
"""A second round in which only the decoder learns: pictures get sharper and latents stay as they are."""
SCENES = 48_000
SUBJECT_PICTURES = 24_000
KL_WEIGHT = 1e-3
LATENT_CHANNELS = 8
ANCHOR_WEIGHT = 1.0
ANCHOR_SCALE = 2.0
"""The first three latent channels are held to twice the fourfold shrunk picture: smooth latents are learned faster."""


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64), layers_per_block=1, latent_channels=LATENT_CHANNELS, norm_num_groups=4,
        sample_size=SIDE, mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def encode_all(vae: AutoencoderKL, data: DrawnPictures, shop: Workshop, name: str) -> Tensor:
    """The scaled latent means of every picture, half precision: [N, 8, 16, 16]."""
    return shop.cached(name, vae.encoder, lambda: {"latents": _encode_all(vae, data, shop)})["latents"]


def _encode_all(vae: AutoencoderKL, data: DrawnPictures, shop: Workshop) -> Tensor:
    out = []
    with torch.inference_mode(), shop.autocast():
        for start in range(0, len(data), 256):
            rows = list(range(start, min(start + 256, len(data))))
            images = data.tensor(rows).to(shop.device)
            out.append(vae.encode(images * 2 - 1).latent_dist.mean.float().cpu())
    shift, scale = float(vae.config.shift_factor), float(vae.config.scaling_factor)
    return ((torch.cat(out) - shift) * scale).half()


def edges(images: Tensor) -> Tensor:
    """Differences to the right and downward neighbour, side by side."""
    return torch.cat(
        (
            (images[..., 1:, :] - images[..., :-1, :]).flatten(1),
            (images[..., :, 1:] - images[..., :, :-1]).flatten(1),
        ),
        1,
    )


def build_vae(shop: Workshop) -> None:
    """Train and save `vae`; its config says how to scale latents to zero mean and unit variance."""
    torch.manual_seed(shop.seed)
    sets = [
        pictures(shop.work, "scenes", SCENES, shop.seed),
        pictures(shop.work, "subjects", SUBJECT_PICTURES, shop.seed),
    ]
    vae = new_vae().to(shop.device)

    def loss(draw: Draw) -> Tensor:
        data = sets[int(draw.rng.random() < 0.3)]
        target = data.tensor(draw.rows(len(data), PLAN.batch)).to(shop.device) * 2 - 1
        with shop.autocast():
            latents = vae.encode(target).latent_dist
            noise = draw.normal(*latents.mean.shape).to(shop.device)
            decoded = vae.decode(latents.mean + latents.std * noise).sample
        decoded = decoded.float()
        error = F.l1_loss(decoded, target) + F.mse_loss(decoded, target)
        error = error + 0.5 * F.l1_loss(edges(decoded), edges(target))
        divergence: Tensor = latents.kl().float().mean() / latents.mean[0].numel()
        smooth = ANCHOR_SCALE * F.avg_pool2d(target, 4)
        anchor = F.mse_loss(latents.mean[:, :3].float(), smooth)
        return error + KL_WEIGHT * divergence + ANCHOR_WEIGHT * anchor

    seconds = shop.fit("vae", vae, PLAN, loss)
    vae.encoder.requires_grad_(False)
    seconds += shop.fit("vae_decoder", vae, DECODER_PLAN, loss)
    vae.eval()
    with torch.no_grad():
        sample = sets[0].tensor(list(range(1024))).to(shop.device)
        latents = vae.encode(sample * 2 - 1).latent_dist.mean
    vae.register_to_config(
        scaling_factor=round(1 / float(latents.std()), 4), shift_factor=round(float(latents.mean()), 4)
    )
    save_half(vae, shop.folder("vae"))
    shop.provenance("vae", {"vae": PLAN, "decoder alone": DECODER_PLAN}, seconds)
