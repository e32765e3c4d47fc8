# %% [markdown]
# # Null-embedding optimisation
#
# Guided sampling leaves the trajectory of an inversion without guidance. Negative embeddings, optimised for each step
# by gradients through the UNet, lead it back, and the guidance is there for an edit.

# %%
import jax
import jax.numpy as jnp

import kandinsky_jax as kj
from kandinsky_jax import diffusion, editing, images
from kandinsky_jax.utils import make_image_grid

pipe = kj.KandinskyV22CombinedPipeline.from_pretrained("tiny")
unet, movq, steps = pipe.unet, pipe.movq, 8
size = {"height": 64, "width": 64, "guidance_scale": 2.0, "prior_guidance_scale": 1.0}
picture = pipe("grinning face", generator=0, **size).images[0]
latents = jax.jit(movq.encode)(images.pictures(picture, "image", 64, 64))
own = jax.jit(pipe.prior_image_encoder)(pipe.prior_image_processor(picture))
new, negative = pipe.prior_pipe("crying face", guidance_scale=1.0, generator=0, return_dict=False)
schedule = kj.DDIMScheduler.from_config(pipe.scheduler.config).schedule(steps)
guider = diffusion.ClassifierFreeGuidance(3.0)


# %%
@jax.jit
def optimize(latents):
    cond = unet.condition(own)
    trajectory = editing.ddim_inversion(unet, latents, cond, None, schedule, fixed_point_iterations=3)
    options = {"guider": guider, "iterations": 5, "learning_rate": 0.3}
    found = editing.optimize_null_embeds(unet, unet.condition, trajectory, cond, negative, schedule, **options)
    return trajectory[0], found


@jax.jit
def sample(noise, embeds, negatives):
    model = editing.embeds_by_step(unet, unet.condition, schedule)
    embeds = jnp.repeat(embeds[:, None], steps, axis=1)
    return movq.decode(diffusion.sample(model, noise, embeds, negatives, schedule, guider=guider))


# %%
noise, found = optimize(latents)
same = jnp.repeat(negative[:, None], steps, axis=1)
round_trip = jax.jit(movq.decode)(latents)
without, with_them, edited = (sample(noise, *pair) for pair in ((own, same), (own, found.embeds), (new, found.embeds)))
distances = [float(jnp.abs(decoded - round_trip).mean() * 127.5) for decoded in (without, with_them)]
print("guided, from the round trip: {:.1f} of 255, with optimised embeddings {:.1f}".format(*distances))
pixels = jnp.concatenate([round_trip, without, with_them, edited])
make_image_grid(images.to_output(images.from_network(pixels), "pil"), 1, 4).save("null_embeds.png")
