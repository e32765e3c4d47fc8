"""Names and layouts of weights, PyTorch <-> Flax; `python -m convert_weights SRC DST` converts a model."""
