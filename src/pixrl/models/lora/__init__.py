"""LoRA files of other trainers: read under every name that is in use, and written for other tools."""
