"""One compiled program per network, size and batch: counted, not timed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import pytest

from kandinsky_jax import DDIMScheduler, DDPMScheduler, TorchGenerator

COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects an entry per program that XLA compiles in the block, however small."""
    events: list[str] = []

    def listen(name: str, duration: float, **_: object) -> None:
        if name == COMPILED:
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


SMALL = {"height": 64, "width": 64, "num_inference_steps": 4, "prior_num_inference_steps": 4, "output_type": "np"}


def test_counter_counts():
    with compilations() as events:
        jax.jit(lambda x: x * 3.25 + 1)(jax.numpy.ones(7))
    assert events


@pytest.mark.parametrize("batch", [1, 2])
def test_nothing_compiles_after_the_first_call(tiny_pipe, batch):
    prompts = ["a red circle on a blue background", "yellow ring, black background"][:batch]
    tiny_pipe(prompts, generator=0, **SMALL)
    original = tiny_pipe.scheduler
    with compilations() as events:
        tiny_pipe(["a small white star on a green background"] * batch, generator=0, **SMALL)
        tiny_pipe(prompts, generator=12345, **SMALL)
        tiny_pipe(prompts, generator=0, **SMALL | {"num_inference_steps": 7, "prior_num_inference_steps": 9})
        tiny_pipe(prompts, generator=0, **SMALL | {"guidance_scale": 2.5, "prior_guidance_scale": 7.0})
        tiny_pipe(prompts, negative_prompt="green", generator=0, **SMALL)
        tiny_pipe(prompts, negative_prompt=["green"] * batch, generator=0, **SMALL)
        try:
            for scheduler in (
                DDIMScheduler.from_config(original.config, thresholding=False),
                DDIMScheduler.from_config(original.config, eta=0.5),
                DDPMScheduler.from_config(original.config, variance_type="fixed_small", thresholding=False),
                DDPMScheduler.from_config(original.config, timestep_spacing="trailing", clip_sample=True),
            ):
                tiny_pipe.scheduler = scheduler
                tiny_pipe(prompts, generator=0, **SMALL)
        finally:
            tiny_pipe.scheduler = original
    assert not events


def test_nothing_compiles_for_another_torch_seed(tiny_pipe):
    prompt = "a red circle on a blue background"
    tiny_pipe(prompt, generator=TorchGenerator(0), **SMALL)
    with compilations() as events:
        tiny_pipe(prompt, negative_prompt="green", generator=TorchGenerator(1), **SMALL | {"num_inference_steps": 9})
    assert not events


def test_a_twin_network_shares_the_programs(tiny_pipe):
    """Programs belong to a network's structure, not to the object: what `from_pipe` and reloading rely on."""
    prompt = "a red circle on a blue background"
    tiny_pipe(prompt, generator=0, **SMALL)
    again = type(tiny_pipe).from_pretrained("tiny", dtype="float32")
    again.set_progress_bar_config(disable=True)
    with compilations() as events:
        again(prompt, generator=0, **SMALL)
    assert not events
