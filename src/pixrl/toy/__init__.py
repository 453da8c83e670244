"""The toy world: small pictures whose content is known exactly, and small real models trained on them."""
