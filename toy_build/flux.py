"""`flux`: a FluxPipeline that draws a subject from reference tokens beside its text, as UNO does.

It starts from the teacher of `sd3`, whose blocks have the same shapes: the first ones become double blocks, and of the
later ones the image stream becomes single blocks (its MLP beside its attention instead of after it). A student then
learns to draw in ten steps what the teacher draws with guidance by the text.
"""

import copy
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from pixrl.equations import interpolate
from pixrl.models.flux import pack_latents, position_ids, unpack_latents
from pixrl.toy.language import caption
from pixrl.toy.pictures import to_tensor
from pixrl.toy.scene import SIDE
from toy_build.clip import WIDTH, tokens
from toy_build.distil import Captioned, Conditions, Guided, Velocity, compiled, distil
from toy_build.generators import Aligned, Latents, dropped, load_vae, logit_normal, part_shares, save_pipeline
from toy_build.pictures import VIEWS, Pictures, pictures
from toy_build.sd3 import HEAD_WIDTH, HEADS, Texts, new_teacher
from toy_build.texts import SECOND_WIDTH, load_t5, text_folder
from toy_build.tokenizers import T5_LENGTH, t5_tokenizer
from toy_build.training import Build, Draw, Lesson, Plan, kept_rows
from toy_build.vae import FACTOR, LATENT_CHANNELS, encode

TEACHER = Plan(
    steps=10_000, batch=48, lr=1.2e-3, warmup=200, weight_decay=0.02, ema=0.998, level=0.5, muon=2.4e-3
)
STUDENT = Plan(steps=800, batch=32, lr=5e-4, warmup=50, weight_decay=0.0, ema=0.99, level=0.3, muon=1e-3)
SUBJECT_PICTURES = 24_000
BARE_SHARE = 0.25
"""Share of training batches that show no reference: they cost half, and the text must be read without one too."""
SAMPLING_STEPS, GUIDANCE = 10, 2.5
GUIDANCE_INPUT = 1.0
"""What the transformer is told of guidance, as FLUX.1-dev is: always the same, since it is in the weights."""
TOKENS = SIDE // FACTOR // 2
DOUBLE, SINGLE = 2, 4


def new_transformer() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4 * LATENT_CHANNELS, num_layers=DOUBLE, num_single_layers=SINGLE,
        attention_head_dim=HEAD_WIDTH, num_attention_heads=HEADS, joint_attention_dim=WIDTH,
        pooled_projection_dim=SECOND_WIDTH, guidance_embeds=True, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip


def start_from(flux: FluxTransformer2DModel, sd3: SD3Transformer2DModel) -> None:
    """Fill in place what both have: a start, not a copy. Text inputs and rotary positions are learned anew."""
    state, given = flux.state_dict(), sd3.state_dict()
    state |= {name: tensor for name, tensor in given.items() if name in state and _is_shared(name)}
    blocks = int(sd3.config.num_layers)
    for number in range(SINGLE):
        source = min(DOUBLE + number, blocks - 1)
        state |= _single_block(given, source, f"single_transformer_blocks.{number}.")

    def channels_first(rows: Tensor) -> Tensor:
        return rows.reshape(4, LATENT_CHANNELS, *rows.shape[1:]).transpose(0, 1).flatten(0, 1)

    state["x_embedder.weight"] = given["pos_embed.proj.weight"].flatten(1)
    state["x_embedder.bias"] = given["pos_embed.proj.bias"]
    state |= {f"proj_out.{kind}": channels_first(given[f"proj_out.{kind}"]) for kind in ("weight", "bias")}
    flux.load_state_dict(state)
    torch.nn.init.zeros_(flux.time_text_embed.guidance_embedder.linear_2.weight)
    torch.nn.init.zeros_(flux.time_text_embed.guidance_embedder.linear_2.bias)


def _is_shared(name: str) -> bool:
    if name.startswith("transformer_blocks."):
        return int(name.split(".")[1]) < DOUBLE
    return name.startswith(("time_text_embed.timestep_embedder.", "norm_out."))


def _single_block(given: dict[str, Tensor], block: int, name: str) -> dict[str, Tensor]:
    """Attention and MLP of a block's image stream, side by side behind one modulation."""
    old = f"transformer_blocks.{block}."
    kept = ("attn.to_q.", "attn.to_k.", "attn.to_v.", "attn.norm_q.", "attn.norm_k.")
    out = {
        f"{name}{key.removeprefix(old)}": t
        for key, t in given.items()
        if key.removeprefix(old).startswith(kept)
    }
    width = len(given[f"{old}attn.to_q.bias"])
    for kind in ("weight", "bias"):
        out[f"{name}norm.linear.{kind}"] = given[f"{old}norm1.linear.{kind}"][: 3 * width]
        out[f"{name}proj_mlp.{kind}"] = given[f"{old}ff.net.0.proj.{kind}"]
    after = (f"{old}attn.to_out.0.", f"{old}ff.net.2.")
    out[f"{name}proj_out.weight"] = torch.cat([given[f"{part}weight"] for part in after], dim=1)
    out[f"{name}proj_out.bias"] = given[f"{after[0]}bias"] + given[f"{after[1]}bias"]
    return out


def cutout_latents(build: Build, data: Pictures) -> Tensor:
    """Latents of the subjects cut out on white, as references mostly show them; kept on disk."""
    path, vae = build.work / "encoded" / f"cutouts-{data.seed}-{len(data)}.npy", load_vae(build)
    return kept_rows(path, len(data), lambda rows: encode(build, vae, to_tensor(whitened(data, rows))))


def whitened(data: Pictures, rows: Sequence[int]) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    """Pictures of the rows whose background is white."""
    found = np.array(data.images[list(rows)])
    found[data.labels[list(rows)] == 0] = 255
    return found


class Told:
    """What `flux` reads: a T5 encoder's features and the pooled ones of a CLIP tower."""

    def __init__(self, build: Build) -> None:
        tower = CLIPTextModel.from_pretrained(text_folder(build) / "text_encoder_2", dtype=torch.float32)
        self.tower = tower.eval().to(build.device).requires_grad_(False)
        self.t5 = load_t5(build).to(build.device).requires_grad_(False)
        self.tokenizer, self.t5_tokenizer = CLIPTokenizer.from_pretrained(build.out / "clip"), t5_tokenizer()

    def ids(self, captions: list[str]) -> Conditions:
        """Captions as T5's tokens and as CLIP's [B, L] each."""
        words = self.t5_tokenizer(
            captions, padding="max_length", max_length=T5_LENGTH, truncation=True, return_tensors="pt"
        )
        return words.input_ids, tokens(self.tokenizer, captions)[0]

    def without(self, given: Conditions) -> Conditions:
        """The empty caption in place of tokenized ones; a reference stays."""
        empty = (ids.to(given[0].device) for ids in self.ids([""]))
        return *(one.expand_as(ids) for one, ids in zip(empty, given[:2], strict=True)), *given[2:]


def velocity_of(transformer: FluxTransformer2DModel, told: Told, device: torch.device) -> Velocity:
    """What the transformer answers to tokenized captions, and to a reference's latents [B, C, H, W] if there is one."""
    run = compiled(transformer)
    target_ids, reference_ids = position_ids((TOKENS, TOKENS), [(TOKENS, TOKENS)], "uno")
    image_ids = torch.cat((target_ids, *reference_ids)).to(device)
    text_ids = torch.zeros(T5_LENGTH, 3, device=device)

    def velocity(x: Tensor, t: Tensor, words: Tensor, ids: Tensor, *reference: Tensor) -> Tensor:
        with torch.no_grad():
            features = told.t5(input_ids=words).last_hidden_state
            pooled = told.tower(input_ids=ids).pooler_output
        packed = torch.cat([pack_latents(part) for part in (x, *reference)], dim=1)
        answer: Tensor = run(
            hidden_states=packed, timestep=t, guidance=torch.full_like(t, GUIDANCE_INPUT),
            encoder_hidden_states=features, pooled_projections=pooled, txt_ids=text_ids,
            img_ids=image_ids[: packed.shape[1]],
        ).sample  # fmt: skip
        return unpack_latents(answer[:, : TOKENS * TOKENS].float(), (TOKENS, TOKENS))

    return velocity


class Views:
    """Batches of subjects: one view is wanted, another is the reference, cut out half of the time."""

    def __init__(self, known: Latents, cutouts: Tensor, told: Told) -> None:
        self.known, self.cutouts, self.told = known, cutouts, told

    def __call__(self, draw: Draw, batch: int) -> tuple[list[int], Tensor, Conditions]:
        """The rows that are wanted, their latents, and what is told; a share of batches shows no reference."""
        data = self.known.data
        subject = draw.rows(len(data) // VIEWS, batch)
        shown, wanted = np.stack([draw.rng.choice(VIEWS, 2, replace=False) for _ in subject]).T
        rows, others = [int(row) for row in subject * VIEWS + wanted], subject * VIEWS + shown
        cut = torch.from_numpy(draw.rng.random(batch) < 0.5)[:, None, None, None]
        reference = torch.where(cut, self.cutouts[others], self.known.latents[others]).float()
        captions = dropped([caption(data.scene(row), draw.rng) for row in rows], draw)
        shows = () if draw.rng.random() < BARE_SHARE else (reference,)
        return rows, self.known.latents[rows].float(), (*self.told.ids(captions), *shows)


def _teach(build: Build, transformer: FluxTransformer2DModel, told: Told, views: Callable[[], Views]) -> None:
    aligned = Aligned(transformer, transformer.transformer_blocks[-1], transformer.inner_dim).to(build.device)
    velocity = velocity_of(transformer, told, build.device)

    def lesson(draw: Draw) -> Lesson:
        rows, x0, given = views()(draw, TEACHER.batch)
        known = views().known
        shares = part_shares(known.data.parts(rows))
        return x0, draw.normal(*x0.shape), logit_normal(draw, len(x0)), known.patches[rows], shares, *given

    def loss(x0: Tensor, noise: Tensor, t: Tensor, patches: Tensor, shares: Tensor, *given: Tensor) -> Tensor:
        with build.autocast():
            answer = velocity(interpolate(x0, noise, t), t, *given)
            return F.mse_loss(answer, noise - x0) + aligned.loss(patches, shares)

    build.fit("flux_teacher", aligned, TEACHER, lesson, loss)
    aligned.release()


def build_flux(build: Build) -> None:
    """Train and save `flux`."""
    told, teacher = Told(build), new_transformer()
    start_from(teacher, new_teacher(build, Texts(build)).cpu())
    teacher = teacher.to(build.device)

    @cache
    def views() -> Views:
        known = Latents(build, pictures(build.work, "subjects", SUBJECT_PICTURES, build.seed))
        return Views(known, cutout_latents(build, known.data), told)

    _teach(build, teacher, told, views)
    student = copy.deepcopy(teacher)
    guided = Guided(velocity_of(teacher.eval(), told, build.device), told.without, GUIDANCE)

    def given(draw: Draw) -> Captioned:
        _, x0, conditions = views()(draw, STUDENT.batch)
        return x0, conditions, conditions

    velocities = (velocity_of(student, told, build.device), guided)
    distil(build, "flux", STUDENT, student, velocities, given, steps=SAMPLING_STEPS)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0), vae=load_vae(build), text_encoder=told.tower,
        tokenizer=told.tokenizer, text_encoder_2=told.t5, tokenizer_2=told.t5_tokenizer,
        transformer=student.eval(),
    )  # fmt: skip
    settings = {
        "steps": SAMPLING_STEPS, "guidance": GUIDANCE_INPUT, "max_sequence_length": T5_LENGTH, "position_ids": "uno",
    }  # fmt: skip
    parts = {"transformer": None, "vae": "vae", "text_encoder": None, "text_encoder_2": "texts/t5"}
    save_pipeline(pipeline, build.out / "flux", parts, settings)
    build.provenance("flux", {"flux_teacher": TEACHER, "flux": STUDENT})
