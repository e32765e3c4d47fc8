"""Interpolation beside SciPy and its formula, and grids of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial
from jax.test_util import check_grads

from kandinsky_jax import composition, diffusion
from tests.diffusion.toy import normal


def test_slerp_of_unit_vectors_is_scipys():
    start, end = (x / np.linalg.norm(x) for x in np.random.default_rng(0).normal(size=(2, 12)))
    shares = np.linspace(0, 1, 7)
    found = diffusion.slerp(start[None].astype(np.float32), end[None].astype(np.float32), shares)
    np.testing.assert_allclose(found, scipy.spatial.geometric_slerp(start, end, shares), atol=1e-6)


def test_slerp_is_its_formula_for_each_image():
    start, end = normal(0, 3, 4, 4, 2), 2.5 * normal(1, 3, 4, 4, 2)
    share = np.array([0.1, 0.5, 0.9])
    for given in (0.3, share):
        found = diffusion.slerp(start, end, given)
        for a, b, t, ours in zip(*(np.asarray(x, np.float64) for x in (start, end)), share, found, strict=True):
            t = t if given is share else 0.3
            angle = np.arccos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
            expected = np.sin((1 - t) * angle) / np.sin(angle) * a + np.sin(t * angle) / np.sin(angle) * b
            np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_slerp_keeps_the_norm_of_noise_and_lerp_does_not():
    start, end = normal(0, 1, 64, 64, 4), normal(1, 1, 64, 64, 4)
    assert abs(diffusion.slerp(start, end, 0.5).std() - 1) < 0.02
    assert abs(diffusion.lerp(start, end, 0.5).std() - np.sqrt(0.5)) < 0.02


def test_slerp_between_parallel_vectors_is_the_straight_line_with_finite_gradients():
    a = normal(0, 1, 6)
    for start, end in ((a, a), (a, 2 * a), (a, -a), (0 * a, a), (0 * a, 0 * a)):
        np.testing.assert_allclose(diffusion.slerp(start, end, 0.3), 0.7 * start + 0.3 * end, atol=1e-6)
        gradients = jax.grad(lambda *x: diffusion.slerp(*x).sum(), argnums=(0, 1, 2))(start, end, 0.3)
        assert all(np.isfinite(gradient).all() for gradient in gradients)
    with jax.enable_x64(True):
        near = jnp.asarray(a, jnp.float64) * 1.001 + 1e-3
        check_grads(diffusion.slerp, (jnp.asarray(a, jnp.float64), near, 0.3), 1, modes=["rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("interpolate", [diffusion.slerp, diffusion.lerp])
def test_a_grid_lies_between_its_corners(interpolate):
    corners = normal(0, 4, 3, 2)
    grid = composition.interpolation_grid(corners, 3, 5, interpolate).reshape(3, 5, 3, 2)
    np.testing.assert_allclose(grid[[0, 0, -1, -1], [0, -1, 0, -1]], corners, atol=1e-6)
    left, right = (interpolate(corners[i : i + 1], corners[i + 2 : i + 3], 0.5) for i in (0, 1))
    np.testing.assert_allclose(grid[1], interpolate(left, right, np.linspace(0, 1, 5)), atol=1e-6)
    row = composition.interpolation_grid(corners[:2], 1, 5, interpolate)
    np.testing.assert_allclose(row, grid[0], atol=1e-6)


def test_what_makes_no_grid_is_said():
    with pytest.raises(ValueError, match=r"corners has the shape \[3, 2\]; needed are two or four"):
        composition.interpolation_grid(jnp.zeros((3, 2)), 2, 2)
    with pytest.raises(ValueError, match="two corners make one row, but rows=2"):
        composition.interpolation_grid(jnp.zeros((2, 2)), 2, 2)
    with pytest.raises(ValueError, match="columns must be an integer of at least 1, got 0"):
        composition.interpolation_grid(jnp.zeros((2, 2)), 1, 0)
