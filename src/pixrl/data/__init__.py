"""The readers of data: concept pairs, prompts, subjects and their pictures."""
