# %% [markdown]
# # A picture beyond its border
#
# The left part of a picture becomes a larger canvas and a mask, which an ordinary inpainting call completes.

# %%
from kandinsky_jax import KandinskyV22CombinedPipeline, KandinskyV22InpaintCombinedPipeline, composition

pipe = KandinskyV22CombinedPipeline.from_pretrained("tiny")
size = {"height": 64, "width": 64, "guidance_scale": 2.0, "num_inference_steps": 25}
whole = pipe("red apple", generator=0, **size).images[0]
picture = whole.crop((0, 0, 40, 64))

# %% [markdown]
# 24 pixels are added on the right. What fills them until they are generated has little effect.

# %%
canvas = composition.outpaint_canvas(picture, right=24, fill="edge")
inpaint = KandinskyV22InpaintCombinedPipeline.from_pretrained("tiny")
images = [
    inpaint("red apple", image=canvas.image, mask_image=canvas.mask_image, generator=seed, **size).images[0]
    for seed in range(3)
]

# %% [markdown]
# The kept part went through MoVQ. Its own pixels are pasted back, faded in over eight pixels from the new part.

# %%
finished = [composition.paste_original(image, picture, canvas.box, feather=8) for image in images]
composition.save_grid([whole, canvas.image, canvas.mask_image, *finished], "outpainting.png")
