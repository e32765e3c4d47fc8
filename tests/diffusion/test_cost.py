"""What a gradient through a whole sample costs: memory and compile time hardly grow with the number of steps."""

from __future__ import annotations

import math
import time

import jax
import jax.numpy as jnp
import pytest

import kandinsky_jax
from kandinsky_jax import diffusion
from kandinsky_jax.schedulers import DDIMScheduler
from tests.conftest import note
from tests.diffusion.toy import inputs, network

FEW, MANY = 5, 20


@pytest.fixture(scope="module")
def lowered():
    """Value and gradient of a sample of `tiny`, to its first noise and the guidance scale, by numbers of steps."""
    pipe = kandinsky_jax.KandinskyV22Pipeline.from_pretrained("tiny", dtype="float32")
    unet, scheduler = pipe.unet, kandinsky_jax.DDIMScheduler.from_config(pipe.scheduler.config)
    embeds = jnp.ones((2, 1, unet.config.encoder_hid_dim))

    def of(steps: int, segment: int = 1):
        schedule = scheduler.schedule(steps)

        def loss(noise, scale, embeds):
            cond, uncond = unet.condition(embeds[0]), unet.condition(embeds[1])
            guider = diffusion.ClassifierFreeGuidance(scale)
            return (diffusion.sample(unet, noise, cond, uncond, schedule, guider=guider, segment=segment) ** 2).mean()

        gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        return gradient.lower(jnp.ones((1, 8, 8, 4)), jnp.float32(3), embeds)

    return of


@pytest.fixture(scope="module")
def compiled(lowered):
    """Programs of a few and of many steps, and the seconds of making each: tracing, lowering and compiling, without the
    compilation cache, twice in turns."""
    seconds: dict[int, list[float]] = {FEW: [], MANY: []}
    programs = {}
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        for _ in range(2):
            for steps, found in seconds.items():
                jax.clear_caches()
                began = time.perf_counter()
                programs[steps] = lowered(steps).compile()
                found.append(time.perf_counter() - began)
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    return programs, seconds


def memory(program) -> int:
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_of_twenty_steps_is_at_most_twice_that_of_five(compiled, lowered):
    """Whether or not the segments are full: no copy of the parameters for the steps that fill the last one up."""
    programs, _ = compiled
    few = memory(programs[FEW])
    assert few > 0
    for segment in (1, 5, 7):
        many = memory(programs[MANY] if segment == 1 else lowered(MANY, segment).compile())
        assert note(many / few, f"memory of {MANY} steps in segments of {segment} over {FEW}") <= 2


@pytest.mark.slow
@pytest.mark.parametrize("steps", [16, 64])
def test_memory_of_a_large_state_grows_with_the_square_root_of_the_steps(steps):
    """A feature cache of a megabyte: all states are kept with segments of one or of all steps, 2 sqrt(N) between."""
    noise, cond, uncond = inputs()
    schedule = DDIMScheduler().schedule(steps)

    def caching(sample, timestep, condition, cache):
        cache = jnp.sin(cache + sample.mean())
        return network(sample, timestep, condition) * cache.mean(), cache

    def kept(segment: int) -> float:
        """Megabytes."""

        def loss(noise, cache):
            return diffusion.sample(caching, noise, cond, uncond, schedule, cache=cache, segment=segment).sum()

        cache = jnp.ones((2, 128, 1024))
        return memory(jax.jit(jax.grad(loss, argnums=(0, 1))).lower(noise, cache).compile()) / 2**20

    root = math.isqrt(steps)
    assert note(kept(1) / steps, "memory of segments of one step over the states'") >= 1
    assert note(kept(steps) / steps, "memory of one segment over the states'") >= 1
    assert note(kept(root) / (2 * root), "memory of sqrt(N) segments over that of 2 sqrt(N) states") <= 1.5


@pytest.mark.slow
def test_twenty_steps_compile_within_one_and_a_half_times_the_time_of_five(compiled):
    few, many = (min(found) for found in compiled[1].values())
    assert note(many / few, f"compile time of {MANY} steps over {FEW}") <= 1.5
