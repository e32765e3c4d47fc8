"""The server on several devices: each has its own images, with the bits that they have on one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.xla_flags import devices

PROGRAM = """
import time
import jax, numpy as np
from PIL import Image
import kandinsky_jax as kj
from kandinsky_jax.serve.requests import ImageRequest
from kandinsky_jax.serve.served_model import ServedModel
from kandinsky_jax.serve.server_settings import ServerSettings
from kandinsky_jax.serve.service import Service

picture = Image.effect_noise((64, 64), 50).convert("RGB")
mask = Image.linear_gradient("L")
requests = [
    ImageRequest(prompt="purple heart", seed=1, num_images=3, num_inference_steps=8),
    ImageRequest(prompt="cat face", seed=2, num_inference_steps=9, scheduler="euler-a"),
    ImageRequest(mode="inpaint", prompt="dog face", image=picture, mask_image=mask, num_inference_steps=7, seed=4),
]
found = []
for devices in (1, 4):
    mesh = kj.make_mesh(devices, devices=jax.devices()[:devices])
    model = ServedModel.load("tiny", modes=["generate", "inpaint"], mesh=mesh)
    service = Service(model, ServerSettings(batch_sizes=(2,)))
    service._thread.start()
    service.warmup.is_compiled = service._engine.is_compiled = lambda *_: True  # what is needed is compiled when it is
    images = [image for ticket in [service.submit(r) for r in requests] for image in ticket.result(500)]
    assert all(image.record["batch_sizes"] == [2 * devices] * 2 for image in images)
    found.append([np.asarray(image.picture) for image in images])
    service.stop()
assert all(np.array_equal(*pair) for pair in zip(*found, strict=True))
try:
    Service(ServedModel.load("tiny", modes=["generate"], mesh=kj.make_mesh(2, 2)), ServerSettings())
except ValueError as error:
    assert "--mesh 8,1,1" in str(error), error
else:
    raise AssertionError("a mesh that shards guidance")
print("equal")
"""


@pytest.mark.slow
def test_images_have_the_same_bits_on_four_devices():
    environment = os.environ | {"XLA_FLAGS": devices(4), "TQDM_DISABLE": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "equal"
