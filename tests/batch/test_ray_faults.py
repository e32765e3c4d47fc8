"""Jobs on Ray in which shards fail, hosts cannot work, and the driver is asked to stop. Kills: test_ray_kills.py."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.batch.test_jobs import contents, job_of, run_job
from tests.batch.test_ray_engine import AS_COMMANDED, OPTIONS, ROWS
from tpu_scripts.batch.ray_cluster import RayCluster

pytest.importorskip("ray")
SECONDS = 100  # that a job may take
SHARDS = ["--rows-per-shard", "1"]  # eight


@pytest.fixture(scope="module")
def whole(shapes_pipe, tmp_path_factory) -> dict[str, bytes]:
    """Output of the job without an engine."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_job(job_of(folder, ROWS, **AS_COMMANDED, rows_per_shard=1), shapes_pipe).complete
    return contents(folder / "out")


def start(folder: Path, cluster: RayCluster, *options: str, home: Path | None = None, **faults) -> subprocess.Popen:
    """Start the driver of a job in a folder; the output is `out` there, or in a home."""
    job_of(folder, ROWS, **AS_COMMANDED)
    line = f"-m tests.batch.ray_faults batch {folder}/rows.jsonl -o {'~/' if home else ''}out {OPTIONS} --quiet"
    line += f" --engine ray --address {cluster.address} --resources CPU=1"
    environment = cluster.environment() | {"KANDINSKY_FAULTS": json.dumps(faults)}
    return subprocess.Popen(
        [sys.executable, *line.split(), *SHARDS, *options],
        cwd=folder,
        env=environment | ({"HOME": str(home)} if home else {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen, code: int) -> tuple[str, str]:
    """Wait for the end; return what was printed."""
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(process.communicate()) from None
    assert process.returncode == code, (out, err)
    return out, err


def cluster_of(nodes: int, **faults) -> RayCluster:
    return RayCluster(nodes, {"KANDINSKY_FAULTS": json.dumps(faults)})


@pytest.mark.campaign
def test_shards_that_always_fail_are_left_out_and_all_others_are_generated(tmp_path, whole):
    """They take neither hosts nor their neighbours with them."""
    with cluster_of(2, generate={"2": "value", "6": "unprintable"}) as cluster:
        _, err = end(start(tmp_path, cluster), 1)
    assert err.strip().splitlines()[-1].startswith("error: 2 shards failed 5 times: 2, 6; at last on ")
    assert "shard 2 is left out: it failed 5 times" in err
    assert ": poison" in err
    found = contents(tmp_path / "out")
    assert found == {name: data for name, data in whole.items() if name not in ("000002.tar", "000006.tar")}


@pytest.mark.campaign
def test_a_host_that_cannot_load_is_given_up_with_the_reason(tmp_path):
    with cluster_of(1, load="value") as cluster:
        _, err = end(start(tmp_path, cluster), 1)
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: no host of the cluster can generate: ")
    assert last.endswith(": poison")


@pytest.mark.campaign
def test_a_host_where_the_output_is_another_folder_generates_nothing(tmp_path, whole):
    homes = [tmp_path / "home-0", tmp_path / "home-1"]
    with RayCluster() as cluster:
        for home in homes:
            home.mkdir()
            cluster.add(environment={"HOME": str(home)})
        _, err = end(start(tmp_path, cluster, home=homes[0]), 0)
    assert "~/out has no job.json here: does it lead to the same folder on all hosts?" in err
    assert contents(homes[0] / "out") == whole
    assert not (homes[1] / "out").exists()


@pytest.mark.campaign
def test_the_only_shard_of_a_host_that_hangs_goes_to_another_one(tmp_path):
    with cluster_of(2, delay=4) as cluster:
        process = start(tmp_path, cluster, "--rows-per-shard", "8", patience=5, delay=4)
        deadline = time.monotonic() + SECONDS
        while not (busy := [node for node in cluster.nodes if node.workers()]) and time.monotonic() < deadline:
            time.sleep(0.05)
        busy[0].send(signal.SIGSTOP, busy[0].workers())
        out, _ = end(process, 0)
    assert "8 images in 1 shard" in out


@pytest.mark.slow
def test_sigterm_finishes_the_shards_in_hand_and_no_others(tmp_path, whole):
    with cluster_of(2, delay=2) as cluster:
        process = start(tmp_path, cluster)
        deadline = time.monotonic() + SECONDS
        while len(list(tmp_path.glob("out/*.tar"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        before = len(list(tmp_path.glob("out/*.tar")))
        out, err = end(process, 143)
    found = contents(tmp_path / "out")
    assert found.items() < whole.items()
    assert len(found) - 1 - before <= 2  # one of each worker
    assert "stopped; start it again to continue" in out
    assert "lost its worker" not in err


def alone(folder: Path, *options: str) -> subprocess.Popen:
    """Start a job in a cluster of this machine alone."""
    job_of(folder, ROWS, **AS_COMMANDED)
    line = [*f"-m kandinsky_jax.cli batch rows.jsonl -o out {OPTIONS} --engine ray".split(), *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    return subprocess.Popen(
        [sys.executable, *line], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_sigterm_while_ray_starts(tmp_path):
    process = alone(tmp_path)
    deadline = time.monotonic() + SECONDS
    while not (tmp_path / "out" / "job.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(1.0)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    out, err = end(process, 143)
    assert "stopped; start it again to continue" in out
    assert "SIGTERM" not in err  # no stack
    assert not psutil.wait_procs(started, timeout=10)[1]  # none of Ray's outlives the job


@pytest.mark.slow
def test_sigterm_while_an_address_does_not_answer_as_ray(tmp_path):
    """Ray itself tries for minutes."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        process = alone(tmp_path, "--address", f"127.0.0.1:{other.getsockname()[1]}")
        assert process.stderr.readline().startswith("connecting to the Ray cluster at 127.0.0.1:")
        time.sleep(1.0)
        process.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        out, _ = end(process, 143)
    assert time.monotonic() - asked < 20
    assert "stopped; start it again to continue" in out


@pytest.mark.campaign
def test_a_folder_that_is_removed_midway_ends_the_job(tmp_path):
    with cluster_of(2, delay=1) as cluster:
        process = start(tmp_path, cluster)
        deadline = time.monotonic() + SECONDS
        while not list(tmp_path.glob("out/*.tar")) and time.monotonic() < deadline:
            time.sleep(0.02)
        (tmp_path / "out").rename(tmp_path / "elsewhere")
        _, err = end(process, 1)
    last = "error: out: job.json is gone, so the folder was removed or renamed: start the job again"
    assert err.strip().splitlines()[-1] == last
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_cluster_of_this_machine_alone_listens_on_loopback(tmp_path):
    process = alone(tmp_path)
    seen: set[str] = set()
    try:
        while process.poll() is None:
            for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                try:
                    seen.update(c.laddr.ip for c in each.net_connections("inet") if c.status == psutil.CONN_LISTEN)
                except psutil.Error:
                    continue  # it has ended
            time.sleep(0.2)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0
    assert seen <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert seen
