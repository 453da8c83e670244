"""What a person touches, and the house itself: settings, run folders, checkpoints, commands, layers, names."""
