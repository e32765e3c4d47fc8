# %% [markdown]
# # An edit by a prompt, with edit-friendly inversion
#
# The picture is inverted with its own CLIP image embedding, to the noises of a stochastic sampler. Sampling with these
# noises and the embedding that the prior makes of another prompt keeps the layout.

# %%
import jax

import kandinsky_jax as kj
from kandinsky_jax import diffusion, editing, images
from kandinsky_jax.utils import make_image_grid

pipe = kj.KandinskyV22CombinedPipeline.from_pretrained("tiny")
unet, movq = pipe.unet, pipe.movq
size = {"height": 64, "width": 64, "guidance_scale": 2.0, "prior_guidance_scale": 1.0}
picture = pipe("grinning face", generator=0, **size).images[0]

# %%
latents = jax.jit(movq.encode)(images.pictures(picture, "image", 64, 64))
own = jax.jit(pipe.prior_image_encoder)(pipe.prior_image_processor(picture))
new, negative = pipe.prior_pipe("crying face", guidance_scale=1.0, generator=0, return_dict=False)
cond, uncond, other = map(jax.jit(unet.condition), (own, negative, new))
schedule = kj.DDIMScheduler.from_config(pipe.scheduler.config, eta=1.0).schedule(50)


# %% [markdown]
# The first ten steps are skipped: the more, the more stays. With the picture's own condition and no guidance,
# the sampler gives the picture back.


# %%
@jax.jit
def edit(latents, cond, other, uncond):
    inversion = editing.edit_friendly_inversion(unet, latents, cond, None, schedule, rng=0)
    sample, rows, rng = inversion.after(10)
    same = diffusion.sample(unet, sample, cond, None, rows, guider=diffusion.NoGuidance(), rng=rng)
    guider = diffusion.ClassifierFreeGuidance(2.0)
    edited = diffusion.sample(unet, sample, other, uncond, rows, guider=guider, rng=rng)
    return same, edited


same, edited = edit(latents, cond, other, uncond)
print(f"largest error of the latents without the edit: {abs(same - latents).max():.1e}")
pixels = jax.jit(movq.decode)(jax.numpy.concatenate([latents, same, edited]))
make_image_grid(images.to_output(images.from_network(pixels), "pil"), 1, 3).save("edit_by_prompt.png")
