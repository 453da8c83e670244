"""SDXL and SDXL-Turbo as a trainable policy, on diffusers' StableDiffusionXLPipeline.

They were trained as diffusion models: the UNet sees alpha x0 + s noise with alpha^2 + s^2 = 1, at one of a thousand
levels, and predicts the noise, or v = alpha noise - s x0. Divided by alpha + s that input is (1 - t) x0 + t noise with
t = s / (alpha + s), a point on a rectified flow's path, and both predictions give its velocity, noise - x0. So every
loss and every sampler of a flow policy is exact on it:

| prediction | velocity at x_t                                                        |
|------------|------------------------------------------------------------------------|
| noise      | (noise - x_t) / (1 - t)                                                |
| v          | (s - alpha) x + (s + alpha) v, where x = alpha x0 + s noise            |

Euler's step on the velocity is the scheduler's Euler step, which is DDIM's; the random step of `sampling.noise: cps` is
DDIM's (Song et al. 2021, Eq. 12) with a standard deviation of s sin(eta pi / 2). The highest level is short of pure
noise (t = 0.936), and a picture begins there.

`sample` runs the pipeline's own scheduler, so that its pictures are those of diffusers: SDXL-Turbo, drawn in 4 steps
without guidance at 512 x 512, takes ancestral steps, whose noise is seeded per picture; the base model is drawn in 50
steps with guidance 5 at 1024 x 1024. The schedulers of their folders tell them apart.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

from pixrl.device import DType
from pixrl.errors import CheckpointError
from pixrl.hub_check import read_json
from pixrl.models.base import Conditioning, Mixture, SamplingSettings
from pixrl.models.latents import memory_format
from pixrl.models.memory.plan import MemoryPlan
from pixrl.models.pipeline import FlowPipelinePolicy, averaged, draw, generators
from pixrl.models.regions import cross_attention
from pixrl.models.text import ClipEncoder, PerturbableText

TEXT_LENGTH = 77
SIZES = 6
"""The numbers of a picture's size and crop that are an input of the UNet."""
TURBO = SamplingSettings(steps=4, guidance=0.0, resolution=512)
BASE = SamplingSettings(steps=50, guidance=5.0, resolution=1024)
"""The defaults of the published pipeline."""
NEAR = 1e-3
NOISE, V = "epsilon", "v_prediction"
"""What the UNet of a checkpoint predicts, in the words of its scheduler's config."""


class SDXLPolicy(FlowPipelinePolicy, PerturbableText):
    """SDXL or SDXL-Turbo as a trainable policy."""

    pipelines = ("StableDiffusionXLPipeline",)
    pipeline_class = "StableDiffusionXLPipeline"
    gpu_dtype = DType.FLOAT16
    lora_layout = "sdxl"
    reads_regions = True
    defaults = BASE
    lora_targets = tuple(f"attn{n}.{name}" for n in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0"))
    licences: ClassVar[Mapping[str, str]] = {
        "stabilityai/stable-diffusion-xl-base-1.0": "CreativeML Open RAIL++-M",
        "stabilityai/sdxl-turbo": "Stability AI Non-Commercial Research Community License",
    }

    def _defaults(self, folder: Path) -> SamplingSettings:
        """Return Turbo's settings where the timesteps are trailing; those of the base model are leading."""
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
        return TURBO if scheduler.get("timestep_spacing") == "trailing" else self.defaults

    def _place(self, plan: MemoryPlan, *, placed: bool) -> None:
        self.pipeline.unet.to(memory_format=memory_format(self.device, self.pipeline.unet.dtype))
        super()._place(plan, placed=placed)

    def _latent_geometry(self) -> tuple[int, int]:
        return int(self.pipeline.unet.config.in_channels), 1

    def blank(self) -> Conditioning:
        config, dtype = self.pipeline.unet.config, self.precision.weights
        pooled = config.projection_class_embeddings_input_dim - SIZES * config.addition_time_embed_dim
        tokens = torch.zeros(1, TEXT_LENGTH, config.cross_attention_dim, dtype=dtype)
        return Conditioning(tokens, torch.zeros(1, pooled, dtype=dtype))

    def _encode_one(self, prompt: str) -> Conditioning:
        with self.text_present():
            tokens, _, pooled, _ = self.pipeline.encode_prompt(
                prompt=[prompt], device=self.device, do_classifier_free_guidance=False
            )
        return Conditioning(tokens, pooled)

    def _unconditional(self, rows: int) -> Conditioning:
        away = super()._unconditional(rows)
        is_zero = self.settings.negative_prompt is None and self.pipeline.config.force_zeros_for_empty_prompt
        return away._map(torch.zeros_like) if is_zero else away

    def text_encoders(self) -> tuple[ClipEncoder, ...]:
        """Return CLIP-L, which gives tokens alone, and CLIP-G, whose pooled features are the model's."""
        pipeline = self.pipeline
        first, second = pipeline.text_encoder.config.hidden_size, pipeline.text_encoder_2.config
        return (
            ClipEncoder(
                name="clip_l",
                model=pipeline.text_encoder,
                tokenizer=pipeline.tokenizer,
                length=pipeline.tokenizer.model_max_length,
                projected=False,
                pooled_columns=None,
                token_columns=slice(0, first),
            ),
            ClipEncoder(
                name="clip_g",
                model=pipeline.text_encoder_2,
                tokenizer=pipeline.tokenizer_2,
                length=pipeline.tokenizer_2.model_max_length,
                projected=True,
                pooled_columns=slice(0, second.projection_dim),
                token_columns=slice(first, first + second.hidden_size),
            ),
        )

    @cached_property
    def _levels(self) -> Tensor:
        """The noise over the signal, s / alpha, of the timesteps that the UNet was trained at, rising, float64."""
        kept: Tensor = self.pipeline.scheduler.alphas_cumprod.double()
        return ((1 - kept) / kept).sqrt().to(self.device)

    def schedule(self, steps: int) -> Tensor:
        """Return the levels of trailing timesteps, whose first is the noisiest, whatever `sample` takes."""
        last = len(self._levels)
        timesteps = (torch.arange(steps, 0, -1, dtype=torch.float64) * last / steps).round().long() - 1
        ratios = self._levels.cpu()[timesteps]
        return torch.cat((ratios / (1 + ratios), ratios.new_zeros(1))).float()

    @property
    def draws_by_euler(self) -> bool:
        scheduler = self.pipeline.scheduler
        return (
            isinstance(scheduler, EulerDiscreteScheduler) and scheduler.config.timestep_spacing == "trailing"
        )

    def _timesteps_at(self, ratios_B: Tensor) -> Tensor:
        """Return where these levels stand among the UNet's timesteps, between two of them in proportion.

        A timestep's own level is it exactly: the last digits of a level in float32 are `NEAR` of a timestep.
        """
        levels = self._levels
        ratios_B = ratios_B.clamp(levels[0], levels[-1])
        above = torch.searchsorted(levels, ratios_B).clamp(min=1)
        low, high = levels[above - 1], levels[above]
        found = above - 1 + (ratios_B - low) / (high - low)
        return torch.where((found - found.round()).abs() < NEAR, found.round(), found)

    def predict(self, x_t: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        kind = str(self.pipeline.scheduler.config.prediction_type)
        if kind not in (NOISE, V):
            raise CheckpointError(
                f"{self.checkpoint.folder}/scheduler says prediction_type {kind!r}; SDXL is read as {NOISE} or {V}."
            )
        t = t_B.double()
        timesteps_B = self._timesteps_at(t / (1 - t)).float()
        norm = ((1 - t).square() + t.square()).sqrt()
        alpha, s, norm, t = (one.float().view(-1, 1, 1, 1) for one in ((1 - t) / norm, t / norm, norm, t))
        x = x_t / norm
        found = self._unet(x, timesteps_B, conditioning)
        return (s - alpha) * x + (s + alpha) * found if kind == V else (found - x_t) / (1 - t)

    def _unet(self, x: Tensor, timesteps_B: Tensor, conditioning: Conditioning) -> Tensor:
        """Return what the UNet predicts for its own input, alpha x0 + s noise, in float32."""
        size = (self.settings.height, self.settings.width)  # the UNet takes rows before columns
        sizes = x.new_tensor([*size, 0, 0, *size]).expand(len(x), SIZES)
        with cross_attention(self, conditioning, (x.shape[2], x.shape[3])):
            found: Tensor = self.denoiser(
                x,
                timesteps_B,
                encoder_hidden_states=conditioning.tokens_BLD,
                added_cond_kwargs={"text_embeds": self.pooled(conditioning), "time_ids": sizes},
                return_dict=False,
            )[0]
        return found.float()

    def _integrate(self, source: Conditioning | Mixture, seeds: Sequence[int]) -> Tensor:
        """Take the steps of the pipeline's scheduler, and return the latents."""
        scheduler, noises = self.pipeline.scheduler, generators(seeds)
        scheduler.set_timesteps(self.settings.steps)
        extra = self.pipeline.prepare_extra_step_kwargs(noises, eta=0.0)  # ancestral noise, after the first
        x: Tensor = draw(noises, self.latent_shape).to(self.device) * scheduler.init_noise_sigma

        def predict(x: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
            on_device = conditioning.to(device=self.device)
            with self.precision.context(self.device):
                return self._guided(self._unet, x, t_B, on_device)

        for step, t in enumerate(scheduler.timesteps):
            inputs = scheduler.scale_model_input(x, t)
            found = averaged(predict, inputs, t.to(self.device), source, step)
            x = scheduler.step(found, t, x, **extra, return_dict=False)[0]
        return x
