"""The benchmark runs; its figures are not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tpu_scripts" / "benchmark.py"


@pytest.mark.slow
def test_it_runs_on_the_small_model(tmp_path):
    small = "--models tiny --size 64 --steps 2 --prior-steps 2 --stages text2img --repeats 1 --rounds 1".split()
    command = [sys.executable, str(SCRIPT), *small, "--output", str(tmp_path / "found")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    sides = {(row["what"], row["side"]) for row in found["rows"]}
    assert {what for what, side in sides if side == "ours"} == {what for what, side in sides if side == "diffusers"}
    assert all(row["seconds"] > 0 and row["peak_gb"] > 0 for row in found["rows"])
    assert (tmp_path / "found.png").stat().st_size > 1000
    assert "text2img, 25 + 50 steps" in (tmp_path / "found.md").read_text()


def test_help_has_an_example():
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True)
    assert "python tpu_scripts/benchmark.py --models tiny" in done.stdout
