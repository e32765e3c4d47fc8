"""Fast jobs: the pictures of the model with its fast adapter; being fast is part of a job's identity."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet
import pytest

from kandinsky_jax import CheckpointError, KandinskyV22CombinedPipeline
from kandinsky_jax.batch import JobError, load_pipeline
from kandinsky_jax.checkpoint import hub, lora_files
from tests import fast_model
from tests.batch.test_jobs import PROMPTS, job_of, members, run_job
from tests.conftest import SHAPES_MODEL
from tests.pipelines.test_adapters import random_changes

ROWS = [{"prompt": PROMPTS[0]}, {"prompt": PROMPTS[1], "steps": 2, "guidance_scale": 2.0}]
BY_HAND = {"steps": 3, "guidance_scale": 1.0, "prior_steps": 2, "prior_guidance_scale": 1.0}
NOTHING = dict.fromkeys(("steps", "prior_steps"))  # of what the job says


@pytest.fixture(scope="module")
def model(shapes_pipe, tmp_path_factory) -> Path:
    return fast_model.write(tmp_path_factory.mktemp("family") / "shapes", shapes_pipe)


def fast_job(folder: Path, model: Path, **settings):
    return job_of(folder, ROWS, model=str(model), defaults=NOTHING, **{"fast": True} | settings)


def test_pictures_are_those_of_the_lora_loaded_by_hand(model, tmp_path):
    job = fast_job(tmp_path, model)
    assert run_job(job, load_pipeline(job)).complete
    pipe = KandinskyV22CombinedPipeline.from_pretrained(model, dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    fast_model.load_by_hand(pipe, model)
    by_hand = job_of(tmp_path, ROWS, "by_hand", model=str(model), defaults=BY_HAND, scheduler="lcm")
    assert run_job(by_hand, pipe).complete
    found, expected = members(tmp_path / "out"), members(tmp_path / "by_hand")
    assert found.keys() == expected.keys()
    for name, data in found.items():
        if name.endswith(".json"):
            assert json.loads(data) == json.loads(expected[name]) | {"fast": True}
        else:
            assert data == expected[name]


@pytest.mark.slow
def test_a_folder_of_pictures_says_so_too(model, tmp_path):
    job = fast_job(tmp_path, model, form="folder")
    run_job(job, load_pipeline(job))
    rows = pyarrow.parquet.read_table(tmp_path / "out" / "manifest").to_pylist()
    assert [(row["fast"], row["scheduler"], row["steps"]) for row in rows] == [(True, "lcm", 3), (True, "lcm", 2)]


def test_a_job_goes_on_only_as_it_was_begun(model, tmp_path):
    fast_job(tmp_path, model).begin()
    fast_job(tmp_path, model).begin()
    with pytest.raises(JobError, match=r"\n  fast was True, now not given\n"):
        fast_job(tmp_path, model, fast=False).begin()
    slow = fast_job(tmp_path, model, output="slow", fast=False)
    slow.begin()
    assert "fast" not in json.loads((tmp_path / "slow" / "job.json").read_text())  # as in older releases
    with pytest.raises(JobError, match=r"\n  fast was not given, now True\n"):
        fast_job(tmp_path, model, output="slow").begin()


def test_the_adapter_is_part_of_the_model(shapes_pipe, tmp_path):
    family = fast_model.write(tmp_path / "family", shapes_pipe)
    fast_job(tmp_path, family).begin()
    fast_job(tmp_path, family, output="slow", fast=False).begin()
    lora_files.write(family / hub.PRIOR, {"prior": random_changes(shapes_pipe.prior_prior, 5)}, fast_model.LORA)
    with pytest.raises(JobError, match=rf"\n  the model's files changed: prior/{fast_model.LORA}$"):
        fast_job(tmp_path, family).begin()
    fast_job(tmp_path, family, output="slow", fast=False).begin()


def test_a_model_without_one_is_an_error_before_anything_is_written(tmp_path):
    with pytest.raises(CheckpointError, match="have no fast adapter"):
        fast_job(tmp_path, SHAPES_MODEL).begin()
    assert not (tmp_path / "out").exists()
    with pytest.raises(JobError, match="fast must be True or False, got 'yes'"):
        fast_job(tmp_path, SHAPES_MODEL, fast="yes")


def test_steps_that_the_scheduler_does_not_take_are_an_error_at_once(model, tmp_path):
    job = job_of(tmp_path, ROWS[:1], model=str(model), fast=True, defaults={"steps": 60, "prior_steps": None})
    with pytest.raises(JobError, match=r"steps: num_inference_steps=60 .*LCMScheduler"):
        job.begin()
