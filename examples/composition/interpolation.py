# %% [markdown]
# # Between four prompts, and round a circle of noises
#
# A grid whose corners are four image embeddings, from one noise; and a GIF that goes from noise to noise and back.

# %%
import jax
import jax.numpy as jnp

from kandinsky_jax import DDIMScheduler, KandinskyV22CombinedPipeline, composition, diffusion

pipe = KandinskyV22CombinedPipeline.from_pretrained("tiny")
unet, movq = pipe.unet, pipe.movq
embeds, negatives = pipe.prior_pipe(["red apple", "orange", "green apple", "pear"], generator=0, return_dict=False)
schedule = DDIMScheduler.from_config(pipe.scheduler.config).schedule(15)


def noise(seed):
    return diffusion.noise_source(seed, 1, diffusion.DECODER_STREAM).initial((1, 8, 8, 4))[0]


@jax.jit
def pictures(noises, embeds):
    cond, uncond = unet.condition(embeds), unet.condition(jnp.repeat(negatives[:1], len(embeds), axis=0))
    guider = diffusion.ClassifierFreeGuidance(2.0)
    return movq.decode(diffusion.sample(unet, noises, cond, uncond, schedule, guider=guider))


# %% [markdown]
# Image embeddings between four corners: `lerp` is as good, since theirs is a small angle.

# %%
between = composition.interpolation_grid(embeds, rows=4, columns=5)  # [20, D]
grid = pictures(jnp.repeat(noise(0), len(between), axis=0), between)
composition.save_grid(grid, "interpolation.png", columns=5)

# %% [markdown]
# Noises lie near a sphere, which `slerp` does not leave. The straight line would: its middle is too quiet.

# %%
noises = composition.interpolation_grid(jnp.concatenate([noise(0), noise(1)]), rows=1, columns=20)
frames = pictures(noises, jnp.repeat(embeds[:1], len(noises), axis=0))
composition.save_gif(frames, "interpolation.gif", seconds=3, back=True)
