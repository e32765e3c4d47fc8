"""Errors of training, other than those of data and configuration."""

from kandinsky_jax.common.errors import RunError


class TrainingError(RunError):
    """Training cannot continue; existing checkpoints stay."""
