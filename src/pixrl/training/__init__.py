"""The one loop: collect, score, update, log, save, resume. Run folders and checkpoints live here too."""
