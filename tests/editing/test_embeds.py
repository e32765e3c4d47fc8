"""Arithmetic of embeddings."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from scipy.spatial import geometric_slerp

from kandinsky_jax.editing import rotate_embeds, shift_embeds
from tests.diffusion.toy import assert_close, normal

START, END, THIRD = (normal(seed, 3, 16) for seed in range(3))


def unit(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64) / np.linalg.norm(np.asarray(x, np.float64))


def lengths(x: jax.Array) -> np.ndarray:
    return np.linalg.norm(x, axis=-1, keepdims=True)


def test_one_direction_and_several_strengths():
    strengths = jnp.array([0.0, 0.5, 1.0])
    found = shift_embeds(START[:1], END[0], THIRD[0], strengths)
    assert_close(found, START[0] + strengths[:, None] * (THIRD[0] - END[0]))


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
    assert_close(rotate_embeds(START, END, END, 0.4), START, 0)  # there is no direction
