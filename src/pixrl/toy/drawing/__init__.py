"""This package draws with PIL: a pen in an object's own frame, the kinds, their accessories, and the backgrounds."""
