"""Folders whose weights are a pytorch_model.bin alone, as openai/clip-vit-base-patch32 and older ones are published."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

BIN, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class RunsCode:
    """A pickled object that prints when it is read by who runs what a file says."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this must never be printed",)


def as_bin(source: Path, folder: Path, *, shards: int = 1, zipped: bool = True) -> Path:
    """A copy of a safetensors folder with the same tensors as pytorch_model.bin.

    `shards`: above 1, in so many files with their index. `zipped` False: as torch.save wrote before 1.6.
    """
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = load_file(source / "model.safetensors")
    parts = [sorted(weights)[start::shards] for start in range(shards)]
    names = [BIN] if shards == 1 else [f"pytorch_model-{n}-of-{shards}.bin" for n in range(shards)]
    for name, keys in zip(names, parts, strict=True):
        held = {key: weights[key] for key in keys}
        torch.save(held, folder / name, _use_new_zipfile_serialization=zipped)
    if shards > 1:
        listed = {key: name for name, keys in zip(names, parts, strict=True) for key in keys}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return folder
