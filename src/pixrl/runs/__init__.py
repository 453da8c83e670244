"""Runs: the one loop, where a run starts and goes on, its folder and its checkpoints."""
