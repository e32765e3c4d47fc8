"""Memory does not grow with the number of pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import note

ROOT = Path(__file__).parents[2]


@pytest.mark.campaign
def test_ten_times_the_pictures_need_no_more_memory(tmp_path):
    command = [sys.executable, "tpu_scripts/evaluation/memory.py", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    [path] = tmp_path.glob("*.json")
    few, many = json.loads(path.read_text())["runs"]
    assert (few["pictures"], many["pictures"]) == (1000, 10_000)
    assert not few["faults"]
    assert not many["faults"]
    assert note(many["peak_mb"] - few["peak_mb"], "MB more of 10,000 pictures than of 1,000") < 64
