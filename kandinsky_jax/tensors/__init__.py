"""Tensors outside the networks: their names and layouts, PyTorch <-> Flax, and the files that hold them."""
