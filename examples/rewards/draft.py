# %% [markdown]
# # A LoRA by gradients of a reward
# DRaFT (arXiv 2309.17400) differentiates a reward through the last steps of the sampler, into a LoRA of the UNet. The
# reward is any function of pictures: here how warm their colours are. It is trained on some names of emoji, measured on
# others, and saved as the file that pipelines load.

# %%
import numpy as np

import kandinsky_jax as kj
from kandinsky_jax import diffusion, images, rewards
from kandinsky_jax.utils import make_image_grid

seen = ["red apple", "rocket", "snowman", "tulip", "skull", "penguin", "crown", "banana", "bell", "key", "frog"]
unseen = ["red heart", "christmas tree", "mushroom", "slice of pizza", "guitar", "bicycle", "umbrella", "balloon"]
pipe = kj.KandinskyV22CombinedPipeline.from_pretrained("tiny")


def embeddings(names):
    return pipe.prior_pipe(names, guidance_scale=1.0, generator=[0] * len(names)).image_embeds


def warmth(pictures, prompts):
    return (pictures[..., 0] - pictures[..., 2]).mean((1, 2))  # red, less blue


# %% [markdown]
# The decoder as a function of noise and embeddings, with 8 steps of DDIM, of which the last one is differentiated.

# %%
sampler = rewards.DecoderSampler.from_pipeline(
    pipe,
    kj.DDIMScheduler.from_config(pipe.scheduler.config).schedule(8),
    guider=diffusion.ClassifierFreeGuidance(2.0),
    height=64,
    width=64,
)
config = rewards.DraftConfig(updates=20, batch_size=11, gradient_steps=1, learning_rate=3e-3)
trained = rewards.train_draft(sampler, embeddings(seen), warmth, config)

# %% [markdown]
# The same noise without and with the LoRA.

# %%
embeds = embeddings(unseen)
before, after = (s.generate(embeds, seed=1) for s in (sampler, sampler.with_lora(trained.changes)))
print(f"warmth of unseen names: {warmth(before, None).mean():.4f}, with the LoRA {warmth(after, None).mean():.4f}")
make_image_grid(images.to_output(np.concatenate([before, after]), "pil"), 2, len(unseen)).save("draft.png")

# %%
trained.save("draft_lora")
pipe.load_lora_weights("draft_lora")
options = {"prior_guidance_scale": 1.0, "guidance_scale": 2.0, "height": 64, "width": 64, "generator": 0}
pipe("snowman", **options).images[0].save("snowman.png")
