# %% [markdown]
# # A LoRA by policy gradients
# DDPO (arXiv 2305.13301) needs no gradient of the reward: here the size of a picture as a JPEG file, counted by Pillow.
# It needs a solver that draws noise at its steps, since their probabilities are what is differentiated.

# %%
import numpy as np

import kandinsky_jax as kj
from kandinsky_jax import diffusion, images, rewards
from kandinsky_jax.utils import make_image_grid

names = ["red heart", "christmas tree", "mushroom", "slice of pizza"]
pipe = kj.KandinskyV22CombinedPipeline.from_pretrained("tiny")
embeds = pipe.prior_pipe(names, guidance_scale=1.0, generator=[0] * len(names)).image_embeds
sampler = rewards.DecoderSampler.from_pipeline(
    pipe,
    kj.DDIMScheduler.from_config(pipe.scheduler.config, eta=1.0).schedule(5),
    guider=diffusion.NoGuidance(),
    height=64,
    width=64,
)

# %% [markdown]
# Each epoch samples 32 pictures of each name, compares their rewards with each other, and makes what was better than
# usual more probable. Few steps without guidance are quick, and leave less noise to be blamed for a reward.

# %%
config = rewards.DDPOConfig(
    epochs=6,
    samples_per_epoch=128,
    sample_batch_size=32,
    train_batch_size=32,
    inner_epochs=4,
    buffer_size=32,
    learning_rate=1e-2,
    clip_range=1e-2,
)
trained = rewards.train_ddpo(sampler, embeds, rewards.jpeg_compressibility, config, log="ddpo.jsonl")
for epoch in trained.history:
    print(f"epoch {epoch['epoch']:.0f}: {-epoch['reward']:.3f} +- {epoch['standard_error']:.3f} kB")

# %%
before, after = (s.generate(embeds, seed=1) for s in (sampler, sampler.with_lora(trained.changes)))
make_image_grid(images.to_output(np.concatenate([before, after]), "pil"), 2, len(names)).save("ddpo.png")
