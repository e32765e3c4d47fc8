# %% [markdown]
# # An edit within a mask that two conditions find (DiffEdit)
#
# Where the UNet predicts other noise for the new embedding than for the picture's own, the picture is to change. The
# rest is held to the trajectory of the inversion, so that it comes out as it was.

# %%
import jax
import jax.numpy as jnp

import kandinsky_jax as kj
from kandinsky_jax import diffusion, editing, images
from kandinsky_jax.utils import make_image_grid

pipe = kj.KandinskyV22CombinedPipeline.from_pretrained("tiny")
unet, movq = pipe.unet, pipe.movq
size = {"height": 64, "width": 64, "guidance_scale": 2.0, "prior_guidance_scale": 1.0}
picture = pipe("grinning face", generator=0, **size).images[0]
latents = jax.jit(movq.encode)(images.pictures(picture, "image", 64, 64))
own = jax.jit(pipe.prior_image_encoder)(pipe.prior_image_processor(picture))
new = pipe.prior_pipe("crying face", guidance_scale=1.0, generator=0).image_embeds
schedule = kj.DDIMScheduler.from_config(pipe.scheduler.config).schedule(50)


# %%
@jax.jit
def edit(latents, own, new):
    cond, other = unet.condition(own), unet.condition(new)
    mask = editing.difference_mask(unet, latents, cond, other, schedule, rng=0, step=35, threshold=0.4)
    trajectory = editing.ddim_inversion(unet, latents, cond, None, schedule, fixed_point_iterations=3)
    keep = editing.KeepOutside(trajectory, mask)
    options = {"guider": diffusion.NoGuidance(), "after_step": keep}
    return mask, diffusion.sample(unet, trajectory[0], other, None, schedule, **options)


# %%
mask, edited = edit(latents, own, new)
print(f"{mask.mean():.0%} of the picture may change")
shown = jnp.repeat(jax.image.resize(2 * mask - 1, (1, 64, 64, 1), "nearest"), 3, axis=-1)
pixels = jnp.concatenate([jax.jit(movq.decode)(jnp.concatenate([latents, edited])), shown])
make_image_grid(images.to_output(images.from_network(pixels), "pil"), 1, 3).save("edit_in_mask.png")
