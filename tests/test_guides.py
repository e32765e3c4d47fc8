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
    assert len(blocks) == 7
    for block in blocks:
        exec(compile(block, "inside_a_network.md", "exec"), made)
    assert np.asarray(made["image"]).std() > 10
    assert made["output"].shape == (1, 8, 8, 8)
    assert 0 < made["of_uncond"] < 1
    assert 0 < made["of_cond"] < 1
    expected = made["pipe"].prior_pipe("red apple", generator=0, output_type="np", return_dict=False)[0]
    np.testing.assert_allclose(made["image_embeds"], expected, atol=1e-4)
    gradient, changes = made["gradient"], made["changes"]
    assert gradient.keys() == changes.keys()
    for name, part in gradient.items():
        assert np.isfinite(part["B"]).all(), name
    assert max(np.abs(part["B"]).max() for part in gradient.values()) > 1e-4
    assert not any(np.asarray(part["A"]).any() for part in gradient.values())  # B is zero to begin with


@pytest.mark.slow
def test_int8(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [block] = re.findall(r"```python\n(.*?)```", (DOCS / "int8.md").read_text(), re.DOTALL)
    made: dict = {}
    exec(compile(block, "int8.md", "exec"), made)
    assert np.asarray(made["image"]).std() > 10
    assert (tmp_path / "tiny-int8" / "model_index.json").is_file()
