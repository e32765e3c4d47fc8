"""Conversion of models between diffusers' layout and Orbax checkpoints: `python -m convert_weights`."""
