"""Rewards: making pictures score higher by any function of pictures.

    DraftConfig, train_draft        a LoRA by gradients through the sampler: DRaFT, AlignProp
    NoiseConfig, optimize_noise     the first noise of one picture: ReNO
    DDPOConfig, train_ddpo          a LoRA by policy gradients, for rewards without a gradient: DDPO

Pairs of pictures instead of a reward are a kind of training: `kandinsky-jax train dpo-decoder`.
"""

from kandinsky_jax.rewards.ddpo import DDPOConfig, PerPromptStatTracker, policy_loss, sample_trajectories, train_ddpo
from kandinsky_jax.rewards.draft import DraftConfig, train_draft
from kandinsky_jax.rewards.functions import ClipSimilarity, Reward, jpeg_compressibility
from kandinsky_jax.rewards.noise import NoiseConfig, OptimizedNoise, noise_regularization, optimize_noise
from kandinsky_jax.rewards.sampler import DecoderSampler
from kandinsky_jax.rewards.training import TrainedLora

__all__ = [
    "ClipSimilarity",
    "DDPOConfig",
    "DecoderSampler",
    "DraftConfig",
    "NoiseConfig",
    "OptimizedNoise",
    "PerPromptStatTracker",
    "Reward",
    "TrainedLora",
    "jpeg_compressibility",
    "noise_regularization",
    "optimize_noise",
    "policy_loss",
    "sample_trajectories",
    "train_ddpo",
    "train_draft",
]
