"""examples/batch_on_*.py on the engines' local runners: whatever happens to a worker, the bytes are the plain job's."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from kandinsky_jax.batch import Job, load_pipeline, open_job, run
from tests.batch.test_jobs import contents

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS = 17  # the last one cannot be generated
OPTIONS = ["--model", "tiny", "--rows-per-shard", "2"]
SUMMARY = "9 shards, complete: True, failed rows: 1"
MULTI_PROCESSING = "--runner FnApiRunner --direct_running_mode multi_processing --direct_num_workers 2".split()
RETRYING = ["--runner", "BundleBasedDirectRunner"]  # the one of Beam's local runners that runs a bundle again


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    rows = [{"prompt": "purple heart", "steps": 12, "seed": i} for i in range(ROWS - 1)] + [{"prompt": ""}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def plain(folder) -> dict[str, bytes]:
    """Output of the job without an engine."""
    job = open_job(Job(str(folder / "rows.jsonl"), str(folder / "plain"), model="tiny", rows_per_shard=2))
    report = run(job, load_pipeline(job), quiet=True)
    assert (report.complete, report.shards, report.images, report.failed) == (True, 9, ROWS - 1, 1)
    return contents(folder / "plain")


def check_output(output: Path, plain: dict[str, bytes]) -> None:
    """Compare with the plain job's output; every row is there once, as a picture or an error."""
    names = []
    for path in output.glob("*.tar"):
        with tarfile.open(path) as tar:
            names += [member.name for member in tar if member.name.endswith(".png")]
    assert sorted(names) == [f"{number:09d}.png" for number in range(ROWS - 1)]
    assert [json.loads(line)["row"] for line in (output / "errors.jsonl").read_text().splitlines()] == [ROWS - 1]
    assert contents(output) == plain


class Example:
    """A running example, in a process group of its own.

    Args:
        output: folder to fill; the log lies beside it.
    """

    def __init__(self, name: str, output: Path, *options: str):
        self.output, self._log = output, output.with_suffix(".log")
        command = [sys.executable, str(EXAMPLES / f"{name}.py"), str(output.parent / "rows.jsonl"), str(output)]
        environment = os.environ | {"RAY_ADDRESS": "local"}  # no cluster that runs here for others
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, *OPTIONS, *options], stdout=log, stderr=log, env=environment, start_new_session=True
            )

    @property
    def log(self) -> str:
        """Everything that it has printed."""
        return self._log.read_text()

    def wait_for_shards(self, count: int) -> None:
        """Return as soon as `count` shards are complete."""
        until = time.monotonic() + 120
        while len(list(self.output.glob("*.tar"))) < count:
            assert self._process.poll() is None, self.log
            assert time.monotonic() < until, self.log
            time.sleep(0.02)

    def workers(self, command: str) -> list[int]:
        """Return the processes that it has started and whose command contains a text, ascending."""
        return [pid for pid in _descendants(self._process.pid) if command in _command(pid)]

    def wait(self) -> str:
        """Return what it has printed, once it has ended well."""
        assert self._process.wait(timeout=240) == 0, self.log
        return self.log

    def kill(self) -> None:
        """Kill all its processes."""
        pids = _descendants(self._process.pid)
        for pid in (self._process.pid, *pids):
            _kill(pid)
        self._process.wait()


def _descendants(pid: int) -> list[int]:
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
    found, new = set(), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new}
        found |= new
    return sorted(found)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


# Ray Data ---------------------------------------------------------------------------------------------------------


@pytest.mark.campaign
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds workers in /proc")
def test_ray_data_with_a_worker_killed(folder, plain):
    """Its shards are generated by another one; started again, the complete job has nothing to do."""
    example = Example("batch_on_ray_data", folder / "ray", "--workers", "2")
    try:
        example.wait_for_shards(2)
        workers = example.workers("ray::MapWorker")
        assert workers, example.log
        _kill(workers[0])
        assert len(list(example.output.glob("*.tar"))) < 9
        printed = example.wait()
    finally:
        example.kill()
    assert SUMMARY in printed
    assert sorted(map(int, re.findall(r"'item': (\d+)", printed))) == [*range(9)]
    check_output(folder / "ray", plain)
    again = Example("batch_on_ray_data", folder / "ray").wait()
    assert SUMMARY in again
    assert "ray" not in again.replace(str(folder), "")


# Apache Beam ------------------------------------------------------------------------------------------------------


@pytest.mark.beam
def test_beam_in_several_processes_killed_and_started_again(folder, plain):
    example = Example("batch_on_beam", folder / "beam", *MULTI_PROCESSING)
    try:
        example.wait_for_shards(2)
        assert len(example.workers("-m apache_beam.runners.worker.sdk_worker_main")) >= 2
    finally:
        example.kill()
    complete = {path.name: path.stat().st_mtime_ns for path in example.output.glob("*.tar")}
    assert 2 <= len(complete) < 9
    assert SUMMARY in Example("batch_on_beam", folder / "beam", *MULTI_PROCESSING).wait()
    assert {name: (folder / "beam" / name).stat().st_mtime_ns for name in complete} == complete
    check_output(folder / "beam", plain)


@pytest.mark.beam
@pytest.mark.parametrize("shard_is_written", [False, True])
def test_beam_runs_a_bundle_that_raises_again(folder, plain, monkeypatch, shard_is_written):
    """Whether the shard in hand was complete by then or not."""
    specification = importlib.util.spec_from_file_location("batch_on_beam", EXAMPLES / "batch_on_beam.py")
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    output, raised = folder / f"again-{shard_is_written}", folder / f"raised-{shard_is_written}"

    class RaisesOnce(example.Generate):
        def process(self, shard: int) -> None:
            if shard == 4 and not raised.exists():
                if shard_is_written:
                    super().process(shard)
                raised.touch()
                raise ConnectionError("the worker is preempted")
            super().process(shard)

    monkeypatch.setattr(example, "Generate", RaisesOnce)
    monkeypatch.setattr(sys, "argv", ["batch_on_beam.py", str(folder / "rows.jsonl"), str(output), *OPTIONS, *RETRYING])
    example.main()
    assert raised.exists()
    check_output(output, plain)
