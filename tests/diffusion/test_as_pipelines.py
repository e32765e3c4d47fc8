"""The public core makes what the pipelines make, and its documented example runs."""

from __future__ import annotations

import inspect
import textwrap

import jax
import numpy as np
import pytest

import kandinsky_jax
from kandinsky_jax import diffusion

SEED, SIDE, STEPS, SCALE = 3, 64, 6, 3.0


@pytest.mark.parametrize(
    ("name", "options"), [("DDIMScheduler", {}), ("EulerAncestralDiscreteScheduler", {}), ("DDPMScheduler", {})]
)
def test_sample_gives_the_latents_of_a_pipeline(ours, name, options):
    """For the same seed: of a deterministic solver, an ancestral one, and one with a learned variance."""
    pipe = ours["KandinskyV22Pipeline"]
    embeds, negative = ours["KandinskyV22PriorPipeline"](["a red ring", "a blue star"], generator=0, return_dict=False)
    before, pipe.scheduler = pipe.scheduler, getattr(kandinsky_jax, name).from_config(pipe.scheduler.config, **options)
    try:
        settings = {"height": SIDE, "width": SIDE, "num_inference_steps": STEPS, "guidance_scale": SCALE}
        expected = pipe(embeds, negative, generator=SEED, output_type="latent", **settings).images
        schedule = pipe.scheduler.schedule(STEPS)
    finally:
        pipe.scheduler = before
    [noise] = diffusion.noise_source(SEED, images=2, use=diffusion.DECODER_STREAM).initial((2, 8, 8, 4))

    @jax.jit
    def sample(noise, embeds, negative):
        cond, uncond = pipe.unet.condition(embeds), pipe.unet.condition(negative)
        guider = diffusion.ClassifierFreeGuidance(SCALE)
        first = noise * schedule.init_noise_sigma
        return diffusion.sample(pipe.unet, first, cond, uncond, schedule, guider=guider, rng=SEED)

    found = np.asarray(sample(noise, embeds, negative)).transpose(0, 3, 1, 2)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert np.abs(found[0] - found[1]).max() > 0.1 * np.abs(expected).max()  # two prompts, two pictures


@pytest.mark.slow
def test_the_documented_example_runs_as_it_is_printed():
    """From a pipeline to a gradient, in the docstring of `kandinsky_jax.diffusion`."""
    text = inspect.getdoc(diffusion)
    block = text[text.index("    import jax") : text.index("\nFor gradients to the weights")]
    names: dict = {}
    exec(textwrap.dedent(block), names)
    value, to_noise, to_scale = names["value"], names["to_noise"], names["to_scale"]
    assert np.isfinite(value)
    assert to_noise.shape == (1, 8, 8, 4)
    assert np.isfinite(to_noise).all()
    assert np.abs(to_noise).max() > 0
    assert np.isfinite(to_scale)
    assert to_scale != 0
