"""A guider of one's own: perturbed-attention guidance (arXiv 2403.17377), without an unconditional evaluation."""

import jax

import kandinsky_jax as kj
from kandinsky_jax import diffusion, images


def look_at_itself(query, key, value, mask, *, name):  # each pixel gets its own value; 32 image tokens come first
    return value[:, 32:].reshape(*query.shape[:2], -1)


class PerturbedAttentionGuidance(diffusion.NoGuidance):
    def evaluations(self, cond, uncond):
        return [diffusion.Evaluation(cond), diffusion.Evaluation(cond, options={"attention": look_at_itself})]

    def combine(self, outputs, sample, coefficients, state):
        good, bad = (diffusion.split_output(output, sample.shape[-1])[0] for output in outputs)
        return diffusion.prediction_from_output(coefficients, sample, good + 1.0 * (good - bad)), state


pipe = kj.KandinskyV22CombinedPipeline.from_pretrained("tiny")
cond = pipe.unet.condition(pipe.prior_pipe("red apple", guidance_scale=1.0, generator=0).image_embeds)
[noise] = diffusion.noise_source(0, images=1, use=diffusion.DECODER_STREAM).initial((1, 8, 8, 4))
schedule = kj.DDIMScheduler.from_config(pipe.scheduler.config).schedule(25)
latents = diffusion.sample(pipe.unet, noise, cond, None, schedule, guider=PerturbedAttentionGuidance())
images.to_output(images.from_network(jax.jit(pipe.movq.decode)(latents)), "pil")[0].save("own_guider.png")
