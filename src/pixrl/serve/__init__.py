"""The server that scores pictures for runs in other environments."""
