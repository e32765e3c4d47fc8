# %% [markdown]
# # Edits by arithmetic of image embeddings
#
# The difference of two prompts' embeddings, made by the prior with the same noise, is a direction in which to move the
# embedding of a picture. Another way is to interpolate to the embedding of the new prompt along the great circle.

# %%
import jax
import jax.numpy as jnp

import kandinsky_jax as kj
from kandinsky_jax import diffusion, editing, images
from kandinsky_jax.utils import make_image_grid

pipe = kj.KandinskyV22CombinedPipeline.from_pretrained("tiny")
unet, movq = pipe.unet, pipe.movq
options = {"guidance_scale": 1.0, "generator": [0, 0], "return_dict": False}
(red, green), negatives = pipe.prior_pipe(["red apple", "green apple"], **options)
picture = pipe.decoder_pipe(red[None], negatives[:1], height=64, width=64, guidance_scale=2.0, generator=1).images[0]

# %%
latents = jax.jit(movq.encode)(images.pictures(picture, "image", 64, 64))
own = jax.jit(pipe.prior_image_encoder)(pipe.prior_image_processor(picture))
strengths = jnp.array([0.0, 0.5, 1.0])
shifted = editing.shift_embeds(own, red, green, strengths)  # [3, D]
between = diffusion.slerp(own, green[None], jnp.array([0.33, 0.67, 1.0]))
schedule = kj.DDIMScheduler.from_config(pipe.scheduler.config, eta=1.0).schedule(50)


# %%
@jax.jit
def edit(embeds):
    inversion = editing.edit_friendly_inversion(unet, latents, unet.condition(own), None, schedule, rng=0)
    sample, rows, rng = inversion.after(10)

    def one(embeds):
        cond = unet.condition(embeds[None])
        return diffusion.sample(unet, sample, cond, None, rows, guider=diffusion.NoGuidance(), rng=rng)[0]

    return movq.decode(jax.vmap(one)(embeds))


pixels = edit(jnp.concatenate([shifted, between]))
make_image_grid(images.to_output(images.from_network(pixels), "pil"), 1, 6).save("edit_by_arithmetic.png")
