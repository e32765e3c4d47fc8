"""Shapes in annotations are checked under pytest, in every process of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from kandinsky_jax import models
from kandinsky_jax.diffusion import rng, solver
from kandinsky_jax.models import attention, convolution
from kandinsky_jax.training import losses


def test_a_wrong_shape_names_the_argument_and_both_shapes():
    q, k = jnp.zeros((2, 3, 4, 8)), jnp.zeros((2, 5, 4, 16))  # heads of different sizes
    with pytest.raises(jaxtyping.TypeCheckError, match=r"(?s)attention\.plain\..*parameter 'k'.*2,5,4,16.*B S N H"):
        attention.plain(q, k, k)


@pytest.mark.parametrize(("transform", "shape"), [(jax.jit, (8, 8, 4)), (jax.vmap, (2, 8, 8, 4))])
def test_shapes_are_checked_while_tracing(transform, shape):
    with pytest.raises(jaxtyping.TypeCheckError, match="upsample_nearest"):
        transform(convolution.upsample_nearest)(jnp.zeros(shape))


def test_a_wrong_dtype_is_refused():
    with pytest.raises(jaxtyping.TypeCheckError, match="'timesteps'"):
        losses.diffuse(jnp.ones(10), jnp.zeros((2, 4)), jnp.zeros((2, 4)), jnp.zeros(2))


def test_each_package_is_checked():
    for function in (attention.attend, models.UNet2DConditionModel.__call__, solver.solver_step, losses.prior_loss):
        assert hasattr(function, "__wrapped__"), function
    assert hasattr(rng.KeyNoise.__call__, "__wrapped__")


def test_right_shapes_pass():
    doubled = jax.jit(convolution.upsample_nearest)(jnp.zeros((1, 2, 3, 4)))
    assert doubled.shape == (1, 4, 6, 4)
