# %% [markdown]
# # Every seed with every prompt
#
# `jax.vmap` over a function of one picture gives all combinations of noises and conditions in one compiled program.
# Run it in the repository's root: the model of coloured shapes lies among the tests.

# %%
import jax
import jax.numpy as jnp

from kandinsky_jax import DDIMScheduler, KandinskyV22CombinedPipeline, composition, diffusion

pipe = KandinskyV22CombinedPipeline.from_pretrained("tests/shapes_model")
unet, movq = pipe.unet, pipe.movq
prompts = ["red circle on white", "small blue star on yellow", "large green ring on black", "white cross on gray"]
embeds, negatives = pipe.prior_pipe(prompts, generator=0, return_dict=False)
schedule = DDIMScheduler.from_config(pipe.scheduler.config, thresholding=False).schedule(15)
noises = jnp.concatenate(
    [diffusion.noise_source(seed, 1, diffusion.DECODER_STREAM).initial((1, 8, 8, 4))[0] for seed in range(3)]
)

# %% [markdown]
# A function of one noise `[8, 8, 4]` and one embedding `[D]`. Nothing in it knows of batches.


# %%
def picture(noise, embed, negative):
    cond, uncond = unet.condition(embed[None]), unet.condition(negative[None])
    latents = diffusion.sample(unet, noise[None], cond, uncond, schedule, guider=diffusion.ClassifierFreeGuidance(4.0))
    return movq.decode(latents)[0]


# %% [markdown]
# Prompts go from left to right, seeds from top to bottom.

# %%
of_prompts = jax.vmap(picture, in_axes=(None, 0, 0))
of_seeds_and_prompts = jax.jit(jax.vmap(of_prompts, in_axes=(0, None, None)))
pictures = of_seeds_and_prompts(noises, embeds, negatives)  # [seeds, prompts, 64, 64, 3]
composition.save_grid(pictures.reshape(-1, *pictures.shape[2:]), "seeds_and_prompts.png", columns=len(prompts))
alone = jax.jit(picture)(noises[1], embeds[2], negatives[2])
print(f"the largest difference from a call of one picture: {jnp.abs(pictures[1, 2] - alone).max():.1e}")
