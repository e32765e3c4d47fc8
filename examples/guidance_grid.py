"""Guidance scales side by side: one compiled program for all of them, by `vmap`."""

import jax
import jax.numpy as jnp

import kandinsky_jax as kj
from kandinsky_jax import diffusion, images
from kandinsky_jax.utils import make_image_grid

pipe = kj.KandinskyV22CombinedPipeline.from_pretrained("tiny")
cond, uncond = map(pipe.unet.condition, pipe.prior_pipe("red apple", generator=0, return_dict=False))
[noise] = diffusion.noise_source(0, images=1, use=diffusion.DECODER_STREAM).initial((1, 8, 8, 4))
schedule = kj.DDIMScheduler.from_config(pipe.scheduler.config).schedule(25)


def picture(scale):
    guider = diffusion.ClassifierFreeGuidance(scale)
    return pipe.movq.decode(diffusion.sample(pipe.unet, noise, cond, uncond, schedule, guider=guider))[0]


pictures = jax.jit(jax.vmap(picture))(jnp.array([0.0, 1.0, 2.0, 4.0, 8.0]))
make_image_grid(images.to_output(images.from_network(pictures), "pil"), 1, 5).save("guidance_grid.png")
