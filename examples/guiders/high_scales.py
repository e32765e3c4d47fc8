# %% [markdown]
# # Guidance at high scales
#
# Classifier-free guidance makes a picture more like its prompt, and at high scales it makes it harder: flat colours,
# burnt contrasts, lost variety. Each row here is another guider, each column another scale, all from the same noise.

# %%
import numpy as np
from PIL import Image

from kandinsky_jax import KandinskyV22CombinedPipeline, diffusion

pipe = KandinskyV22CombinedPipeline.from_pretrained("tiny")
pipe.set_progress_bar_config(disable=True)
embeds = pipe.prior_pipe(["red apple"], guidance_scale=1.0, generator=0, return_dict=False)


def generate(guider, scale):
    settings = {"num_inference_steps": 25, "generator": 0, "height": 64, "width": 64, "output_type": "np"}
    return pipe.decoder_pipe(*embeds, guider=guider, guidance_scale=scale, **settings).images[0]


# %% [markdown]
# A guider is chosen by its name, with settings behind a colon; its scale is `guidance_scale`. CFG++ has a scale of its
# own kind, from 0 to 1.

# %%
scales = (2, 4, 8, 16)
rows = {name: [generate(name, scale) for scale in scales] for name in ("cfg", "rescaled-cfg", "apg:norm_threshold=1.9")}
rows["cfg++"] = [generate("cfg++", scale) for scale in (0.2, 0.4, 0.7, 1.0)]
Image.fromarray((np.vstack([np.hstack(row) for row in rows.values()]) * 255).astype("uint8")).save("high_scales.png")


# %% [markdown]
# How far does a picture go from that of the smallest scale? Mean differences, of 255.

# %%
for name, row in rows.items():
    print(f"{name:22}", *(f"{255 * np.abs(picture - row[0]).mean():5.1f}" for picture in row))

# %% [markdown]
# The same guiders are objects, for samples of one's own: pytrees of numbers, differentiable in their scale.

# %%
print(diffusion.guider_named("apg:eta=0.5", 8.0))
