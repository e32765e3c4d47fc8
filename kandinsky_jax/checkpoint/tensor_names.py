"""Names and layouts of tensors in PyTorch and Flax; defined only here.

A parameter here has the attribute path of its PyTorch twin; only the last part and the order of axes differ. So one
small table serves every network, in both directions. A "Flax name" is the dotted path, such as
`down_blocks.1.resnets.0.conv1.kernel`.
"""

from __future__ import annotations

import re

import numpy as np

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}

# Attention of checkpoints saved by old releases of diffusers.
_OLD_NAMES = (
    (re.compile(r"(attentions\.\d+)\.query\."), r"\1.to_q."),
    (re.compile(r"(attentions\.\d+)\.key\."), r"\1.to_k."),
    (re.compile(r"(attentions\.\d+)\.value\."), r"\1.to_v."),
    (re.compile(r"(attentions\.\d+)\.proj_attn\."), r"\1.to_out.0."),
)

# Buffers that some releases saved although they follow from the configuration.
_DROPPED = re.compile(r"(\.embeddings\.position_ids|^causal_attention_mask)$")


def torch_name(flax_name: str) -> str:
    """`conv_in.kernel` -> `conv_in.weight`."""
    stem, _, leaf = flax_name.rpartition(".")
    return f"{stem}.{_LEAVES[leaf]}" if leaf in _LEAVES else flax_name


def modern_name(name: str) -> str | None:
    """Return a PyTorch tensor's name in current diffusers, or None if the tensor is ignored."""
    if _DROPPED.search(name):
        return None
    for pattern, replacement in _OLD_NAMES:
        name = pattern.sub(replacement, name)
    return name


def _axes_to_torch(flax_name: str, ndim: int) -> tuple[int, ...]:
    if flax_name.endswith(".kernel"):  # a convolution's [H, W, in, out] <-> [out, in, H, W]
        return (3, 2, 0, 1)
    return tuple(range(ndim))


def to_torch(flax_name: str, array: np.ndarray) -> np.ndarray:
    """Transpose an array to PyTorch's order of axes (a view)."""
    return array.transpose(_axes_to_torch(flax_name, array.ndim))


def to_flax(flax_name: str, array: np.ndarray) -> np.ndarray:
    """Transpose an array to Flax's order of axes (a view)."""
    return array.transpose(np.argsort(_axes_to_torch(flax_name, array.ndim)))


def torch_shape(flax_name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a parameter in PyTorch."""
    return tuple(shape[axis] for axis in _axes_to_torch(flax_name, len(shape)))
