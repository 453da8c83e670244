"""`flux`: a FluxPipeline that draws a subject from reference tokens beside its text, as UNO does.

It starts from `sd3`, whose blocks have the same shapes: SD3's first blocks become FLUX's double blocks, and of the
later ones the image stream becomes single blocks (its MLP beside its attention instead of after it).
"""

from collections.abc import Sequence

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
from pixrl.models.flux import pack_latents, position_ids
from toy_build.clip import WIDTH, tokens
from toy_build.generators import Aligned, Latents, dropped, load_vae, logit_normal, part_shares, save_pipeline
from toy_build.pictures import VIEWS, Pictures, pictures, to_tensor
from toy_build.sd3 import HEAD_WIDTH, HEADS
from toy_build.texts import SECOND_WIDTH, load_t5, text_folder
from toy_build.tokenizers import T5_LENGTH, t5_tokenizer
from toy_build.training import Build, Draw, Lesson, Plan, kept_rows
from toy_build.vae import FACTOR, LATENT_CHANNELS, encode
from toy_build.world.language import caption
from toy_build.world.scene import SIDE

PLAN = Plan(
    steps=16_000, batch=48, lr=1.2e-3, warmup=300, weight_decay=0.02, ema=0.9993, level=0.6, muon=2.4e-3
)
SUBJECT_PICTURES = 48_000
BARE_SHARE = 0.25
"""Share of training batches that show no reference: they cost half, and the text must be read without one too."""
SAMPLING_STEPS, GUIDANCE = 10, 1.0
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


def build_flux(build: Build) -> None:
    """Train and save `flux`."""
    torch.manual_seed(build.seed)
    known = Latents(build, pictures(build.work, "subjects", SUBJECT_PICTURES, build.seed))
    cutouts = cutout_latents(build, known.data)
    tower = CLIPTextModel.from_pretrained(text_folder(build) / "text_encoder_2", dtype=torch.float32).eval()
    tower, t5 = (
        tower.to(build.device).requires_grad_(False),
        load_t5(build).to(build.device).requires_grad_(False),
    )
    tokenizer, t5_words = CLIPTokenizer.from_pretrained(build.out / "clip"), t5_tokenizer()
    transformer = new_transformer()
    start_from(transformer, SD3Transformer2DModel.from_pretrained(build.out / "sd3" / "transformer"))
    transformer = transformer.to(build.device)
    aligned = Aligned(transformer, transformer.transformer_blocks[-1], transformer.inner_dim).to(build.device)
    target_ids, reference_ids = position_ids((TOKENS, TOKENS), [(TOKENS, TOKENS)], "uno")
    image_ids = torch.cat((target_ids, *reference_ids)).to(build.device)

    def lesson(draw: Draw) -> Lesson:
        """Another view of each subject is the reference, cut out half of the time."""
        subject = draw.rows(len(known.data) // VIEWS, PLAN.batch)
        shown, wanted = np.stack([draw.rng.choice(VIEWS, 2, replace=False) for _ in subject]).T
        rows, others = subject * VIEWS + wanted, subject * VIEWS + shown
        cut = torch.from_numpy(draw.rng.random(len(rows)) < 0.5)[:, None, None, None]
        reference = torch.where(cut, cutouts[others], known.latents[others]).float()
        captions = dropped([caption(known.data.scene(int(row)), draw.rng) for row in rows], draw)
        words = t5_words(
            captions, padding="max_length", max_length=T5_LENGTH, truncation=True, return_tensors="pt"
        )
        x0, shares = known.latents[rows].float(), part_shares(known.data.parts(rows))
        t, bare = logit_normal(draw, len(x0)), draw.rng.random() < BARE_SHARE
        ids = (words.input_ids, tokens(tokenizer, captions)[0])
        return x0, draw.normal(*x0.shape), t, reference, *ids, known.patches[rows], shares, bare

    def loss(
        x0: Tensor, noise: Tensor, t: Tensor, reference: Tensor, words: Tensor, ids: Tensor, patches: Tensor,
        shares: Tensor, bare: bool,
    ) -> Tensor:  # fmt: skip
        shown = [] if bare else [reference]
        with build.autocast():
            with torch.no_grad():
                features = t5(input_ids=words).last_hidden_state
                pooled = tower(input_ids=ids).pooler_output
            packed = torch.cat([pack_latents(part) for part in (interpolate(x0, noise, t), *shown)], dim=1)
            velocity = transformer(
                hidden_states=packed, timestep=t, guidance=torch.full_like(t, GUIDANCE),
                encoder_hidden_states=features, pooled_projections=pooled,
                txt_ids=torch.zeros(T5_LENGTH, 3, device=x0.device), img_ids=image_ids[: packed.shape[1]],
            ).sample[:, : TOKENS * TOKENS]  # fmt: skip
            return F.mse_loss(velocity.float(), pack_latents(noise - x0)) + aligned.loss(patches, shares)

    build.fit("flux", aligned, PLAN, lesson, loss)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0), vae=load_vae(build), text_encoder=tower,
        tokenizer=tokenizer, text_encoder_2=t5, tokenizer_2=t5_words, transformer=transformer.eval(),
    )  # fmt: skip
    settings = {
        "steps": SAMPLING_STEPS, "guidance": GUIDANCE, "max_sequence_length": T5_LENGTH, "position_ids": "uno",
    }  # fmt: skip
    save_pipeline(
        pipeline, build.out / "flux", ("transformer", "vae", "text_encoder", "text_encoder_2"), settings
    )
    build.provenance("flux", {"flux": PLAN})
