# %% [markdown]
# # A LoRA by preferred pictures
# Diffusion-DPO (arXiv 2311.12908) learns from pairs of pictures for one prompt, of which one is preferred. Here the
# model of coloured shapes learns to prefer blue where a prompt names no colour, from pairs of its own pictures. Run it
# in the repository's root, or name the folder of `tests/shapes_model` otherwise.

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
from kandinsky_jax.utils import make_image_grid

model = "tests/shapes_model"
pipe = kj.KandinskyV22CombinedPipeline.from_pretrained(model, dtype="float32")
pipe.set_progress_bar_config(disable=True)
options = {"height": 64, "width": 64, "num_inference_steps": 15}
grounds = ["white", "black", "gray", "yellow"]
seen = [f"{shape} on {ground}" for shape in ["circle", "square", "triangle", "cross"] for ground in grounds]
unseen = [f"{shape} on {ground}" for shape in ["star", "ring"] for ground in grounds]

# %% [markdown]
# The pairs are a folder with `metadata.jsonl`, as for every other kind of training.

# %%
folder = Path("pairs")
folder.mkdir()
with (folder / "metadata.jsonl").open("w") as file:
    for colour in ["red", "green"]:
        pairs = {name: pipe([f"{name} {text}" for text in seen], generator=0, **options) for name in ["blue", colour]}
        for text, preferred, rejected in zip(seen, pairs["blue"].images, pairs[colour].images, strict=True):
            row = {"file_name": f"{text}, blue.png", "rejected_file_name": f"{text}, {colour}.png", "text": text}
            preferred.save(folder / row["file_name"])
            rejected.save(folder / row["rejected_file_name"])
            file.write(json.dumps(row) + "\n")

# %% [markdown]
# What a picture shows is the prior's choice, so it is the prior that learns: `kandinsky-jax train dpo-prior pairs.toml`
# does the same from a file.

# %%
optimizer, dpo = OptimizerConfig(learning_rate=5e-4, max_train_steps=200), DPOConfig(beta=30.0)
files = {"model": model, "data": str(folder), "output": "run"}
config = Config(**files, resolution=64, train_batch_size=16, precompute=True, optimizer=optimizer, dpo=dpo)
before = pipe(unseen, generator=1, **options).images
pipe.load_lora_weights(Run(Kind.DPO_PRIOR, config, pipe).train())
after = pipe(unseen, generator=1, **options).images
levels = [np.asarray(picture, int) for picture in [*before, *after]]
blue = [(x[..., 2] - x[..., :2].max(-1)).max() > 80 for x in levels]
print(f"blue pictures of 8 unseen prompts: {sum(blue[:8])}, after {optimizer.max_train_steps} steps {sum(blue[8:])}")
make_image_grid([*before, *after], 2, len(unseen)).save("dpo.png")
