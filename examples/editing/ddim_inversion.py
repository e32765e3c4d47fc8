# %% [markdown]
# # DDIM inversion: a picture becomes noise, and the noise the picture again
#
# The usual inversion takes the network's prediction at one sample for that at the next one. A few fixed-point
# iterations make each step exact, and sampling gives the picture back. Distances are from MoVQ's round trip.

# %%
import functools

import jax
import jax.numpy as jnp

import kandinsky_jax as kj
from kandinsky_jax import diffusion, editing, images
from kandinsky_jax.utils import make_image_grid

pipe = kj.KandinskyV22CombinedPipeline.from_pretrained("tiny")
unet, movq = pipe.unet, pipe.movq
picture = pipe("slice of pizza", height=64, width=64, guidance_scale=2.0, generator=0).images[0]

# %% [markdown]
# The condition is the picture's own CLIP image embedding. Clipping of x0 must be off, and so is guidance.

# %%
latents = jax.jit(movq.encode)(images.pictures(picture, "image", 64, 64))
embeds = jax.jit(pipe.prior_image_encoder)(pipe.prior_image_processor(picture))
cond = jax.jit(unet.condition)(embeds)
config = pipe.scheduler.config
schedule = kj.DDIMScheduler.from_config(config, clip_sample=False, thresholding=False).schedule(50)


@functools.partial(jax.jit, static_argnames="iterations")
def there_and_back(latents, iterations):
    trajectory = editing.ddim_inversion(unet, latents, cond, None, schedule, fixed_point_iterations=iterations)
    back = diffusion.sample(unet, trajectory[0], cond, None, schedule, guider=diffusion.NoGuidance())
    return trajectory[0], movq.decode(back)


# %%
round_trip = jax.jit(movq.decode)(latents)
distances, pixels = {}, [round_trip]
for iterations in (0, 1, 5):
    noise, decoded = there_and_back(latents, iterations)
    distances[iterations] = float(jnp.abs(decoded - round_trip).mean() * 127.5)
    pixels.append(decoded)
    print(f"{iterations} iterations: {distances[iterations]:.2f} of 255, noise of deviation {noise.std():.2f}")
grid = images.to_output(images.from_network(jnp.concatenate(pixels)), "pil")
make_image_grid(grid, 1, 4).save("ddim_inversion.png")
