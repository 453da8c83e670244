"""Properties first, then oracles by hand, then golden numbers. `tiny.py` makes checkpoints of the real classes."""
