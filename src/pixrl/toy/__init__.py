"""The toy world consists of small pictures with exactly known content, and of small real models trained on them."""

from pathlib import Path

CHECKPOINTS = Path(__file__).parent / "checkpoints"
"""The folder of the shipped checkpoints, one folder each."""
