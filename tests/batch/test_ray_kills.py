"""Jobs on Ray whose processes are killed and stopped: smaller versions of tpu_scripts/batch/ray_kill.py."""

from __future__ import annotations

import random

import pytest

from tests.batch.test_kills import OPTIONS
from tpu_scripts.batch import ray_kill, ray_scenes

pytest.importorskip("ray")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job of 25 shards, and its output without interruption."""
    return ray_kill.open_job(tmp_path_factory.mktemp("ray"), 200, OPTIONS)


@pytest.mark.campaign
def test_a_killed_driver_that_is_started_again(job):
    assert ray_scenes.driver_killed(job, 1, random.Random(2))["kills"] == 1


@pytest.mark.campaign
def test_each_kind_of_kill(job):
    found = ray_kill.kills(job, 5, random.Random(1))
    assert found["kinds"] == dict.fromkeys(ray_kill.KINDS, 1)


@pytest.mark.campaign
@pytest.mark.parametrize("name", ray_kill.SCENES)
def test_campaign(job, name):
    ray_kill.SCENES[name](job, 10, random.Random(name))
