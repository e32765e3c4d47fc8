"""Training tasks, one file a network."""
