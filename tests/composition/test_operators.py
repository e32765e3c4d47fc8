"""Measurement operators beside SciPy and Pillow."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from kandinsky_jax import composition
from tests.diffusion.toy import normal

PICTURES = normal(0, 2, 24, 16, 3)


@pytest.mark.parametrize("sigma", [0.7, 3.0, 8.0])  # the last one's kernel is longer than the picture
def test_gaussian_blur_is_scipys(sigma):
    found = jax.jit(composition.gaussian_blur(sigma))(PICTURES)
    expected = scipy.ndimage.gaussian_filter(np.asarray(PICTURES, np.float64), (0, sigma, sigma, 0), mode="reflect")
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(("method", "filter"), [("cubic", "BICUBIC"), ("linear", "BILINEAR"), ("lanczos3", "LANCZOS")])
@pytest.mark.parametrize("factor", [2, 8])
def test_downsampling_is_pillows(method, filter, factor):
    found = composition.downsampling(factor, method)(PICTURES)
    for picture, ours in zip(np.asarray(PICTURES), found, strict=True):
        for channel in range(3):
            plane = Image.fromarray(picture[..., channel])
            reduced = plane.resize((16 // factor, 24 // factor), Image.Resampling[filter])
            np.testing.assert_allclose(ours[..., channel], np.asarray(reduced), atol=1e-5)


def test_masking_keeps_what_is_known():
    mask = np.random.default_rng(0).random((24, 16)) > 0.5
    for given in (mask, mask[..., None], np.stack([mask, mask])[..., None]):
        found = composition.masking(given)(PICTURES)
        np.testing.assert_array_equal(found, np.where(mask[..., None], PICTURES, 0))
    with pytest.raises(ValueError, match=r"keep_mask has the shape \[16\]; needed is \[H, W\]"):
        composition.masking(mask[0])


def test_what_an_operator_cannot_take_is_said():
    with pytest.raises(ValueError, match="factor must be an integer of at least 2, got 1"):
        composition.downsampling(1)
    with pytest.raises(ValueError, match="pictures have 24 x 16 pixels, which 5 does not divide"):
        composition.downsampling(5)(PICTURES)
    with pytest.raises(ValueError, match="sigma must be above 0, got 0"):
        composition.gaussian_blur(0)


def test_an_operator_of_pixels_becomes_one_of_latents():
    operator = composition.of_decoded(lambda latents: jnp.repeat(jnp.repeat(latents, 2, 1), 2, 2), lambda x: x.sum(1))
    np.testing.assert_allclose(operator(PICTURES), 2 * jnp.repeat(PICTURES.sum(1), 2, axis=1), rtol=1e-5)
