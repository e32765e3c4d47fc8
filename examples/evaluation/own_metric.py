# %% [markdown]
# # Measure pictures, with a metric of one's own
#
# Eight names are generated twice, in 2 steps and in 25, as batch jobs. The model's own CLIP says how well the pictures
# fit their names and how many are taken for the right one; a function of ours says how colourful they are. All numbers
# come with bootstrap intervals. Jobs and features are kept in `evaluation/`: a second run reads them.

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
for steps in (2, 25):
    defaults = {"steps": steps, "num_images": 2}
    job = Job("evaluation/names.txt", f"evaluation/job-{steps}", model="tiny", batch=8, defaults=defaults)
    metrics = ["clip-score", "nearest-name", PictureMetric("colourfulness", colourfulness)]
    found[steps] = evaluate(job, f"evaluation/out-{steps}", metrics=metrics, clip="tiny", quiet=True)
    print(found[steps].table(), "\n")
