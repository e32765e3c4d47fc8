"""Guiders that differentiate through the network, and corrections that the loop adds after the solver's step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kandinsky_jax import diffusion
from kandinsky_jax.schedulers import DDIMScheduler, DPMSolverMultistepScheduler
from tests.diffusion.toy import assert_close, inputs, network, row

SCHEDULE = DDIMScheduler(clip_sample=False).schedule(5)


class Towards(diffusion.NoGuidance):
    """Pulls x0 towards 1; counts its steps."""

    def init(self, sample):
        return jnp.zeros((), jnp.int32)

    def predict(self, evaluate, sample, coefficients, state):
        def loss(sample):
            prediction, _ = self.combine(evaluate(sample), sample, coefficients, None)
            return 0.5 * jnp.sum((1 - prediction.x0) ** 2), prediction

        gradient, prediction = jax.grad(loss, has_aux=True)(sample)
        return prediction._replace(correction=-0.01 * gradient), state + 1


def by_hand(noise, cond, schedule):
    """The same with the solver's own functions, and the gradient by `jax.vjp` of the network."""
    state = diffusion.initial_state(noise)
    for i, t in enumerate(schedule.timesteps):
        own = row(schedule, i)

        def x0(sample, own=own, t=t):
            output = network(sample * own.input_scale, jnp.full(len(sample), t), cond)
            return diffusion.prediction_from_output(own, sample, output).x0, output

        found, pullback, output = jax.vjp(x0, state[0], has_aux=True)
        [gradient] = pullback(found - 1)
        prediction = diffusion.prediction_from_output(own, state[0], output)
        state = diffusion.solver_step(own, state, prediction, jnp.zeros_like(noise))
        state = state.at[0].add(-0.01 * gradient)
    return state


@pytest.mark.parametrize("scheduler", [DDIMScheduler(clip_sample=False), DPMSolverMultistepScheduler()])
def test_the_correction_changes_the_sample_after_the_step_and_no_memory(scheduler):
    noise, cond, _ = inputs()
    schedule = scheduler.schedule(5)
    guider = Towards()
    loop = diffusion.initial_loop_state(noise, guider)
    coefficients = diffusion.solver_coefficients(schedule)
    loop = diffusion.denoise(network, loop, cond, None, coefficients, 0, 5, guider=guider)
    assert_close(loop.solver, by_hand(noise, cond, schedule))
    assert loop.guider == 5
    assert_close(diffusion.sample(network, noise, cond, None, schedule, guider=guider), loop.solver[0])
    plain = diffusion.sample(network, noise, cond, None, schedule, guider=diffusion.NoGuidance())
    assert np.abs(loop.solver[0] - plain).max() > 0.01


def test_what_inpainting_puts_back_is_put_back_after_the_correction():
    noise, cond, _ = inputs()
    found = diffusion.sample(
        network, noise, cond, None, SCHEDULE, guider=Towards(), after_step=lambda index, sample: 0 * sample + 7
    )
    np.testing.assert_array_equal(found, 7)


def test_a_correction_of_another_shape_is_said():
    class Wrong(Towards):
        def predict(self, evaluate, sample, coefficients, state):
            prediction, _ = super().predict(evaluate, sample, coefficients, state)
            return prediction._replace(correction=jnp.zeros(3)), state

    noise, cond, _ = inputs()
    with pytest.raises(TypeError, match=r"Wrong.predict must return .* returned correction of shape \[3\]"):
        diffusion.sample(network, noise, cond, None, SCHEDULE, guider=Wrong())


def test_a_feature_cache_is_refused():
    noise, cond, _ = inputs()
    with pytest.raises(ValueError, match="Towards differentiates through the network, which must be without a cache"):
        diffusion.sample(network, noise, cond, None, SCHEDULE, guider=Towards(), cache=jnp.zeros(()))
