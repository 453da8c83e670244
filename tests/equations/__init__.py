"""Properties first, then oracles worked out by hand from the papers, then golden numbers."""
