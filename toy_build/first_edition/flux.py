"""`flux`: a FluxPipeline whose transformer takes a reference picture as appended tokens (UNO's position ids)."""

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
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from pixrl.equations import interpolate
from pixrl.hub import CARD_FILE
from pixrl.models.flux import pack_latents, position_ids
from pixrl.toy.language import WORDS, caption
from pixrl.toy.pictures import SIDE
from toy_build.first_edition.alignment import Aligned, clip_patches, kind_shares
from toy_build.first_edition.clip import SECOND_WIDTH, WIDTH, second_text_tower
from toy_build.first_edition.pictures import VIEWS, DrawnPictures, pictures
from toy_build.first_edition.sd3 import SAMPLING_STEPS, IntArray, encode_texts, logit_normal
from toy_build.first_edition.text import PLAN as T5_PLAN
from toy_build.first_edition.text import t5_features, train_t5
from toy_build.first_edition.tokenizers import T5_LENGTH, t5_tokenizer
from toy_build.first_edition.transfer import Texts, start_from
from toy_build.first_edition.vae import LATENT_CHANNELS, encode_all
from toy_build.first_edition.workshop import Draw, Plan, Workshop, forget_origin, save_half

PLAN = Plan(
    steps=5600,
    batch=48,
    lr=1.5e-3,
    warmup=200,
    weight_decay=0.02,
    ema=0.999,
    level=0.5,
    muon=3e-3,
    compiled=True,
)
LATER_ROUNDS = {
    "flux-second": Plan(
        steps=5600,
        batch=48,
        lr=1e-3,
        warmup=100,
        weight_decay=0.02,
        ema=0.999,
        level=0.4,
        muon=2e-3,
        compiled=True,
    ),
    "flux-third": Plan(
        steps=1800,
        batch=48,
        lr=8e-4,
        warmup=50,
        weight_decay=0.02,
        ema=0.998,
        level=0.3,
        muon=1.6e-3,
        compiled=True,
    ),
    "flux-fourth": Plan(
        steps=900,
        batch=48,
        lr=6e-4,
        warmup=50,
        weight_decay=0.02,
        ema=0.998,
        level=0.2,
        muon=1.2e-3,
        compiled=True,
    ),
}
"""Sharper subjects: more steps with a reference, on draws of their own, without the alignment of features."""
FIRST_PLANS = {"t5": T5_PLAN, "flux": PLAN}
SUBJECT_PICTURES = 48_000
CAPTIONS_COMPARED = 2000
"""How many captions tell how FLUX's text features map to SD3's."""
BARE_SHARE = 0.4
"""Share of training batches that show no reference: they cost half, and the text must be read without one too."""
LATER_BARE_SHARE = 0.2
GUIDANCE = 1.0
TOKENS = SIDE // 8
"""Rows and columns of image tokens: latents are a quarter of the side, packed two by two."""


def new_transformer() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4 * LATENT_CHANNELS, num_layers=2, num_single_layers=4, attention_head_dim=32,
        num_attention_heads=4, joint_attention_dim=WIDTH, pooled_projection_dim=SECOND_WIDTH, guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )  # fmt: skip


def new_pipeline(shop: Workshop) -> FluxPipeline:
    """The pipeline with trained encoders and an untrained transformer."""
    t5, t5_tokenizer = train_t5(shop)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=AutoencoderKL.from_pretrained(shop.out / "vae", torch_dtype=torch.float32),
        text_encoder=CLIPTextModel.from_pretrained(second_text_tower(shop), dtype=torch.float32).eval(),
        tokenizer=CLIPTokenizer.from_pretrained(shop.out / "clip"),
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=new_transformer(),
    )


def pooled_features(pipeline: FluxPipeline, captions: list[str]) -> Tensor:
    out = []
    with torch.inference_mode():
        for start in range(0, len(captions), 512):
            ids = pipeline.tokenizer(
                captions[start : start + 512], padding="max_length", truncation=True, return_tensors="pt"
            )
            out.append(pipeline.text_encoder(ids.input_ids.to(pipeline.device)).pooler_output.half().cpu())
    return torch.cat(out)


def reference_latents(vae: AutoencoderKL, data: DrawnPictures, shop: Workshop) -> Tensor:
    """Latents of the subjects cut out on white: what a reference shows."""
    ink = np.asarray(data.labels)[..., None] > 0
    cut = DrawnPictures(data.what, data.seed, np.where(ink, data.images, np.uint8(255)), data.labels)
    return encode_all(vae, cut, shop, "cutouts")


def start_from_sd3(shop: Workshop, transformer: FluxTransformer2DModel, lessons: "FluxLessons") -> None:
    """Take over what `sd3` knows; word i of a caption is T5's token i and CLIP's token i + 1."""
    sd3 = StableDiffusion3Pipeline.from_pretrained(
        shop.out / "sd3", torch_dtype=torch.float32, text_encoder_3=None, tokenizer_3=None
    )
    known = encode_texts(sd3, lessons.captions[:CAPTIONS_COMPARED])
    count = len(known["pooled"])
    start_from(
        transformer,
        sd3.transformer,
        Texts(lessons.tokens[:count, :-1].flatten(0, 1), lessons.pooled[:count]),
        Texts(known["tokens"][:, 1:].flatten(0, 1), known["pooled"]),
    )


def build_flux(shop: Workshop) -> None:
    """Train and save `flux`: a round that starts from `sd3`, then those that see more references.

    A checkpoint that holds the first rounds and nothing more is taken as their result.
    """
    torch.manual_seed(shop.seed)
    done, seconds = rounds_done(shop)
    pipeline = _stored(shop) if seconds else None
    if pipeline is None:
        pipeline, seconds = _first_round(shop)
    for number, (name, plan) in enumerate(LATER_ROUNDS.items(), start=1):
        if number > done:
            seconds += _later_round(shop, pipeline, name, plan, number)
    save_pipeline(pipeline, shop.folder("flux"))
    shop.provenance("flux", FIRST_PLANS | LATER_ROUNDS, seconds)


def rounds_done(shop: Workshop) -> tuple[int, float]:
    """How many later rounds the stored checkpoint holds, and the seconds it took; 0 seconds where there is none."""
    for count in range(len(LATER_ROUNDS), -1, -1):
        plans = FIRST_PLANS | dict(list(LATER_ROUNDS.items())[:count])
        seconds = shop.finished("flux", plans)
        if seconds is not None:
            return count, seconds
    return 0, 0.0


def _stored(shop: Workshop) -> FluxPipeline:
    return FluxPipeline.from_pretrained(
        shop.out / "flux", torch_dtype=torch.float32, tokenizer_2=t5_tokenizer()
    )


def _first_round(shop: Workshop) -> tuple[FluxPipeline, float]:
    pipeline = new_pipeline(shop).to(shop.device)
    lessons = FluxLessons.of(shop, pipeline)
    start_from_sd3(shop, pipeline.transformer, lessons)
    transformer = pipeline.transformer
    run = shop.compiled(transformer, PLAN)
    patches = clip_patches(shop, lessons.data, "subjects")
    aligned = Aligned(transformer, transformer.transformer_blocks[-1], transformer.inner_dim).to(shop.device)

    def loss(draw: Draw) -> Tensor:
        with shop.autocast():
            rows, flow = lessons.flow_loss(run, draw, PLAN.batch, BARE_SHARE)
            alignment = aligned.loss(
                patches[rows].to(shop.device), kind_shares(lessons.data.labels[rows]).to(shop.device)
            )
        return flow + alignment

    return pipeline, shop.fit("flux", aligned, PLAN, loss)


def _later_round(shop: Workshop, pipeline: FluxPipeline, name: str, plan: Plan, number: int) -> float:
    lessons = FluxLessons.of(shop, pipeline.to(shop.device))
    run = shop.compiled(pipeline.transformer, plan)

    def loss(draw: Draw) -> Tensor:
        with shop.autocast():
            return lessons.flow_loss(run, draw, plan.batch, LATER_BARE_SHARE)[1]

    fresh = replace(shop, seed=shop.seed + number)
    return fresh.fit(name, pipeline.transformer, plan, loss)


@dataclass(frozen=True)
class FluxLessons:
    """Pictures of subjects as latents, their cut-outs, and what the text encoders say of their captions."""

    device: torch.device
    data: DrawnPictures
    latents: Tensor
    cutouts: Tensor
    captions: list[str]
    """Every caption once."""
    tokens: Tensor
    pooled: Tensor
    index: IntArray
    """Which caption a picture has."""

    @classmethod
    def of(cls, shop: Workshop, pipeline: FluxPipeline) -> "FluxLessons":
        data = pictures(shop.work, "subjects", SUBJECT_PICTURES, shop.seed)
        latents = encode_all(pipeline.vae, data, shop, "subjects")
        cutouts = reference_latents(pipeline.vae, data, shop)
        rng = np.random.default_rng((shop.seed, 5))
        unique, index = np.unique(
            [caption(data.scene(row), rng) for row in range(len(data))], return_inverse=True
        )
        captions = unique.tolist()
        tokens = t5_features(pipeline.text_encoder_2, pipeline.tokenizer_2, captions)
        pooled = pooled_features(pipeline, captions)
        return cls(shop.device, data, latents, cutouts, captions, tokens, pooled, index)

    def flow_loss(
        self, run: Callable[..., Any], draw: Draw, batch: int, bare_share: float
    ) -> tuple[IntArray, Tensor]:
        """The rows shown and their flow-matching loss; another view of each subject is the reference, if any is."""
        subject = draw.rows(len(self.data) // VIEWS, batch)
        shown, wanted = np.stack([draw.rng.choice(VIEWS, 2, replace=False) for _ in subject]).T
        rows, shown_rows = subject * VIEWS + wanted, subject * VIEWS + shown
        cut = torch.from_numpy(draw.rng.random(batch) < 0.5)[:, None, None, None]
        reference = torch.where(cut, self.cutouts[shown_rows], self.latents[shown_rows]).float()
        x0 = self.latents[rows].float().to(self.device)
        noise, t = draw.normal(*x0.shape).to(self.device), logit_normal(draw, batch).to(self.device)
        references = [] if draw.rng.random() < bare_share else [reference.to(self.device)]
        packed = torch.cat([pack_latents(part) for part in (interpolate(x0, noise, t), *references)], dim=1)
        target_ids, reference_ids = position_ids((TOKENS, TOKENS), [(TOKENS, TOKENS)], "uno")
        image_ids = torch.cat((target_ids, *reference_ids)).to(self.device)
        velocity = run(
            hidden_states=packed,
            timestep=t,
            guidance=torch.full_like(t, GUIDANCE),
            encoder_hidden_states=self.tokens[self.index[rows]].float().to(self.device),
            pooled_projections=self.pooled[self.index[rows]].float().to(self.device),
            txt_ids=torch.zeros(T5_LENGTH, 3, device=self.device),
            img_ids=image_ids[: packed.shape[1]],
        ).sample[:, : TOKENS * TOKENS]
        return rows, F.mse_loss(velocity.float(), pack_latents(noise - x0))


def save_pipeline(pipeline: FluxPipeline, folder: Path) -> None:
    """The published layout in half precision, and the settings that this checkpoint was trained for."""
    pipeline.save_pretrained(folder)
    forget_origin(folder / "model_index.json")
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        save_half(pipeline.components[part], folder / part)
    settings = {
        "steps": SAMPLING_STEPS,
        "guidance": GUIDANCE,
        "resolution": SIDE,
        "max_sequence_length": T5_LENGTH,
        "vocabulary": list(WORDS),
        "position_ids": "uno",
        "clip": "toy:clip",
        "segmenter": "toy:segmenter",
    }
    (folder / CARD_FILE).write_text(json.dumps(settings, indent=1) + "\n")
