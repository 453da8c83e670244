"""`sd3`: a StableDiffusion3Pipeline with two CLIP encoders, trained by flow matching in the shared latent space."""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from pixrl.equations import interpolate
from pixrl.hub import CARD_FILE
from pixrl.toy.build.alignment import Aligned, clip_patches, kind_shares
from pixrl.toy.build.clip import SCENES, SECOND_WIDTH, WIDTH
from pixrl.toy.build.pictures import SIDE, Pictures, pictures
from pixrl.toy.build.processes import leads
from pixrl.toy.build.vae import LATENT_CHANNELS, encode_all
from pixrl.toy.build.workshop import Draw, Plan, Workshop, save_half
from pixrl.toy.language import WORDS, caption
from pixrl.toy.vocabulary import KINDS

PLAN = Plan(
    steps=20_000,
    batch=64,
    lr=1.5e-3,
    warmup=200,
    weight_decay=0.02,
    ema=0.999,
    level=0.6,
    muon=3e-3,
    compiled=True,
)
SAMPLING_STEPS = 10
ALIGNED_BLOCK = 2
"""The block whose tokens are aligned with `clip`'s."""
CAPTIONS_EACH = 2
"""Captions of each training picture, encoded once."""
DROPPED_CAPTIONS = 0.05
"""Share of training pictures shown without their caption, so that the empty prompt means something."""


def new_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=SIDE // 4, patch_size=2, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_layers=6,
        attention_head_dim=32, num_attention_heads=4, joint_attention_dim=WIDTH + SECOND_WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=2 * WIDTH, pos_embed_max_size=SIDE // 8, qk_norm="rms_norm",
    )  # fmt: skip


def new_pipeline(shop: Workshop) -> StableDiffusion3Pipeline:
    """The pipeline with trained encoders and an untrained transformer."""
    tokenizer = CLIPTokenizer.from_pretrained(shop.out / "clip")
    return StableDiffusion3Pipeline(
        transformer=new_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=AutoencoderKL.from_pretrained(shop.out / "vae", torch_dtype=torch.float32),
        text_encoder=CLIPTextModelWithProjection.from_pretrained(
            shop.out / "clip", dtype=torch.float32
        ).eval(),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(
            shop.work / "text_encoder_2", dtype=torch.float32
        ).eval(),
        text_encoder_3=None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
    )


def encode_texts(pipeline: StableDiffusion3Pipeline, captions: list[str]) -> dict[str, Tensor]:
    """Token features [B, L, D] and pooled features [B, E], as the pipeline computes them, half precision."""
    tokens, pooled = [], []
    with torch.inference_mode():
        for start in range(0, len(captions), 512):
            part = captions[start : start + 512]
            one, _, two, _ = pipeline.encode_prompt(
                prompt=part,
                prompt_2=None,
                prompt_3=None,
                do_classifier_free_guidance=False,
                max_sequence_length=0,
            )
            tokens.append(one.half().cpu())
            pooled.append(two.half().cpu())
    return {"tokens": torch.cat(tokens), "pooled": torch.cat(pooled)}


def captions_of(data: Pictures, seed: int) -> list[str]:
    """CAPTIONS_EACH captions of every picture, one round after the other."""
    rng = np.random.default_rng((seed, 4))
    return [caption(data.scene(row), rng) for _ in range(CAPTIONS_EACH) for row in range(len(data))]


def logit_normal(draw: Draw, batch: int) -> Tensor:
    """Training times, most of them in the middle."""
    return torch.sigmoid(draw.normal(batch))


def build_sd3(shop: Workshop) -> None:
    """Train and save `sd3`."""
    torch.manual_seed(shop.seed)
    data = pictures(shop.work, "scenes", SCENES, shop.seed)
    pipeline = new_pipeline(shop).to(shop.device)
    latents = encode_all(pipeline.vae, data, shop, "scenes")
    unique, index = np.unique(captions_of(data, shop.seed), return_inverse=True)
    texts = shop.cached(
        "captions", pipeline.text_encoder, lambda: encode_texts(pipeline, [*unique.tolist(), ""])
    )
    tokens, pooled = texts["tokens"], texts["pooled"]
    print(
        f"{len(latents)} latents, {len(tokens)} captions, latent std {latents.float().std():.3f}", flush=True
    )
    transformer = pipeline.transformer
    patches = clip_patches(shop, data, "scenes")
    aligned = Aligned(transformer, transformer.transformer_blocks[ALIGNED_BLOCK], transformer.inner_dim).to(
        shop.device
    )

    run = shop.compiled(transformer, PLAN)

    def loss(draw: Draw) -> Tensor:
        rows = draw.rows(len(data), PLAN.batch)
        chosen = index[rows + len(data) * draw.rng.integers(CAPTIONS_EACH, size=PLAN.batch)]
        chosen = np.where(draw.rng.random(PLAN.batch) < DROPPED_CAPTIONS, len(unique), chosen)
        x0 = latents[rows].float().to(shop.device)
        noise, t = draw.normal(*x0.shape).to(shop.device), logit_normal(draw, PLAN.batch).to(shop.device)
        with shop.autocast():
            velocity = run(
                hidden_states=interpolate(x0, noise, t),
                timestep=t * 1000,
                encoder_hidden_states=tokens[chosen].float().to(shop.device),
                pooled_projections=pooled[chosen].float().to(shop.device),
            ).sample
            alignment = aligned.loss(
                patches[rows].to(shop.device), kind_shares(data.labels[rows]).to(shop.device)
            )
        return F.mse_loss(velocity.float(), noise - x0) + alignment

    seconds = shop.fit("sd3", aligned, PLAN, loss)
    save_pipeline(pipeline, shop.folder("sd3"))
    if leads():
        calibrate(shop)
    shop.provenance("sd3", {"sd3": PLAN}, seconds)


def calibrate(shop: Workshop) -> None:
    """Store the thresholds of `pixrl fuse` with the generator: they come from its own pictures of every kind."""
    from pixrl.training.calibration import calibrate_presence
    from pixrl.training.fuse_world import load_world

    world = load_world(*(str(shop.out / name) for name in ("sd3", "clip", "segmenter")))
    card = shop.out / "sd3" / CARD_FILE
    settings = json.loads(card.read_text()) | {"presence": calibrate_presence(world, KINDS).to_card()}
    card.write_text(json.dumps(settings, indent=1) + "\n")


def save_pipeline(pipeline: StableDiffusion3Pipeline, folder: Path) -> None:
    """The published layout in half precision, and the settings that this checkpoint was trained for."""
    pipeline.save_pretrained(folder)
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        save_half(pipeline.components[part], folder / part)
    settings = {
        "steps": SAMPLING_STEPS,
        "guidance": 0.0,
        "resolution": SIDE,
        "max_sequence_length": 0,
        "vocabulary": list(WORDS),
        "exemplar_prompt": "a photo of {concept}",
        "clip": "toy:clip",
        "segmenter": "toy:segmenter",
    }
    (folder / CARD_FILE).write_text(json.dumps(settings, indent=1) + "\n")
