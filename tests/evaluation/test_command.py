"""`kandinsky-jax evaluate`, as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kandinsky_jax.cli import app
from tests.conftest import SHAPES_MODEL
from tests.evaluation.conftest import drawn, write_folder, write_job

MODEL = str(SHAPES_MODEL)


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


@pytest.fixture
def job(tmp_path) -> Path:
    write_job(str(tmp_path / "job"), drawn(20))
    return tmp_path / "job"


def test_a_table_and_its_files(job, tmp_path):
    write_folder(tmp_path / "reference", drawn(24, seed=1))
    options = ["-o", tmp_path / "out", "--clip", MODEL, "--reference", tmp_path / "reference", "--resamples", "50"]
    done = invoke(job, *options, "--quiet")
    assert done.exit_code == 0, done.exception
    head, _, names, _, *rows = done.output.splitlines()
    assert head == f"{job}: 20 pictures; reference {tmp_path / 'reference'} (24 pictures)"
    assert names.split() == "| metric | value | interval | resamples | better |".split()
    assert [row.split()[1] for row in rows] == ["clip-score", "kandinsky-clip-mmd"]
    assert "(95 %)" in rows[0]
    assert (tmp_path / "out" / "evaluation.md").read_text() == done.output
    stored = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert json.loads(invoke(job, *options, "--quiet", "--json").output) == stored


def test_faults_of_all_options_at_once(job, tmp_path):
    options = ["--metric", "fid", "--names", tmp_path / "names.txt", "--mesh", "1,2", "--steps", "4", "--batch", "0"]
    done = invoke(job, "-o", tmp_path / "out", *options)
    told = str(done.exception)
    assert done.exit_code == 1
    for part in ("--steps: these pictures are there already", "--names: there is no file", "--mesh must be three"):
        assert part in told
    for part in ("batch must be", "(--inception)", "(--reference)"):
        assert part in told


def test_features_alone(job, tmp_path):
    done = invoke(job, "-o", tmp_path / "out", "--clip", MODEL, "--save-features", tmp_path / "f.safetensors", "-q")
    assert done.exit_code == 0, done.exception
    assert done.output.strip() == f"{job}: 20 pictures"
    assert (tmp_path / "f.safetensors").stat().st_size > 20 * 4 * 16


@pytest.mark.slow
def test_prompts_are_generated_first(tmp_path):
    """And not again by a second run, whose other settings would be those of another job."""
    prompts = "".join(f"{prompt}\n" for prompt, _ in drawn(5))
    (tmp_path / "prompts.txt").write_text(prompts)
    options = ["-o", tmp_path / "out", "-m", MODEL, "--prior-steps", "5", "--metric", "nearest-name", "-q"]
    done = invoke(tmp_path / "prompts.txt", *options, "--steps", "10")
    assert done.exit_code == 0, done.exception
    lines = [json.loads(line) for line in (tmp_path / "out" / "pictures.jsonl").read_text().splitlines()]
    assert "".join(f"{line['prompt']}\n" for line in lines) == prompts
    assert sum(line["nearest-name"] for line in lines) >= 4
    [shard] = (tmp_path / "out" / "pictures").glob("*.tar")
    before = shard.stat().st_mtime_ns
    assert invoke(tmp_path / "prompts.txt", *options, "--steps", "10").exit_code == 0
    assert shard.stat().st_mtime_ns == before
    other = invoke(tmp_path / "prompts.txt", *options, "--steps", "9")
    assert "holds another job" in str(other.exception)


@pytest.mark.slow
def test_killed_and_started_again(tmp_path):
    """By SIGKILL, as soon as the first features are there."""
    write_job(str(tmp_path / "job"), drawn(60) * 10, per_shard=20)
    features = tmp_path / "out" / "features"
    command = [sys.executable, "-m", "kandinsky_jax.cli", "evaluate", str(tmp_path / "job"), "--clip", MODEL, "-q"]
    with subprocess.Popen(
        [*command, "-o", str(tmp_path / "out"), "--batch", "4"], stdout=subprocess.DEVNULL
    ) as process:
        for _ in range(600):
            if len(list(features.glob("clip-*/*.safetensors"))) > 2:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    kept = {path: path.stat().st_mtime_ns for path in features.glob("clip-*/*.safetensors")}
    assert 2 < len(kept) < 60, "it was killed while it was at work"
    options = ["--clip", MODEL, "--batch", "4", "-q"]
    assert invoke(tmp_path / "job", "-o", tmp_path / "out", *options).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert invoke(tmp_path / "job", "-o", tmp_path / "whole", *options).exit_code == 0
    found = [(tmp_path / name / "evaluation.json").read_bytes() for name in ("out", "whole")]
    assert found[0] == found[1]
    assert not [name for name in os.listdir(tmp_path / "out") if name.startswith(".")]
