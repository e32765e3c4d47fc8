"""What may go wrong while training, other than in its data and its configuration."""


class TrainingError(RuntimeError):
    """Training cannot go on; what was kept stays."""
