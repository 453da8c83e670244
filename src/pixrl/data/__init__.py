"""What the methods read: concept pairs, prompts, subjects."""
