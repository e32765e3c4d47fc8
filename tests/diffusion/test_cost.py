"""What a gradient through a whole sample costs: memory and compile time hardly grow with the number of steps."""

from __future__ import annotations

import statistics
import time

import jax
import jax.numpy as jnp
import pytest

import kandinsky_jax
from kandinsky_jax import diffusion
from tests.conftest import note

FEW, MANY = 5, 20
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lowered():
    """The gradient of a sample of `tiny` to its first noise, by number of steps, lowered."""
    pipe = kandinsky_jax.KandinskyV22Pipeline.from_pretrained("tiny", dtype="float32")
    unet, scheduler = pipe.unet, kandinsky_jax.DDIMScheduler.from_config(pipe.scheduler.config)
    embeds = jnp.ones((2, 1, unet.config.encoder_hid_dim))

    def of(steps: int):
        schedule = scheduler.schedule(steps)

        def loss(noise, embeds):
            cond, uncond = unet.condition(embeds[0]), unet.condition(embeds[1])
            return (diffusion.sample(unet, noise, cond, uncond, schedule) ** 2).mean()

        return jax.jit(jax.value_and_grad(loss)).lower(jnp.ones((1, 8, 8, 4)), embeds)

    return of


def test_memory_of_twenty_steps_is_at_most_twice_that_of_five(lowered):
    few, many = (lowered(steps).compile().memory_analysis().temp_size_in_bytes for steps in (FEW, MANY))
    assert few > 0
    assert note(many / few, f"memory of {MANY} steps over {FEW}") <= 2


def test_twenty_steps_compile_within_one_and_a_half_times_the_time_of_five(lowered):
    """Medians of three in turns, without the compilation cache; tracing and lowering count."""
    seconds: dict[int, list[float]] = {FEW: [], MANY: []}
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        for _ in range(3):
            for steps, found in seconds.items():
                jax.clear_caches()
                began = time.perf_counter()
                lowered(steps).compile()
                found.append(time.perf_counter() - began)
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    few, many = (statistics.median(found) for found in seconds.values())
    assert note(many / few, f"compile time of {MANY} steps over {FEW}") <= 1.5
