"""HPSv3 (Ma et al. 2025): Qwen2-VL reads an instruction with the picture and the prompt; a head reads one token.

    (mu, sigma) = head(h at <|Reward|>),   reward = mu

What its numbers depend on, beside the weights:
  1. Plain positions. It was trained where Qwen2-VL counts tokens 0, 1, 2 ... on all three axes of its rotary
     embedding; transformers 5 would give picture tokens rows and columns. The positions are passed explicitly.
  2. The template, word for word, padded on the right.
  3. Pictures of 256 patches of 28 x 28, sides rounded to multiples of 28, bicubic.
Prompts that hold one of the tokenizer's special tokens would write into the template: they fail.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from pixrl.device import choose_device, choose_precision, quiet_loading
from pixrl.errors import CheckpointError, ShapeError
from pixrl.hub_check import read_json
from pixrl.rewards.base import DifferentiableReward, Form, Options, Read
from pixrl.rewards.preprocess import OPENAI_MEAN, OPENAI_STD, Preprocessing, load_tokenizer, score_pairs
from pixrl.rewards.weights import (
    build,
    describe_words,
    find_file,
    load_weights,
    origin,
    part,
    read_weights,
    words_folder,
)
from pixrl.types import RewardBatch, Scores

WEIGHTS = "HPSv3.safetensors"
LICENCE = "MIT"
WORDS_LICENCE = "Apache-2.0"
"""The licence of Qwen2-VL-7B-Instruct."""
TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{picture}<|vision_end|>{text}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
"""Qwen2-VL's chat template of one picture and one text."""
# The instruction is hpsv3 1.0.0's, word for word, trailing blanks and grammar included: the model was trained on it
# (dataset/data_collator_qwen.py: MIT License, Copyright (c) 2024 HPSv3 Team).
REWARD_TOKEN = "<|Reward|>"
"""The token at whose place the reward is read; it is added to Qwen2-VL's tokenizer."""

INSTRUCTION = (
    "\n"
    "You are tasked with evaluating a generated image based on Visual Quality and Text Alignment and "
    "give a overall score to estimate the human preference. Please provide a rating from 0 to 10, "
    "with 0 being the worst and 10 being the best. \n"
    "\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should be "
    "considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical "
    "errors, such as abnormal body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear "
    "and easy to interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other "
    "visual elements (e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color "
    "scheme, composition, atmosphere, depth of field, and the overall creative appeal. The scene "
    "should convey a sense of harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as political, "
    "violent, or adult material. If such content is present, the image quality and satisfaction "
    "score should be the lowest possible. \n"
    "\n"
    "**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, "
    "animal, object) align with the textual description. The subject should match the description in "
    "terms of number, appearance, and behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, "
    "evaluate how well the image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements "
    "in the image logically fit the scenario described in the prompt. The environment should support "
    "and enhance the subject without contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, "
    "clothing, accessories, expressions, actions) are faithfully represented in the image. Minor "
    "deviations may be acceptable, but critical attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are "
    "captured in the image. The generated content should not introduce elements that conflict with "
    "or distort the original description.\n"
    "Textual prompt - {text_prompt}\n"
    "\n"
    "\n"
)
"""The instruction, to be formatted with `text_prompt`."""

QUESTION = f"\nPlease provide the overall ratings of this image: {REWARD_TOKEN}\n\nEND\n"
PICTURE_TOKEN = "<|image_pad|>"
EDGE = 28
"""The side of the square that one picture token shows: 2 x 2 patches of 14 x 14 pixels."""
PIXELS = 256 * EDGE * EDGE
WIDEST = 200
"""The largest ratio of the longer to the shorter side that the model takes."""
HEAD_WIDTHS = (1024, 16, 2)
HEAD_LAYERS = {"0": "0", "3": "2", "5": "4"}
"""The places of the head's linear layers: published, with dropout between -> here."""
BATCH = 8


class HPSv3Reward(DifferentiableReward):
    """How much people would like the picture for its prompt: about -3 to 15; good generators reach 6 to 11.

    Args:
        model: HPSv3.safetensors, a folder that holds it, or a hub id (MizzenAI/HPSv3).
        processor: the folder or hub id of the Qwen2-VL that it was trained from (Qwen/Qwen2-VL-7B-Instruct): its
            config and tokenizer. Not needed where they lie beside the weights.

    Raises:
        CheckpointError: a file is missing, half written or of another model.
    """

    name = "hpsv3"
    examples: ClassVar[Mapping[str, object]] = {"model": "MizzenAI/HPSv3"}

    def __init__(
        self,
        model: str | Path,
        processor: str | Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
    ) -> None:
        file = find_file(model, WEIGHTS)
        if processor is None and not (file.parent / "config.json").is_file():
            raise CheckpointError(
                f"{file.parent} holds no config and tokenizer, as published. Say which Qwen2-VL it was trained from: "
                "processor: Qwen/Qwen2-VL-7B-Instruct"
            )
        words = (
            file.parent if processor is None else words_folder(processor)
        )  # of the config and the tokenizer
        kind = read_json(words / "config.json").get("model_type")
        if kind != "qwen2_vl":
            raise CheckpointError(
                f"{words} describes a {kind!r} model; HPSv3 was trained from a 'qwen2_vl' one."
            )
        self.device = choose_device(device)
        self.precision = choose_precision(self.device, dtype)
        self.tokenizer = load_tokenizer(words)
        self._special = frozenset(self.tokenizer.all_special_tokens) | {REWARD_TOKEN, PICTURE_TOKEN}
        self.tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
        self._reward_id = int(self.tokenizer.convert_tokens_to_ids(REWARD_TOKEN))
        trunk, head = split_weights(read_weights([file]))
        with quiet_loading():
            from transformers import Qwen2VLConfig, Qwen2VLModel

            config = Qwen2VLConfig.from_pretrained(words, local_files_only=True)
            rows = _rows(trunk, file)
            if self._reward_id >= rows:
                raise CheckpointError(
                    f"{file} has {rows} token embeddings, but {REWARD_TOKEN} of the tokenizer in {words} is number "
                    f"{self._reward_id}. Give the processor that HPSv3 was trained with: Qwen/Qwen2-VL-7B-Instruct"
                )
            config.text_config.vocab_size = rows
            built = build(
                Qwen2VLModel, config, trunk, self.precision.weights, file, attn_implementation="sdpa"
            )
        self.trunk = built.to(self.device)
        self.head = _head(head, self.trunk.config.text_config.hidden_size, file).to(self.device)
        self.provenance: Mapping[str, str] = {
            **origin(model, file.parent, [file], LICENCE),
            **part("processor", describe_words(processor or model, words, known=WORDS_LICENCE)),
            "preprocessing": (
                f"8-bit; {PIXELS // EDGE**2} tokens of {EDGE}x{EDGE}, ratio nearly kept, bicubic antialias; OpenAI's "
                "mean and std"
            ),
            "positions": "plain, one a token",
        }

    @classmethod
    def reads(cls, options: Options) -> Mapping[str, Read]:
        return {
            "model": Read(Form.FILES, (WEIGHTS,)),
            "processor": Read(Form.WORDS, beside=True, advice="Type: processor: Qwen/Qwen2-VL-7B-Instruct"),
        }

    @torch.inference_mode()
    def score(self, batch: RewardBatch) -> Scores:
        def score(images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
            images_BCHW = images_BCHW.to(self.device)
            return self.rewards(self._preprocessing(images_BCHW)(images_BCHW), prompts)

        return score_pairs(
            batch,
            score,
            at_once=BATCH,
            provenance=self.provenance,
            reasons=[self._unusable(prompt) for prompt in batch.prompts],
        )

    def differentiable_scores(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]] = ()
    ) -> Tensor:
        pictures = images_BCHW.to(self.device)
        pixels = self._preprocessing(pictures).differentiable(pictures)
        failed = torch.tensor([self._unusable(prompt) is not None for prompt in prompts], device=self.device)
        shown = ["" if bad else prompt for prompt, bad in zip(prompts, failed.tolist(), strict=True)]
        values_B = self.rewards(pixels, shown).masked_fill(failed, torch.nan)
        return values_B.to(images_BCHW.device)

    def rewards(self, pixels_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the rewards [B] of preprocessed pictures, float32 on the device and differentiable."""
        patches, grid_B3 = patchify(pixels_BCHW)
        tokens = int(grid_B3[0].prod()) // 4
        texts = [self.text(prompt, tokens) for prompt in prompts]
        words = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(self.device)
        count, length = words.input_ids.shape
        positions = torch.arange(length, device=self.device).expand(3, count, length)
        with self.precision.context(self.device):
            states = self.trunk(
                input_ids=words.input_ids,
                attention_mask=words.attention_mask,
                position_ids=positions,
                pixel_values=patches.to(self.precision.weights),
                image_grid_thw=grid_B3,
                use_cache=False,
            ).last_hidden_state
        mu_sigma = self.head(states[words.input_ids == self._reward_id].float())
        return torch.as_tensor(mu_sigma[:, 0])

    def text(self, prompt: str, tokens: int) -> str:
        """Return what the model reads for a prompt and a picture of so many tokens."""
        question = INSTRUCTION.format(text_prompt=prompt) + QUESTION
        return TEMPLATE.format(picture=PICTURE_TOKEN * tokens, text=question)

    def _preprocessing(self, images_BCHW: Tensor) -> Preprocessing:
        size = model_size(*images_BCHW.shape[-2:])
        return Preprocessing(None, size, None, OPENAI_MEAN, OPENAI_STD, "bicubic")

    def _unusable(self, prompt: str) -> str | None:
        held = sorted(token for token in self._special if token in prompt)
        return f"the prompt holds {held[0]}, which belongs to HPSv3's template" if held else None


def model_size(rows: int, columns: int) -> tuple[int, int]:
    """Return the rows and columns to which a picture is scaled for the model.

    Raises:
        ShapeError: the picture is more than 200 times as long as it is wide.
    """
    if max(rows, columns) > WIDEST * min(rows, columns):
        raise ShapeError(f"HPSv3 takes sides up to {WIDEST} to 1, got a picture of {rows}x{columns}.")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    size: tuple[int, int] = smart_resize(rows, columns, EDGE, min_pixels=PIXELS, max_pixels=PIXELS)
    return size


def patchify(pixels_BCHW: Tensor, patch: int = 14, merge: int = 2, frames: int = 2) -> tuple[Tensor, Tensor]:
    """Return Qwen2-VL's input: patches [B * h * w, 3 * frames * patch * patch], and their grid [B, 3] as (1, h, w).

    Patches that become one token follow each other; the picture is shown as so many equal frames.
    """
    count, channels, height, width = pixels_BCHW.shape
    rows, columns = height // patch, width // patch
    split = pixels_BCHW.reshape(
        count, channels, rows // merge, merge, patch, columns // merge, merge, patch
    ).permute(0, 2, 5, 3, 6, 1, 4, 7)
    shown = split[:, :, :, :, :, :, None].expand(-1, -1, -1, -1, -1, -1, frames, -1, -1)
    grid = torch.tensor([[1, rows, columns]] * count, device=pixels_BCHW.device)
    return shown.reshape(count * rows * columns, channels * frames * patch * patch), grid


def split_weights(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the trunk's weights under Qwen2VLModel's names, and the head's; the language model's head is dropped."""
    trunk, head = {}, {}
    for key, value in weights.items():
        if key.startswith("rm_head."):
            layer, _, what = key.removeprefix("rm_head.").partition(".")
            head[f"{HEAD_LAYERS.get(layer, layer)}.{what}"] = value.float()
        elif key.startswith("model."):
            trunk[f"language_model.{key.removeprefix('model.')}"] = value
        elif not key.startswith("lm_head."):
            trunk[key] = value
    return trunk, head


def _head(weights: Mapping[str, Tensor], width: int, source: Path) -> nn.Sequential:
    hidden, narrow, out = HEAD_WIDTHS
    head = nn.Sequential(
        nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, narrow), nn.ReLU(), nn.Linear(narrow, out)
    )
    load_weights(head, weights, source)
    return head.requires_grad_(False).eval()


def _rows(weights: Mapping[str, Tensor], source: Path) -> int:
    """Return how many tokens have an embedding; the published file has one more than Qwen2-VL's tokenizer."""
    name = "language_model.embed_tokens.weight"
    if name not in weights:
        raise CheckpointError(
            f"{source} has no model.embed_tokens.weight; it starts with {next(iter(weights))!r}. "
            "Is it HPSv3.safetensors?"
        )
    return int(weights[name].shape[0])
