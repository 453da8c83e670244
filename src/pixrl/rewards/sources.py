"""Where an encoder's weights come from, and what their provenance says: id, checksum, revision and licence."""

import re
from collections.abc import Iterable
from pathlib import Path

from pixrl.errors import CheckpointError
from pixrl.rewards.weights import origin, published_folder, require_file, weight_shards
from pixrl.untrusted import plain

NOT_STATED = "not stated: see the model's page"
NON_COMMERCIAL = "BRIA RMBG-2.0: non-commercial use only, commercial use by agreement with BRIA AI"
LICENCES = {
    "facebook/dino-vits16": "Apache-2.0",
    "facebook/dinov2-base": "Apache-2.0",
    "facebook/dinov2-large": "Apache-2.0",
    "facebook/dinov2-small": "Apache-2.0",
    "google/siglip-so400m-patch14-384": "Apache-2.0",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "MIT",
    "openai/clip-vit-base-patch32": "MIT",
    "openai/clip-vit-large-patch14": "MIT",
    "openai/clip-vit-large-patch14-336": "MIT",
    "google-bert/bert-base-uncased": "Apache-2.0",
    "google/flan-t5-xxl": "Apache-2.0",
    "Qwen/Qwen2-VL-7B-Instruct": "Apache-2.0",
    "xswu/HPSv2": "Apache-2.0",
    "yuvalkirstain/PickScore_v1": "MIT",
    "PaddlePaddle/PP-OCRv5_mobile_det_safetensors": "Apache-2.0",
    "PaddlePaddle/PP-OCRv5_mobile_rec_safetensors": "Apache-2.0",
    "PaddlePaddle/PP-OCRv5_server_det_safetensors": "Apache-2.0",
    "PaddlePaddle/PP-OCRv5_server_rec_safetensors": "Apache-2.0",
    "Salesforce/blip-vqa-capfilt-large": "BSD-3-Clause",
    "stepfun-ai/GOT-OCR-2.0-hf": "Apache-2.0",
    "ZhengPeng7/BiRefNet": "MIT",
    "ZhengPeng7/BiRefNet_lite": "MIT",
}
"""Hub id -> licence of the weights, or of the code they are published with where they state none."""
WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
WORDS = (
    "config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "*processor_config.json",
)
"""What is needed of a checkpoint whose weights are not."""
_FIELD = re.compile(r"^(license|license_name):(.*)$", re.MULTILINE)


def describe(ref: str | Path, path: Path) -> dict[str, str]:
    """Provenance of the weights that a folder's model is loaded from, or of one file: id, checksum, revision, licence.

    Raises:
        CheckpointError: the folder holds no weights.
    """
    folder, files = (path.parent, [path]) if path.is_file() else (path, weight_shards(path))
    return describe_files(ref, folder, files)


def describe_files(ref: str | Path, folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """The same of some files of a folder."""
    return origin(ref, folder, files, licence(ref, folder))


def licence(ref: str | Path, folder: Path) -> str:
    """What the README in the folder states in its front matter, or what that hub id is published under."""
    stated = _front_matter(folder / "README.md")
    if "rmbg" in f"{ref} {stated}".lower():
        return NON_COMMERCIAL
    if str(ref).startswith("toy:"):
        return "Apache-2.0"
    return stated or LICENCES.get(str(ref).partition("@")[0], NOT_STATED)


def is_weight_file(ref: str | Path) -> bool:
    """Whether a reference is the path of one file, not a folder or a hub id."""
    return Path(str(ref)).suffix in WEIGHT_SUFFIXES


def find_file(ref: str | Path, name: str) -> Path:
    """One file of a published checkpoint: `ref` is the file itself, a folder that holds `name`, or a hub id.

    Raises:
        CheckpointError: there is no such file, or the hub does not give it.
    """
    given = Path(str(ref)).expanduser()
    if is_weight_file(ref):
        if not given.is_file():
            raise CheckpointError(
                f"The file {str(ref)!r} does not exist. Give {name}, its folder, or a hub id."
            )
        return given
    return require_file(published_folder(ref, (name, "README.md")), name)


def words_folder(ref: str | Path) -> Path:
    """The folder of a checkpoint's config, tokenizer and preprocessing; its weights are not fetched.

    Raises:
        CheckpointError: it has no config, or the hub does not give it.
    """
    folder = published_folder(ref, WORDS)
    require_file(folder, "config.json")
    return folder


def _front_matter(readme: Path) -> str | None:
    """`license`, or `license_name` where that is `other`."""
    if not readme.is_file():
        return None
    opening, head, *_ = (*readme.read_text(encoding="utf-8", errors="replace").split("---\n", 2), "")
    found = [] if opening else _FIELD.findall(head)
    fields = {name: text for name, given in found if (text := plain(given.strip().strip("'\"")))}
    stated = fields.get("license")
    return fields.get("license_name", stated) if stated == "other" else stated
