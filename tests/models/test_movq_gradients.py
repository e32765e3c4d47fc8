"""Gradients through MoVQ's encoder and decoder, with and without its codebook, beside torch's autograd."""

from __future__ import annotations

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from kandinsky_jax.checkpoint import hub
from kandinsky_jax.models.movq import straight_through
from tests import shapes
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    rng = np.random.default_rng(0)
    drawn = np.stack([shapes.draw(caption, rng) for caption in shapes.captions(2)])
    return np.asarray(drawn * 2 - 1, np.float32)


def torch_codes(reference, latents: torch.Tensor) -> torch.Tensor:
    """The nearest codes of `[B, D, h, w]`, by a bare lookup: diffusers' own always passes gradients through."""
    codebook = reference.quantize.embedding.weight
    examples = latents.permute(0, 2, 3, 1)
    nearest = torch.cdist(examples.reshape(-1, examples.shape[-1]), codebook).argmin(1)
    return codebook[nearest].view_as(examples).permute(0, 3, 1, 2)


def slopes(ours, theirs, x: np.ndarray):
    """Gradients of both functions' outputs, weighed alike, to one input: ours NHWC, and torch's NCHW."""
    given = torch.tensor(nchw(x), requires_grad=True)
    output = theirs(given)
    weights = torch.tensor(nchw(normal(6, *output.permute(0, 2, 3, 1).shape)))
    [expected] = torch.autograd.grad((output * weights).sum(), [given])
    weights = jnp.asarray(weights.numpy().transpose(0, 2, 3, 1))
    return jax.jit(jax.grad(lambda x: (ours(x) * weights).sum()))(jnp.asarray(x)), expected


@pytest.mark.slow
def test_gradient_of_codes_to_the_pictures(shapes_pipe, reference, pixels):
    """Encode and quantise: straight through, with the code's own difference detached."""
    movq = shapes_pipe.movq

    def ours(x):
        latents = movq.encode(x)
        return straight_through(latents, movq.quantize(latents)[0])

    def theirs(x):
        latents = reference.encode(x).latents
        return latents + (torch_codes(reference, latents) - latents).detach()

    found, expected = slopes(ours, theirs, pixels)
    assert np.isfinite(found).all()
    assert note(relative(found, expected), "gradient of codes to pictures, relative") <= BOUND
    bare = jax.jit(jax.grad(lambda x: movq.quantize(movq.encode(x))[0].sum()))(jnp.asarray(pixels))
    assert not bare.any()


@pytest.mark.slow
def test_gradient_of_a_reconstruction_through_the_codebook(shapes_pipe, reference, pixels):
    movq = shapes_pipe.movq
    found, expected = slopes(
        lambda x: movq.decode(movq.encode(x), force_not_quantize=False, through_codebook=True),
        lambda x: reference.decode(reference.encode(x).latents, force_not_quantize=False).sample,
        pixels,
    )
    assert np.isfinite(found).all()
    assert note(relative(found, expected), "gradient of a reconstruction, relative") <= BOUND


@pytest.mark.slow
def test_decoding_by_codes_has_no_gradient_to_the_latents_unless_asked(shapes_pipe, reference):
    latents, weights = normal(7, 1, 8, 8, 4), normal(8, 1, 64, 64, 3)

    def loss(latents):
        decoded = shapes_pipe.movq.decode(latents, force_not_quantize=False)
        return (decoded * weights).sum(), decoded

    (_, decoded), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(latents))
    np.testing.assert_array_equal(gradient, np.zeros_like(latents))
    codes = torch_codes(reference, torch.tensor(nchw(latents)))
    expected = reference.decode(codes, force_not_quantize=True).sample
    assert note(relative(decoded, expected), "pictures of codes, relative") <= 1e-4


def test_pictures_and_latents_of_another_layout_are_said(shapes_pipe):
    with pytest.raises(ValueError, match=r"latents has the shape \[1, 4, 8, 8\]; needed is \[B, h, w, 4\]"):
        shapes_pipe.movq.decode(jnp.zeros((1, 4, 8, 8)))
    with pytest.raises(ValueError, match=r"pixels has the shape \[1, 3, 64, 64\]; needed is \[B, H, W, 3\]"):
        shapes_pipe.movq.encode(jnp.zeros((1, 3, 64, 64)))
