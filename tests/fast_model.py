"""The models of shapes with fast adapters: random LoRA of the decoder and of the prior, and settings for them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from kandinsky_jax import scheduler_named
from kandinsky_jax.checkpoint import hub, lora_files
from kandinsky_jax.checkpoint.recommended_settings import FILE
from tests.conftest import SHAPES_MODEL
from tests.pipelines.test_adapters import random_changes

LORA = "fast_lora.safetensors"
DECODER = {"lora": LORA, "num_inference_steps": 3, "guidance_scale": 1.0, "scheduler": "lcm"}
PRIOR = {"lora": LORA, "prior_num_inference_steps": 2, "prior_guidance_scale": 1.0}
# Of a combined call.
ARGUMENTS = {"num_inference_steps": 3, "guidance_scale": 1.0, "prior_num_inference_steps": 2, "prior_guidance_scale": 1}


def write(family: Path, pipe) -> Path:
    """Write the models into a new folder; `pipe` is a combined pipeline of the same networks."""
    shutil.copytree(SHAPES_MODEL, family)
    lora_files.write(family / hub.DECODER, {"unet": random_changes(pipe.unet, 1)}, LORA)
    lora_files.write(family / hub.PRIOR, {"prior": random_changes(pipe.prior_prior, 2)}, LORA)
    write_table(family / hub.DECODER, DECODER)
    write_table(family / hub.PRIOR, PRIOR)
    return family


def write_table(folder: Path, table: dict) -> None:
    (folder / FILE).write_text(json.dumps({"format_version": 2, "guidance_scale": 2.0, "fast": table}))


def load_by_hand(pipe, family: Path) -> None:
    """Load the same LoRA one by one, and set the scheduler."""
    for name in (hub.DECODER, hub.PRIOR):
        pipe.load_lora_weights(family / name, name, weight_name=LORA)
    pipe.scheduler = scheduler_named("lcm", pipe.scheduler.config)
