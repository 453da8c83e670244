"""`sd3`: a StableDiffusion3Pipeline with two CLIP text encoders, trained by flow matching in the shared latent space.

Crisp but weak in composition, as the published base is: few of its training pictures show more than one object.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from pixrl.equations import interpolate
from toy_build.clip import WIDTH, tokens
from toy_build.generators import Aligned, Latents, dropped, load_vae, logit_normal, part_shares, save_pipeline
from toy_build.pictures import pictures
from toy_build.texts import SECOND_WIDTH, load_tower
from toy_build.training import Build, Draw, Lesson, Plan
from toy_build.vae import FACTOR, LATENT_CHANNELS
from toy_build.world.language import caption
from toy_build.world.scene import SIDE

PLAN = Plan(
    steps=20_000, batch=64, lr=1.5e-3, warmup=300, weight_decay=0.02, ema=0.9993, level=0.6, muon=3e-3
)
SCENES = 60_000
SAMPLING_STEPS = 10
ALIGNED_BLOCK = 2
LAYERS, HEADS, HEAD_WIDTH = 5, 5, 32


def new_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=SIDE // FACTOR, patch_size=2, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
        num_layers=LAYERS, attention_head_dim=HEAD_WIDTH, num_attention_heads=HEADS,
        joint_attention_dim=WIDTH + SECOND_WIDTH, caption_projection_dim=HEADS * HEAD_WIDTH,
        pooled_projection_dim=2 * WIDTH, pos_embed_max_size=SIDE // FACTOR, qk_norm="rms_norm",
    )  # fmt: skip


class Texts:
    """Both frozen CLIP encoders, as the pipelines read them: features of the last layer but one, side by side."""

    def __init__(self, build: Build) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(build.out / "clip")
        first = CLIPTextModelWithProjection.from_pretrained(build.out / "clip", dtype=torch.float32).eval()
        self.towers = [tower.to(build.device).requires_grad_(False) for tower in (first, load_tower(build))]

    def __call__(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Token features [B, L, 2 * WIDTH] and the pooled ones of each tower [B, WIDTH] for ids [B, L]."""
        with torch.no_grad():
            seen = [tower(input_ids=ids, output_hidden_states=True) for tower in self.towers]
        return torch.cat([out.hidden_states[-2] for out in seen], dim=-1), [out.text_embeds for out in seen]


def build_sd3(build: Build) -> None:
    """Train and save `sd3`."""
    torch.manual_seed(build.seed)
    known = Latents.of(build, pictures(build.work, "single", SCENES, build.seed))
    texts = Texts(build)
    transformer = new_transformer().to(build.device)
    aligned = Aligned(transformer, transformer.transformer_blocks[ALIGNED_BLOCK], transformer.inner_dim)
    aligned = aligned.to(build.device)
    run: Callable[..., Any] = torch.compile(transformer, dynamic=False)

    def lesson(draw: Draw) -> Lesson:
        rows = draw.rows(len(known.data), PLAN.batch)
        captions = dropped([caption(known.data.scene(int(row)), draw.rng) for row in rows], draw)
        ids, _ = tokens(texts.tokenizer, captions)
        x0 = known.latents[rows].float()
        shares = part_shares(known.data.parts(rows))
        return x0, draw.normal(*x0.shape), logit_normal(draw, len(x0)), ids, known.patches[rows], shares

    def loss(x0: Tensor, noise: Tensor, t: Tensor, ids: Tensor, patches: Tensor, shares: Tensor) -> Tensor:
        with build.autocast():
            features, pooled = texts(ids)
            velocity = run(
                hidden_states=interpolate(x0, noise, t), timestep=t * 1000,
                encoder_hidden_states=features, pooled_projections=torch.cat(pooled, dim=-1),
            ).sample  # fmt: skip
            return F.mse_loss(velocity.float(), noise - x0) + aligned.loss(patches, shares)

    build.fit("sd3", aligned, PLAN, lesson, loss)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0), vae=load_vae(build),
        text_encoder=texts.towers[0], text_encoder_2=texts.towers[1], text_encoder_3=None,
        tokenizer=texts.tokenizer, tokenizer_2=texts.tokenizer, tokenizer_3=None,
    )  # fmt: skip
    settings = {"steps": SAMPLING_STEPS, "guidance": 0.0, "max_sequence_length": 0}
    save_pipeline(
        pipeline, build.out / "sd3", ("transformer", "vae", "text_encoder", "text_encoder_2"), settings
    )
    build.provenance("sd3", {"sd3": PLAN})
