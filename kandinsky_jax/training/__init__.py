"""Training: data/ -> tasks.py (encoding of batches) -> losses.py -> step.py, run by loop.py."""
