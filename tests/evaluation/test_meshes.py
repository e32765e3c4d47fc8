"""Evaluations on a mesh: the features of one device, to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kandinsky_jax.evaluation import Resampling, evaluate
from tests.conftest import SHAPES_MODEL
from tests.evaluation.conftest import drawn, write_job

ROOT = Path(__file__).parents[2]


def features(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, "2,2,1"])
def test_features_on_a_mesh_are_those_of_one_device(mesh, tmp_path):
    """The last batch does not fill the devices."""
    write_job(str(tmp_path / "job"), drawn(21), per_shard=21)
    options = {"clip": str(SHAPES_MODEL), "reference": tmp_path / "job", "resampling": Resampling(resamples=20)}
    evaluate(tmp_path / "job", tmp_path / "one", batch=4, quiet=True, **options)
    command = [sys.executable, "-W", "error", "-m", "tests.evaluation.mesh_worker", tmp_path / "job", tmp_path / "mesh"]
    done = subprocess.run(
        [*map(str, command), *([mesh] if mesh else [])], cwd=ROOT, env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, several = features(tmp_path / "one"), features(tmp_path / "mesh")
    assert len(one) == 3
    assert one == several
    numbers = [json.loads((tmp_path / name / "evaluation.json").read_text())["metrics"] for name in ("one", "mesh")]
    assert numbers[0] == numbers[1]
