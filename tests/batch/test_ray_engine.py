"""The Ray engine has the bytes of a job without one, here in a cluster of one host. Faults: test_ray_kills.py."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from kandinsky_jax.batch import runner as batch_runner
from kandinsky_jax.batch.engines import ray_connection
from kandinsky_jax.batch.engines.ray_worker import Fault, RayWorker
from kandinsky_jax.cli.main import app
from tests.batch.ray_faults import Panic, Unprintable
from tests.batch.test_jobs import PROMPTS, contents, job_of, run_job
from tests.conftest import SHAPES_MODEL

OPTIONS = f"--model {SHAPES_MODEL} --rows-per-shard 3 --batch 2 --dtype float32 --steps 3 --prior-steps 2"
AS_COMMANDED = {"defaults": {"num_images": 1, "strength": 0.3}}  # the command line's defaults, in job.json
ROWS = [{"prompt": PROMPTS[i % 5], "seed": i} for i in range(8)]


@pytest.fixture(scope="module")
def whole(shapes_pipe, tmp_path_factory) -> Path:
    """The output of a job without an engine."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_job(job_of(folder, ROWS, **AS_COMMANDED), shapes_pipe).complete
    return folder / "out"


@pytest.fixture
def worker(tmp_path) -> Iterator[RayWorker]:
    job = job_of(tmp_path, ROWS, **AS_COMMANDED)
    job.begin()  # as the driver
    worker = RayWorker(job.job, os.fspath(tmp_path))
    before = os.getcwd()
    loaded = worker.load()
    os.chdir(before)
    assert loaded is None
    yield worker
    worker.close()


def test_a_worker_generates_the_shards_that_it_is_given(worker, whole, tmp_path):
    with ThreadPoolExecutor(3) as calls:
        results = list(calls.map(worker.generate, (2, 0, 1)))
    assert [(result.shard, result.written, result.images, result.errors) for result in results] == [
        (2, True, 2, 0),
        (0, True, 3, 0),
        (1, True, 3, 0),
    ]
    assert contents(tmp_path / "out") == contents(whole)
    again = worker.generate(1)
    assert (again.written, again.images) == (False, 0)


def test_a_worker_goes_on_after_an_error(worker, whole, tmp_path):
    """An error while a shard is written is the answer for it, though the worker waits for the next one meanwhile."""
    assert worker.generate(2).written
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").write_text("a file where the folder should be")
    with ThreadPoolExecutor(2) as calls:
        for answer in calls.map(worker.generate, (0, 1)):
            assert isinstance(answer, Fault)
            assert not answer.permanent
            assert str(tmp_path / "out") in answer.message
    (tmp_path / "out").unlink()
    shutil.copytree(whole, tmp_path / "out", ignore=shutil.ignore_patterns("000001.tar"))
    assert worker.generate(1).written
    assert contents(tmp_path / "out") == contents(whole)


ERRORS = ValueError("poison"), Panic("poison"), Unprintable()


@pytest.mark.parametrize("error", ERRORS, ids=["ValueError", "Panic", "Unprintable"])
def test_a_worker_survives_any_error(worker, whole, tmp_path, monkeypatch, error):
    """It is the answer for all shards in hand, and passes, whatever it is: a store's damaged answer is a ValueError."""
    generate = batch_runner._Stages._generate_shard
    left = [error]

    def fail_once(*arguments):
        if left:
            raise left.pop()
        return generate(*arguments)

    monkeypatch.setattr(batch_runner._Stages, "_generate_shard", fail_once)
    fault = worker.generate(1)
    assert fault == Fault("Unprintable" if isinstance(error, Unprintable) else "poison", permanent=False)
    assert worker.generate(1).written


def test_a_worker_that_is_asked_to_stop_leaves_all_shards_but_that_in_hand(worker, tmp_path, monkeypatch):
    generate = batch_runner._Stages._generate_shard
    begun, go_on = threading.Event(), threading.Event()

    def wait(*arguments):
        begun.set()
        assert go_on.wait(60)
        return generate(*arguments)

    assert worker.generate(2).written  # so it knows how long a call takes
    monkeypatch.setattr(batch_runner._Stages, "_generate_shard", wait)
    with ThreadPoolExecutor(2) as calls:
        first = calls.submit(worker.generate, 1)
        assert begun.wait(60)
        second = calls.submit(worker.generate, 0)
        worker.stop(600)
        go_on.set()
        assert first.result(60).written
        assert second.result(60) is None
    assert worker.generate(0) is None
    assert not (tmp_path / "out" / "000000.tar").exists()


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_worker_ends_with_its_node(tmp_path):
    """Though a thread waits for the next shard, for which the interpreter would wait in its turn."""
    worker = (
        "import concurrent.futures, os, threading\n"
        "from kandinsky_jax.batch.engines.ray_worker import RayWorker\n"
        "RayWorker(None, '/').end_with_node()\n"
        "print(os.getpid(), flush=True)\n"
        "concurrent.futures.ThreadPoolExecutor().submit(threading.Event().wait)\n"
    )
    node = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", node], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        time.sleep(1.5)
        assert runs(pid)
        process.kill()
    deadline = time.monotonic() + 20
    while runs(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not runs(pid)


def test_a_worker_whose_output_is_another_folder_says_so_and_writes_nothing(tmp_path):
    fault = RayWorker(job_of(tmp_path, ROWS, **AS_COMMANDED).job, "/no/such/folder").load()
    assert isinstance(fault, Fault)
    assert fault.message == f"{tmp_path}/out has no job.json here: does it lead to the same folder on all hosts?"
    assert not (tmp_path / "out").exists()


def test_a_worker_without_the_model_says_so(tmp_path):
    opened = job_of(tmp_path, ROWS, **AS_COMMANDED)
    opened.begin()
    job = dataclasses.replace(opened.job, model=str(tmp_path / "nowhere"))
    fault = RayWorker(job, "/no/such/folder").load()
    assert isinstance(fault, Fault)
    assert fault.permanent
    assert "nowhere" in fault.message


def test_a_worker_of_another_job_says_so(tmp_path, whole):
    job = job_of(tmp_path, ROWS, **AS_COMMANDED)
    shutil.copytree(whole, tmp_path / "out")
    fault = RayWorker(dataclasses.replace(job.job, seed=5), "/no/such/folder").load()
    assert fault == Fault(fault.message, permanent=True)
    assert "seed was 0, now 5" in fault.message


def command(folder: Path, *options: str, without_ray: bool = False) -> subprocess.CompletedProcess[str]:
    """`kandinsky-jax batch` as a user calls it, from the folder of the rows, with relative paths."""
    program = "import sys; sys.modules['ray'] = None; " if without_ray else ""
    program += "from kandinsky_jax.cli import main; main()"
    fixed = f"rows.jsonl -o out {OPTIONS} --engine ray"
    line = [sys.executable, "-c", program, "batch", *fixed.split(), *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_a_job_on_ray_has_the_bytes_of_one_without(tmp_path, whole):
    job_of(tmp_path, ROWS, **AS_COMMANDED)
    shutil.copytree(whole, tmp_path / "out", ignore=shutil.ignore_patterns("000001.tar"))
    done = command(tmp_path, "--quiet", "--compilation-cache", "off")
    assert done.returncode == 0, done.stderr
    assert "3 images in 1 shard," in done.stdout
    assert "2 shards were complete" in done.stdout
    assert "1 worker, 0 lost" in done.stdout
    assert "CPU-hours" in done.stdout
    assert "the job is complete: out" in done.stdout
    assert contents(tmp_path / "out") == contents(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows.jsonl"]


@pytest.mark.parametrize(
    ("address", "variable", "alone"),
    [
        (None, None, True),
        ("", "", True),
        ("local", "10.0.0.1:6379", True),
        (None, "local", True),
        (None, "10.0.0.1:6379", False),
        ("auto", None, False),
        ("10.0.0.1:6379", None, False),
    ],
)
def test_which_cluster_is_meant(monkeypatch, address, variable, alone):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert ray_connection.is_alone(address) == alone


@pytest.mark.slow
def test_a_machine_without_the_resources_is_not_waited_for(tmp_path):
    job_of(tmp_path, ROWS, **AS_COMMANDED)
    done = command(tmp_path, "--quiet", "--resources", "TPU=4")
    assert done.returncode == 1
    assert "error: this machine does not have TPU=4; Ray finds at most CPU=" in done.stderr


def test_hosts_are_asked_of_a_cluster(tmp_path):
    done = job_of(tmp_path, ROWS, **AS_COMMANDED) and command(tmp_path, "--hosts", "3")
    assert done.returncode == 1
    assert done.stderr == "error: hosts=3 are asked of a cluster: give its --address, or leave out --hosts\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "address", ["foo", "http://10.0.0.1:8265", "10.0.0.1", "10.0.0.1:0", "10.0.0.1:999999", ":6379"]
)
def test_an_address_of_no_known_form(address):
    with pytest.raises(ValueError, match=r"^the address .+ should be HOST:PORT, ray://HOST:PORT, auto or local$"):
        ray_connection.reach(address)


def test_an_address_where_nothing_is(tmp_path):
    job_of(tmp_path, ROWS, **AS_COMMANDED)
    done = command(tmp_path, "--address", "127.0.0.1:1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no Ray cluster at 127.0.0.1:1: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()  # other options may be given next time


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--engine ray --resources TPU", "--resources 'TPU' should be NAME=AMOUNT, such as TPU=4"),
        ("--engine ray --resources TPU=none", "--resources 'TPU=none' should be NAME=AMOUNT"),
        ("--engine ray --resources TPU=nan", "--resources 'TPU=nan' should be NAME=AMOUNT"),
        ("--engine ray --resources TPU=0", "with an amount above 0"),
        ("--engine ray --process 0 --processes 2", "have no meaning with --engine ray"),
        ("--engine ray --distributed", "have no meaning with --engine ray"),
        ("--engine ray --no-overlap", "--no-overlap has no meaning with --engine ray"),
        ("--address auto", "add --engine ray"),
        ("--resources TPU=4", "add --engine ray"),
        ("--hosts 4", "add --engine ray"),
    ],
)
def test_options_that_do_not_fit(options, said):
    """They are said before the job is looked at, which is not there."""
    result = CliRunner().invoke(app, ["batch", "rows.jsonl", "-o", "out", *options.split()])
    assert isinstance(result.exception, ValueError)
    assert said in str(result.exception)


def test_without_ray_it_says_what_to_install(tmp_path):
    job_of(tmp_path, ROWS, **AS_COMMANDED)
    done = command(tmp_path, without_ray=True)
    assert done.returncode == 1
    assert done.stderr == "error: this job cannot be run:\n  --engine ray needs Ray: pip install 'kandinsky-jax[ray]'\n"


def test_without_the_engine_ray_is_not_imported():
    program = "import sys, kandinsky_jax.cli.main; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=120, check=False).returncode == 0
