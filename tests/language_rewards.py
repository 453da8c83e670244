"""How to make each reward with a language model from tiny checkpoints, for what is asked of all rewards."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests import tiny_blip, tiny_flant5, tiny_hpsv3, tiny_ocr

OPTIONS: Mapping[str, Callable[[Path], dict[str, object]]] = {
    "blip_vqa": lambda folder: {"model": tiny_blip.blip_vqa(folder / "blip_vqa")},
    "hpsv3": lambda folder: {
        "model": tiny_hpsv3.hpsv3(folder / "hpsv3"),
        "processor": tiny_hpsv3.qwen2_vl(folder / "qwen"),
    },
    "image_reward": lambda folder: {"model": tiny_blip.image_reward(folder / "image_reward")},
    "ocr": lambda folder: {
        "model": tiny_ocr.recognizer(folder / "recognizer"),
        "detector": tiny_ocr.detector(folder / "detector"),
    },
    "vqascore": lambda folder: {
        "model": tiny_flant5.flant5(folder / "flant5", tiny_flant5.vision_tower(folder / "tower")),
        "tokenizer": tiny_flant5.tokenizer(folder / "t5"),
    },
}
"""Name -> its options, in a folder that the checkpoint is written to."""
METADATA: Mapping[str, Sequence[Mapping[str, object]]] = {
    "blip_vqa": [
        {"phrases": ["an owl"]},
        {"phrases": []},
        {"phrases": ["two owls", "a red cat"]},
        {"phrases": ["a"]},
    ],
}
"""Name -> what it reads of four pictures, where it reads anything."""
PROMPTS: Mapping[str, Sequence[str]] = {
    "ocr": ['an owl, "nt4"', 'a cat, "z4n1"', "two owls", 'an owl and "Stop"']
}
"""Name -> four prompts, where it asks more of them than to be text."""
