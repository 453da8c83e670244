"""The toy world's second edition: what its pictures show, how they are drawn, and what is said about them."""
