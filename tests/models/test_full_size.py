"""Every network against its PyTorch twin at the official size, float32, random weights.

Each in a process of its own, which gives its memory back: two of these networks at once would not fit a small machine.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import note, slow_and_campaign

TOLERANCE = 1e-4  # max |difference| / std(reference)
PEAK_GIB = 20  # of the 24 that the machine running these tests has
ROOT = Path(__file__).parents[2]


# The decoders for inpainting and with a hint are that for text with more channels in their first convolution; the image
# tower has the layers of the text tower, and as many parameters again.
SLOW = ("unet_decoder", "movq")
CAMPAIGN = ("prior", "text_encoder", "unet_inpaint", "unet_controlnet_depth", "image_encoder")


@pytest.mark.parametrize("network", slow_and_campaign((*SLOW, *CAMPAIGN), *SLOW))
def test_network_follows_the_reference(network: str, tmp_path: Path):
    folder = tmp_path / network
    command = [sys.executable, "-m", "tests.models.full_size_worker", network, str(folder)]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # programs that run long
    try:
        run = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, timeout=900)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # up to 7 GB, and pytest keeps tmp_path of its last three runs
    assert run.returncode == 0, f"{' '.join(command)} failed, see its errors above"
    line = run.stdout.splitlines()[-1]
    print("\n" + line)
    measured = json.loads(line)
    assert note(max(measured["worst"].values()), f"{network}, max|d| / std") <= TOLERANCE, line
    assert note(measured["peak_gib"], f"{network}, peak GiB of the process") < PEAK_GIB, line
