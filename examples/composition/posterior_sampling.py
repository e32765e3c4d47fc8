# %% [markdown]
# # A picture from 16 x 16 pixels
#
# Diffusion posterior sampling (arXiv 2209.14687) finds a picture that fits a prompt and a measurement. Here the
# measurement is a picture of 64 x 64 pixels reduced to 16 x 16. Ordinary sampling with the same noise is beside it.
# Run it in the repository's root: the model of coloured shapes lies among the tests.

# %%
import jax
import jax.numpy as jnp

from kandinsky_jax import DDIMScheduler, KandinskyV22CombinedPipeline, composition, diffusion

pipe = KandinskyV22CombinedPipeline.from_pretrained("tests/shapes_model")
unet, movq = pipe.unet, pipe.movq
embeds, negative = pipe.prior_pipe("a green star on white background", generator=0, return_dict=False)
cond, uncond = unet.condition(embeds), unet.condition(negative)
schedule = DDIMScheduler.from_config(pipe.scheduler.config, thresholding=False).schedule(25)
truth_noise, noise = (
    diffusion.noise_source(seed, images=1, use=diffusion.DECODER_STREAM).initial((1, 8, 8, 4))[0] for seed in (1, 2)
)

# %% [markdown]
# The operator is any differentiable function of the decoded picture. `of_decoded` puts MoVQ's decoder before it.

# %%
reduced = composition.downsampling(4)
operator = composition.of_decoded(movq.decode, reduced)


@jax.jit
def sample(noise, guider):
    return movq.decode(diffusion.sample(unet, noise, cond, uncond, schedule, guider=guider))


truth, ordinary = (sample(x, diffusion.ClassifierFreeGuidance(4.0)) for x in (truth_noise, noise))
measurement = reduced(truth)

# %% [markdown]
# The step size is the one number to choose: too small, and the measurement is not met; too large, and it diverges.

# %%
guider = composition.PosteriorSampling(operator, measurement, 0.5, diffusion.ClassifierFreeGuidance(4.0))
fitting = sample(noise, guider)
for name, picture in (("ordinary", ordinary), ("posterior", fitting)):
    error = 127.5 * jnp.sqrt(jnp.mean((reduced(picture) - measurement) ** 2))
    print(f"{name} sampling: the measurement is missed by {error:.1f} of 255")
enlarged = jnp.repeat(jnp.repeat(measurement, 4, axis=1), 4, axis=2)
composition.save_grid(jnp.concatenate([truth, enlarged, ordinary, fitting]), "posterior_sampling.png")
