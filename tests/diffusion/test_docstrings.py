"""The example in the package's docstring runs as printed."""

from __future__ import annotations

import re
import textwrap

import numpy as np
import pytest

from kandinsky_jax import diffusion


@pytest.mark.slow
def test_the_example_gives_a_value_and_its_gradients():
    [block] = re.findall(r"\n\n((?:    .*\n|\n)+)", diffusion.__doc__)
    made: dict = {}
    exec(compile(textwrap.dedent(block), "diffusion/__init__.py", "exec"), made)
    assert -1 <= made["value"] <= 1
    assert made["to_noise"].shape == made["noise"].shape == (1, 8, 8, 4)
    for gradient in (made["to_noise"], made["to_scale"]):
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0
