"""What training minimises: pure functions of a network's parameters and a batch.

Reference: diffusers' examples/kandinsky2_2/text_to_image, `train_text_to_image_decoder.py` and `..._prior.py`. Their
min-SNR weights are kept as they are, also where they differ from the paper: the prior predicts the sample, and its
weights are min(SNR, gamma) undivided.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from kandinsky_jax.sampling import Network, Params

PredictionType = Literal["epsilon", "sample", "v_prediction"]


def min_snr_weights(
    alphas_cumprod: jax.Array, timesteps: jax.Array, gamma: float, prediction_type: PredictionType
) -> jax.Array:
    """How much an example's error counts (Hang et al. 2023, arXiv 2303.09556, section 3.4).

    Args:
        alphas_cumprod: of the noise schedule, float32 `[T]`.
        timesteps: int `[B]`.
        gamma: the paper's recommendation is 5.
        prediction_type: what the network predicts.
    Returns:
        float32 `[B]`.
    """
    alpha = alphas_cumprod[timesteps]
    snr = alpha / (1 - alpha)
    least = jnp.minimum(snr, gamma)
    return {"epsilon": least / snr, "sample": least, "v_prediction": least / (snr + 1)}[prediction_type]


def add_noise(alphas_cumprod: jax.Array, clean: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
    """The forward process at `timesteps [B]`: `[B, ...]`, in the dtype of `clean`."""
    alpha = alphas_cumprod[timesteps].reshape(-1, *[1] * (clean.ndim - 1))
    return jnp.sqrt(alpha) * clean + jnp.sqrt(1 - alpha) * noise


def _mean(error: jax.Array, weights: jax.Array | None) -> jax.Array:
    each = jnp.square(error).mean(axis=tuple(range(1, error.ndim)))  # [B]
    return (each if weights is None else each * weights).mean()


def decoder_loss(
    network: Network,
    params: Params,
    latents: jax.Array,
    image_embeds: jax.Array,
    noise: jax.Array,
    timesteps: jax.Array,
    alphas_cumprod: jax.Array,
    *,
    snr_gamma: float | None = None,
) -> jax.Array:
    """The UNet's error in predicting the noise, a float32 scalar.

    Args:
        latents: MoVQ's, float32 `[B, h, w, 4]`.
        image_embeds: CLIP's, `[B, encoder_hid_dim]`.
        noise: standard normal, as the latents.
        timesteps: int `[B]`, 0 .. T - 1.
        alphas_cumprod: float32 `[T]`.
        snr_gamma: of min-SNR weighting; None is none.
    """
    module = network.bind(params)
    noisy = add_noise(alphas_cumprod, latents, noise, timesteps)
    output = module(noisy, timesteps, module.condition(image_embeds)).astype(jnp.float32)
    weights = None if snr_gamma is None else min_snr_weights(alphas_cumprod, timesteps, snr_gamma, "epsilon")
    return _mean(output[..., : latents.shape[-1]] - noise, weights)  # the rest is a variance, which is not trained


def prior_loss(
    network: Network,
    params: Params,
    image_embeds: jax.Array,
    prompt_embeds: jax.Array,
    text_encoder_hidden_states: jax.Array,
    text_mask: jax.Array,
    noise: jax.Array,
    timesteps: jax.Array,
    alphas_cumprod: jax.Array,
    *,
    snr_gamma: float | None = None,
) -> jax.Array:
    """The prior's error in predicting the normalised image embedding, a float32 scalar.

    Args:
        image_embeds: CLIP's of the picture, float32 `[B, D]`, not normalised.
        prompt_embeds, text_encoder_hidden_states, text_mask: of its caption, `[B, D]`, `[B, 77, D]`, bool `[B, 77]`.
        noise: standard normal `[B, D]`.
        timesteps, alphas_cumprod, snr_gamma: see `decoder_loss`.
    """
    module = network.bind(params)
    mean, std = (jax.lax.stop_gradient(module.clip_mean[...]), jax.lax.stop_gradient(module.clip_std[...]))
    clean = (image_embeds - mean) / std
    noisy = add_noise(alphas_cumprod, clean, noise, timesteps)
    condition = module.condition(prompt_embeds, text_encoder_hidden_states, text_mask)
    predicted = module(noisy, timesteps, condition).astype(jnp.float32)
    weights = None if snr_gamma is None else min_snr_weights(alphas_cumprod, timesteps, snr_gamma, "sample")
    return _mean(predicted - clean, weights)
