"""Runs with two devices: a pipeline that was moved to one of them generates the same image."""

from __future__ import annotations

import sys

import jax
import numpy as np

import kandinsky_jax

pipe = kandinsky_jax.KandinskyV22CombinedPipeline.from_pretrained(sys.argv[1], dtype="float32")
pipe.set_progress_bar_config(disable=True)
call = {"height": 64, "width": 64, "num_inference_steps": 3, "prior_num_inference_steps": 3, "output_type": "np"}
assert len(pipe.unet.conv_in.kernel.get_value().devices()) == 2  # all devices, each for its own images
before = pipe("a red circle", generator=0, **call).images
assert pipe.to("cpu").device == jax.devices()[0]
assert len(pipe.unet.conv_in.kernel.get_value().devices()) == 2
for target in ("cpu:1", jax.devices()[0]):
    pipe.to(target)
    [device] = pipe.unet.conv_in.kernel.get_value().devices()
    assert device == pipe.device == pipe.prior_prior.device == (jax.devices()[1] if target == "cpu:1" else target)
    moved = pipe("a red circle", generator=0, **call).images
    assert np.abs(moved - before).max() < 1e-4
pipe.to("cpu:1")
assert pipe.prior_image_encoder.device == jax.devices()[1]  # read after the move
print("moved")
