"""What a recipe needs, asked before anything loads: files, licences, memory, time."""
