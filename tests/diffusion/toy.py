"""A smooth function in the place of a network, where a test is about the loop and not about what it calls."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kandinsky_jax import diffusion

SHAPE = (2, 4, 4, 3)


def network(sample: jax.Array, timestep: jax.Array, condition: jax.Array) -> jax.Array:
    """sample `[N, h, w, C]`, timestep `[N]`, condition `[N, C]` -> `[N, h, w, C]`."""
    hidden = 0.9 * sample + 0.3 * jnp.roll(sample, 1, axis=1) + condition[:, None, None]
    return 1.1 * jnp.tanh(hidden) + 0.1 * jnp.sin(timestep / 100)[:, None, None, None]


def with_variance(sample: jax.Array, timestep: jax.Array, condition: jax.Array) -> jax.Array:
    """`network`, and a second half of channels in -1..1."""
    return jnp.concatenate([network(sample, timestep, condition), jnp.tanh(jnp.roll(sample, 1, axis=2))], axis=-1)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def inputs() -> tuple[jax.Array, jax.Array, jax.Array]:
    """First noise, cond and uncond."""
    return normal(0, *SHAPE), normal(1, SHAPE[0], SHAPE[-1]), normal(2, SHAPE[0], SHAPE[-1])


def row(schedule: diffusion.Schedule, index: int) -> diffusion.SolverCoefficients:
    return jax.tree.map(lambda column: column[index], diffusion.solver_coefficients(schedule))


def assert_close(found: jax.Array, expected: jax.Array, bound: float = 1e-5) -> None:
    """The largest difference is at most `bound` of the largest number."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= bound * np.abs(expected).max()
