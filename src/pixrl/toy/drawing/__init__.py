"""How the toy world is drawn: `pen` draws shapes, one file a slot draws its 32 parts, `figure` puts them together."""
