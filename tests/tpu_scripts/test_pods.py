"""Files for pods: manifests consistent with each other and the program, a script, a notebook that runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
import yaml

from kandinsky_jax.cli import app
from kandinsky_jax.parallel.process import VARIABLES

ROOT = Path(__file__).parents[2]
PODS = ROOT / "tpu_scripts" / "pods"
CHIPS = {"2x2": (4, 1), "2x4": (8, 1), "4x4": (4, 4)}  # of a host, and hosts, by topology of v5e


def options_of_batch() -> set[str]:
    command = typer.main.get_command(app).commands["batch"]
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def jobs() -> list[tuple[str, dict]]:
    indexed = yaml.safe_load((PODS / "indexed_job.yaml").read_text())
    jobset = yaml.safe_load((PODS / "jobset.yaml").read_text())
    return [("indexed", indexed["spec"]), ("jobset", jobset["spec"]["replicatedJobs"][0]["template"]["spec"])]


@pytest.mark.parametrize(("name", "job"), jobs(), ids=lambda x: x if isinstance(x, str) else "")
def test_a_manifest_agrees_with_itself_and_the_program(name, job):
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    arguments = container["args"]
    assert arguments[0] == "batch"
    assert {word.split("=")[0] for word in arguments if word.startswith("-")} <= options_of_batch()
    [grace] = [float(word.split("=")[1]) for word in arguments if word.startswith("--grace=")]
    assert grace < pod["terminationGracePeriodSeconds"] <= 25  # what a spot node has
    assert job["completions"] == job["parallelism"]
    assert job["completionMode"] == "Indexed"
    assert pod["restartPolicy"] == "Never"
    chips, hosts = CHIPS[pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]]
    assert container["resources"]["limits"]["google.com/tpu"] == chips
    assert {volume["name"] for volume in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    if name == "indexed":
        assert hosts == 1
        [(_, total)] = [pair for pair in VARIABLES if pair[0] == "JOB_COMPLETION_INDEX"]
        values = {variable["name"]: variable["value"] for variable in container["env"]}
        assert values[total] == str(job["completions"])
        assert 143 in job["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"]
    else:
        assert job["completions"] == hosts
        assert "--distributed" in arguments


def test_the_commands_of_the_guide_and_the_script_exist():
    texts = [
        (PODS / "README.md").read_text(),
        (PODS / "queued_resources.sh").read_text(),
        (ROOT / "README.md").read_text(),
    ]
    calls = [call for text in texts for call in re.findall(r"kandinsky-jax batch ([^`\n]*(?:\\\n[^`\n]*)*)", text)]
    assert len(calls) >= 4
    for call in calls:
        assert set(re.findall(r"(?<!\S)--[a-z-]+", call)) <= options_of_batch() | {"--help"}, call


def test_the_script_for_queued_resources(tmp_path):
    """With a stand-in for gcloud: it asks for a slice, runs the job, asks again after a preemption, and tidies up."""
    log, states = tmp_path / "log", tmp_path / "states"
    states.write_text("\nWAITING\nACTIVE\nSUSPENDED\n\nACTIVE\n")
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(
        f"""#!/usr/bin/env bash
echo "$@" >> {log}
case "$*" in
    *describe*) head -n 1 {states}; sed -i 1d {states} ;;
    *"tpu-vm ssh"*"pip install"*) : ;;
    *"tpu-vm ssh"*) [ "$(grep -c 'kandinsky-jax batch' {log})" -ge 2 ] ;;
esac
"""
    )
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    for name in ("gcloud", "sleep"):
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PROJECT": "p", "ZONE": "z"}
    command = [PODS / "queued_resources.sh", "gs://b/a b.jsonl", "--output", "gs://b/out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = log.read_text().splitlines()
    assert sum("queued-resources create" in line for line in lines) == 2
    runs = [line for line in lines if "kandinsky-jax batch" in line and "pip install" not in line]
    assert len(runs) == 2
    assert r"gs://b/a\ b.jsonl --output gs://b/out" in runs[0]
    assert "delete" in lines[-1]


def test_the_image_is_built_of_what_there_is():
    text = (PODS / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split())
    assert 'ENTRYPOINT ["kandinsky-jax"]' in text


@pytest.mark.slow
def test_the_notebook_runs_on_a_cpu(tmp_path):
    notebook = json.loads((ROOT / "tpu_scripts" / "kandinsky_colab.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    code = "\n".join(line for cell in cells for line in cell.splitlines() if not line.startswith("%"))
    (tmp_path / "cells.py").write_text(code + "\nassert len(drawn) == 4 and report.complete\nprint(sheet.size)\n")
    done = subprocess.run(
        [sys.executable, "-W", "error", "cells.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "(256, 64)"
    shutil.rmtree(tmp_path / "pictures")
