"""Inversion and editing with trained networks: the embedded model, and that of coloured shapes."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kandinsky_jax as kj
from kandinsky_jax import diffusion, editing, images
from tests import shapes
from tests.conftest import SHAPES_MODEL, note, slow_and_campaign

NAMES = ["snowman", "red apple", "red heart", "rocket"]
EXACT = {"clip_sample": False, "thresholding": False}
UNGUIDED = diffusion.NoGuidance()


class Pictures(NamedTuple):
    """Pictures for one of the models, as it sees them."""

    pipe: kj.KandinskyV22CombinedPipeline
    latents: jax.Array  # [B, 8, 8, 4]
    embeds: jax.Array  # [B, D], CLIP's of the pictures
    cond: tuple
    truths: list[shapes.Caption]

    def schedule(self, scheduler: type = kj.DDIMScheduler, steps: int = 50, **options) -> diffusion.Schedule:
        return scheduler.from_config(self.pipe.scheduler.config, **options).schedule(steps)


@functools.cache
def of_model(name: str) -> Pictures:
    """Generated pictures for `tiny`, drawn ones for the model of shapes."""
    pipe = kj.KandinskyV22CombinedPipeline.from_pretrained("tiny" if name == "tiny" else SHAPES_MODEL, dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    asked, rng = shapes.captions(len(NAMES), seed=31), np.random.default_rng(31)
    if name == "tiny":
        size = {"height": 64, "width": 64, "num_inference_steps": 25}
        seen = pipe(NAMES, guidance_scale=2.0, prior_guidance_scale=1.0, generator=0, **size).images
    else:
        seen = images.to_output(np.stack([shapes.draw(one, rng) for one in asked]), "pil")
    latents = jax.jit(pipe.movq.encode)(images.pictures(seen, "image", 64, 64))
    pixels = np.concatenate([pipe.prior_image_processor(picture) for picture in seen])
    embeds = jax.jit(pipe.prior_image_encoder)(pixels)
    return Pictures(pipe, latents, embeds, jax.jit(pipe.unet.condition)(embeds), asked)


def away(given: Pictures, latents: jax.Array) -> float:
    """The mean difference of the decoded picture from MoVQ's round trip, of 255."""
    decode = jax.jit(given.pipe.movq.decode)
    ours, round_trip = (np.clip(decode(x), -1, 1) for x in (latents, given.latents))
    return float(np.abs(ours - round_trip).mean() * 127.5)


@pytest.mark.parametrize("name", slow_and_campaign(["tiny", "shapes"], "shapes"))
def test_ddim_inversion_and_back_is_within_a_level_of_movqs_round_trip(name):
    given = of_model(name)
    unet, rows = given.pipe.unet, diffusion.solver_coefficients(given.schedule(**EXACT))

    @functools.partial(jax.jit, static_argnums=2)
    def there_and_back(latents, rows, iterations):
        options = {"guider": UNGUIDED}
        first = editing.ddim_inversion(unet, latents, given.cond, None, rows, fixed_point_iterations=iterations)[0]
        return diffusion.sample(unet, first, given.cond, None, rows, **options)

    plain, iterated = (away(given, there_and_back(given.latents, rows, n)) for n in (0, 3))
    assert note(iterated, f"{name}: of 255, with 3 iterations") <= 1
    assert note(plain, f"{name}: of 255, the usual inversion") > 2 * iterated


@pytest.mark.parametrize("name", slow_and_campaign(["tiny", "shapes"], "shapes"))
def test_edit_friendly_inversion_is_exact(name):
    """By the model's own scheduler, DDPM; that of shapes has thresholding and a learned variance."""
    given = of_model(name)
    unet, schedule = given.pipe.unet, given.schedule(kj.DDPMScheduler)
    assert schedule.learned_variance == (name == "shapes")

    @jax.jit
    def there_and_back(latents):
        found = editing.edit_friendly_inversion(unet, latents, given.cond, None, schedule, rng=0)
        first, rows, rng = found.after(20)
        return diffusion.sample(unet, first, given.cond, None, rows, guider=UNGUIDED, rng=rng)

    error = jnp.abs(there_and_back(given.latents) - given.latents).max()
    assert note(error, f"{name}: largest error of latents") <= 1e-3


@pytest.mark.campaign  # hundreds of gradients; the slow suite's programs run ten times as long
def test_null_embeds_make_guided_sampling_reconstruct():
    given, steps = of_model("shapes"), 20
    unet, schedule = given.pipe.unet, given.schedule(steps=steps, **EXACT)
    null = given.pipe.prior_pipe.get_zero_embed(len(NAMES))
    guider = diffusion.ClassifierFreeGuidance(4.0)
    trajectory = jax.jit(
        lambda x: editing.ddim_inversion(unet, x, given.cond, None, schedule, fixed_point_iterations=3)
    )(given.latents)
    found = jax.jit(
        lambda path: editing.optimize_null_embeds(
            unet, unet.condition, path, given.cond, null, schedule, guider=guider, iterations=10
        )
    )(trajectory)
    model = editing.embeds_by_step(unet, unet.condition, schedule)
    cond = jnp.repeat(given.embeds[:, None], steps, axis=1)
    guided = jax.jit(lambda uncond: diffusion.sample(model, trajectory[0], cond, uncond, schedule, guider=guider))
    before, after = (away(given, guided(uncond)) for uncond in (jnp.repeat(null[:, None], steps, axis=1), found.embeds))
    np.testing.assert_allclose(guided(found.embeds), found.latents, atol=1e-4)
    assert note(after, "of 255, optimised") < 0.3 * note(before, "of 255, guided without")
