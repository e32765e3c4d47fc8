"""A job of the small model that nothing happened to; tests copy its output before they change it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.batch.test_jobs import PROMPTS, job_of, run_job


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    many = [{"prompt": PROMPTS[i % 5], "seed": 2**40 + i} for i in range(8)]
    many[1] |= {"num_images": 3, "id": "three"}
    many[4] |= {"negative_prompt": "a red circle", "metadata": {"source": ["x", 1]}}
    many[6] |= {"steps": 4, "guidance_scale": 1.0}
    return many


@pytest.fixture(scope="session")
def whole(rows, shapes_pipe, tmp_path_factory) -> Path:
    """The output of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    report = run_job(job_of(folder, rows), shapes_pipe)
    assert (report.shards, report.images, report.errors, report.complete) == (3, 10, 0, True)
    return folder / "out"
