"""Losses of training: pure functions of a network's parameters and a batch.

Reference: diffusers' examples/kandinsky2_2/text_to_image, `train_text_to_image_decoder.py` and `..._prior.py`. Their
min-SNR weights are used even where they differ from the paper: the prior predicts the sample, and its weights are
min(SNR, gamma), not divided. diffusers trains neither MoVQ nor CLIP; their losses are those of the papers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kandinsky_jax.common.types import Array, Bool, Float, Int, Num, PyTree
from kandinsky_jax.diffusion import Network, Params
from kandinsky_jax.models.movq import straight_through
from kandinsky_jax.training.mesh import all_examples, first_example

PredictionType = Literal["epsilon", "sample", "v_prediction"]
COMMITMENT = 0.25  # van den Oord et al. 2017, section 3.2
MAX_LOGIT_SCALE = math.log(100)  # the largest logit scale, Radford et al. 2021, section 2.5


def min_snr_weights(
    alphas_cumprod: Float[Array, "T_train"], timesteps: Int[Array, "B"], gamma: float, prediction_type: PredictionType
) -> Float[Array, "B"]:
    """Compute min-SNR weights of examples (Hang et al. 2023, arXiv 2303.09556, section 3.4).

    Args:
        alphas_cumprod: of the noise schedule, float32 `[T]`.
        timesteps: int `[B]`.
        gamma: the paper's recommendation is 5.
        prediction_type: of the network.
    Returns:
        float32 `[B]`.
    """
    alpha = alphas_cumprod[timesteps]
    snr = alpha / (1 - alpha)
    least = jnp.minimum(snr, gamma)
    return {"epsilon": least / snr, "sample": least, "v_prediction": least / (snr + 1)}[prediction_type]


def diffuse(
    alphas_cumprod: Float[Array, "T_train"],
    clean: Float[Array, "B *s"],
    noise: Float[Array, "B *s"],
    timesteps: Int[Array, "B"],
) -> Float[Array, "B *s"]:
    """Apply the forward process at `timesteps [B]`; returns `[B, ...]` in the dtype of `clean`."""
    alpha = alphas_cumprod[timesteps].reshape(-1, *[1] * (clean.ndim - 1))
    return jnp.sqrt(alpha) * clean + jnp.sqrt(1 - alpha) * noise


def _mean(error: jax.Array, weights: jax.Array | None) -> jax.Array:
    each = jnp.square(error).mean(axis=tuple(range(1, error.ndim)))  # [B]
    return (each if weights is None else each * weights).mean()


def decoder_condition(
    module: Any,
    latents: Float[Array, "B h w C"],
    image_embeds: Float[Array, "B D"],
    hint: Float[Array, "B H W 3"] | None = None,
    repaint_mask: Num[Array, "B h w 1"] | None = None,
) -> PyTree:
    """Compute a UNet's conditioning of a batch; arguments: see `decoder_loss`."""
    channels = None
    if repaint_mask is not None:  # the UNet takes the opposite, 1 where a latent is kept
        keep_mask = 1 - repaint_mask
        channels = jnp.concatenate([latents * keep_mask, keep_mask], axis=-1)  # [B, h, w, 5]
    return module.condition(image_embeds, hint, channels)


def normalized_embeds(module: Any, image_embeds: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """Normalise image embeddings with a prior's statistics, which are not trained."""
    mean, std = (jax.lax.stop_gradient(module.clip_mean[...]), jax.lax.stop_gradient(module.clip_std[...]))
    return (image_embeds - mean) / std


def decoder_loss(
    network: Network,
    params: Params,
    latents: Float[Array, "B h w C"],
    image_embeds: Float[Array, "B D"],
    noise: Float[Array, "B h w C"],
    timesteps: Int[Array, "B"],
    alphas_cumprod: Float[Array, "T_train"],
    hint: Float[Array, "B H W 3"] | None = None,
    repaint_mask: Num[Array, "B h w 1"] | None = None,
    *,
    snr_gamma: float | None = None,
) -> Float[Array, ""]:
    """Compute the UNet's mean squared error in predicting the noise, a float32 scalar.

    Args:
        latents: of MoVQ, float32 `[B, h, w, 4]`.
        image_embeds: of CLIP, `[B, encoder_hid_dim]`.
        noise: standard normal, of the latents' shape.
        timesteps: int `[B]`, 0 .. T - 1.
        alphas_cumprod: float32 `[T]`.
        hint: for a UNet that takes depth hints, `[B, H, W, 3]` in 0..1.
        repaint_mask: for an inpainting UNet, 1 where a latent is repainted, `[B, h, w, 1]`.
        snr_gamma: of min-SNR weighting; None turns it off.
    """
    module = network.bind(params)
    noisy = diffuse(alphas_cumprod, latents, noise, timesteps)
    condition = decoder_condition(module, latents, image_embeds, hint, repaint_mask)
    output = module(noisy, timesteps, condition).astype(jnp.float32)
    weights = None if snr_gamma is None else min_snr_weights(alphas_cumprod, timesteps, snr_gamma, "epsilon")
    return _mean(output[..., : latents.shape[-1]] - noise, weights)  # without the variance, which is not trained


def prior_loss(
    network: Network,
    params: Params,
    image_embeds: Float[Array, "B D"],
    prompt_embeds: Float[Array, "B P"],
    text_encoder_hidden_states: Float[Array, "B T E"],
    text_mask: Bool[Array, "B T"],
    noise: Float[Array, "B D"],
    timesteps: Int[Array, "B"],
    alphas_cumprod: Float[Array, "T_train"],
    *,
    snr_gamma: float | None = None,
) -> Float[Array, ""]:
    """Compute the prior's mean squared error in predicting the normalised image embedding, a float32 scalar.

    Args:
        image_embeds: of CLIP, float32 `[B, D]`, not normalised.
        prompt_embeds, text_encoder_hidden_states, text_mask: of the captions, `[B, D]`, `[B, 77, D]`, bool `[B, 77]`;
            the length may be less than 77 for short captions.
        noise: standard normal `[B, D]`.
        timesteps, alphas_cumprod, snr_gamma: see `decoder_loss`.
    """
    module = network.bind(params)
    clean = normalized_embeds(module, image_embeds)
    noisy = diffuse(alphas_cumprod, clean, noise, timesteps)
    condition = module.condition(prompt_embeds, text_encoder_hidden_states, text_mask)
    predicted = module(noisy, timesteps, condition).astype(jnp.float32)
    weights = None if snr_gamma is None else min_snr_weights(alphas_cumprod, timesteps, snr_gamma, "sample")
    return _mean(predicted - clean, weights)


def movq_loss(
    network: Network,
    params: Params,
    pixels: Float[Array, "B H W 3"],
    quantized: Bool[Array, "B"],
    *,
    commitment: float = COMMITMENT,
) -> Float[Array, ""]:
    """Compute MoVQ's reconstruction and codebook losses, a float32 scalar.

    The sum of the mean absolute and the mean squared error of pixels, and the codebook's two terms (van den Oord et al.
    2017, arXiv 1711.00937, equation 3). Gradients pass through the codebook unchanged (straight-through).

    Args:
        pixels: pictures in -1..1, float32 `[B, H, W, 3]`.
        quantized: examples that are decoded from codes, bool `[B]`; the others are decoded from latents, as in the
            pipelines.
        commitment: weight of the term that moves latents towards codes.
    """
    module = network.bind(params)
    latents = module.encode(pixels)  # [B, h, w, 4]
    codes, _ = module.quantize(latents)
    given = jnp.where(quantized[:, None, None, None], straight_through(latents, codes), latents)
    decoded = module.decode(given)
    error = (decoded - pixels).astype(jnp.float32)
    differences = [codes - jax.lax.stop_gradient(latents), latents - jax.lax.stop_gradient(codes)]
    to_latents, to_codes = (jnp.square(part.astype(jnp.float32)).mean() for part in differences)
    return jnp.abs(error).mean() + jnp.square(error).mean() + to_latents + commitment * to_codes


def clip_loss(
    networks: Mapping[str, Network],
    params: Mapping[str, Params],
    input_ids: Int[Array, "B T"],
    clip_pixels: Float[Array, "B S S 3"],
) -> Float[Array, ""]:
    """Compute the contrastive loss of pictures and captions, a float32 scalar (Radford et al. 2021, figure 3).

    Each is compared with all examples of the batch, those of other devices too.

    Args:
        networks: "text_encoder" and "image_encoder".
        params: of each network, and "logit_scale", the logarithm of the cosines' factor, which is at most 100.
        input_ids: int32 `[B, T]`.
        clip_pixels: preprocessed for the vision tower, float32 `[B, S, S, 3]`.
    """
    text = networks["text_encoder"].bind(params["text_encoder"])(input_ids).text_embeds
    image = networks["image_encoder"].bind(params["image_encoder"])(clip_pixels)
    text, image = (x.astype(jnp.float32) for x in (text, image))
    text, image = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (text, image))
    scale = jnp.exp(jnp.minimum(params["logit_scale"].astype(jnp.float32), MAX_LOGIT_SCALE))
    all_text, all_images = (all_examples(x) for x in (text, image))  # [N, D], of the B here and of other devices
    matching = first_example(len(text)) + jnp.arange(len(text))[:, None]  # [B, 1]
    found = [
        jnp.take_along_axis(jax.nn.log_softmax(scale * mine @ theirs.T), matching, axis=1)
        for mine, theirs in ((text, all_images), (image, all_text))
    ]
    return -(found[0].mean() + found[1].mean()) / 2
