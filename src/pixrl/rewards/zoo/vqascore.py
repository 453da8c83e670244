"""VQAScore (Lin et al. 2024) with CLIP-FlanT5: the probability that a model answers Yes when asked about the picture.

    Does this figure show "{text}"? Please answer yes or no.
    score = exp(-mean cross-entropy of the answer's tokens) = sqrt(P(Yes) · P(</s> | Yes)),   in (0, 1)

CLIP's patch features of the last but one layer go through a small projector and stand, as tokens, between the two
halves of the question. Each half is tokenized alone and keeps its own </s>, as in t2v_metrics. Only transformers' T5
and CLIP vision models are needed; the shards are read tensor by tensor and nothing in them is run.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixrl.device import choose_device, choose_precision, quiet_loading
from pixrl.errors import CheckpointError
from pixrl.hub_check import read_json
from pixrl.rewards.base import DifferentiableReward, Form, Options, Read
from pixrl.rewards.encoders import ClipSimilarity
from pixrl.rewards.preprocess import Preprocessing, load_tokenizer, score_pairs, to_grey_levels
from pixrl.rewards.weights import (
    WORDS,
    build,
    describe,
    describe_words,
    load_folder,
    load_weights,
    origin,
    part,
    published_folder,
    published_model,
    read_weights,
    require_file,
    under,
    weight_shards,
)
from pixrl.types import RewardBatch, Scores

TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
LICENCE = "Apache-2.0"
TOKENIZER = (*WORDS, "spiece.model")
"""The files that are needed of the checkpoint that the tokenizer is taken from."""
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
BEFORE = f"{SYSTEM} USER: "
AFTER = '\nDoes this figure show "{text}"? Please answer yes or no. ASSISTANT: '
ANSWER = "Yes"
PICTURE_MARK = "<image>"
BATCH = 8
_PROJECTOR, _TOWER = "mm_projector.", "vision_tower.vision_tower."
_COPIES = ("embed_tokens.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
"""Further names of the same embeddings."""
_BY_TOKEN = ("shared.weight", "lm_head.weight")
"""Weights with one row per token; rows that the tokenizer has no token for are cut off, as the original does."""


class VQAScoreReward(DifferentiableReward):
    """The probability in (0, 1) that the picture shows its prompt; about 0.3 to 0.9 on real pictures.

    Args:
        model: a folder or hub id of CLIP-FlanT5 (zhiqiulin/clip-flant5-xxl or -xl).
        tokenizer: the folder or hub id of T5's tokenizer (google/flan-t5-xxl), where the model's folder has none.
        vision: the folder or hub id of the CLIP whose vision tower and preprocessing it uses; else what the model's
            config names (openai/clip-vit-large-patch14-336).

    Raises:
        CheckpointError: a file is missing, half written or of another model.
    """

    name = "vqascore"
    examples: ClassVar[Mapping[str, object]] = {"model": "zhiqiulin/clip-flant5-xl"}

    def __init__(
        self,
        model: str | Path,
        tokenizer: str | Path | None = None,
        vision: str | Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
    ) -> None:
        folder = published_model(model, WORDS)
        config = _config(folder)
        self.device = choose_device(device)
        self.precision = choose_precision(self.device, dtype)
        words = folder if tokenizer is None else published_folder(tokenizer, TOKENIZER)
        if tokenizer is None and not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise CheckpointError(
                f"{folder} holds no tokenizer, as published. Say where T5's is, for example tokenizer: "
                "google/flan-t5-xxl"
            )
        self.tokenizer = load_tokenizer(words)
        shards = weight_shards(folder)
        weights = read_weights(shards)
        tower = str(config["mm_vision_tower"]) if vision is None else vision
        own_tower = any(key.startswith(_TOWER) for key in weights)
        tower_folder = published_folder(tower, WORDS) if own_tower else published_model(tower, WORDS)
        self.preprocess = Preprocessing.from_folder(tower_folder, square=False)
        self.text_model = self._build_text(config, weights, folder)
        self.tower = self._build_tower(weights if own_tower else {}, tower_folder, folder)
        width, out = int(str(config["mm_hidden_size"])), int(str(config["d_model"]))
        projector = nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))  # from CLIP to T5
        load_weights(projector, under(_PROJECTOR, weights), folder)
        self.projector = projector.requires_grad_(False).eval().to(self.device, self.precision.weights)
        self._layer = int(str(config["mm_vision_select_layer"]))
        self._before = self._ids(BEFORE)
        self._answer = self._ids(ANSWER)
        self.provenance: Mapping[str, str] = {
            **origin(model, folder, shards, LICENCE),
            **part("tokenizer", describe_words(tokenizer or model, words, TOKENIZER, LICENCE)),
            **part(
                "vision",
                describe_words(tower, tower_folder, licences=ClipSimilarity.licences)
                if own_tower
                else describe(tower, tower_folder, ClipSimilarity.licences),
            ),
            "preprocessing": f"8-bit; mean colour to a square; {self.preprocess.describe()}",
            "question": AFTER.strip(),
        }

    @classmethod
    def reads(cls, options: Options) -> Mapping[str, Read]:
        config = Path(str(options["model"])).expanduser() / "config.json"
        tower = read_json(config).get("mm_vision_tower") if config.is_file() else None
        advice = "Type: tokenizer: google/flan-t5-xxl"
        return {
            "model": Read(),
            "tokenizer": Read(Form.WORDS, TOKENIZER_FILES, beside=True, advice=advice),
            "vision": Read(Form.WORDS, usual=tower),
        }

    def _build_text(self, config: Mapping[str, object], weights: Mapping[str, Tensor], folder: Path) -> Any:
        """Build T5 with as many tokens as its tokenizer has."""
        tokens = len(self.tokenizer)
        with quiet_loading():
            from transformers import T5Config, T5ForConditionalGeneration

            settings = T5Config.from_dict(
                {key: value for key, value in config.items() if not key.startswith(("mm_", "model_type"))}
            )
            settings.vocab_size = tokens
            others = (_PROJECTOR, "vision_tower.", *_COPIES)
            kept = {
                key: value[:tokens] if key in _BY_TOKEN else value
                for key, value in weights.items()
                if not key.startswith(others)
            }
            model = build(T5ForConditionalGeneration, settings, kept, self.precision.weights, folder)
        return model.to(self.device)

    def _build_tower(self, weights: Mapping[str, Tensor], tower: Path, folder: Path) -> Any:
        """Build CLIP's vision model, from the checkpoint's own weights or else from the tower's folder."""
        with quiet_loading():
            from transformers import CLIPVisionConfig, CLIPVisionModel

            if not weights:
                return load_folder(CLIPVisionModel, tower, self.precision.weights).to(self.device)
            config = CLIPVisionConfig.from_pretrained(tower, local_files_only=True)
            own = under(_TOWER, weights)
            own.pop("vision_model.embeddings.position_ids", None)  # a buffer that old transformers saved
            return build(CLIPVisionModel, config, own, self.precision.weights, folder).to(self.device)

    @torch.inference_mode()
    def score(self, batch: RewardBatch) -> Scores:
        return score_pairs(
            batch,
            lambda images, prompts: self.probabilities(
                self.preprocess(self.pad(to_grey_levels(images.float())).to(self.device)), prompts
            ),
            at_once=BATCH,
            provenance=self.provenance,
            reasons=[_unusable(prompt) for prompt in batch.prompts],
        )

    def differentiable_scores(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]] = ()
    ) -> Tensor:
        pixels = self.preprocess.differentiable(self.pad(images_BCHW.to(self.device)))
        failed = torch.tensor([_unusable(prompt) is not None for prompt in prompts], device=self.device)
        return self.probabilities(pixels, prompts).masked_fill(failed, torch.nan).to(images_BCHW.device)

    def probabilities(self, pixels_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores [B] of preprocessed pictures, float32 on the device and differentiable."""
        count = len(prompts)
        with self.precision.context(self.device):
            layers = self.tower(
                pixels_BCHW.to(self.precision.weights), output_hidden_states=True
            ).hidden_states
            seen_BLD = self.projector(layers[self._layer][:, 1:])
            # each question around its picture, and zeros after it
            embed = self.text_model.get_input_embeddings()
            before = embed(self._before)
            rows = [
                torch.cat([before, seen.to(before.dtype), embed(self._ids(AFTER.format(text=prompt)))])
                for seen, prompt in zip(seen_BLD, prompts, strict=True)
            ]
            lengths_B = torch.tensor([len(row) for row in rows], device=self.device)
            embeddings_BLD = nn.utils.rnn.pad_sequence(rows, batch_first=True)
            places_L = torch.arange(embeddings_BLD.shape[1], device=self.device)
            mask_BL = (places_L < lengths_B[:, None]).long()
            labels_BL = self._answer.repeat(count, 1)
            logits = self.text_model(
                inputs_embeds=embeddings_BLD, attention_mask=mask_BL, labels=labels_BL
            ).logits
        return answer_probability(logits, labels_BL)

    def pad(self, images_BCHW: Tensor) -> Tensor:
        """Pad pictures to a square, the picture in the middle, with CLIP's mean colour in 8 bits."""
        rows, columns = images_BCHW.shape[-2:]
        side = max(rows, columns)
        colour = torch.tensor([int(255 * mean) / 255 for mean in self.preprocess.mean])
        square = colour.to(images_BCHW).view(1, 3, 1, 1).expand(len(images_BCHW), 3, side, side).clone()
        top, left = (side - rows) // 2, (side - columns) // 2
        square[..., top : top + rows, left : left + columns] = images_BCHW
        return square

    def _ids(self, text: str) -> Tensor:
        """Return the tokens of a text, with </s> at the end."""
        return torch.tensor(self.tokenizer(text).input_ids, device=self.device)


def answer_probability(logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    """Return [B]: exp of the mean log-probability of the labels, in float32."""
    log_BLV = F.log_softmax(logits_BLV.float(), dim=-1)
    return log_BLV.gather(-1, labels_BL[..., None])[..., 0].mean(dim=-1).exp()


def _unusable(prompt: str) -> str | None:
    return f"the prompt holds {PICTURE_MARK}, where the picture would go" if PICTURE_MARK in prompt else None


def _config(folder: Path) -> dict[str, object]:
    config = read_json(require_file(folder, "config.json"))
    expected = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch"}
    for key, value in expected.items():
        if config.get(key) != value:
            raise CheckpointError(
                f"{folder}/config.json has {key} {config.get(key)!r}; CLIP-FlanT5 has {value!r}. "
                "Give zhiqiulin/clip-flant5-xxl or -xl."
            )
    for key in ("mm_vision_tower", "mm_hidden_size", "mm_vision_select_layer", "d_model"):
        if key not in config:
            raise CheckpointError(f"{folder}/config.json has no {key}: is it CLIP-FlanT5's?")
    return config
