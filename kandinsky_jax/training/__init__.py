"""Training: data.py -> tasks.py (what a batch becomes) -> losses.py -> step.py, driven by loop.py as config.py says."""
