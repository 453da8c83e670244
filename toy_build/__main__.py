"""`python -m toy_build [STAGE ...]`: train the named stages, or all in the order in which they need each other.

A killed build goes on where it stopped. `python -m toy_build keep` writes unfinished states into build-state/.
"""

import importlib
import os
import sys
from pathlib import Path

import torch

from toy_build.training import ROOT, Build, keep

STAGES = {
    "vae": "toy_build.vae:build_vae",
    "clip": "toy_build.clip:build_clip",
    "segmenter": "toy_build.segmenters:build_segmenter",
    "identity": "toy_build.identity:build_identity",
    "preference": "toy_build.preference:build_preference",
    "texts": "toy_build.texts:build_texts",
    "sd3": "toy_build.sd3:build_sd3",
    "turbo": "toy_build.turbo:build_turbo",
    "parts": "toy_build.segmenters:build_parts",
    "flux": "toy_build.flux:build_flux",
}


def main(names: list[str]) -> int:
    work, out = ROOT / "build" / "world", Path(__file__).parent / "checkpoints"
    if names == ["keep"]:
        for path in keep(work, out):
            print(path.relative_to(ROOT), path.stat().st_size)
        return 0
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        print(f"There is no stage {unknown[0]!r}. Stages: {', '.join(STAGES)}; or keep.", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workers = 0 if device.type == "cpu" else max((os.cpu_count() or 2) - 2, 1)
    build = Build(out, work, device=device, workers=workers)
    for name in names or STAGES:
        module, function = STAGES[name].split(":")
        getattr(importlib.import_module(module), function)(build)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
