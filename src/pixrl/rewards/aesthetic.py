"""Aesthetic predictors, which score how beautiful people find a picture, from 1 to 10, whatever its prompt.

Both are five linear layers, without activations between them, on the unit vector of a frozen encoder:

* `laion-v2` (improved-aesthetic-predictor, Schuhmann 2022): CLIP ViT-L/14, head `sac+logos+ava1-l14-linearMSE.pth`.
  Flow-GRPO's and DiffusionNFT's; typically 5 to 6.5.
* `v2.5` (discus0434's aesthetic-predictor-v2-5): SigLIP so400m/14-384, head `aesthetic_predictor_v2_5.pth`. E²PO's; 5.5
  and above is good. Code and head are under AGPL-3.0, which reaches those who offer a service with it: the option
  `accept_licence: AGPL-3.0` says that you know. pixrl holds neither; its layers are our own, the head is your file.

Their scores are not comparable.
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from pixrl.errors import CheckpointError, ConfigError
from pixrl.rewards.base import DifferentiableReward, Form, Options, Read
from pixrl.rewards.encoders import ClipSimilarity, PictureEncoder, SiglipEncoder
from pixrl.rewards.references import choice
from pixrl.rewards.weights import describe_files, find_file, read_weights, refuse_misfits
from pixrl.types import RewardBatch, Scores

HEAD_WIDTHS = (1024, 128, 64, 16, 1)
"""The output widths of the published head's layers."""
AGPL = "AGPL-3.0"


class AestheticVersion(StrEnum):
    """The published predictors that can be chosen; the module's docstring describes them."""

    LAION = "laion-v2"
    V2_5 = "v2.5"


ENCODERS = {
    AestheticVersion.LAION: "openai/clip-vit-large-patch14",
    AestheticVersion.V2_5: "google/siglip-so400m-patch14-384",
}
HEADS = {
    AestheticVersion.LAION: "sac+logos+ava1-l14-linearMSE.pth",
    AestheticVersion.V2_5: "aesthetic_predictor_v2_5.pth",
}
HEAD_NAMES = {AestheticVersion.LAION: "layers", AestheticVersion.V2_5: "scoring_head"}
HEAD_LICENCES = {AestheticVersion.LAION: "Apache-2.0", AestheticVersion.V2_5: AGPL}
HEAD_PAGES = {
    AestheticVersion.LAION: "https://github.com/christophschuhmann/improved-aesthetic-predictor",
    AestheticVersion.V2_5: "https://github.com/discus0434/aesthetic-predictor-v2-5",
}


class AestheticReward(DifferentiableReward):
    """The score of an aesthetic predictor; the prompt plays no part.

    Args:
        head: the published file of the head (.pth or .safetensors), or a folder or hub id that holds it.
        version: `laion-v2` or `v2.5`; see the module's docstring.
        model: the encoder; by default the version's published one.
        accept_licence: `AGPL-3.0`, which v2.5 requires and `laion-v2` refuses.

    Raises:
        ConfigError: an unknown version, or a licence that is not accepted or not asked for.
        CheckpointError: a file is missing, damaged, or of another model.
    """

    name = "aesthetic"
    examples: ClassVar[Mapping[str, object]] = {"head": HEADS[AestheticVersion.LAION]}

    def __init__(
        self,
        head: str | Path,
        version: str = AestheticVersion.LAION,
        model: str | Path | None = None,
        accept_licence: str | None = None,
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        chosen = choice(self.name, "version", version, AestheticVersion)
        if chosen is AestheticVersion.V2_5 and accept_licence != AGPL:
            raise ConfigError(
                f"aesthetic: the head of v2.5 is published under {AGPL} ({HEAD_PAGES[chosen]}), whose terms reach "
                f"services that use it. If they suit you, say so: accept_licence: {AGPL}. If not: version: "
                f"{AestheticVersion.LAION}"
            )
        if chosen is not AestheticVersion.V2_5 and accept_licence is not None:
            raise ConfigError(
                f"aesthetic: {chosen} asks for no licence, so accept_licence has no effect. Take it out."
            )
        ref = ENCODERS[chosen] if model is None else model
        make = ClipSimilarity if chosen is AestheticVersion.LAION else SiglipEncoder
        self.encoder: PictureEncoder = make(ref, device=device, dtype=dtype)
        file = find_file(head, HEADS[chosen])
        self.head = read_head(file, HEAD_NAMES[chosen]).to(self.encoder.device)
        width = self.encoder.image_features(torch.zeros(1, 3, 64, 64)).shape[1]
        (first, *_) = self.head
        if isinstance(first, nn.Linear) and first.in_features != width:
            raise CheckpointError(
                f"{file} takes {first.in_features} numbers a picture, but the encoder "
                f"{self.encoder.provenance['model']} gives {width}. Give the encoder that it was trained on."
            )
        head_source = describe_files(head, file.parent, [file])
        self.provenance: Mapping[str, str] = {
            **self.encoder.provenance,
            "version": chosen.value,
            "head": head_source["model"],
            "head_revision": head_source["revision"],
            "head_licence": HEAD_LICENCES[chosen],
        }

    @classmethod
    def reads(cls, options: Options) -> Mapping[str, Read]:
        version = choice(cls.name, "version", str(options["version"]), AestheticVersion)
        return {"head": Read(Form.FILES, (HEADS[version],)), "model": Read(usual=ENCODERS[version])}

    def score(self, batch: RewardBatch) -> Scores:
        features_BE = self.encoder.image_features(batch.images_BCHW).to(self.encoder.device)
        with torch.no_grad():
            scores_B = self.head(features_BE)[:, 0].cpu()
        return Scores.checked(scores_B, [None] * len(scores_B), self.provenance)

    def differentiable_scores(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]] = ()
    ) -> Tensor:
        scores_B: Tensor = self.head(self.encoder.differentiable_features(images_BCHW))[:, 0]
        return scores_B.to(images_BCHW.device)


def read_head(file: Path, name: str) -> nn.Sequential:
    """Read the linear layers NAME.0, NAME.2 ... of a published head in float32; ignore the file's other tensors.

    Raises:
        CheckpointError: they are not the published five.
    """
    weights = {key: w for key, w in read_weights([file]).items() if key.startswith(f"{name}.")}
    numbers = sorted({int(key.split(".")[1]) for key in weights})
    expected = [f"{name}.{number}.{end}" for number in numbers for end in ("weight", "bias")]
    refuse_misfits([k for k in expected if k not in weights], [k for k in weights if k not in expected], file)
    shapes = [tuple(weights[f"{name}.{number}.weight"].shape) for number in numbers]
    fits = all(out == into for (out, _), (_, into) in pairwise(shapes))
    if tuple(out for out, _ in shapes) != HEAD_WIDTHS or not fits:
        raise CheckpointError(
            f"{file} holds no published aesthetic head: its layers called {name!r} have the shapes {shapes}, but "
            f"{', '.join(map(str, HEAD_WIDTHS))} columns must come out of five. Is it the head of another version?"
        )
    layers = nn.Sequential(*(nn.Linear(into, out) for out, into in shapes))
    for layer, number in zip(layers, numbers, strict=True):
        layer.load_state_dict({end: weights[f"{name}.{number}.{end}"] for end in ("weight", "bias")})
    return layers.requires_grad_(False).eval()
