"""Prompts that a language model reads within a frame of text, such as one turn of a chat.

Whatever a pipeline takes of the model (which hidden states, without which first tokens, with padding or without it) is
said once, by `LanguageEncoder`, for prompts as they are and for variants from changed embeddings. `LanguagePolicy` is
what the adapters of such pipelines share.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from pixrl.errors import CheckpointError, ShapeError
from pixrl.models.base import Conditioning
from pixrl.models.pipeline import FlowPipelinePolicy
from pixrl.models.text import LANGUAGE, PromptText, TextEncoder, TextFeatures, lerp_rows

_MARK = "PROMPT"
"""What stands for the prompt where a chat template is asked for the text around it."""


@dataclass(frozen=True)
class LanguageEncoder(TextEncoder):
    """A causal language model that reads a prompt within a frame of text, such as one turn of a chat.

    Its pooled features are what the pipeline takes of the first token after the prompt, which sees all of it, as CLIP's
    end token does.
    """

    frame: tuple[str, str]
    """The text before and after a prompt; the second begins with a special token."""
    layers: tuple[int, ...]
    """The hidden states that the pipeline takes, side by side; -1 is the last."""
    skipped: int = 0
    """The number of first rows that the pipeline leaves out."""
    takes_padding: bool = False
    """Whether the pipeline takes the rows of padding as it takes others, without a mask."""

    def encode(self, prompt: str, **given: Any) -> Conditioning:
        """Return a prompt as the pipeline reads it, one row of `length - skipped` tokens.

        Padding is zeros, which the mask tells apart, unless the pipeline takes its rows. `given`: what else the model
        is given, such as pictures.
        """
        ids_1L = self._tokens(prompt, padded=self.takes_padding).input_ids.to(self.model.device)
        embeddings_1LD = self.model.get_input_embeddings()(ids_1L)
        tokens_1LD = self._states(ids_1L, embeddings_1LD, **given)[:, self.skipped :]
        if self.takes_padding:
            return Conditioning(tokens_1LD)
        own, length = tokens_1LD.shape[1], self.length - self.skipped
        mask_1L = torch.arange(length, device=ids_1L.device)[None] < own
        return Conditioning(pad(tokens_1LD, (0, 0, 0, length - own)), mask_BL=mask_1L)

    def read(self, prompt: str) -> PromptText:
        before, _ = self.frame
        found = self._tokens(prompt, padded=True, return_offsets_mapping=True)
        ids: Tensor = found.input_ids.to(self.model.device)
        first_L, last_L = found.offset_mapping[0].to(self.model.device).unbind(dim=1)
        inside_L = (first_L >= len(before)) & (last_L <= len(before) + len(prompt)) & (first_L < last_L)
        return self._text(ids[0], inside_L & self._own(ids)[0], int(self._ends(ids)[0]), prompt)

    def pooled(self, ids_BL: Tensor, embeddings_BLD: Tensor) -> Tensor:
        return self._at_ends(ids_BL, self._states(ids_BL, embeddings_BLD)).float()

    def features(self, ids_BL: Tensor, embeddings_BLD: Tensor) -> TextFeatures:
        states_BLD = self._states(ids_BL, embeddings_BLD)
        return TextFeatures(self._at_ends(ids_BL, states_BLD), states_BLD[:, self.skipped :])

    def blend(self, conditioning: Conditioning, features: TextFeatures, weight_B: Tensor) -> Conditioning:
        rows, other = len(conditioning), features.tokens_KLD
        if other is None or other.shape != conditioning.tokens_BLD.shape or len(weight_B) != rows:
            raise ShapeError(
                f"blend: conditionings {list(conditioning.tokens_BLD.shape)}, features "
                f"{None if other is None else list(other.shape)} and {len(weight_B)} weights; give one row each."
            )
        tokens = conditioning.tokens_BLD.clone()
        lerp_rows(tokens, other, weight_B)
        if conditioning.mask_BL is not None:
            tokens = tokens.masked_fill(~conditioning.mask_BL[:, :, None], 0)
        return replace(conditioning, tokens_BLD=tokens)

    def _tokens(self, prompt: str, *, padded: bool, **options: Any) -> Any:
        return self.tokenizer(
            [prompt.join(self.frame)],
            padding="max_length" if padded else False,
            max_length=self.length,
            truncation=True,
            padding_side="right",
            return_tensors="pt",
            **options,
        )

    def _states(self, ids_BL: Tensor, embeddings_BLD: Tensor, **given: Any) -> Tensor:
        output = self._run(
            ids_BL,
            embeddings_BLD,
            attention_mask=self._own(ids_BL).long(),
            output_hidden_states=True,
            use_cache=False,
            **given,
        )
        return torch.cat([output.hidden_states[layer] for layer in self.layers], dim=-1)

    def _own(self, ids_BL: Tensor) -> Tensor:
        """Return a mask that is false on padding, which stands behind the last token of another kind."""
        others_BL: Tensor = ids_BL != self.tokenizer.pad_token_id
        return others_BL.int().flip(1).cumsum(dim=1).flip(1) > 0

    def _ends(self, ids_BL: Tensor) -> Tensor:
        """Return the place [B] of the first token after each prompt, or of its last one where that was cut off."""
        before, after = (self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in self.frame)
        behind_BL = (ids_BL == after[0]) & (
            torch.arange(ids_BL.shape[1], device=ids_BL.device) >= len(before)
        )
        last_B = self._own(ids_BL).sum(dim=1) - 1
        return torch.where(behind_BL.any(dim=1), behind_BL.int().argmax(dim=1), last_B)

    def _at_ends(self, ids_BL: Tensor, states_BLD: Tensor) -> Tensor:
        return states_BLD[torch.arange(len(ids_BL), device=ids_BL.device), self._ends(ids_BL)]


def chat_frame(tokenizer: Any, *, thinks: bool) -> tuple[str, str]:
    """Return the text before and after what a user says in a chat's first turn, up to where the answer begins.

    `thinks`: whether the template leaves room for the model's thoughts, as Qwen3's calls it.

    Raises:
        CheckpointError: the tokenizer has no chat template, or one that changes what the user says.
    """
    if not tokenizer.chat_template:
        raise CheckpointError(
            "The tokenizer has no chat template, within which this model reads a prompt. Download it again: "
            "chat_template.jinja, or chat_template in tokenizer_config.json, is missing."
        )
    turn = [{"role": "user", "content": _MARK}]
    text = tokenizer.apply_chat_template(
        turn, tokenize=False, add_generation_prompt=True, enable_thinking=thinks
    )
    before, mark, after = text.partition(_MARK)
    if not mark or not after:
        raise CheckpointError(f"The tokenizer's chat template does not hold what the user says: {text!r}.")
    return before, after


class LanguagePolicy(FlowPipelinePolicy):
    """A trainable flow pipeline whose prompts one language model reads."""

    layers: ClassVar[tuple[int, ...]]
    """The hidden states of the language model that are a prompt's features, side by side; -1 is the last."""
    takes_padding: ClassVar[bool] = False
    """Whether the transformer takes the rows of padding as it takes others, without a mask."""
    width_option: ClassVar[str] = "joint_attention_dim"
    """The option of the transformer that is the width of a prompt's features."""

    @abstractmethod
    def frame(self, tokenizer: Any) -> tuple[str, str]:
        """Return the text before and after a prompt, for this tokenizer of the pipeline."""

    @property
    def skipped(self) -> int:
        """The number of the frame's first tokens that the pipeline leaves out."""
        return 0

    @property
    def framed_length(self) -> int:
        return self.text_length + self.skipped

    def framed(self, prompt: str, tokenizer: Any) -> str:
        return prompt.join(self.frame(tokenizer))

    def blank(self) -> Conditioning:
        width = int(self.pipeline.transformer.config[self.width_option])
        return Conditioning(torch.zeros(1, self.text_length, width, dtype=self.precision.weights))

    def _encode_one(self, prompt: str) -> Conditioning:
        with self.text_present():
            return self.text_encoders()[0].encode(prompt)

    def text_encoders(self) -> tuple[LanguageEncoder, ...]:
        """Return the language model, whose features of a prompt are all that the transformer is given of it."""
        tokenizer = self.pipeline.tokenizer
        return (
            LanguageEncoder(
                name=LANGUAGE,
                model=self.pipeline.text_encoder,
                tokenizer=tokenizer,
                length=self.framed_length,
                frame=self.frame(tokenizer),
                layers=self.layers,
                skipped=self.skipped,
                takes_padding=self.takes_padding,
            ),
        )
