"""Checkpoints: a network's folder, read and written."""

from kandinsky_jax.checkpoint.networks import (
    Layout,
    LazyNetwork,
    Progress,
    check_network,
    default_dtype,
    describe_network,
    flat_params,
    load_network,
    loading_bar,
    move_network,
    network_dtype,
    read_params,
    set_params,
    stored_bytes,
)
from kandinsky_jax.checkpoint.saving import save_config, save_network
from kandinsky_jax.checkpoint.tensor_files import WeightSelection
from kandinsky_jax.common.errors import CheckpointError

__all__ = [
    "CheckpointError",
    "Layout",
    "LazyNetwork",
    "Progress",
    "WeightSelection",
    "check_network",
    "default_dtype",
    "describe_network",
    "flat_params",
    "load_network",
    "loading_bar",
    "move_network",
    "network_dtype",
    "read_params",
    "save_config",
    "save_network",
    "set_params",
    "stored_bytes",
]
