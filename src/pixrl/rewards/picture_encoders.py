"""The picture encoder of a checkpoint, by the class that its config names."""

from pathlib import Path

from pixrl.hub import Layout, folder, read_json
from pixrl.rewards.clip import ClipSimilarity
from pixrl.rewards.dino import DinoEncoder


def load_encoder(ref: str | Path, *, device: str = "auto") -> ClipSimilarity | DinoEncoder:
    """A CLIP or DINO checkpoint as eyes: `toy:clip`, `toy:identity`, a folder or a hub id.

    Raises:
        CheckpointError: the folder is missing, half written or of another class.
    """
    architectures = str(read_json(folder(ref, Layout.REWARD) / "config.json").get("architectures"))
    return ClipSimilarity(ref, device=device) if "CLIP" in architectures else DinoEncoder(ref, device=device)
