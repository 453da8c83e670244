"""Qwen-Image-Edit as a trainable flow policy with reference pictures, on diffusers' QwenImageEditPlusPipeline.

It is Qwen-Image, shown pictures twice: the vision-language model reads them before the prompt, as "Picture 1: ...", at
about 384 x 384 pixels, and their latents stand behind the picture's own tokens. What guidance leads away from is read
with the same pictures.

Deviations from the pipeline: 1. Latents of references are of the size that they are given in (`references.side`), where
the pipeline makes every picture as large as 1024 x 1024. 2. A prompt is cut to `text_length` tokens, pictures apart,
where the pipeline cuts nothing. 3. The pipeline's Qwen2VLProcessor is not loaded, for it needs torchvision for videos:
its picture processor and its tokenizer are used as it uses them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor

from pixrl.hub import Checkpoint
from pixrl.models.base import Conditioning
from pixrl.models.qwen_image import QwenPolicy
from pixrl.models.references import TokenReferences
from pixrl.models.text import PromptCache

_PICTURE = "Picture {}: <|vision_start|>{}<|vision_end|>"
_PIXELS = "<|image_pad|>"


@dataclass(frozen=True)
class PicturedPrompt:
    """A prompt and the pictures that it is read with, which is equal to another of the same content."""

    prompt: str
    pictures: tuple[Image.Image, ...] = field(compare=False)
    digest: bytes

    @staticmethod
    def of(prompt: str, pictures: Sequence[Image.Image]) -> "PicturedPrompt":
        """Return a prompt with its pictures."""
        content = blake2b(digest_size=16)
        for picture in pictures:
            content.update(f"{picture.size}".encode() + picture.tobytes())
        return PicturedPrompt(prompt, tuple(pictures), content.digest())


class QwenImageEditPolicy(QwenPolicy, TokenReferences):
    """Qwen-Image-Edit as a trainable policy with any number of reference pictures."""

    pipelines = ("QwenImageEditPlusPipeline",)
    pipeline_class = "QwenImageEditPlusPipeline"
    licences: ClassVar[Mapping[str, str]] = {
        "Qwen/Qwen-Image-Edit-2509": "Apache-2.0",
        "Qwen/Qwen-Image-Edit-2511": "Apache-2.0",
    }

    def __init__(self, checkpoint: Checkpoint, **options: Any) -> None:
        """Load the checkpoint; the options are those of `FlowPipelinePolicy`."""
        super().__init__(checkpoint, **options)
        self._shown = PromptCache(self._read)

    @cached_property
    def _patches(self) -> Any:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        folder = str(self.checkpoint.folder / "processor")
        return Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)

    def show(
        self, conditioning: Conditioning, references: Sequence[Tensor], prompts: Sequence[str]
    ) -> Conditioning:
        shown = self.with_references(conditioning, references)
        pictures = list(zip(*(self._seen(images) for images in references), strict=True))
        rows, away = (
            self._shown.rows(
                [PicturedPrompt.of(text, own) for text, own in zip(texts, pictures, strict=True)]
            )
            for texts in (prompts, [self.unwanted] * len(prompts))
        )
        shapes = [
            self._shape(latents) for latents in (self.latent_shape, *(x.shape for x in shown.references))
        ]
        self._keep_positions(shapes, rows.tokens_BLD.shape[1])
        return replace(shown, tokens_BLD=rows.tokens_BLD, mask_BL=rows.mask_BL, away=away)

    def _keep_text(self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]]) -> None:
        super()._keep_text(prompts, references)
        shown = [
            PicturedPrompt.of(text, [seen for picture in own for seen in self._seen(picture[None])])
            for prompt, own in zip(prompts, references, strict=True)
            for text in (prompt, self.unwanted)
            if own
        ]
        if shown:
            self._shown.keep(shown)

    def _seen(self, images_BCHW: Tensor) -> list[Image.Image]:
        """Return pictures as the vision-language model is shown them."""
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as published

        height, width = images_BCHW.shape[2:]
        columns, rows = published.calculate_dimensions(published.CONDITION_IMAGE_SIZE, width / height)
        processor = self.pipeline.image_processor
        pictures = processor.numpy_to_pil(processor.pt_to_numpy(images_BCHW.float()))
        return [processor.resize(picture, rows, columns) for picture in pictures]

    def _read(self, shown: PicturedPrompt) -> Conditioning:
        """Return a prompt's row with its pictures: `text_length` tokens, and the pictures' own."""
        patches = self._patches(images=list(shown.pictures), return_tensors="pt").to(self.device)
        counts = (patches.image_grid_thw.prod(dim=1) // self._patches.merge_size**2).tolist()
        before = "".join(_PICTURE.format(n, _PIXELS * count) for n, count in enumerate(counts, start=1))
        encoder = self.text_encoders()[0]
        own = len(encoder.tokenizer(before, add_special_tokens=False)["input_ids"])
        with self.text_present():
            return replace(encoder, length=encoder.length + own).encode(before + shown.prompt, **patches)
