"""Gradients through MoVQ's encoder and decoder, with and without its codebook, beside torch's autograd."""

from __future__ import annotations

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from kandinsky_jax.checkpoint import hub
from tests.conftest import SHAPES_MODEL, nchw, note

BOUND = 1e-3


@pytest.fixture(scope="module")
def reference():
    return diffusers.VQModel.from_pretrained(SHAPES_MODEL / hub.DECODER, subfolder="movq").requires_grad_(False)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def relative(found, expected: torch.Tensor) -> float:
    expected = expected.numpy()
    return float(np.linalg.norm(nchw(found) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("quantized", [False, True])
def test_decoders_gradient_to_the_latents(shapes_pipe, reference, quantized):
    """diffusers passes gradients straight through its codebook; ours does on request."""
    latents, weights = normal(0, 1, 8, 8, 4), normal(1, 1, 64, 64, 3)
    movq = shapes_pipe.movq

    def loss(latents):
        decoded = movq.decode(latents, force_not_quantize=not quantized, through_codebook=True)
        return (decoded * weights).sum()

    given = torch.tensor(nchw(latents), requires_grad=True)
    decoded = reference.decode(given, force_not_quantize=not quantized).sample
    [expected] = torch.autograd.grad((decoded * torch.tensor(nchw(weights))).sum(), [given])
    error = relative(jax.jit(jax.grad(loss))(jnp.asarray(latents)), expected)
    assert note(error, "gradient of the decoder, relative") <= BOUND


def test_encoders_gradient_to_the_pictures(shapes_pipe, reference):
    pixels, weights = normal(2, 1, 64, 64, 3), normal(3, 1, 8, 8, 4)
    given = torch.tensor(nchw(pixels), requires_grad=True)
    encoded = reference.encode(given).latents
    [expected] = torch.autograd.grad((encoded * torch.tensor(nchw(weights))).sum(), [given])
    found = jax.jit(jax.grad(lambda x: (shapes_pipe.movq.encode(x) * weights).sum()))(jnp.asarray(pixels))
    assert note(relative(found, expected), "gradient of the encoder, relative") <= BOUND


def test_without_the_request_gradients_go_to_the_codebook_alone(shapes_pipe):
    """And the values are the codes themselves."""
    latents, quantize = jnp.asarray(normal(4, 1, 8, 8, 4)), shapes_pipe.movq.quantize
    to_latents = jax.grad(lambda z: (quantize(z)[0] ** 2).sum())(latents)
    assert not to_latents.any()
    codes, indices = quantize(latents)
    codebook = quantize.embedding.embedding[...]
    np.testing.assert_array_equal(codes, codebook[indices])
    distance = ((latents[..., None, :] - codebook) ** 2).sum(-1)
    np.testing.assert_array_equal(indices, distance.argmin(-1))
