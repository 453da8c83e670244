"""FLUX.2 [klein] as a trainable flow policy, on diffusers' Flux2KleinPipeline.

Latents run from noise (t = 1) to data (t = 0); the transformer is fed t and predicts noise - data. Latents here are
[B, C, h, w] as in FLUX.1, and packed two by two into tokens by the same rule; what the VAE's batch norm makes of such
patches is undone in `decode`. A position has four axes: picture, row, column, and place in the text. Reference pictures
follow the picture's own tokens: the first is picture 10, the second picture 20.

A prompt is read by Qwen3 as one turn of a chat, without thoughts. Its features are three hidden states side by side,
and padding is read as text is, without a mask.

Above a scale of 1 `guidance` is the usual u + scale * (c - u) with the empty prompt for u. Checkpoints that are
distilled to four steps say so in model_index.json, and the pipeline ignores a scale that it is given for them.

The schedule is shifted by the number of a picture's tokens and of steps, by constants in the pipeline's code rather
than in the scheduler's config.

Deviation from the pipeline: references are on squares of `references.side`, or with `references.shape: own` that long;
the pipeline shows them in their own shape and size, up to as many pixels as 1024 x 1024.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from pixrl.errors import InputError
from pixrl.hub_check import INDEX, read_json
from pixrl.models.base import Conditioning, SamplingSettings
from pixrl.models.flux import pack_latents, token_size, unpack_latents
from pixrl.models.language import LanguagePolicy, chat_frame
from pixrl.models.references import TokenReferences
from pixrl.models.slots import KNOWN_TARGETS
from pixrl.models.text import PerturbableText

PATCH = 2
"""Rows and columns of latents in a token."""
APART = 10
"""The distance from one picture to the next on the first axis of positions."""
DISTILLED = SamplingSettings(steps=4, guidance=0.0, resolution=1024)


class Flux2KleinPolicy(LanguagePolicy, TokenReferences, PerturbableText):
    """FLUX.2 [klein], 4B or 9B, base or distilled, as a trainable policy with any number of reference pictures."""

    pipelines = ("Flux2KleinPipeline",)
    pipeline_class = "Flux2KleinPipeline"
    lora_layout = "flux2-klein"
    reads_pictures = True
    licences: ClassVar[Mapping[str, str]] = {
        "black-forest-labs/FLUX.2-klein-4B": "Apache-2.0",
        "black-forest-labs/FLUX.2-klein-base-4B": "Apache-2.0",
        "black-forest-labs/FLUX.2-klein-9B": "FLUX Non-Commercial License",
        "black-forest-labs/FLUX.2-klein-base-9B": "FLUX Non-Commercial License",
    }
    defaults = SamplingSettings(steps=50, guidance=4.0, resolution=1024)
    lora_targets = (*KNOWN_TARGETS, "attn.to_qkv_mlp_proj")
    layers = (9, 18, 27)
    even_levels = True
    takes_padding = True

    def _defaults(self, folder: Path) -> SamplingSettings:
        return DISTILLED if _is_distilled(folder) else self.defaults

    def _check_options(self, guidance: float | None, t5: bool) -> None:
        super()._check_options(guidance, t5)
        if guidance is not None and _is_distilled(self.checkpoint.folder):
            raise InputError(
                f"guidance {guidance:g} has no effect: {self.name} is distilled to few steps, and draws without. "
                "Leave it out."
            )

    def _latent_geometry(self) -> tuple[int, int]:
        return int(self.pipeline.transformer.config.in_channels) // PATCH**2, PATCH

    def frame(self, tokenizer: Any) -> tuple[str, str]:
        return chat_frame(tokenizer, thinks=False)

    def _shift_mu(self, steps: int) -> float:
        """Return a shift that is linear in the tokens, and up to 4300 of them in the steps too.

        Source: black-forest-labs/flux2, by way of diffusers' `compute_empirical_mu`.
        """
        tokens = self._shift_tokens()
        at_200 = 0.00016927 * tokens + 0.45666666
        if tokens > 4300:
            return at_200
        at_10 = 8.73809524e-05 * tokens + 1.89833333
        return at_200 + (at_10 - at_200) / 190 * (200 - steps)

    def predict(self, x_t: Tensor, t_B: Tensor, conditioning: Conditioning) -> Tensor:
        pictures = (x_t, *conditioning.references)
        rows, columns = token_size(x_t)
        places = [
            _positions(1, *token_size(latents), 1, picture=APART * number)
            for number, latents in enumerate(pictures)
        ]
        found: Tensor = self.denoiser(
            hidden_states=torch.cat([pack_latents(latents) for latents in pictures], dim=1),
            timestep=t_B,
            encoder_hidden_states=conditioning.tokens_BLD,
            txt_ids=_positions(1, 1, 1, conditioning.tokens_BLD.shape[1]).to(self.device),
            img_ids=torch.cat(places).to(self.device),
            return_dict=False,
        )[0]
        return unpack_latents(found[:, : rows * columns].float(), (rows, columns))


def _positions(*sizes: int, picture: int = 0) -> Tensor:
    """Return the position [n, 4] of every place in a grid of these sizes: picture, row, column, place in the text."""
    places = torch.cartesian_prod(*(torch.arange(size) for size in sizes))
    places[:, 0] += picture
    return places


def _is_distilled(folder: Path) -> bool:
    return bool(read_json(folder / INDEX).get("is_distilled", False))
