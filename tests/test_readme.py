"""What the README prints as code runs as printed, and draws what it says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests import shapes

SCRIPT = Path(__file__).parents[1] / "tpu_scripts" / "readme_pictures.py"
SHOWS = {
    "circle": ("red", "blue", "circle"),
    "star": ("yellow", "blue", "star"),
    "ring": ("yellow", "blue", "ring"),
    "square": ("purple", "white", "square"),
    "night": ("orange", "black", "square"),
    "mixed": ("orange", "blue", "star"),
    "varied": ("green", "yellow", "circle"),
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("readme_pictures", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_line_for_every_mode(script):
    """The block for every mode, as it is printed."""
    made: dict = {}
    exec(compile(script.modes_block(), "README.md", "exec"), made)
    assert set(script.MODES) == set(SHOWS)
    for name, expected in SHOWS.items():
        assert shapes.classify(made[name]) == shapes.Verdict(*expected), name
    modes = ("text2img", "img2img", "inpaint", "controlnet", "controlnet_img2img")
    assert all(made[mode].prior_prior is made["text2img"].prior_prior for mode in modes)
    assert made["inpaint"].movq is made["controlnet"].movq is made["text2img"].movq
