"""Tensors of checkpoints: names and layouts in PyTorch and Flax, and their files."""
