"""What a warm-up has compiled, the call after it does not compile; and a rehearsal runs nothing."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.test_compile import compilations

# Sizes that no other test draws, so that there is something to compile.
SIZE = {"height": 64, "width": 192}
STEPS = {"num_inference_steps": 3, "prior_num_inference_steps": 3}
PICTURE = Image.new("RGB", (80, 70), "red")


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("KandinskyV22CombinedPipeline", {}),
        ("KandinskyV22Img2ImgCombinedPipeline", {"image": PICTURE, "strength": 0.7}),
        ("KandinskyV22InpaintCombinedPipeline", {"image": PICTURE, "mask_image": np.eye(64, 192) > 0}),
        ("KandinskyV22ControlnetCombinedPipeline", {"hint": PICTURE.convert("L")}),
    ],
)
def test_nothing_compiles_after_a_warmup(ours, name, given):
    pipe = ours[name]
    with compilations() as events:
        pipe.warmup(**SIZE)
    assert len(events) >= 2  # at least the loop and MoVQ, in this size
    with compilations() as events:
        pipe("a red circle", generator=1, **SIZE, **STEPS, **given)
    assert not events
