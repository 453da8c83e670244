"""FLUX with reference pictures as a trainable flow policy, on diffusers' FluxPipeline.

Latents run from noise (t = 1) to data (t = 0). The latents of reference pictures are packed two by two like the
target's and appended after its tokens; the output is cut to the target's (UNO; FLUX.1 Kontext). The guidance scale is
an input of the distilled model, not a second pass. Reference tokens follow the target's in one sequence, so that the
transformer attends to them as to any other token; position ids tell them apart.
"""

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from pixrl.errors import CheckpointError, InputError, ShapeError, did_you_mean
from pixrl.hub import Checkpoint
from pixrl.hub_check import INDEX, read_json
from pixrl.models.base import Conditioning, SamplingSettings
from pixrl.models.references import ReferenceShape, TokenReferences
from pixrl.models.regions import joint_bias
from pixrl.models.slots import KNOWN_TARGETS
from pixrl.models.text import ClipEncoder, PerturbableText

SCHNELL_LENGTH = 256
SCHNELL = SamplingSettings(steps=4, guidance=0.0, resolution=512)
"""The settings of FLUX.1-schnell, which is distilled to four steps and has no guidance."""
KONTEXT_PIPELINE = "FluxKontextPipeline"
"""The pipeline of FLUX.1-Kontext, whose folder differs from FLUX's in that name alone."""
UNO_SHRINK = 64
"""The factor by which UNO counts fewer tokens than FLUX, one for 16 x 16 latents: its schedule is shifted less."""


class Preset(StrEnum):
    """The places of reference tokens: `uno` on a diagonal staircase after the target, `kontext` on their own plane."""

    UNO = "uno"
    KONTEXT = "kontext"


class Shift(StrEnum):
    """The rule that shifts a schedule by the resolution; it is the same for sampling and training."""

    FLUX = "flux"
    """The shift of FluxPipeline by the picture's tokens: mu = 0.630 at 512 x 512."""
    UNO = "uno"
    """The shift of UNO's published inference: mu = 0.459 at 512 x 512."""


Size = tuple[int, int]
"""The size of a picture in tokens: (rows, columns)."""


def position_ids(target: Size, references: Sequence[Size], preset: str) -> tuple[Tensor, list[Tensor]]:
    """Return the position ids of the target's tokens and of each reference's, float32 [rows * columns, 3].

    The target's ids are (0, row, column). With `uno` the first reference starts at (rows, columns) of the target and
    each next one further by the size of the one before; with `kontext` references lie at no offset with axis 0 at 1.

    Raises:
        InputError: an unknown preset, or a size that is not two positive whole numbers.

    Source: UNO (bytedance/UNO) and FLUX.1 Kontext; EQUATIONS.md, "Published settings for personalize".
    """
    if preset not in list(Preset):
        raise InputError(
            f"Unknown preset {preset!r}.{did_you_mean(str(preset), list(Preset))} Use {', '.join(Preset)}."
        )
    if not isinstance(references, Iterable):
        raise InputError(f"references must be a list of sizes, such as [(32, 32)], got {references!r}.")
    own, others = _checked_size(target), [_checked_size(size) for size in references]
    if preset == Preset.KONTEXT:
        return _grid(own), [_grid(size, plane=1) for size in others]
    starts = accumulate(chain([own], others), lambda a, b: (a[0] + b[0], a[1] + b[1]))
    return _grid(own), [_grid(size, start=start) for size, start in zip(others, starts, strict=False)]


def _checked_size(given: Any) -> Size:
    """Return a size as whole numbers; InputError unless it is two of at least 1 (2.0 is whole)."""
    try:
        rows, columns = given
        size = int(rows), int(columns)
        is_whole = size == (rows, columns)
    except (TypeError, ValueError, OverflowError):
        is_whole = False
    if not is_whole:
        raise InputError(
            f"A size in tokens is two whole numbers, (rows, columns), got {given!r}. Give position_ids one for the "
            "target and a list of them for the references, such as position_ids((32, 32), [(32, 32)], 'uno')."
        )
    if min(size) < 1:
        raise InputError(f"A size in tokens must be positive, got {size}.")
    return size


def _grid(size: Size, *, start: Size = (0, 0), plane: int = 0) -> Tensor:
    rows, columns = (
        torch.arange(n, dtype=torch.float32) + offset for n, offset in zip(size, start, strict=True)
    )
    row_ids, column_ids = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack((torch.full_like(row_ids, plane), row_ids, column_ids), dim=-1).flatten(0, 1)


def pack_latents(latents: Tensor) -> Tensor:
    """Pack latents [B, C, H, W] as tokens [B, H/2 * W/2, 4C], two by two as FLUX packs them.

    Raises:
        ShapeError: an odd side.
    """
    if latents.ndim != 4 or latents.shape[2] % 2 or latents.shape[3] % 2:
        raise ShapeError(f"pack_latents takes [B, C, H, W] with even H and W, got {list(latents.shape)}.")
    batch, channels, height, width = latents.shape
    blocks = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // 2) * (width // 2), 4 * channels)


def unpack_latents(tokens: Tensor, size: Size) -> Tensor:
    """Unpack tokens [B, rows * columns, 4C] as latents [B, C, 2 rows, 2 columns].

    Raises:
        ShapeError: the number of tokens is not rows * columns.
    """
    rows, columns = size
    if tokens.ndim != 3 or tokens.shape[1] != rows * columns or tokens.shape[2] % 4:
        raise ShapeError(
            f"unpack_latents takes [B, {rows * columns}, 4C] for {rows} x {columns} tokens, got {list(tokens.shape)}."
        )
    blocks = tokens.view(len(tokens), rows, columns, tokens.shape[2] // 4, 2, 2)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), tokens.shape[2] // 4, 2 * rows, 2 * columns)


class FluxPolicy(TokenReferences, PerturbableText):
    """FLUX as a trainable policy with any number of reference pictures; `preset` says how their tokens are placed."""

    pipelines = ("FluxPipeline", KONTEXT_PIPELINE)
    pipeline_class = "FluxPipeline"
    lora_layout = "flux"
    reads_regions = True
    reads_pictures = True
    licences: ClassVar[Mapping[str, str]] = {
        "black-forest-labs/FLUX.1-dev": "FLUX.1 [dev] Non-Commercial License",
        "black-forest-labs/FLUX.1-Kontext-dev": "FLUX.1 [dev] Non-Commercial License",
        "black-forest-labs/FLUX.1-schnell": "Apache-2.0",
        "bytedance-research/UNO": "CC BY-NC 4.0",
    }
    reads_negative_prompt = False  # its guidance is an input, not a second pass
    defaults = SamplingSettings(steps=25, guidance=4.0, resolution=512)
    lora_targets = KNOWN_TARGETS
    even_levels = True

    def __init__(self, checkpoint: Checkpoint, **options: Any) -> None:
        """Load the checkpoint; the options are those of `FlowPipelinePolicy`.

        The preset is the card's; without one it is kontext for that pipeline and uno for others.
        """
        super().__init__(checkpoint, **options)
        folder, named = checkpoint.folder, self.card.position_ids
        if named is None:
            is_kontext = read_json(folder / INDEX).get("_class_name") == KONTEXT_PIPELINE
            named = Preset.KONTEXT if is_kontext else Preset.UNO
        if named not in list(Preset):
            raise CheckpointError(
                f"{folder}: its card names the position ids {named!r}.{did_you_mean(named, list(Preset))} "
                f"Known are {', '.join(Preset)}."
            )
        self.preset = Preset(named)
        self.shift = Shift.FLUX

    def _defaults(self, folder: Path) -> SamplingSettings:
        return self.defaults if _is_guided(folder) else SCHNELL

    def _check_options(self, guidance: float | None, t5: bool) -> None:
        super()._check_options(guidance, t5)
        if guidance is not None and not _is_guided(self.checkpoint.folder):
            raise InputError(
                f"guidance {guidance:g} has no effect: {self.name} has no guidance embedding (as FLUX.1-schnell). "
                "Leave it out."
            )

    def place(
        self,
        *,
        side: int | None = None,
        shape: ReferenceShape | None = None,
        preset: Preset | None = None,
        shift: Shift | None = None,
    ) -> None:
        """Set how references are placed and sized and the schedule is shifted, in place of what the checkpoint says.

        Raises:
            InputError: the side is no multiple of two latents, or the shift would have no effect.
        """
        super().place(side=side, shape=shape)
        if shift is not None and not self.pipeline.scheduler.config.use_dynamic_shifting:
            raise InputError(
                f"shift {shift.value} has no effect: the schedule of {self.name} does not depend on the resolution."
            )
        self.preset = self.preset if preset is None else preset
        self.shift = self.shift if shift is None else shift

    def _latent_geometry(self) -> tuple[int, int]:
        return int(self.pipeline.transformer.config.in_channels) // 4, 2

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode one row a prompt, without references; a toy model's words are in lower case."""
        if self.vocabulary is not None:
            prompts = [prompt.lower() for prompt in prompts]
        return super().encode(prompts)

    def blank(self) -> Conditioning:
        config = self.pipeline.transformer.config
        dtype = self.precision.weights
        tokens = torch.zeros(1, self.text_length, config.joint_attention_dim, dtype=dtype)
        return Conditioning(tokens, torch.zeros(1, config.pooled_projection_dim, dtype=dtype))

    def _encode_one(self, prompt: str) -> Conditioning:
        with self.text_present():
            tokens, pooled, _ = self.pipeline.encode_prompt(
                prompt=[prompt], prompt_2=None, device=self.device, max_sequence_length=self.text_length
            )
        return Conditioning(tokens, pooled)

    @property
    def text_length(self) -> int:
        """The number of token features: the card's, 512, or 256 where the model has no guidance embedding (schnell)."""
        is_schnell = not self.pipeline.transformer.config.guidance_embeds
        return SCHNELL_LENGTH if is_schnell and self.card.max_sequence_length is None else super().text_length

    def text_encoders(self) -> tuple[ClipEncoder, ...]:
        """Return CLIP-L, of which FLUX takes the pooled features alone; its token features are T5's."""
        model = self.pipeline.text_encoder
        return (
            ClipEncoder(
                name="clip_l",
                model=model,
                tokenizer=self.pipeline.tokenizer,
                length=self.pipeline.tokenizer_max_length,
                projected=False,
                pooled_columns=slice(0, model.config.hidden_size),
                token_columns=None,
            ),
        )

    def _shift_tokens(self) -> int:
        tokens = super()._shift_tokens()
        return tokens if self.shift is Shift.FLUX else tokens // UNO_SHRINK

    @property
    def guidance_scale(self) -> float:
        """None of `_guided`'s: the network is given the scale, and there is no second pass."""
        return 1.0

    def predict(self, x_t: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        size = token_size(x_t)
        packed = [pack_latents(latents) for latents in (x_t, *conditioning.references)]
        own, others = position_ids(
            size, [token_size(latents) for latents in conditioning.references], self.preset
        )
        guidance = None  # a distilled model takes the scale in float32; one without the embedding takes none
        if self.pipeline.transformer.config.guidance_embeds:
            guidance = torch.full((len(x_t),), self.settings.guidance, device=self.device)
        bias = joint_bias(conditioning, size, image_first=False)
        tokens: Tensor = self.denoiser(
            hidden_states=torch.cat(packed, dim=1),
            timestep=t_B,
            guidance=guidance,
            pooled_projections=self.pooled(conditioning),
            encoder_hidden_states=conditioning.tokens_BLD,
            txt_ids=torch.zeros(conditioning.tokens_BLD.shape[1], 3, device=self.device),
            img_ids=torch.cat((own, *others)).to(self.device),
            joint_attention_kwargs=None if bias is None else {"attention_mask": bias},
            return_dict=False,
        )[0]
        return unpack_latents(tokens[:, : size[0] * size[1]].float(), size)


def token_size(latents: Tensor) -> Size:
    """Return the rows and columns of the tokens that latents [B, C, h, w] are packed into."""
    return latents.shape[2] // 2, latents.shape[3] // 2


def _is_guided(folder: Path) -> bool:
    """Return whether the transformer takes the guidance scale as an input, as FLUX.1-dev and Kontext do."""
    return bool(read_json(folder / "transformer" / "config.json").get("guidance_embeds", False))
