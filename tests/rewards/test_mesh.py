"""Training by rewards on a mesh is that of one device."""

from __future__ import annotations

import json
import subprocess
import sys
import types

import numpy as np
import pytest

from kandinsky_jax.rewards.training import check_divides
from tests.conftest import note


@pytest.mark.campaign
def test_a_mesh_trains_as_one_device(tmp_path):
    out = tmp_path / "out.json"
    subprocess.run([sys.executable, "-m", "tests.rewards.mesh_worker", str(out)], check=True, timeout=600)
    found = json.loads(out.read_text())
    for kind in ("draft", "ddpo"):
        mesh, alone = (found[where][kind] for where in ("mesh", "alone"))
        for name in ("reward", "gradient_norm"):
            ours, theirs = ([row[name] for row in run["history"]] for run in (mesh, alone))
            assert note(np.abs(np.subtract(ours, theirs)).max() / np.abs(theirs).max(), f"{kind}: {name}") < 1e-3
        assert note(np.abs(np.divide(mesh["changes"], alone["changes"]) - 1).max(), f"{kind}: changes") < 1e-3


def test_a_batch_that_cannot_be_divided():
    mesh = types.SimpleNamespace(shape={"data": 4})
    with pytest.raises(ValueError, match="batch_size=6 cannot be divided over 4 devices; make it a multiple of 4"):
        check_divides(mesh, "batch_size", 6)
