"""Code in the guides runs as printed, block after block."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.slow
def test_inside_a_network():
    made: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "inside_a_network.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(compile(block, "inside_a_network.md", "exec"), made)
    assert np.asarray(made["image"]).std() > 10
    assert made["output"].shape == (1, 8, 8, 8)
    assert 0 < made["of_uncond"] < 1
    assert 0 < made["of_cond"] < 1
