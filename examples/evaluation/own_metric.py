# %% [markdown]
# # Measure pictures, with a metric of one's own
#
# Eight names are generated twice, with and without guidance, as batch jobs. The model's own CLIP says how well the
# pictures fit their names and how many are taken for the right one; a function of ours says how colourful they are. All
# numbers come with bootstrap intervals. Jobs and features are kept in `evaluation/`: a second run reads them.

# %%
from pathlib import Path

import numpy as np

from kandinsky_jax.batch import Job
from kandinsky_jax.evaluation import PictureMetric, evaluate

NAMES = ["snowman", "red apple", "purple heart", "rocket", "penguin", "slice of pizza", "christmas tree", "tulip"]
Path("evaluation").mkdir(exist_ok=True)
Path("evaluation/names.txt").write_text("\n".join(NAMES))


# %% [markdown]
# A metric of one's own: a function of each picture. Its mean is reported, and each number is in `pictures.jsonl`.


# %%
def colourfulness(picture):  # how far the channels of a pixel are apart, on average, from 0 to 255
    return np.ptp(np.asarray(picture.image, float), axis=-1).mean()


# %% [markdown]
# The job is run first, where it has not been; then its shards are evaluated.

# %%
found = {}
for scale in (1.0, 4.0):
    defaults = {"guidance_scale": scale, "prior_guidance_scale": 1.0, "steps": 25, "num_images": 2}
    job = Job("evaluation/names.txt", f"evaluation/job-{scale:g}", model="tiny", batch=8, defaults=defaults)
    metrics = ["clip-score", "nearest-name", PictureMetric("colourfulness", colourfulness)]
    found[scale] = evaluate(job, f"evaluation/out-{scale:g}", metrics=metrics, clip="tiny", quiet=True)
    print(found[scale].table(), "\n")
