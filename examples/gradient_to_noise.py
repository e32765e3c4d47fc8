"""The first noise, changed so that CLIP finds the picture more like the prompt: a gradient through everything."""

import jax
import jax.numpy as jnp

from kandinsky_jax import DDIMScheduler, KandinskyV22CombinedPipeline, diffusion

pipe = KandinskyV22CombinedPipeline.from_pretrained("tiny")
cond, uncond = map(pipe.unet.condition, pipe.prior_pipe("red heart", generator=0, return_dict=False))
tokens = pipe.prior_tokenizer("red heart", padding="max_length", return_tensors="np").input_ids
text = pipe.prior_text_encoder(tokens).text_embeds[0]
[noise] = diffusion.noise_source(0, images=1, use=diffusion.DECODER_STREAM).initial((1, 8, 8, 4))
schedule = DDIMScheduler.from_config(pipe.scheduler.config).schedule(4)
mean, std = map(jnp.array, (pipe.prior_image_processor.image_mean, pipe.prior_image_processor.image_std))


def similarity(noise):
    pixels = pipe.movq.decode(diffusion.sample(pipe.unet, noise, cond, uncond, schedule))
    image = pipe.prior_image_encoder(((pixels + 1) / 2 - mean) / std)[0]
    return image @ text / jnp.linalg.norm(image) / jnp.linalg.norm(text)


value_and_gradient = jax.jit(jax.value_and_grad(similarity))
for step in range(4):
    value, gradient = value_and_gradient(noise)
    print(f"step {step}: similarity {value:.4f}")
    noise = noise + 0.1 * gradient / jnp.sqrt(jnp.mean(gradient**2))
