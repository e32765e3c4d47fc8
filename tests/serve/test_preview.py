"""Previews: small pictures of latents."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from kandinsky_jax import VQModel, images, load_network
from kandinsky_jax.checkpoint import hub
from kandinsky_jax.checkpoint.drawn_pictures import drawn_pictures
from kandinsky_jax.checkpoint.preview_map import encoded_and_decoded, small_pictures
from kandinsky_jax.serve.preview import LatentPreview, preview_map


@pytest.fixture(scope="module")
def movq() -> VQModel:
    return load_network(VQModel, hub.EMBEDDED["tiny"] / hub.DECODER / "movq", "float32")


@pytest.fixture(scope="module")
def preview(movq) -> LatentPreview:
    return preview_map(movq)


def test_previews_look_like_the_decoded_pictures(movq, preview):
    latents, pixels = encoded_and_decoded(movq, drawn_pictures(16, 64, seed=2))
    found = preview(latents)
    assert [(each.mode, each.size) for each in found] == [("RGB", (16, 16))] * 16
    wanted = images.from_network(small_pictures(pixels, 16)) * 255
    errors = [np.abs(np.asarray(each, float) - other).mean() for each, other in zip(found, wanted, strict=True)]
    assert np.mean(errors) < 30
    others = [np.abs(np.asarray(each, float) - other).mean() for each, other in zip(found, wanted[::-1], strict=True)]
    assert np.mean(errors) < np.mean(others) / 3


def test_one_and_several_latents_of_any_dtype(preview):
    latents = np.random.default_rng(0).normal(size=(3, 4, 6, 4)).astype(np.float32)
    several = [np.asarray(each) for each in preview(latents)]
    assert several[0].shape == (8, 12, 3)
    for i in range(3):
        [one] = preview(latents[i])
        np.testing.assert_array_equal(np.asarray(one), several[i])
    for dtype in (np.float64, np.float16, ml_dtypes.bfloat16):
        [one] = preview(latents[0].astype(dtype))
        assert np.abs(np.asarray(one, float) - several[0]).max() <= 2


def test_numbers_that_are_not_finite_are_shown(preview):
    latents = np.zeros((1, 4, 4, 4), np.float32)
    latents[0, 0, 0] = (np.nan, np.inf, -np.inf, 1e38)
    [one] = preview(latents)
    assert one.size == (8, 8)
    np.testing.assert_array_equal(np.asarray(one)[6:], np.asarray(preview(np.zeros((1, 4, 4, 4)))[0])[6:])


@pytest.mark.parametrize("shape", [(4, 4, 3), (4, 4), (1, 1, 4, 4, 4), (4, 8, 8)])
def test_other_shapes_are_named(preview, shape):
    with pytest.raises(ValueError, match=r"latents have shape .*, needed is \[h, w, C\] or \[B, h, w, C\] with C = 4"):
        preview(np.zeros(shape))
