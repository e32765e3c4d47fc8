"""Edit-friendly inversion: a stochastic sampler with the noises found gives the latents back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.pipelines.ledits_pp.pipeline_leditspp_stable_diffusion import compute_noise_ddim

import kandinsky_jax as kj
from kandinsky_jax import diffusion
from kandinsky_jax.editing import edit_friendly_inversion
from kandinsky_jax.schedulers import scheduler_named
from tests.diffusion.toy import SHAPE, assert_close, inputs, network, normal, with_variance

BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
STEPS, GUIDER = 10, diffusion.ClassifierFreeGuidance(1.5)
SCHEDULERS = {
    "ddim": kj.DDIMScheduler(eta=1.0, clip_sample=False, **BETAS),
    "half as noisy": kj.DDIMScheduler(eta=0.5, clip_sample=False, **BETAS),
    "clipped": kj.DDIMScheduler(eta=1.0, clip_sample=True, **BETAS),
    "ddpm": kj.DDPMScheduler(clip_sample=False, **BETAS),
    "learned range": kj.DDPMScheduler(clip_sample=False, variance_type="learned_range", **BETAS),
    "thresholded": kj.DDPMScheduler(thresholding=True, **BETAS),
    "euler-a": scheduler_named("euler-a", kj.DDPMScheduler(**BETAS).config),
    "sde": scheduler_named("dpm++2m-sde", kj.DDPMScheduler(**BETAS).config),
    "custom timesteps": kj.DDIMScheduler(eta=1.0, custom_timesteps=(900, 500, 200, 30)),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("skip", [0, 3])
def test_sampling_with_the_noises_gives_the_latents_back(name, skip):
    latents, cond, uncond = inputs()
    schedule = SCHEDULERS[name].schedule(STEPS)
    model = with_variance if schedule.learned_variance else network
    found = edit_friendly_inversion(model, latents, cond, uncond, schedule, rng=3, guider=GUIDER)
    assert jnp.abs(found.noise).max() < 100  # the last step's, too, which has next to no variance of its own
    sample, coefficients, rng = found.after(skip)
    back = diffusion.sample(model, sample, cond, uncond, coefficients, guider=GUIDER, rng=rng)
    # A multistep solver starts anew at a later step, where it has no earlier prediction.
    if name == "sde" and skip:
        assert jnp.abs(back - latents).max() > 1e-3
    else:
        assert jnp.abs(back - latents).max() < 1e-4


@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_the_noise_of_a_step_is_that_of_ledits(eta):
    """Diffusers' LEDITS++ computes the same from the same two samples; its last step has none, ours the difference."""
    latents, cond, _ = inputs()
    config = {"clip_sample": False, **BETAS}
    found = edit_friendly_inversion(
        network, latents, cond, None, kj.DDIMScheduler(eta=eta, **config).schedule(STEPS), rng=3
    )
    theirs = DDIMScheduler(**config)
    theirs.set_timesteps(STEPS)
    for i, timestep in enumerate(theirs.timesteps):
        output = network(found.samples[i], jnp.full(SHAPE[0], int(timestep)), cond)
        following, sample, output = (
            torch.tensor(np.asarray(x)) for x in (found.samples[i + 1], found.samples[i], output)
        )
        noise, reached = compute_noise_ddim(theirs, following, sample, timestep, output, eta)
        if i < STEPS - 1:
            assert_close(found.noise[i], noise.numpy())
        else:
            assert_close(found.noise[i], (following - reached).numpy())


def test_samples_are_noised_independently():
    latents, cond, _ = inputs()
    schedule = SCHEDULERS["ddpm"].schedule(STEPS)
    drawn = normal(9, STEPS, *SHAPE)
    found = edit_friendly_inversion(network, latents, cond, None, schedule, rng=diffusion.GivenNoise(drawn, 0))
    for i, (signal, sigma) in enumerate(schedule.levels):
        assert_close(found.samples[i], np.float32(signal) * latents + np.float32(sigma) * drawn[i], 1e-6)
    assert_close(found.samples[-1], latents, 0)
    assert found.noise[:-1].std() > 1.3  # the noise of a sampler has a variance of 1


def test_an_image_has_its_noises_in_any_batch():
    latents, cond, _ = inputs()
    schedule = SCHEDULERS["ddim"].schedule(STEPS)

    @jax.jit
    def invert(latents: jax.Array, cond: jax.Array) -> jax.Array:
        return edit_friendly_inversion(network, latents, cond, None, schedule, rng=jax.random.key(4)).noise

    assert_close(invert(latents[:1], cond[:1]), invert(latents, cond)[:, :1])


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"schedule": kj.DDIMScheduler().schedule(4)}, ValueError, "eta=1.0"),
        ({"schedule": diffusion.solver_coefficients(kj.DDIMScheduler().schedule(4))}, TypeError, "scheduler.schedule"),
        ({"rng": None}, TypeError, "rng must be a seed"),
    ],
)
def test_wrong_arguments(wrong, error, message):
    latents, cond, _ = inputs()
    arguments = {"schedule": SCHEDULERS["ddim"].schedule(4), "rng": 0, **wrong}
    with pytest.raises(error, match=message):
        edit_friendly_inversion(network, latents, cond, None, **arguments)


def test_at_least_one_step_is_left():
    latents, cond, _ = inputs()
    found = edit_friendly_inversion(network, latents, cond, None, SCHEDULERS["ddim"].schedule(4), rng=0)
    with pytest.raises(ValueError, match="skip=4 is out of range; needed is 0 to 3"):
        found.after(4)
