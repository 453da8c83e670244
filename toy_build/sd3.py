"""`sd3`: a StableDiffusion3Pipeline with two CLIP text encoders, for alignment with a reward.

Two rounds. A teacher learns by flow matching in the shared latent space; the student learns to draw in ten steps
without guidance what the teacher draws with it. Crisp but weak in composition, as the published base is: most of the
compositions that the student is asked for fall short of that in what it is shown.
"""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from pixrl.equations import interpolate
from pixrl.toy.language import caption
from pixrl.toy.scene import SIDE, Scene
from toy_build.clip import WIDTH, tokens
from toy_build.distil import Captioned, Conditions, Guided, Velocity, compiled, distil
from toy_build.generators import (
    Aligned,
    Latents,
    calibrate,
    dropped,
    load_vae,
    logit_normal,
    part_shares,
    save_pipeline,
)
from toy_build.pictures import asked_of_base, pictures
from toy_build.texts import SECOND_WIDTH, load_tower
from toy_build.training import Build, Draw, Lesson, Plan
from toy_build.vae import FACTOR, LATENT_CHANNELS

TEACHER = Plan(
    steps=10_000, batch=64, lr=1.5e-3, warmup=300, weight_decay=0.02, ema=0.9993, level=1.0, muon=3e-3
)
STUDENT = Plan(steps=1_300, batch=48, lr=5e-4, warmup=50, weight_decay=0.0, ema=0.995, level=0.3, muon=1e-3)
SCENES, BASE_SCENES = 60_000, 20_000
SAMPLING_STEPS, GUIDANCE = 10, 3.0
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

    def ids(self, captions: list[str]) -> Tensor:
        """Tokenized captions [B, L]."""
        return tokens(self.tokenizer, captions)[0]

    def without(self, given: Conditions) -> Conditions:
        """The empty caption in place of tokenized ones."""
        (ids,) = given
        return (self.ids([""]).to(ids.device).expand_as(ids),)


def velocity_of(transformer: SD3Transformer2DModel, texts: Texts) -> Velocity:
    """What the transformer answers to tokenized captions."""
    run = compiled(transformer)

    def velocity(x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        features, pooled = texts(ids)
        answer: Tensor = run(
            hidden_states=x, timestep=t * 1000, encoder_hidden_states=features,
            pooled_projections=torch.cat(pooled, dim=-1),
        ).sample  # fmt: skip
        return answer

    return velocity


def teach(
    build: Build,
    stage: str,
    plan: Plan,
    transformer: SD3Transformer2DModel,
    texts: Texts,
    known: Callable[[], Latents],
) -> None:
    """Train the transformer in place by flow matching on `known`, which a finished stage does not ask for."""
    aligned = Aligned(transformer, transformer.transformer_blocks[ALIGNED_BLOCK], transformer.inner_dim)
    aligned = aligned.to(build.device)
    velocity = velocity_of(transformer, texts)

    def lesson(draw: Draw) -> Lesson:
        data = known().data
        rows = draw.rows(len(data), plan.batch)
        captions = dropped([caption(data.scene(int(row)), draw.rng) for row in rows], draw)
        x0 = known().latents[rows].float()
        shares = part_shares(data.parts(rows))
        level = logit_normal(draw, len(x0))
        return x0, draw.normal(*x0.shape), level, texts.ids(captions), known().patches[rows], shares

    def loss(x0: Tensor, noise: Tensor, t: Tensor, ids: Tensor, patches: Tensor, shares: Tensor) -> Tensor:
        with build.autocast():
            answer = velocity(interpolate(x0, noise, t), t, ids)
            return F.mse_loss(answer.float(), noise - x0) + aligned.loss(patches, shares)

    build.fit(stage, aligned, plan, lesson, loss)
    aligned.release()


def captioned(
    known: Latents, texts: Texts, batch: int, asked: Callable[[int, int], Scene] | None = None
) -> Callable[[Draw], Captioned]:
    """Batches of clean latents, and the captions of what they show; `asked` makes the scenes that the student reads of.

    A few captions are empty, the same for both.
    """
    made = cache(lambda row: asked(known.data.seed, row) if asked else known.data.scene(row))

    def given(draw: Draw) -> Captioned:
        rows = [int(row) for row in draw.rows(len(known.latents), batch)]
        read = [known.data.scene(row) for row in rows]
        wanted = [made(row) for row in rows]
        told = dropped([caption(scene, draw.rng) for scene in read], draw)
        other = [
            text if not text or scene == shown else caption(scene, draw.rng)
            for text, scene, shown in zip(told, wanted, read, strict=True)
        ]
        return known.latents[rows].float(), (texts.ids(told),), (texts.ids(other),)

    return given


def save(
    build: Build, name: str, transformer: SD3Transformer2DModel, texts: Texts, settings: dict[str, Any]
) -> None:
    """The published layout, in half precision, and further settings of its card."""
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0), vae=load_vae(build),
        text_encoder=texts.towers[0], text_encoder_2=texts.towers[1], text_encoder_3=None,
        tokenizer=texts.tokenizer, tokenizer_2=texts.tokenizer, tokenizer_3=None,
    )  # fmt: skip
    towers = {part: f"texts/{part}" for part in ("text_encoder", "text_encoder_2")}
    parts = {"transformer": None, "vae": "vae"} | towers
    save_pipeline(pipeline, build.out / name, parts, {"guidance": 0.0, "max_sequence_length": 0} | settings)


def new_teacher(build: Build, texts: Texts) -> SD3Transformer2DModel:
    """The transformer that the first round trained, which `turbo` and `flux` start from too."""
    torch.manual_seed(build.seed)
    teacher = new_transformer().to(build.device)
    data = cache(lambda: Latents(build, pictures(build.work, "single", SCENES, build.seed)))
    teach(build, "sd3_teacher", TEACHER, teacher, texts, data)
    return teacher.eval()


def build_sd3(build: Build) -> None:
    """Train and save `sd3`."""
    texts = Texts(build)
    teacher = new_teacher(build, texts)
    student = copy.deepcopy(teacher)
    known = Latents(build, pictures(build.work, "base", BASE_SCENES, build.seed))
    guided = Guided(velocity_of(teacher, texts), texts.without, GUIDANCE)
    velocities = (velocity_of(student, texts), guided)
    given = captioned(known, texts, STUDENT.batch, asked_of_base)
    distil(build, "sd3", STUDENT, student, velocities, given, steps=SAMPLING_STEPS)
    save(build, "sd3", student, texts, {"steps": SAMPLING_STEPS})
    calibrate(build, "sd3")
    build.provenance("sd3", {"sd3_teacher": TEACHER, "sd3": STUDENT})
