"""`sd3`: a StableDiffusion3Pipeline with two CLIP encoders, trained by flow matching in the shared latent space."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from pixrl.toy.language import WORDS, caption
from pixrl.toy.pictures import SIDE
from pixrl.toy.scene import Task
from pixrl.toy.vocabulary import KINDS
from toy_build.first_edition.alignment import Aligned, clip_patches, kind_shares
from toy_build.first_edition.clip import SCENES, SECOND_WIDTH, WIDTH, second_text_tower
from toy_build.first_edition.pictures import DrawnPictures, pictures
from toy_build.first_edition.processes import leads
from toy_build.first_edition.vae import LATENT_CHANNELS, encode_all
from toy_build.first_edition.workshop import Draw, Plan, Workshop, save_half

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
GUIDED_PLAN = Plan(
    steps=1_000,
    batch=64,
    lr=5e-4,
    warmup=50,
    weight_decay=0.0,
    ema=0.99,
    level=0.3,
    muon=1e-3,
    compiled=True,
)
"""A second round that moves guidance into the weights, on pictures of its own."""
GUIDED_SCENES = 64_000
GUIDANCE = 2.0
GUIDED_TASKS = (Task.SINGLE_OBJECT, Task.COLORS)
"""What is drawn as if guided. The other tasks are left as they are, so that RL finds room in them."""

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


def captions_of(data: DrawnPictures, seed: int) -> list[str]:
    """CAPTIONS_EACH captions of every picture, one round after the other."""
    rng = np.random.default_rng((seed, 4))
    return [caption(data.scene(row), rng) for _ in range(CAPTIONS_EACH) for row in range(len(data))]


def logit_normal(draw: Draw, batch: int) -> Tensor:
    """Training times, most of them in the middle."""
    return torch.sigmoid(draw.normal(batch))


def build_sd3(shop: Workshop) -> None:
    """Train and save `sd3`: a broad round with aligned features, then one that distils guidance for lone objects."""
    torch.manual_seed(shop.seed)
    pipeline = new_pipeline(shop).to(shop.device)
    seconds = _broad_round(shop, pipeline)
    seconds += _guided_round(shop, pipeline)
    save_pipeline(pipeline, shop.folder("sd3"))
    if leads():
        calibrate(shop)
    shop.provenance("sd3", {"sd3": PLAN, "sd3-guided": GUIDED_PLAN}, seconds)


def _broad_round(shop: Workshop, pipeline: StableDiffusion3Pipeline) -> float:
    """The first round; a checkpoint that holds it and nothing more is taken as its result."""
    done = shop.finished("sd3", {"sd3": PLAN})
    if done is not None:
        stored = SD3Transformer2DModel.from_pretrained(
            shop.out / "sd3" / "transformer", torch_dtype=torch.float32
        )
        pipeline.transformer.load_state_dict(stored.state_dict())
        return done
    lessons = SD3Lessons.of(shop, pipeline, pictures(shop.work, "scenes", SCENES, shop.seed), "scenes")
    transformer = pipeline.transformer
    patches = clip_patches(shop, lessons.data, "scenes")
    aligned = Aligned(transformer, transformer.transformer_blocks[ALIGNED_BLOCK], transformer.inner_dim)
    aligned.to(shop.device)
    run = shop.compiled(transformer, PLAN)

    def loss(draw: Draw) -> Tensor:
        rows = draw.rows(len(lessons.data), PLAN.batch)
        with shop.autocast():
            lesson = lessons.draw(draw, rows, DROPPED_CAPTIONS)
            flow = F.mse_loss(lesson.velocity(run).float(), lesson.target)
            alignment = aligned.loss(
                patches[rows].to(shop.device), kind_shares(lessons.data.labels[rows]).to(shop.device)
            )
        return flow + alignment

    return shop.fit("sd3", aligned, PLAN, loss)


def _guided_round(shop: Workshop, pipeline: StableDiffusion3Pipeline) -> float:
    """Learn the velocity that classifier-free guidance of the first round's weights would give, in one pass.

    Guidance distillation (Meng et al. 2023), as in FLUX.1-dev; for GUIDED_TASKS alone.
    """
    lessons = SD3Lessons.of(shop, pipeline, pictures(shop.work, "guided", GUIDED_SCENES, shop.seed), "guided")
    tasks = np.array([lessons.data.scene(row).task for row in range(len(lessons.data))])
    guidance = torch.from_numpy(np.where(np.isin(tasks, GUIDED_TASKS), GUIDANCE, 1.0)).float()
    teacher = shop.compiled(copy.deepcopy(pipeline.transformer).requires_grad_(False), GUIDED_PLAN)
    student = shop.compiled(pipeline.transformer, GUIDED_PLAN)

    def loss(draw: Draw) -> Tensor:
        rows = draw.rows(len(lessons.data), GUIDED_PLAN.batch)
        with shop.autocast():
            lesson = lessons.draw(draw, rows, dropped=0.0)
            with torch.no_grad():
                asked = lesson.velocity(teacher).float()
                unasked = replace(lesson, **lessons.empty_caption(len(rows))).velocity(teacher).float()
            weight = guidance[rows].to(shop.device)[:, None, None, None]
            return F.mse_loss(lesson.velocity(student).float(), unasked + weight * (asked - unasked))

    return shop.fit("sd3-guided", pipeline.transformer, GUIDED_PLAN, loss)


@dataclass(frozen=True)
class Lesson:
    """One batch: noised latents and what the text encoders say of their captions."""

    x_t: Tensor
    t: Tensor
    target: Tensor
    tokens: Tensor
    pooled: Tensor

    def velocity(self, model: Callable[..., Any]) -> Tensor:
        velocity: Tensor = model(
            hidden_states=self.x_t,
            timestep=self.t * 1000,
            encoder_hidden_states=self.tokens,
            pooled_projections=self.pooled,
        ).sample
        return velocity


@dataclass(frozen=True)
class SD3Lessons:
    """Pictures with their latents and encoded captions."""

    shop: Workshop
    data: DrawnPictures
    latents: Tensor
    texts: dict[str, Tensor]
    """Every caption once, the empty one last."""
    index: IntArray
    """Which caption row + round x pictures has."""

    @classmethod
    def of(
        cls, shop: Workshop, pipeline: StableDiffusion3Pipeline, data: DrawnPictures, name: str
    ) -> "SD3Lessons":
        latents = encode_all(pipeline.vae, data, shop, name)
        unique, index = np.unique(captions_of(data, shop.seed), return_inverse=True)
        texts = shop.cached(
            f"{name}-captions", pipeline.text_encoder, lambda: encode_texts(pipeline, [*unique.tolist(), ""])
        )
        print(f"{len(latents)} latents of {name}, {len(unique)} captions", flush=True)
        return cls(shop, data, latents, texts, index)

    def draw(self, draw: Draw, rows: IntArray, dropped: float) -> Lesson:
        """Pictures at random times, each with one of its captions or, for a share of them, with none."""
        device, batch = self.shop.device, len(rows)
        chosen = self.index[rows + len(self.data) * draw.rng.integers(CAPTIONS_EACH, size=batch)]
        chosen = np.where(draw.rng.random(batch) < dropped, len(self.texts["tokens"]) - 1, chosen)
        x0 = self.latents[rows].float().to(device)
        noise, t = draw.normal(*x0.shape).to(device), logit_normal(draw, batch).to(device)
        texts = {name: text[chosen].float().to(device) for name, text in self.texts.items()}
        return Lesson(interpolate(x0, noise, t), t, noise - x0, **texts)

    def empty_caption(self, batch: int) -> dict[str, Tensor]:
        """The text features of no caption, once a picture."""
        return {
            name: text[-1:].float().to(self.shop.device).expand(batch, *text.shape[1:])
            for name, text in self.texts.items()
        }


def calibrate(shop: Workshop) -> None:
    """Store the thresholds of `pixrl fuse` with the generator: they come from its own pictures of every kind."""
    from pixrl.fusion.world import calibrate_presence, load_world

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
