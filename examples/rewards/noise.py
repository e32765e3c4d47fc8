# %% [markdown]
# # The noise that a reward likes best
# ReNO (arXiv 2406.04312) leaves the weights alone and changes the first noise of a picture, by gradients through a
# one-step student: here `tiny` with its fast adapter, and CLIP's similarity to the prompt.

# %%
import jax.numpy as jnp
import numpy as np

import kandinsky_jax as kj
from kandinsky_jax import diffusion, images, rewards
from kandinsky_jax.utils import make_image_grid

names = ["red heart", "christmas tree", "mushroom", "slice of pizza", "guitar", "bicycle", "umbrella", "balloon"]
pipe = kj.KandinskyV22CombinedPipeline.from_pretrained("tiny")
embeds = pipe.prior_pipe(names, guidance_scale=1.0, generator=[0] * len(names)).image_embeds
pipe.load_fast()
sampler = rewards.DecoderSampler.from_pipeline(
    pipe, pipe.scheduler.schedule(1), guider=diffusion.NoGuidance(), height=64, width=64
)

# %% [markdown]
# Each picture's noise follows its own gradient. A term keeps the noise's norm where that of random noise is.

# %%
reward = rewards.ClipSimilarity.from_pipeline(pipe.prior_pipe, names)
noise = sampler.noise(0, len(names))
config = rewards.NoiseConfig(iterations=20, learning_rate=1.0, regularization=0.001)
found = rewards.optimize_noise(sampler, jnp.asarray(embeds), noise, reward, config)
before, after = found.rewards[0].mean(), found.rewards.max(0).mean()
print(f"similarity {before:.4f}, after {config.iterations} iterations {after:.4f}")
print(f"norm of the noise {found.norms[0].mean():.1f}, then {found.norms[-1].mean():.1f}")

# %%
both = np.concatenate([sampler(noise, embeds), found.images])
make_image_grid(images.to_output(both, "pil"), 2, len(names)).save("noise.png")
