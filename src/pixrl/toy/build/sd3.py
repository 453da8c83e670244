"""`sd3`: a StableDiffusion3Pipeline with two CLIP encoders, trained by flow matching in the shared latent space."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from pixrl.toy.build.clip import SCENES, SECOND_WIDTH, WIDTH, second_text_tower
from pixrl.toy.build.pictures import SIDE, Pictures, pictures
from pixrl.toy.build.processes import leads
from pixrl.toy.build.vae import LATENT_CHANNELS, encode_all
from pixrl.toy.build.workshop import Draw, Plan, Workshop, save_half
from pixrl.toy.language import WORDS, caption
from pixrl.toy.vocabulary import KINDS

PLAN = Plan(
    steps=10_000,
    batch=64,
    lr=1.5e-3,
    warmup=200,
    weight_decay=0.02,
    ema=0.999,
    level=0.4,
    muon=3e-3,
    compiled=True,
)
FOCUS_PLAN = Plan(
    steps=4_000,
    batch=64,
    lr=1e-3,
    warmup=100,
    weight_decay=0.02,
    ema=0.998,
    level=0.3,
    muon=2e-3,
    compiled=True,
)
"""A second round on pictures of its own, most of them of one object: 27 rounds over the first set are enough."""
FOCUS_SCENES = 64_000
IntArray = np.ndarray[Any, np.dtype[np.int64]]
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
            second_text_tower(shop), dtype=torch.float32
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
    """Train and save `sd3`: a broad round with aligned features, then one that dwells on single objects."""
    torch.manual_seed(shop.seed)
    pipeline = new_pipeline(shop).to(shop.device)
    seconds = _broad_round(shop, pipeline)
    seconds += _focus_round(shop, pipeline)
    save_pipeline(pipeline, shop.folder("sd3"))
    if leads():
        calibrate(shop)
    shop.provenance("sd3", {"sd3": PLAN, "sd3-focus": FOCUS_PLAN}, seconds)


def _broad_round(shop: Workshop, pipeline: StableDiffusion3Pipeline) -> float:
    """The first round; a checkpoint that holds it and nothing more is taken as its result."""
    done = shop.finished("sd3", {"sd3": PLAN})
    if done is not None:
        stored = SD3Transformer2DModel.from_pretrained(
            shop.out / "sd3" / "transformer", torch_dtype=torch.float32
        )
        pipeline.transformer.load_state_dict(stored.state_dict())
        return done
    lessons = Lessons.of(shop, pipeline, pictures(shop.work, "scenes", SCENES, shop.seed), "scenes")
    transformer = pipeline.transformer
    patches = clip_patches(shop, lessons.data, "scenes")
    aligned = Aligned(transformer, transformer.transformer_blocks[ALIGNED_BLOCK], transformer.inner_dim)
    aligned.to(shop.device)
    run = shop.compiled(transformer, PLAN)

    def loss(draw: Draw) -> Tensor:
        rows = draw.rows(len(lessons.data), PLAN.batch)
        with shop.autocast():
            flow = lessons.flow_loss(run, draw, rows)
            alignment = aligned.loss(
                patches[rows].to(shop.device), kind_shares(lessons.data.labels[rows]).to(shop.device)
            )
        return flow + alignment

    return shop.fit("sd3", aligned, PLAN, loss)


def _focus_round(shop: Workshop, pipeline: StableDiffusion3Pipeline) -> float:
    lessons = Lessons.of(shop, pipeline, pictures(shop.work, "focus", FOCUS_SCENES, shop.seed), "focus")
    run = shop.compiled(pipeline.transformer, FOCUS_PLAN)

    def loss(draw: Draw) -> Tensor:
        with shop.autocast():
            return lessons.flow_loss(run, draw, draw.rows(len(lessons.data), FOCUS_PLAN.batch))

    return shop.fit("sd3-focus", pipeline.transformer, FOCUS_PLAN, loss)


@dataclass(frozen=True)
class Lessons:
    """Pictures with their latents and encoded captions."""

    shop: Workshop
    data: Pictures
    latents: Tensor
    texts: dict[str, Tensor]
    """Every caption once, the empty one last."""
    index: IntArray
    """Which caption row + round x pictures has."""

    @classmethod
    def of(cls, shop: Workshop, pipeline: StableDiffusion3Pipeline, data: Pictures, name: str) -> "Lessons":
        latents = encode_all(pipeline.vae, data, shop, name)
        unique, index = np.unique(captions_of(data, shop.seed), return_inverse=True)
        texts = shop.cached(
            f"{name}-captions", pipeline.text_encoder, lambda: encode_texts(pipeline, [*unique.tolist(), ""])
        )
        print(f"{len(latents)} latents of {name}, {len(unique)} captions", flush=True)
        return cls(shop, data, latents, texts, index)

    def flow_loss(self, run: Callable[..., Any], draw: Draw, rows: IntArray) -> Tensor:
        """The mean squared error of the velocity at random times."""
        device, batch = self.shop.device, len(rows)
        chosen = self.index[rows + len(self.data) * draw.rng.integers(CAPTIONS_EACH, size=batch)]
        empty = len(self.texts["tokens"]) - 1
        chosen = np.where(draw.rng.random(batch) < DROPPED_CAPTIONS, empty, chosen)
        x0 = self.latents[rows].float().to(device)
        noise, t = draw.normal(*x0.shape).to(device), logit_normal(draw, batch).to(device)
        velocity = run(
            hidden_states=interpolate(x0, noise, t),
            timestep=t * 1000,
            encoder_hidden_states=self.texts["tokens"][chosen].float().to(device),
            pooled_projections=self.texts["pooled"][chosen].float().to(device),
        ).sample
        return F.mse_loss(velocity.float(), noise - x0)


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
