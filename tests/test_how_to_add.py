"""The changes of docs/how_to_add.md: each is applied to a copy of the package, and used."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SHAPES_MODEL

ROOT = Path(__file__).parents[1]
PATCHES = ROOT / "docs" / "how_to_add"
MOST_FILES = {"scheduler": 2, "mask_rule": 1, "unet_conditioning": 4, "mode": 2}

PROGRAMS = {
    "scheduler": """
from kandinsky_jax import KandinskyV22CombinedPipeline, scheduler_named
pipe = KandinskyV22CombinedPipeline.from_pretrained("tiny")
pipe.scheduler = scheduler_named("renoise", pipe.scheduler.config)
settings = {"generator": 0, "num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}
ours = pipe("red heart", prior_num_inference_steps=2, **settings).images
assert np.isfinite(ours).all() and ours.std() > 0.05
pipe.decoder_pipe.save_pretrained("saved")
again = type(pipe.decoder_pipe).from_pretrained("saved", scheduler=pipe.scheduler)
assert type(again.scheduler).__name__ == "RenoiseScheduler"
print(json.loads(open("saved/scheduler/scheduler_config.json").read())["_class_name"])
""",
    "mask_rule": """
from kandinsky_jax import KandinskyV22InpaintPipeline
from kandinsky_jax.diffusion.inpainting import latent_repaint_mask
mask = np.zeros((1, 64, 64), bool)
mask[:, 24:32, 24:32] = True
assert latent_repaint_mask(mask, 8, 8).sum() == 9  # 7 by the reference's rule
pipe = KandinskyV22InpaintPipeline.from_pretrained("tiny")
embeds, picture = np.ones((1, pipe.unet.config.encoder_hid_dim)), np.full((64, 64, 3), 128, np.uint8)
seen = []
def watch(pipe, step, timestep, tensors):
    seen.append(tensors["mask_image"])
    return {}
pipe(embeds, picture, mask[0], embeds, 64, 64, 1, generator=0, callback_on_step_end=watch,
     callback_on_step_end_tensor_inputs=["mask_image"])
print(int((1 - seen[0][0]).sum()))
""",
    "unet_conditioning": """
import dataclasses, inspect
import jax
from flax import nnx
from kandinsky_jax import KandinskyV22Pipeline, UNet2DConditionModel
pipe = KandinskyV22Pipeline.from_pretrained("tiny")
config = dataclasses.replace(pipe.unet.config, takes_score=True)
unet = UNet2DConditionModel(config, rngs=nnx.Rngs(0))
pipe = KandinskyV22Pipeline(unet, pipe.scheduler, pipe.movq)
pipe.save_pretrained("scored")
pipe = KandinskyV22Pipeline.from_pretrained("scored")  # configuration and tensors were saved
assert pipe.unet.config.takes_score and "score_embedding" in str(nnx.state(pipe.unet))
embeds = np.ones((1, config.encoder_hid_dim))
low, high = (pipe(embeds, embeds, 64, 64, 1, generator=0, output_type="np", score=x).images for x in (1.0, 9.0))
assert np.abs(low - high).max() > 1e-3
assert "score: the aesthetic score" in inspect.getdoc(pipe.__call__)
print(inspect.signature(pipe.__call__).parameters["score"].default)
""",
    "mode": """
from PIL import Image
from kandinsky_jax.cli import app
from kandinsky_jax.pipelines.modes import MODES, pipeline_named, repository_of
from typer.testing import CliRunner
Image.new("RGB", (64, 64), "red").save("red.png")
few = ["--model", MODEL, "--steps", "2", "--prior-steps", "2"]
framed = []
for seed in "01":
    command = ["reframe", "a circle", "--image", "red.png", "--border", "8", "--seed", seed, "-o", "framed.png"]
    done = CliRunner().invoke(app, command + few)
    assert done.exit_code == 0, done.output
    framed.append(np.asarray(Image.open("framed.png"), float))
between = np.abs(framed[0] - framed[1])
kept, border = between[24:40, 24:40].mean(), between[[0, 1, 2, 61, 62, 63]].mean()
assert 2 * kept < border, (kept, border)  # the middle is kept, the border is the seed's
assert repository_of("ReframePipeline") == repository_of("KandinskyV22InpaintPipeline")
assert pipeline_named("ReframeCombinedPipeline").DECODER is MODES["reframe"].decoder_class
open("rows.jsonl", "w").write('{"prompt": "a circle", "image": "red.png"}')
job = ["batch", "rows.jsonl", "-o", "out", "--mode", "reframe", "--batch", "1", "--quiet"]
done = CliRunner().invoke(app, job + few)
assert done.exit_code == 0 and "the job is complete" in done.output, done.output
print(" ".join(CliRunner().invoke(app, ["reframe", "--help"]).output.replace("│", "").split()).count("--border"))
""",
}
PRINTED = {"scheduler": "RenoiseScheduler", "mask_rule": "9", "unet_conditioning": "5.0", "mode": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("name", MOST_FILES)
def test_a_change_touches_few_files_and_works(name, tmp_path):
    patch = PATCHES / f"{name}.patch"
    touched = re.findall(r"^\+\+\+ b/(.*)$", patch.read_text(), re.MULTILINE)
    assert 0 < len(touched) <= MOST_FILES[name]
    package = tmp_path / "kandinsky_jax"
    shutil.copytree(ROOT / "kandinsky_jax", package, ignore=shutil.ignore_patterns("__pycache__", "tiny"))
    (package / "tiny").symlink_to(ROOT / "kandinsky_jax" / "tiny")
    subprocess.run(["git", "apply", patch], cwd=tmp_path, check=True)
    program = f"import json\nimport numpy as np\nMODEL = {str(SHAPES_MODEL)!r}\n{PROGRAMS[name]}"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == PRINTED[name]


def test_the_page_shows_every_patch():
    page = (ROOT / "docs" / "how_to_add.md").read_text()
    assert sorted(path.stem for path in PATCHES.glob("*.patch")) == sorted(MOST_FILES)
    assert all(f"(how_to_add/{name}.patch)" in page for name in MOST_FILES)


@pytest.mark.parametrize("name", MOST_FILES)
def test_a_patch_still_applies(name):
    """Quick, so that it is seen where the file is changed; what the patch does is a slow test."""
    subprocess.run(["git", "apply", "--check", PATCHES / f"{name}.patch"], cwd=ROOT, check=True)
