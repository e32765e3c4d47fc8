"""One compiled program per network, size and batch: counted, not timed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from PIL import Image

from kandinsky_jax import (
    DDIMScheduler,
    DDPMScheduler,
    KandinskyV22CombinedPipeline,
    TorchGenerator,
    scheduler_named,
)
from kandinsky_jax.schedulers import NAMES
from tests.conftest import SHAPES_MODEL

COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects an entry per program that XLA compiles in the block, however small."""
    events: list[str] = []

    def listen(name: str, duration: float, **about: object) -> None:
        if name == COMPILED:
            events.append(str(about.get("fun_name", name)))

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


@pytest.mark.parametrize("batch", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_nothing_compiles_after_the_first_call(shapes_pipe, batch):
    prompts = ["a red circle on a blue background", "yellow ring, black background"][:batch]
    shapes_pipe(prompts, generator=0, **SMALL)
    original = shapes_pipe.scheduler
    with compilations() as events:
        shapes_pipe(["a small white star on a green background"] * batch, generator=0, **SMALL)
        shapes_pipe(prompts, generator=12345, **SMALL)
        shapes_pipe(prompts, generator=0, **SMALL | {"num_inference_steps": 7, "prior_num_inference_steps": 9})
        shapes_pipe(prompts, generator=0, **SMALL | {"guidance_scale": 2.5, "prior_guidance_scale": 7.0})
        shapes_pipe(prompts, negative_prompt="green", generator=0, **SMALL)
        shapes_pipe(prompts, negative_prompt=["green"] * batch, generator=0, **SMALL)
        try:
            for scheduler in (
                *(scheduler_named(name, original.config) for name in NAMES),
                DDIMScheduler.from_config(original.config, thresholding=False),
                DDIMScheduler.from_config(original.config, eta=0.5),
                DDPMScheduler.from_config(original.config, variance_type="fixed_small", thresholding=False),
                DDPMScheduler.from_config(original.config, timestep_spacing="trailing", clip_sample=True),
            ):
                shapes_pipe.scheduler = scheduler
                shapes_pipe(prompts, generator=0, **SMALL)
        finally:
            shapes_pipe.scheduler = original
    assert not events


def test_nothing_compiles_for_another_torch_seed(shapes_pipe):
    prompt = "a red circle on a blue background"
    shapes_pipe(prompt, generator=TorchGenerator(0), **SMALL)
    with compilations() as events:
        shapes_pipe(prompt, negative_prompt="green", generator=TorchGenerator(1), **SMALL | {"num_inference_steps": 9})
    assert not events


@pytest.mark.slow
def test_a_twin_network_shares_the_programs():
    """Programs belong to a network's structure, not to the object: what `from_pipe` and reloading rely on."""
    # Both are new: a pipeline that has been called and then lost its programs would not compute its constants again.
    first, again = (KandinskyV22CombinedPipeline.from_pretrained(SHAPES_MODEL, dtype="float32") for _ in range(2))
    for pipe in (first, again):
        pipe.set_progress_bar_config(disable=True)
    first("a red circle on a blue background", generator=0, **SMALL)
    with compilations() as events:
        again("a red circle on a blue background", generator=0, **SMALL)
    assert not events


MODE_SIZE = {"height": 64, "width": 64, "num_inference_steps": 6, "prior_num_inference_steps": 4, "output_type": "np"}


def pictures(i: int, batch: int) -> dict[str, list]:
    """Everything that a mode may take, other contents for another i."""
    rng = np.random.default_rng(i)
    return {
        "image": [Image.fromarray(rng.integers(0, 256, (70, 80 + i, 3), dtype=np.uint8)) for _ in range(batch)],
        "mask_image": [rng.random((64, 64)) < 0.5 for _ in range(batch)],
        "hint": [rng.random((48 + i, 64)) for _ in range(batch)],
    }


@pytest.mark.parametrize("batch", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "takes"),
    [
        ("KandinskyV22Img2ImgCombinedPipeline", ["image"]),
        pytest.param("KandinskyV22InpaintCombinedPipeline", ["image", "mask_image"], marks=pytest.mark.slow),
        pytest.param("KandinskyV22ControlnetCombinedPipeline", ["hint"], marks=pytest.mark.slow),
        pytest.param("KandinskyV22ControlnetImg2ImgCombinedPipeline", ["image", "hint"], marks=pytest.mark.slow),
    ],
)
def test_nothing_compiles_after_a_modes_first_call(ours, name, takes, batch):
    pipe, prompts = ours[name], ["a red circle on a blue background", "yellow ring, black background"][:batch]
    strength = {"strength": 0.5} if "Img2Img" in name else {}

    def generate(i: int, prompts: list[str] = prompts, **changes) -> None:
        given = {kind: value for kind, value in pictures(i, batch).items() if kind in takes}
        pipe(prompts, generator=i, **MODE_SIZE | strength | given | changes)

    generate(0)
    with compilations() as events:
        generate(1, ["a small white star on a green background"] * batch)
        generate(2, num_inference_steps=9, prior_num_inference_steps=5)
        generate(3, guidance_scale=2.5, prior_guidance_scale=7.0)
        generate(4, negative_prompt="green")
        if strength:
            generate(5, strength=0.9)
            generate(6, strength=1.0)
        one = {kind: value[0] for kind, value in pictures(7, batch).items() if kind in takes}
        generate(7, **one)  # one picture for all prompts
        if "mask_image" in takes:
            generate(8, mask_image=np.eye(64, dtype=np.uint8))
            generate(9, paste_back=True)
    assert not events


def test_nothing_compiles_after_the_first_mix(ours):
    pipe, emb2emb = ours["KandinskyV22PriorPipeline"], ours["KandinskyV22PriorEmb2EmbPipeline"]
    image = pictures(0, 1)["image"][0]
    pipe.interpolate(["a red circle", image], [0.5, 0.5], num_inference_steps=4, generator=0)
    emb2emb("a red circle", image, strength=0.5, num_inference_steps=4, generator=0)
    with compilations() as events:
        pipe.interpolate([image, "a blue star", "yellow"], [0.2, 0.5, 0.9], num_inference_steps=5, generator=1)
        pipe.interpolate(["gray", "green"], [1, 2], negative_prompt="red", num_inference_steps=5, generator=1)
        emb2emb("a blue star", pictures(1, 1)["image"], strength=0.9, num_inference_steps=7, generator=1)
        emb2emb("a blue star", image, negative_prompt="red", num_inference_steps=7, generator=1)
    assert not events
