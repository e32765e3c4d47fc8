"""Training: what is minimised (losses.py), by which step (step.py), and of which parameters (lora.py)."""

from kandinsky_jax.training.lora import LoraConfig
from kandinsky_jax.training.losses import decoder_loss, min_snr_weights, prior_loss
from kandinsky_jax.training.step import Settings, Trainer, TrainState

__all__ = [
    "LoraConfig",
    "Settings",
    "TrainState",
    "Trainer",
    "decoder_loss",
    "min_snr_weights",
    "prior_loss",
]
