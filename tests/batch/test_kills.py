"""Real processes under SIGKILL and SIGSTOP: smaller versions of tpu_scripts/batch/batch_kill.py and batch_twins.py."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest

from tests.conftest import SHAPES_MODEL
from tpu_scripts.batch import batch_kill

OPTIONS = ["-m", str(SHAPES_MODEL)]
OPTIONS += "--steps 5 --prior-steps 3 --batch 4 --rows-per-shard 8 --dtype float32".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A job of 40 rows, and its output without interruption."""
    folder = tmp_path_factory.mktemp("kill")
    batch_kill.write_rows(folder, 40)
    batch_kill.undisturbed(folder, OPTIONS)
    return folder


@pytest.mark.parametrize(
    ("processes", "distributed", "kills"),
    [
        pytest.param(2, True, 1, marks=pytest.mark.slow),
        pytest.param(2, True, 8, marks=pytest.mark.campaign),
        pytest.param(2, False, 4, marks=pytest.mark.campaign),
        pytest.param(4, True, 4, marks=pytest.mark.campaign),
    ],
)
def test_killed_and_started_again(folder, processes, distributed, kills):
    found = batch_kill.disturbed(folder, 40, processes, kills, OPTIONS, distributed, random.Random(processes))
    assert found["kills"] == kills
    assert found["jobs"] >= 1


def check_twins(runs: int, seed: int) -> None:
    """Run tpu_scripts/batch/batch_twins.py; in a process of its own, which has no threads yet and can be forked."""
    command = [sys.executable, str(batch_kill.ROOT / "tpu_scripts" / "batch" / "batch_twins.py"), "--print"]
    command += ["--runs", str(runs), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["signals_during_a_write"] > 0
    names = ("corrupt_shards", "deaths_of_survivors", "runs_with_other_bytes_at_the_end")
    assert [found[name] for name in names] == [0, 0, 0], done.stderr


@pytest.mark.slow
def test_two_processes_with_the_same_index_write_one_job():
    """The twins' shards are whole at every kill, and whoever is not killed ends well."""
    check_twins(10, 1)


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(2, 6))
def test_two_processes_with_the_same_index_write_200_jobs(seed):
    check_twins(50, seed)
