# %% [markdown]
# # A picture four times as wide as the model's
#
# MultiDiffusion (arXiv 2302.08113): the UNet sees windows of the size that it was trained for, and its predictions are
# averaged where windows overlap. `Panorama` is a model around a model, so any guider and solver will do.
# Run it in the repository's root: the model of coloured shapes lies among the tests.

# %%
import jax
import jax.numpy as jnp
import numpy as np

from kandinsky_jax import DDIMScheduler, KandinskyV22CombinedPipeline, composition, diffusion

pipe = KandinskyV22CombinedPipeline.from_pretrained("tests/shapes_model")
unet, movq = pipe.unet, pipe.movq
embeds, negatives = pipe.prior_pipe(
    ["white star on blue background", "red circle on yellow background"], generator=0, return_dict=False
)
schedule = DDIMScheduler.from_config(pipe.scheduler.config, thresholding=False).schedule(20)
[noise] = diffusion.noise_source(0, images=1, use=diffusion.DECODER_STREAM).initial((1, 8, 32, 4))
cond, uncond = ([unet.condition(x[i : i + 1]) for i in (0, 1)] for x in (embeds, negatives))
guider = diffusion.ClassifierFreeGuidance(4.0)


def sample(panorama, cond, uncond):
    return jax.jit(lambda noise: diffusion.sample(panorama, noise, cond, uncond, schedule, guider=guider))(noise)


# %% [markdown]
# One prompt, on a canvas that goes on at the left with what is on the right: the picture can be turned.

# %%
wrapped = sample(composition.Panorama(unet, window=8, stride=4, wrap=True), cond[0], uncond[0])
around = composition.decode_wrapped(movq.decode, wrapped, padding=4)
turned = jnp.roll(around, 128, axis=2)

# %% [markdown]
# Two prompts, each in its region of the canvas, and a border of three latents between.

# %%
left = np.clip(np.linspace(6, -5, 32), 0, 1)[None] * np.ones((8, 1))
panorama = composition.Panorama(unet, window=8, stride=4, regions=[left, 1 - left])
both = movq.decode(sample(panorama, composition.stack_conditions(cond), composition.stack_conditions(uncond)))
composition.save_grid(jnp.concatenate([around, turned, both]), "panorama.png", columns=1)
