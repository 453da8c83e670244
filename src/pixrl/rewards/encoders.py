"""Image encoders: frozen CLIP, DINO and SigLIP models that turn pictures into unit vectors.

A CLIP is read from a transformers folder (`toy:clip`, a path, a hub id), or from one file with OpenCLIP's names, as
HPSv2 publishes it: OpenCLIP keeps query, key and value of an attention in one matrix (`in_proj`), and projections
transposed.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pixrl.device import Precision, choose_device, choose_precision, quiet_loading
from pixrl.errors import CheckpointError, InputError
from pixrl.hub import folder
from pixrl.hub_check import Layout, read_json
from pixrl.rewards.preprocess import InputPreprocessing, Preprocessing, batches, require_images
from pixrl.rewards.weights import (
    LOADING_ERRORS,
    build,
    class_in,
    describe,
    describe_words,
    is_weight_file,
    load_folder,
    part,
    read_weights,
    refuse_misfits,
    words_folder,
)

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase

BATCH = 64
"""The number of pictures or texts in one forward pass."""
MODEL_TYPES = ("dinov2", "dinov2_with_registers", "dinov3_vit", "vit")
"""The `model_type`s of encoders whose first token stands for the picture; `vit` is DINO v1."""
_MASK_TOKEN = "embeddings.mask_token"
"""A weight that only training uses."""


class PictureEncoder(ABC):
    """A frozen model whose output, normalized in float32 to a unit vector, stands for a picture."""

    device: torch.device
    precision: Precision
    batch: int
    preprocess: InputPreprocessing
    provenance: Mapping[str, str]
    licences: ClassVar[Mapping[str, str]] = {}
    """Hub id -> licence of published weights whose page states none."""

    @abstractmethod
    def pooled(self, pixels_BCHW: Tensor) -> Tensor:
        """Return what the model makes of preprocessed pictures [B, 3, H, W]: one vector each, [B, E]."""

    @torch.inference_mode()
    def image_features(self, images_BCHW: Tensor) -> Tensor:
        """Return the unit vectors [B, E] of pictures [B, 3, H, W] in [0, 1], float32 on the CPU."""
        require_images(images_BCHW)
        parts = batches(images_BCHW, self.batch)
        return torch.cat([self.embed(self.preprocess(part.to(self.device))).cpu() for part in parts])

    def differentiable_features(self, images_BCHW: Tensor) -> Tensor:
        """Return unit vectors [B, E], float32 on the device, with a graph back to the pictures."""
        require_images(images_BCHW)
        parts = batches(images_BCHW, self.batch)
        return torch.cat([self.embed(self.preprocess.differentiable(part.to(self.device))) for part in parts])

    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the unit vectors [B, E] of preprocessed pictures, on the device and differentiable."""
        with self.precision.context(self.device):
            output = self.pooled(pixels_BCHW.to(self.precision.weights))
        return F.normalize(output.float(), dim=-1)


class ClipSimilarity(PictureEncoder):
    """A CLIPModel with its tokenizer and preprocessing, from `toy:clip`, a folder, a hub id, or an OpenCLIP file.

    Args:
        ref: the checkpoint; see the module's docstring.
        device: auto, cpu, cuda or cuda:N.
        dtype: the type of the weights; auto, float32, bfloat16 or float16.
        batch: pictures or texts in one forward pass.
        processor: another checkpoint, whose tokenizer and preprocessing are taken instead. An OpenCLIP file needs one:
            its config.json says what the file holds.
        preprocess: the preprocessing, if not the checkpoint's.
        clean: a function that each text goes through before the tokenizer.

    Raises:
        CheckpointError: a checkpoint is missing, damaged or of another class, or an OpenCLIP file has no `processor`.
    """

    licences: ClassVar[Mapping[str, str]] = {
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "MIT",
        "openai/clip-vit-base-patch32": "MIT",
        "openai/clip-vit-large-patch14": "MIT",
        "openai/clip-vit-large-patch14-336": "MIT",
        "yuvalkirstain/PickScore_v1": "MIT",
    }

    def __init__(
        self,
        ref: str | Path,
        *,
        device: str = "auto",
        dtype: str = "float32",
        batch: int = BATCH,
        processor: str | Path | None = None,
        preprocess: InputPreprocessing | None = None,
        clean: Callable[[str], str] = str,
    ) -> None:
        self.name = str(ref)
        self.device = choose_device(device)
        self.precision = choose_precision(self.device, dtype)
        self.batch = batch
        loaded = load_clip(ref, processor, preprocess, self.precision.weights)
        self.preprocess = loaded.preprocess
        self.tokenizer = loaded.tokenizer
        self.provenance: Mapping[str, str] = loaded.provenance
        if processor is not None:
            words = describe_words(processor, words_folder(processor), licences=self.licences)
            self.provenance = {**loaded.provenance, **part("processor", words)}
        self.model = loaded.model.requires_grad_(False).eval().to(self.device)
        self.logit_scale = float(self.model.logit_scale.detach().float().exp())
        self._clean = clean
        self._text_length = int(self.model.config.text_config.max_position_embeddings)
        self._texts: dict[str, Tensor] = {}

    def pooled(self, pixels_BCHW: Tensor) -> Tensor:
        projected: Tensor = self.model.get_image_features(pixel_values=pixels_BCHW).pooler_output
        return projected

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Return the unit vectors [B, E] of texts, float32 on the CPU; each text is encoded once."""
        if isinstance(texts, str) or not texts:
            raise InputError(f"text_features takes a non-empty list of texts, got {texts!r}.")
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        for start in range(0, len(new), self.batch):
            part = new[start : start + self.batch]
            tokens = self.tokenizer(
                [self._clean(text) for text in part],
                padding="max_length",
                truncation=True,
                max_length=self._text_length,
                return_tensors="pt",
            )
            with self.precision.context(self.device):
                output = self.model.get_text_features(
                    input_ids=tokens.input_ids.to(self.device),
                    attention_mask=tokens.attention_mask.to(self.device),
                )
            features_BE = F.normalize(output.pooler_output.float(), dim=-1).cpu()
            self._texts.update(zip(part, features_BE, strict=True))
        return torch.stack([self._texts[text] for text in texts])


class Transform(StrEnum):
    """The preprocessing of a DINO encoder's pictures: how they are resized, cropped and normalized."""

    CHECKPOINT = "checkpoint"
    """The preprocessing of the checkpoint's preprocessor_config.json."""
    DREAMBENCH = "dreambench"
    """`Preprocessing.dreambench`: the usual one of DINO v1 on DreamBench, and of DINOv2."""


class DinoEncoder(PictureEncoder):
    """A transformers model of MODEL_TYPES with its preprocessing, from `toy:identity`, a folder or a hub id.

    Raises:
        CheckpointError: the folder is missing, half written, lacks a weight, or is of another class.
    """

    licences: ClassVar[Mapping[str, str]] = {
        "facebook/dino-vits16": "Apache-2.0",
        "facebook/dinov2-base": "Apache-2.0",
        "facebook/dinov2-large": "Apache-2.0",
        "facebook/dinov2-small": "Apache-2.0",
    }

    def __init__(
        self,
        ref: str | Path,
        *,
        device: str = "auto",
        dtype: str = "float32",
        batch: int = BATCH,
        transform: Transform = Transform.CHECKPOINT,
    ) -> None:
        path = folder(ref, Layout.REWARD)
        model_type = read_json(path / "config.json").get("model_type")
        if model_type not in MODEL_TYPES:
            raise CheckpointError(
                f"{path} holds a {model_type!r} model; DINO features need one of {', '.join(MODEL_TYPES)}, such as "
                "facebook/dinov2-base. A CLIP's features: the rewards clip_i and clip_image"
            )
        self.name = str(ref)
        self.device = choose_device(device)
        self.precision = choose_precision(self.device, dtype)
        self.batch = batch
        if transform is Transform.DREAMBENCH:
            self.preprocess = Preprocessing.dreambench()
        else:
            self.preprocess = Preprocessing.from_folder(path, square=False)
        with quiet_loading():
            from transformers import MODEL_MAPPING, ViTModel

            kind = class_in(MODEL_MAPPING, path)
            # DINO v1 was published without a pooler, and one with random weights would be made for it
            options = {"add_pooling_layer": False} if kind is ViTModel else {}
            model = load_folder(kind, path, self.precision.weights, may_lack=(_MASK_TOKEN,), **options)
        self.model = model.to(self.device)
        self.provenance: Mapping[str, str] = {
            **describe(ref, path, self.licences),
            "preprocessing": self.preprocess.describe(),
        }

    def pooled(self, pixels_BCHW: Tensor) -> Tensor:
        states_BLD: Tensor = self.model(pixel_values=pixels_BCHW).last_hidden_state
        return states_BLD[:, 0]


class SiglipEncoder(PictureEncoder):
    """The vision tower of a SiglipModel with its preprocessing, from a folder or a hub id.

    Raises:
        CheckpointError: the folder is missing, half written or of another class.
    """

    licences: ClassVar[Mapping[str, str]] = {
        "google/siglip-so400m-patch14-384": "Apache-2.0",
    }

    def __init__(
        self, ref: str | Path, *, device: str = "auto", dtype: str = "float32", batch: int = BATCH
    ) -> None:
        path = folder(ref, Layout.TRANSFORMERS)
        kind = read_json(path / "config.json").get("model_type")
        if kind not in ("siglip", "siglip_vision_model"):
            raise CheckpointError(
                f"{path} holds a {kind!r} model; the v2.5 predictor needs a 'siglip' one, such as "
                f"google/siglip-so400m-patch14-384."
            )
        self.device = choose_device(device)
        self.precision = choose_precision(self.device, dtype)
        self.batch = batch
        self.preprocess = Preprocessing.from_folder(path, square=True)
        with quiet_loading():
            from transformers import SiglipVisionModel

            model = load_folder(SiglipVisionModel, path, self.precision.weights)
        self.model = model.to(self.device)
        self.provenance: Mapping[str, str] = {
            **describe(ref, path, self.licences),
            "preprocessing": self.preprocess.describe(),
        }

    def pooled(self, pixels_BCHW: Tensor) -> Tensor:
        pooled: Tensor = self.model(pixel_values=pixels_BCHW).pooler_output
        return pooled


def load_encoder(ref: str | Path, *, device: str = "auto") -> ClipSimilarity | DinoEncoder:
    """Load a CLIP or DINO encoder, whichever the checkpoint's config names: `toy:clip`, a folder or a hub id.

    Raises:
        CheckpointError: the folder is missing, half written or of another class.
    """
    architectures = str(read_json(folder(ref, Layout.REWARD) / "config.json").get("architectures"))
    return ClipSimilarity(ref, device=device) if "CLIP" in architectures else DinoEncoder(ref, device=device)


@dataclass(frozen=True)
class LoadedClip:
    """A CLIPModel on the CPU with the tokenizer and the preprocessing of its input."""

    model: "CLIPModel"
    tokenizer: "PreTrainedTokenizerBase"
    preprocess: InputPreprocessing
    provenance: Mapping[str, str]


def load_clip(
    ref: str | Path,
    processor: str | Path | None,
    preprocess: InputPreprocessing | None,
    dtype: torch.dtype,
) -> LoadedClip:
    """Load a CLIPModel with its tokenizer and preprocessing; the arguments are those of `ClipSimilarity`.

    Raises:
        CheckpointError: a checkpoint is missing, damaged or of another class, or an OpenCLIP file has no `processor`.
    """
    with quiet_loading():
        from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    model: CLIPModel
    if is_weight_file(ref):
        path = Path(str(ref)).expanduser()
        if processor is None:
            raise CheckpointError(
                f"{path} holds weights alone. Give processor: the folder or hub id of the CLIP it was trained from, "
                "such as laion/CLIP-ViT-H-14-laion2B-s32B-b79K."
            )
        words = words_folder(processor)
        _require_clip(words)
        with quiet_loading():
            config = CLIPConfig.from_pretrained(words, local_files_only=True)
            model = build(CLIPModel, config, to_transformers(read_weights([path]), path), dtype, path)
    else:
        path = folder(ref, Layout.REWARD)
        words = path if processor is None else words_folder(processor)
        _require_clip(path)
        with quiet_loading():
            model = load_folder(CLIPModel, path, dtype)
    preprocess = preprocess or Preprocessing.from_folder(words, square=False)
    with quiet_loading():
        try:
            tokenizer = AutoTokenizer.from_pretrained(words, local_files_only=True)
        except LOADING_ERRORS as error:
            raise CheckpointError(f"The tokenizer in {words} could not be loaded: {error}") from error
    provenance = {
        **describe(ref, path, ClipSimilarity.licences),
        "preprocessing": preprocess.describe(),
    }
    if processor is not None:
        provenance["processor"] = str(processor)
    return LoadedClip(model, tokenizer, preprocess, provenance)


def _require_clip(path: Path) -> None:
    kind = read_json(path / "config.json").get("model_type")
    if kind != "clip":
        raise CheckpointError(
            f"{path} holds a {kind!r} model; CLIP similarity needs a 'clip' one, such as toy:clip."
        )


_SINGLE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "logit_scale": "logit_scale",
}
_NORMS = {
    "visual.ln_pre": "vision_model.pre_layrnorm",  # so misspelt in every published checkpoint
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_LAYER_PARTS = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.?(weight|bias)$")
_IGNORED = {"attn_mask"}
"""A buffer that OpenCLIP writes into some files; CLIPModel makes its own."""


def to_transformers(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Convert OpenCLIP's state dict to a CLIPModel's.

    Raises:
        CheckpointError: a name is not OpenCLIP's; the message names `path`, the file that it came from.
    """
    converted: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in state.items():
        pairs = dict(_renamed(name, tensor))
        converted.update(pairs)
        if not pairs and name not in _IGNORED:
            unknown.append(name)
    refuse_misfits([], unknown, path)
    if not converted:
        raise CheckpointError(f"{path} holds no OpenCLIP weights.")
    return converted


def _renamed(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield CLIPModel's names and tensors of one OpenCLIP tensor; nothing where the name is unknown."""
    stem, _, end = name.rpartition(".")
    if name in _SINGLE:
        yield _SINGLE[name], tensor
    elif name in _TRANSPOSED:
        yield _TRANSPOSED[name], tensor.T.contiguous()
    elif stem in _NORMS:
        yield f"{_NORMS[stem]}.{end}", tensor
    elif layer := _LAYER.match(name):
        visual, number, part, end = layer.groups()
        tower = "vision_model" if visual else "text_model"
        prefix = f"{tower}.encoder.layers.{number}"
        if part == "attn.in_proj_":
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                yield f"{prefix}.self_attn.{letter}_proj.{end}", third.clone()
        elif (known := part.rstrip(".")) in _LAYER_PARTS:
            yield f"{prefix}.{_LAYER_PARTS[known]}.{end}", tensor
