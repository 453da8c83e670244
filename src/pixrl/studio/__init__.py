"""The studio: a local page that shows runs while they train, and fuses concepts by hand."""
