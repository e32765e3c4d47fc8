"""The benchmark of training runs; its figures are not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tpu_scripts" / "bench" / "train_benchmark.py"
SMALL = "--batch 2 --rounds 1 --seconds 0.1".split()


def run(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)


@pytest.mark.campaign
def test_it_runs_on_the_small_model(tmp_path):
    kinds = ("lora-prior",)
    done = run("--kinds", *kinds, *SMALL, "--ema", 0.99, "--snr-gamma", 5, "--output", tmp_path / "found")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    wanted = [(kind, encoding, side) for kind in kinds for encoding in (False, True) for side in ("ours", "PyTorch")]
    assert [(row["kind"], row["encoding"], row["side"]) for row in rows] == wanted
    assert all(row["steps_per_second"] > 0 and row["peak_gb"] > 0 and row["first_step_s"] > 0 for row in rows)
    assert all(0 < row["loss"] < 10 for row in rows)
    assert (tmp_path / "found.md").read_text().count("x |\n") == len(wanted) // 2


def test_help_has_an_example():
    assert "python tpu_scripts/bench/train_benchmark.py --kinds lora-prior" in run("--help").stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--models", "absent"], "absent has no kandinsky-2-2-prior in diffusers' layout"),
        (["--size", 70], "--size is a multiple of 64, got 70"),
        (["--batch", 0], "--batch, --rank and --rounds are at least 1"),
    ],
)
def test_bad_options(options, says):
    done = run(*options)
    assert done.returncode == 2
    assert says in done.stderr


@pytest.mark.slow
def test_a_side_that_dies_is_named(tmp_path):
    for name in ("prior", "decoder"):
        (tmp_path / f"kandinsky-2-2-{name}").mkdir()
        (tmp_path / f"kandinsky-2-2-{name}" / "model_index.json").write_text("{}")
    done = run("--models", tmp_path, *SMALL, "--output", tmp_path / "found")
    assert done.returncode == 1
    assert "ours, decoder ended with exit status 1" in done.stderr
