"""`turbo`: a StableDiffusionXLPipeline that draws in four steps without guidance, the class that RMLer fuses with.

Two rounds. A teacher learns to denoise (v-prediction; Salimans and Ho 2022) and draws endings of its own trajectories,
with guidance, from known noises. The student starts from the teacher and learns, at each of its four steps and from
where its own steps before have led it, to foresee the ending.
"""

import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor

from toy_build.clip import WIDTH, tokens
from toy_build.generators import Aligned, Latents, dropped, load_vae, part_shares, save_pipeline
from toy_build.pictures import pictures
from toy_build.sd3 import Texts
from toy_build.texts import SECOND_WIDTH
from toy_build.training import Build, Draw, Lesson, Plan
from toy_build.vae import FACTOR, LATENT_CHANNELS
from toy_build.world.language import caption
from toy_build.world.scene import SIDE

TEACHER = Plan(steps=16_000, batch=64, lr=1e-3, warmup=300, weight_decay=0.01, ema=0.9993, level=0.6)
STUDENT = Plan(steps=4_000, batch=64, lr=4e-4, warmup=100, weight_decay=0.0, ema=0.999, level=0.4)
SCENES = 60_000
STEPS, TRAIN_STEPS = 4, 1000
TEACHER_STEPS, GUIDANCE, ENDINGS = 25, 1.6, 16_384
CHANNELS = (48, 96)
SIZE_NUMBERS, SIZE_WIDTH = 6, 8
LATENT_SIDE = SIDE // FACTOR


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), block_out_channels=CHANNELS,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 3), cross_attention_dim=WIDTH + SECOND_WIDTH, use_linear_projection=True,
        norm_num_groups=8, addition_embed_type="text_time", addition_time_embed_dim=SIZE_WIDTH,
        projection_class_embeddings_input_dim=SIZE_NUMBERS * SIZE_WIDTH + WIDTH,
    )  # fmt: skip


def new_scheduler() -> EulerDiscreteScheduler:
    """Deterministic, from the noisiest of the trained steps on."""
    return EulerDiscreteScheduler(
        num_train_timesteps=TRAIN_STEPS, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type="v_prediction", timestep_spacing="trailing",
    )  # fmt: skip


class Denoiser:
    """A UNet as its pipeline asks it: at a place of the schedule, it foresees the clean latents."""

    def __init__(self, unet: UNet2DConditionModel, steps: int, device: torch.device) -> None:
        self.unet = unet
        scheduler = new_scheduler()
        scheduler.set_timesteps(steps)
        self.sigmas, self.times = scheduler.sigmas.to(device), scheduler.timesteps.to(device)
        self.start = float(scheduler.init_noise_sigma)

    def clean(self, x: Tensor, place: Tensor, features: Tensor, pooled: Tensor) -> Tensor:
        """The clean latents foreseen in x [B, C, H, W] at the schedule's places [B]."""
        sigma = self.sigmas[place].view(-1, 1, 1, 1)
        scale = (sigma**2 + 1).sqrt()
        v = ask(self.unet, x / scale, self.times[place], features, pooled)
        foreseen: Tensor = x / scale**2 - v * sigma / scale
        return foreseen

    def step(self, x: Tensor, clean: Tensor, place: int) -> Tensor:
        """Euler's step from one place of the schedule to the next."""
        moved: Tensor = clean + (x - clean) * (self.sigmas[place + 1] / self.sigmas[place])
        return moved


def ask(unet: UNet2DConditionModel, x: Tensor, times: Tensor, features: Tensor, pooled: Tensor) -> Tensor:
    """What the UNet answers, told that pictures are whole."""
    sizes = torch.tensor([SIDE, SIDE, 0, 0, SIDE, SIDE], dtype=x.dtype, device=x.device).expand(len(x), -1)
    given = {"text_embeds": pooled, "time_ids": sizes}
    answer: Tensor = unet(x, times, encoder_hidden_states=features, added_cond_kwargs=given).sample.float()
    return answer


def build_turbo(build: Build) -> None:
    """Train and save `turbo`."""
    torch.manual_seed(build.seed)
    known = Latents.of(build, pictures(build.work, "fusion", SCENES, build.seed))
    texts = Texts(build)
    unet = new_unet().to(build.device, memory_format=torch.channels_last)
    _teach(build, unet, known, texts)
    student = copy.deepcopy(unet)
    _distil(build, student, known, texts, _endings(build, unet, known, texts))
    pipeline = StableDiffusionXLPipeline(
        unet=student.eval(), scheduler=new_scheduler(), vae=load_vae(build), tokenizer=texts.tokenizer,
        text_encoder=texts.towers[0], text_encoder_2=texts.towers[1], tokenizer_2=texts.tokenizer,
        force_zeros_for_empty_prompt=False,
    )  # fmt: skip
    settings = {"steps": STEPS, "guidance": 0.0}
    save_pipeline(pipeline, build.out / "turbo", ("unet", "vae", "text_encoder", "text_encoder_2"), settings)
    build.provenance("turbo", {"turbo_teacher": TEACHER, "turbo": STUDENT})


def _teach(build: Build, unet: UNet2DConditionModel, known: Latents, texts: Texts) -> None:
    aligned = Aligned(unet, unet.mid_block, CHANNELS[-1]).to(build.device)
    cumulative = new_scheduler().alphas_cumprod.to(build.device)

    def lesson(draw: Draw) -> Lesson:
        rows = draw.rows(len(known.data), TEACHER.batch)
        captions = dropped([caption(known.data.scene(int(row)), draw.rng) for row in rows], draw)
        ids, _ = tokens(texts.tokenizer, captions)
        x0, shares = known.latents[rows].float(), part_shares(known.data.parts(rows))
        times = torch.from_numpy(draw.rng.integers(TRAIN_STEPS, size=len(x0)))
        return x0, draw.normal(*x0.shape), times, ids, known.patches[rows], shares

    def loss(
        x0: Tensor, noise: Tensor, times: Tensor, ids: Tensor, patches: Tensor, shares: Tensor
    ) -> Tensor:
        with build.autocast():
            features, (_, pooled) = texts(ids)
            signal, noisiness = (
                cumulative[times].sqrt().view(-1, 1, 1, 1),
                (1 - cumulative[times]).sqrt().view(-1, 1, 1, 1),
            )
            v = ask(unet, signal * x0 + noisiness * noise, times, features, pooled)
            return F.mse_loss(v, signal * noise - noisiness * x0) + aligned.loss(patches, shares)

    build.fit("turbo_teacher", aligned, TEACHER, lesson, loss)


def _captions(known: Latents, seed: int) -> list[str]:
    """One caption for every ending."""
    rng = np.random.default_rng((seed, 8))
    return [caption(known.data.scene(int(row)), rng) for row in rng.integers(len(known.data), size=ENDINGS)]


def _noises(seed: int, start: int, count: int) -> Tensor:
    """The noises of some endings [count, C, H, W]."""
    shape = (LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE)
    return torch.stack(
        [
            torch.randn(shape, generator=torch.Generator().manual_seed(seed * 7919 + start + k))
            for k in range(count)
        ]
    )


@torch.inference_mode()
def _endings(build: Build, unet: UNet2DConditionModel, known: Latents, texts: Texts) -> Tensor:
    """Where the teacher's trajectories end [ENDINGS, C, H, W], half precision; kept on disk in parts."""
    folder = build.work / "turbo" / "endings"
    folder.mkdir(parents=True, exist_ok=True)
    captions = _captions(known, build.seed)
    denoiser, unet = Denoiser(unet.eval(), TEACHER_STEPS, build.device), unet.eval()
    parts = []
    for start in range(0, ENDINGS, 256):
        path = folder / f"{start}.npy"
        if not path.exists():
            np.save(
                _beside(path), _ending(build, denoiser, texts, captions[start : start + 256], start).numpy()
            )
            _beside(path).replace(path)
        parts.append(torch.from_numpy(np.load(path)))
    return torch.cat(parts)


def _beside(path: Path) -> Path:
    return path.with_suffix(".tmp.npy")


def _ending(build: Build, denoiser: Denoiser, texts: Texts, captions: list[str], start: int) -> Tensor:
    features, (_, pooled) = texts(tokens(texts.tokenizer, captions)[0].to(build.device))
    empty, (_, empty_pooled) = texts(tokens(texts.tokenizer, [""] * len(captions))[0].to(build.device))
    x = _noises(build.seed, start, len(captions)).to(build.device) * denoiser.start
    with build.autocast():
        for number in range(TEACHER_STEPS):
            place = torch.full((len(x),), number, device=x.device)
            with_text = denoiser.clean(x, place, features, pooled)
            without = denoiser.clean(x, place, empty, empty_pooled)
            x = denoiser.step(x, without + GUIDANCE * (with_text - without), number)
    return x.half().cpu()


def _distil(build: Build, unet: UNet2DConditionModel, known: Latents, texts: Texts, endings: Tensor) -> None:
    captions = _captions(known, build.seed)
    denoiser = Denoiser(unet, STEPS, build.device)

    def lesson(draw: Draw) -> Lesson:
        start = int(draw.rng.integers(ENDINGS - STUDENT.batch))
        ids, _ = tokens(texts.tokenizer, captions[start : start + STUDENT.batch])
        noise = _noises(build.seed, start, STUDENT.batch)
        return noise, endings[start : start + STUDENT.batch].float(), ids, int(draw.rng.integers(STEPS))

    def loss(noise: Tensor, ending: Tensor, ids: Tensor, place: int) -> Tensor:
        with build.autocast():
            features, (_, pooled) = texts(ids)
            x = noise * denoiser.start
            for number in range(place):
                with torch.no_grad():
                    x = denoiser.step(x, denoiser.clean(x, _all(number, x), features, pooled), number)
            return F.mse_loss(denoiser.clean(x, _all(place, x), features, pooled), ending)

    build.fit("turbo", unet, STUDENT, lesson, loss)


def _all(place: int, x: Tensor) -> Tensor:
    return torch.full((len(x),), place, device=x.device)
