"""ImageReward (Xu et al. 2023): a BLIP encoder whose text stream looks at the picture, and a small head on [CLS].

    reward = (head(h_CLS) - MEAN) / STD

The published file holds the weights under BLIP's own names; they go into transformers' BlipVisionModel and
BlipTextModel. Its text tower sees the picture, so nothing of a prompt can be kept between pictures.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pixrl.device import choose_device, choose_precision, quiet_loading
from pixrl.errors import CheckpointError
from pixrl.hub_check import read_json
from pixrl.rewards.base import DifferentiableReward, Form, Options, Read
from pixrl.rewards.preprocess import OPENAI_MEAN, OPENAI_STD, Preprocessing, load_tokenizer, score_pairs
from pixrl.rewards.weights import (
    build,
    describe_words,
    load_weights,
    origin,
    part,
    published_folder,
    read_weights,
    require_file,
    under,
)
from pixrl.types import RewardBatch, Scores

WEIGHTS, CONFIG, VOCABULARY = "ImageReward.pt", "med_config.json", "vocab.txt"
VOCABULARY_FILES = (VOCABULARY, "tokenizer*")
LICENCE = "Apache-2.0"
"""The licence of ImageReward, and of bert-base-uncased."""
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""The mean and deviation of the head's output over ImageReward's own data, as its code has them."""
TEXT_LENGTH = 35
HEAD_WIDTHS = (1024, 128, 64, 16, 1)
HEAD_LAYERS = (0, 2, 4, 6, 7)
"""The places of the head's linear layers in the published Sequential, with dropout and no activation between."""
COLUMNS_PER_HEAD = 64
"""The width of a head of BLIP's vision transformers of both sizes; the file does not say how many there are."""
VISION_EPS = 1e-6
BATCH = 32
_VISION, _TEXT, _HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp.layers."
_VISION_NAMES = (
    (r"^norm\.", "post_layernorm."),
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    (r"patch_embed\.proj", "embeddings.patch_embedding"),
    (r"blocks\.", "encoder.layers."),
    (r"attn\.qkv", "self_attn.qkv"),
    (r"attn\.proj", "self_attn.projection"),
    ("norm1", "layer_norm1"),
    ("norm2", "layer_norm2"),
)
"""Parts of BLIP's names -> transformers' names."""
_TEXT_SETTINGS = (
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "layer_norm_eps",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "pad_token_id",
    "vocab_size",
)
"""The settings of BLIP's med_config.json that its code reads, which have the same names in transformers."""


class ImageReward(DifferentiableReward):
    """How much people would like the picture for its prompt: about -2.3 to 2, mean 0 and deviation 1 on its own data.

    Args:
        model: a folder or hub id (THUDM/ImageReward) that holds ImageReward.pt and med_config.json.
        tokenizer: where BERT's vocab.txt is (google-bert/bert-base-uncased), if not in the model's folder.

    Raises:
        CheckpointError: a file is missing, half written or of another model.
    """

    name = "image_reward"
    examples: ClassVar[Mapping[str, object]] = {"model": "THUDM/ImageReward"}

    def __init__(
        self,
        model: str | Path,
        tokenizer: str | Path | None = None,
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        folder = published_folder(model, (WEIGHTS, CONFIG, VOCABULARY))
        file = require_file(folder, WEIGHTS)
        self.device = choose_device(device)
        self.precision = choose_precision(self.device, dtype)
        words = folder if tokenizer is None else published_folder(tokenizer, VOCABULARY_FILES)
        if tokenizer is not None:
            require_file(words, VOCABULARY)
        elif not (folder / VOCABULARY).is_file():
            raise CheckpointError(
                f"{folder} holds no {VOCABULARY}, as published. Say where BERT's is, for example "
                "tokenizer: google-bert/bert-base-uncased"
            )
        self.tokenizer = load_tokenizer(words, "BertTokenizer")
        parts = split_weights(read_weights([file]), file)
        self.vision, self.text = _towers(parts, require_file(folder, CONFIG), self.precision.weights)
        self.head = _head(parts.head, self.text.config.hidden_size, file).to(self.device)
        self.vision.to(self.device), self.text.to(self.device)
        side = int(self.vision.config.image_size)
        self.preprocess = Preprocessing(side, None, (side, side), OPENAI_MEAN, OPENAI_STD, "bicubic")
        self.provenance: Mapping[str, str] = {
            **origin(model, folder, [file], LICENCE),
            **part("tokenizer", describe_words(tokenizer or model, words, VOCABULARY_FILES, LICENCE)),
            "preprocessing": self.preprocess.describe(),
            "scale": f"(head - {MEAN:.6g}) / {STD:.6g}",
        }

    @classmethod
    def reads(cls, options: Options) -> Mapping[str, Read]:
        advice = "Type: tokenizer: google-bert/bert-base-uncased"
        return {
            "model": Read(Form.FILES, (WEIGHTS, CONFIG)),
            "tokenizer": Read(Form.WORDS, (VOCABULARY,), beside=True, advice=advice),
        }

    @torch.inference_mode()
    def score(self, batch: RewardBatch) -> Scores:
        return score_pairs(
            batch,
            lambda images, prompts: self.rewards(self.preprocess(images.to(self.device)), prompts),
            at_once=BATCH,
            provenance=self.provenance,
        )

    def differentiable_scores(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]] = ()
    ) -> Tensor:
        pixels = self.preprocess.differentiable(images_BCHW.to(self.device))
        return self.rewards(pixels, prompts).to(images_BCHW.device)

    def rewards(self, pixels_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the rewards [B] of preprocessed pictures, float32 on the device and differentiable."""
        words = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=TEXT_LENGTH,
            return_tensors="pt",
        ).to(self.device)
        with self.precision.context(self.device):
            seen = self.vision(pixel_values=pixels_BCHW.to(self.precision.weights)).last_hidden_state
            states = self.text(
                input_ids=words.input_ids,
                attention_mask=words.attention_mask,
                encoder_hidden_states=seen,
                is_decoder=False,
            ).last_hidden_state
        return normalize(self.head(states[:, 0].float())[:, 0])


def normalize(outputs_B: Tensor) -> Tensor:
    """Return the head's outputs [B] on the published scale."""
    return (outputs_B - MEAN) / STD


@dataclass(frozen=True)
class Parts:
    """The file's weights under transformers' names, one mapping per model; training's momentum copies are left out."""

    vision: Mapping[str, Tensor]
    text: Mapping[str, Tensor]
    head: Mapping[str, Tensor]


def split_weights(weights: Mapping[str, Tensor], source: Path) -> Parts:
    """Sort the file's weights by the model that they belong to.

    Raises:
        CheckpointError: one of the three has no weights in the file.
    """
    vision, text, head = (under(prefix, weights) for prefix in (_VISION, _TEXT, _HEAD))
    text.pop("embeddings.position_ids", None)  # a buffer that old transformers saved
    for pattern, ours in _VISION_NAMES:
        vision = {re.sub(pattern, ours, key): value for key, value in vision.items()}
    for prefix, found in ((_VISION, vision), (_TEXT, text), (_HEAD, head)):
        if not found:
            raise CheckpointError(
                f"{source} has no weights under {prefix!r}; it starts with {next(iter(weights))!r}. "
                "Is it ImageReward's file?"
            )
    return Parts(vision, text, head)


def _towers(parts: Parts, config_file: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Build the vision and text models; the vision model's sizes are read off its weights."""
    with quiet_loading():
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        embedding = parts.vision["embeddings.patch_embedding.weight"]
        width, patch = int(embedding.shape[0]), int(embedding.shape[-1])
        patches = int(parts.vision["embeddings.position_embedding"].shape[1]) - 1
        layers = {key.split(".")[2] for key in parts.vision if key.startswith("encoder.layers.")}
        vision = BlipVisionConfig(
            hidden_size=width,
            intermediate_size=int(parts.vision["encoder.layers.0.mlp.fc1.weight"].shape[0]),
            num_hidden_layers=len(layers),
            num_attention_heads=width // COLUMNS_PER_HEAD,
            image_size=math.isqrt(patches) * patch,
            patch_size=patch,
            layer_norm_eps=VISION_EPS,
        )
        config = read_json(config_file)
        missing = [name for name in _TEXT_SETTINGS if name not in config]
        if missing:
            raise CheckpointError(
                f"{config_file} has no {missing[0]!r}: is it ImageReward's med_config.json?"
            )
        text = BlipTextConfig(
            **{name: config[name] for name in _TEXT_SETTINGS},
            encoder_hidden_size=width,
            is_decoder=True,  # or it would have no cross-attention
            bos_token_id=None,
            sep_token_id=None,
        )
        source = config_file.parent / WEIGHTS
        return (
            build(BlipVisionModel, vision, parts.vision, dtype, source),
            build(BlipTextModel, text, parts.text, dtype, source, add_pooling_layer=False),
        )


def _head(weights: Mapping[str, Tensor], width: int, source: Path) -> nn.Sequential:
    """Build the published head without its dropout: linear layers in a row, in float32."""
    widths = (width, *HEAD_WIDTHS)
    head = nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(widths)))
    places = {str(theirs): str(ours) for ours, theirs in enumerate(HEAD_LAYERS)}
    renamed = {}
    for key, value in weights.items():
        layer, _, what = key.partition(".")
        renamed[f"{places.get(layer, layer)}.{what}"] = value.float()
    load_weights(head, renamed, source)
    return head.requires_grad_(False).eval()
