"""Arithmetic of embeddings."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from scipy.spatial import geometric_slerp

from kandinsky_jax.editing import rotate_embeds, shift_embeds, slerp
from tests.diffusion.toy import assert_close, normal

START, END, THIRD = (normal(seed, 3, 16) for seed in range(3))


def unit(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64) / np.linalg.norm(np.asarray(x, np.float64))


def lengths(x: jax.Array) -> np.ndarray:
    return np.linalg.norm(x, axis=-1, keepdims=True)


def test_slerp_is_scipys_between_directions():
    for share in (0.0, 0.25, 0.5, 1.0):
        found = slerp(START, END, share)
        for i in range(len(START)):
            ends = [unit(x[i]) for x in (START, END)]
            assert_close(unit(found[i]), geometric_slerp(*ends, share), 1e-5)
        assert_close(lengths(found), (1 - share) * lengths(START) + share * lengths(END))


def test_slerp_takes_a_share_for_each():
    shares = jnp.array([0.1, 0.5, 0.9])
    assert_close(slerp(START, END, shares), jnp.stack([slerp(START[i], END[i], shares[i]) for i in range(3)]))


def test_slerp_of_what_has_no_angle_is_linear_and_has_a_gradient():
    nothing = jnp.zeros_like(START)
    for end in (2 * START, -START, nothing):
        assert_close(slerp(START, end, 0.25), 0.75 * START + 0.25 * end)
        gradients = jax.grad(lambda x, y: slerp(x, y, 0.25).sum(), argnums=(0, 1))(START, end)
        assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_one_direction_and_several_strengths():
    strengths = jnp.array([0.0, 0.5, 1.0])
    for found, expected in (
        (shift_embeds(START[:1], END[0], THIRD[0], strengths), START[0] + strengths[:, None] * (THIRD[0] - END[0])),
        (slerp(START[:1], END[:1], strengths), jnp.stack([slerp(START[0], END[0], share) for share in strengths])),
    ):
        assert_close(found, expected)


def test_shift():
    assert_close(shift_embeds(START, END, THIRD, 0.5), START + 0.5 * (THIRD - END))
    strengths = jnp.array([0.0, 1.0, 2.0])
    assert_close(shift_embeds(START, END, THIRD, strengths)[2], START[2] + 2 * (THIRD[2] - END[2]))


def test_rotation_goes_towards_the_difference():
    found = rotate_embeds(START, END, THIRD, 0.4)
    assert_close(lengths(found), lengths(START))
    difference = THIRD - END
    for i in range(len(START)):
        ends = [unit(x[i]) for x in (START, difference)]
        assert_close(unit(found[i]), geometric_slerp(*ends, 0.4), 1e-5)
    assert_close(rotate_embeds(START, END, THIRD, 0.0), START)
    assert np.isfinite(rotate_embeds(START, END, END, 0.4)).all()
