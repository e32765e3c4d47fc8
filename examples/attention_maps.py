"""Attention maps: how much each place of the picture is looked at by the others, the mean of 25 steps."""

import jax
import jax.numpy as jnp

import kandinsky_jax as kj
from kandinsky_jax import diffusion, images
from kandinsky_jax.models import capture
from kandinsky_jax.utils import make_image_grid


def model(sample, timestep, condition, cache):
    output, captured = capture(pipe.unet, r"up_blocks\.1\.attentions\.1\.weights")(sample, timestep, condition)
    return output, cache + captured["up_blocks.1.attentions.1.weights"].mean((1, 2))[1, 32:]  # of cond, to pixels


pipe = kj.KandinskyV22CombinedPipeline.from_pretrained("tiny")
cond, uncond = map(pipe.unet.condition, pipe.prior_pipe("snowman", generator=0, return_dict=False))
[noise] = diffusion.noise_source(0, images=1, use=diffusion.DECODER_STREAM).initial((1, 8, 8, 4))
schedule = diffusion.solver_coefficients(kj.DDIMScheduler.from_config(pipe.scheduler.config).schedule(25))
guider = diffusion.ClassifierFreeGuidance(2.0)
loop = diffusion.initial_loop_state(noise, guider, cache=jnp.zeros(16))
loop = diffusion.denoise(model, loop, cond, uncond, schedule, 0, 25, guider=guider)
looked_at = jax.image.resize(loop.cache.reshape(1, 4, 4, 1) / loop.cache.max(), (1, 64, 64, 3), "nearest")
pixels = jnp.concatenate([jax.jit(pipe.movq.decode)(loop.solver[0]), 2 * looked_at - 1])
make_image_grid(images.to_output(images.from_network(pixels), "pil"), 1, 2).save("attention_maps.png")
