"""Real processes under SIGKILL: a smaller version of tpu_scripts/batch_kill.py."""

from __future__ import annotations

import random

import pytest

from tests.conftest import SHAPES_MODEL
from tpu_scripts import batch_kill

OPTIONS = ["-m", str(SHAPES_MODEL)]
OPTIONS += "--steps 5 --prior-steps 3 --batch 4 --rows-per-shard 8 --dtype float32".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A job of 64 rows, and what it draws undisturbed."""
    folder = tmp_path_factory.mktemp("kill")
    batch_kill.write_rows(folder, 64)
    batch_kill.undisturbed(folder, OPTIONS)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "distributed"), [(2, False), (4, True)])
def test_killed_and_started_again(folder, processes, distributed):
    found = batch_kill.disturbed(folder, 64, processes, 4, OPTIONS, distributed, random.Random(processes))
    assert found["kills"] == 4
    assert found["jobs"] >= 1
