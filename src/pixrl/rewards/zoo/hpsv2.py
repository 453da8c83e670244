"""Human-preference rewards HPSv2 and HPSv2.1: a CLIP ViT-H/14 fine-tuned on 798 k pairwise choices.

Wu et al. 2023 (Human Preference Score v2): s(x, y) = cos(E_image(y), E_text(x)), without logit scale or softmax; the
benchmark's tables show 100 s. v2.0 and v2.1 are two sets of weights whose scores are not comparable.

Published as OpenCLIP weights in `xswu/HPSv2` (Apache-2.0): one .pt file a version, without config or tokenizer, which
are taken from the CLIP that it was trained from. The picture goes in whole: the longer side is scaled to 224 and black
fills the square, where CLIP's own preprocessing would crop.
  1. A non-square picture whose longer side is 224 already is padded too; the official code forgets it and fails.
"""

import html
from collections.abc import Mapping
from enum import StrEnum
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from pixrl.hub_check import read_json
from pixrl.rewards.base import Form, Options, Read
from pixrl.rewards.clip import PromptCosineReward
from pixrl.rewards.encoders import ClipSimilarity
from pixrl.rewards.preprocess import PadToSquare
from pixrl.rewards.references import choice
from pixrl.rewards.weights import describe_files, find_file, words_folder

HUB_ID = "xswu/HPSv2"
TRAINED_FROM = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class HPSVersion(StrEnum):
    """The two published sets of weights."""

    V2 = "v2.0"
    """The version of RMLer: about 0.26 to 0.28."""
    V2_1 = "v2.1"
    """The version of E²PO, DanceGRPO and D²-Align: about 0.20 to 0.33."""


FILES = {HPSVersion.V2: "HPS_v2_compressed.pt", HPSVersion.V2_1: "HPS_v2.1_compressed.pt"}


class HPSv2Reward(PromptCosineReward):
    """The cosine between the picture and its prompt, from HPSv2's weights.

    Args:
        model: a hub id, a folder that holds the version's file, or such a file.
        version: see `HPSVersion`. A file given by its path is taken as that version's.
        processor: the CLIP whose config and tokenizer fit the weights.
        antialias: false reproduces figures made with torchvision up to 0.16, which resized float tensors without it.

    Raises:
        ConfigError: there is no such version.
        CheckpointError: a file is missing, damaged, or holds another model.
    """

    name = "hpsv2"
    licences: ClassVar[Mapping[str, str]] = {HUB_ID: "Apache-2.0"}

    def __init__(
        self,
        model: str | Path = HUB_ID,
        version: str = HPSVersion.V2_1,
        processor: str | Path = TRAINED_FROM,
        antialias: bool = True,
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        self.version = choice(self.name, "version", version, HPSVersion)
        file = find_file(model, FILES[self.version])
        vision = read_json(words_folder(processor) / "config.json").get("vision_config")
        side = int(vision.get("image_size", 224)) if isinstance(vision, dict) else 224
        clip = ClipSimilarity(
            file,
            device=device,
            dtype=dtype,
            processor=processor,
            preprocess=PadToSquare(side, antialias=antialias),
            clean=clean_text,
        )
        super().__init__(
            clip,
            provenance={
                **describe_files(f"{model}", file.parent, [file], self.licences),
                "file": file.name,
                "version": self.version.value,
                "text_cleaning": "ftfy, html, lower case" if find_spec("ftfy") else "html, lower case",
            },
        )

    @classmethod
    def reads(cls, options: Options) -> Mapping[str, Read]:
        version = choice(cls.name, "version", str(options["version"]), HPSVersion)
        return {"model": Read(Form.FILES, (FILES[version],)), "processor": Read(Form.WORDS)}


def clean_text(text: str) -> str:
    """Clean a text as OpenCLIP does before its tokenizer: Unicode mended where ftfy is installed, HTML, spaces.

    The tokenizer itself makes it lower case and truncates it at 77 tokens.
    """
    if find_spec("ftfy"):
        text = str(import_module("ftfy").fix_text(text))
    return " ".join(html.unescape(html.unescape(text)).split())
