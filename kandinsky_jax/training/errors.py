"""Errors of training, other than those of data and configuration."""


class TrainingError(RuntimeError):
    """Training cannot continue; existing checkpoints stay."""
