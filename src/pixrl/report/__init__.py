"""Pages and files that show a run: reports, charts, exports and model cards."""
