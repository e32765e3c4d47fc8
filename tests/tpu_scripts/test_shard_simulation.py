"""Simulated makespans of batch jobs: fixed parts of the shards against shards one by one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tpu_scripts" / "batch" / "shard_simulation.py"
sys.path.insert(0, str(SCRIPT.parent))

from shard_simulation import Case, fixed_parts, multiple_of_ideal, one_by_one  # noqa: E402


@pytest.mark.parametrize("simulate", [fixed_parts, one_by_one])
def test_hosts_that_are_alike_need_the_ideal_time(simulate):
    assert multiple_of_ideal(simulate, 8, 320, Case("alike"), 1) == 1


def test_a_slow_host_doubles_the_time_of_fixed_parts_alone():
    case = Case("slow", slow=1)
    ideal = 15.5 / 16  # of all hosts at full speed
    assert multiple_of_ideal(fixed_parts, 16, 1600, case, 1) == pytest.approx(2 * ideal)
    assert (
        1 <= multiple_of_ideal(one_by_one, 16, 1600, case, 1) <= 1 + 2 / 100 + 1e-9
    )  # one more of its shards, at most


def test_an_interrupted_shard_is_generated_once_more():
    """One host, which nobody can help: n shards, and for each interruption half a shard and a wait."""
    case = Case("interrupted", interrupted=0.2, wait=3.0)
    lost = [(simulate(50, [1.0], case, 7) - 50) / 3.5 for simulate in (fixed_parts, one_by_one)]
    assert lost[0] == lost[1] == pytest.approx(round(lost[0]))
    assert 5 < lost[0] < 25


def test_others_do_the_shards_of_interrupted_hosts():
    case = Case("interrupted", interrupted=0.01, wait=40.0)
    fixed, stolen = (multiple_of_ideal(simulate, 64, 3907, case, 1) for simulate in (fixed_parts, one_by_one))
    assert stolen < 1.5 < 2 < fixed


def test_the_guide_prints_what_the_script_says():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(table) == 5
    guide = (ROOT / "tpu_scripts" / "pods" / "batch.md").read_text()
    for line in table[1:]:
        assert line in guide, line
