"""The toy world: small pictures whose content is known exactly, and small real models trained on them."""

from pathlib import Path

CHECKPOINTS = Path(__file__).parent / "checkpoints"
"""The folder of the shipped checkpoints, one folder each."""
