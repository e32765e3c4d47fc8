# %% [markdown]
# # A LoRA by preferred pictures
# Diffusion-DPO (arXiv 2311.12908) learns from pairs of pictures for one prompt, of which one is preferred. Here `tiny`
# learns to prefer black and white, from its own pictures with and without their colours.

# %%
import json
from pathlib import Path

import numpy as np

import kandinsky_jax as kj
from kandinsky_jax.training.config import Config
from kandinsky_jax.training.dpo import DPOConfig
from kandinsky_jax.training.kinds import Kind
from kandinsky_jax.training.loop import Run
from kandinsky_jax.training.step import OptimizerConfig

seen = ["red apple", "rocket", "snowman", "tulip", "skull", "penguin", "crown", "banana", "bell", "key", "frog"]
unseen = ["red heart", "christmas tree", "mushroom", "slice of pizza"]
pipe = kj.KandinskyV22CombinedPipeline.from_pretrained("tiny", dtype="float32")
pipe.set_progress_bar_config(disable=True)
options = {"prior_guidance_scale": 1.0, "guidance_scale": 2.0, "num_inference_steps": 10, "height": 64, "width": 64}

# %% [markdown]
# The pairs are a folder with `metadata.jsonl`, as for every other kind of training.

# %%
folder = Path("pairs")
folder.mkdir()
with (folder / "metadata.jsonl").open("w") as file:
    for name, picture in zip(seen, pipe(seen, generator=[0] * len(seen), **options).images, strict=True):
        picture.save(folder / f"{name} in colour.png")
        picture.convert("L").convert("RGB").save(folder / f"{name}.png")
        row = {"file_name": f"{name}.png", "rejected_file_name": f"{name} in colour.png", "text": name}
        file.write(json.dumps(row) + "\n")

# %% [markdown]
# `kandinsky-jax train dpo-decoder pairs.toml` does the same from a file.

# %%
optimizer, dpo = OptimizerConfig(learning_rate=1e-3, max_train_steps=60), DPOConfig(beta=1000.0)
files = {"model": "tiny", "data": str(folder), "output": "run"}
config = Config(**files, resolution=64, train_batch_size=11, precompute=True, optimizer=optimizer, dpo=dpo)
before = pipe(unseen, generator=1, **options).images
pipe.load_lora_weights(Run(Kind.DPO_DECODER, config, pipe).train())
after = pipe(unseen, generator=1, **options).images
colour = [np.mean([np.asarray(picture, float).std(axis=-1) for picture in some]) for some in (before, after)]
print(f"colour of unseen names: {colour[0]:.1f} levels, after {optimizer.max_train_steps} steps {colour[1]:.1f}")
