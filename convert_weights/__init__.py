"""Models between diffusers' layout and Orbax checkpoints: `python -m convert_weights`."""
