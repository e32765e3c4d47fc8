"""`run(shards=...)`: whoever deals out a job's shards, and in whatever order, the output is that of a static job."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kandinsky_jax.batch import Process, ShardResult, finish, run
from kandinsky_jax.batch import runner as batch_runner
from kandinsky_jax.common.errors import RunError
from kandinsky_jax.preemption import Stop
from tests.batch.test_jobs import PROMPTS, contents, job_of, run_job

CALLS = 3  # for the first shard: five pictures, two at a time


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Three shards; the row in the middle of the last one cannot be generated."""
    many: list[dict] = [{"prompt": PROMPTS[i % 5], "seed": 7 * i} for i in range(8)]
    many[1] |= {"num_images": 3, "id": "three"}
    many[7] = {"prompt": ""}
    return many


@pytest.fixture(scope="module")
def whole(rows, shapes_pipe, tmp_path_factory) -> dict[str, bytes]:
    """Output of the static job."""
    folder = tmp_path_factory.mktemp("whole")
    report = run_job(job_of(folder, rows), shapes_pipe)
    assert (report.shards, report.images, report.errors, report.complete) == (3, 9, 1, True)
    return contents(folder / "out")


@pytest.fixture
def job(rows, tmp_path):
    return job_of(tmp_path, rows)


def shard_files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out").glob("*.tar"))


class CountedCalls(Stop):
    """Counts the calls of the pipeline."""

    calls = 0

    def took(self, seconds: float) -> None:
        super().took(seconds)
        self.calls += 1


def test_only_the_given_shards_are_generated(job, whole, shapes_pipe, tmp_path):
    report = run(job, shapes_pipe, shards=np.array([2, 0]), quiet=True)
    assert (report.shards, report.skipped, report.images, report.errors) == (2, 0, 6, 1)
    assert (report.complete, report.stopped) == (False, False)
    assert shard_files(tmp_path) == ["000000.tar", "000002.tar"]
    assert job.incomplete() == [1]
    assert run(job, shapes_pipe, shards=iter(job.incomplete()), quiet=True).shards == 1
    assert job.incomplete() == []
    finish(job)
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("overlap", [True, False])
def test_an_iterator_may_wait_for_the_shard_before(job, whole, shapes_pipe, tmp_path, overlap):
    done = [threading.Event() for _ in range(3)]

    def dealt() -> Iterator[int]:
        for number in range(3):
            assert number == 0 or done[number - 1].wait(60), "the shard before is not written while the iterator waits"
            yield number

    def on_shard(result: ShardResult) -> None:
        done[result.shard].set()

    report = run(job, shapes_pipe, shards=dealt(), on_shard=on_shard, overlap=overlap, quiet=True)
    assert report.shards == 3
    finish(job)
    assert contents(tmp_path / "out") == whole


def test_an_iterator_is_asked_from_a_thread_one_shard_ahead(job, shapes_pipe):
    """So that a shard's rows are read while the one before is generated, and no others are taken from other workers."""
    stop, calls, threads = CountedCalls(), [], set()

    def dealt() -> Iterator[int]:
        for number in range(3):
            calls.append(stop.calls)
            threads.add(threading.current_thread())
            yield number

    run(job, shapes_pipe, shards=dealt(), stop=stop, quiet=True)
    assert threading.main_thread() not in threads
    assert len(threads) == 1
    assert calls[1] < CALLS <= calls[2]


def test_complete_shards_are_skipped_and_reported(job, shapes_pipe, tmp_path):
    run(job, shapes_pipe, shards=[0], quiet=True)
    before = (tmp_path / "out" / "000000.tar").stat()
    results: list[ShardResult] = []
    report = run(job, shapes_pipe, shards=iter([1, 0, 1, 2]), on_shard=results.append, quiet=True)
    assert [(result.shard, result.written) for result in results] == [(1, True), (0, False), (1, False), (2, True)]
    assert [(result.images, result.errors) for result in results] == [(3, 0), (0, 0), (0, 0), (1, 1)]
    assert results[1].generating == 0
    assert (report.shards, report.skipped, report.images, report.errors) == (2, 2, 4, 1)
    after = (tmp_path / "out" / "000000.tar").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("number", [3, -1, True, 1.0, "1", None], ids=repr)
@pytest.mark.parametrize("lazily", [False, True])
def test_a_shard_that_the_job_does_not_have(job, shapes_pipe, tmp_path, number, lazily):
    numbers = [number] if lazily else [0, number]
    with pytest.raises(ValueError, match=r"^there is no shard .+; the job's are numbered from 0 to 2$"):
        run(job, shapes_pipe, shards=iter(numbers) if lazily else numbers, quiet=True)
    assert shard_files(tmp_path) == []


def test_process_and_shards_exclude_each_other(job, shapes_pipe, tmp_path):
    with pytest.raises(ValueError, match=r"^give the process or the shards, not both$"):
        run(job, shapes_pipe, Process(), shards=[0], quiet=True)
    assert not (tmp_path / "out").exists()


def test_arguments_of_other_kinds(job, shapes_pipe, tmp_path):
    with pytest.raises(TypeError, match=r"^needed is the job that open_job\(job\) returns, got a Job$"):
        run(job.job, shapes_pipe, quiet=True)
    with pytest.raises(TypeError, match=r"^shards should be a list of numbers, or an iterator, got 3$"):
        run(job, shapes_pipe, shards=3, quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_removed_midway_is_an_error_and_can_be_filled_again(job, whole, shapes_pipe, tmp_path):
    def remove(result: ShardResult) -> None:
        if result.shard == 0:
            shutil.rmtree(tmp_path / "out")

    with pytest.raises(FileNotFoundError, match=r"job\.json is gone, so the folder was removed or renamed"):
        run(job, shapes_pipe, on_shard=remove, quiet=True)
    assert not (tmp_path / "out").exists()
    assert run(job, shapes_pipe, quiet=True).complete
    assert contents(tmp_path / "out") == whole


def test_shards_that_are_not_there_at_the_end_are_an_error(job, shapes_pipe, tmp_path):
    def remove(result: ShardResult) -> None:
        (tmp_path / "out" / f"{result.shard:06d}.tar").unlink()

    with pytest.raises(RunError, match=r"^all shards were generated, but 0, 1, 2 cannot be found in "):
        run(job, shapes_pipe, on_shard=remove, quiet=True)
    report = run(job, shapes_pipe, Process(0, 2), on_shard=remove, quiet=True)  # others may be at it
    assert (report.shards, report.complete) == (2, False)


def test_an_iterator_that_raises_ends_the_run_and_leaves_whole_shards(job, whole, shapes_pipe, tmp_path):
    written = threading.Event()

    def dealt() -> Iterator[int]:
        yield 1
        assert written.wait(60)
        raise ConnectionError("the queue is gone")

    with pytest.raises(ConnectionError, match="the queue is gone"):
        run(job, shapes_pipe, shards=dealt(), on_shard=lambda _: written.set(), quiet=True)
    assert set(contents(tmp_path / "out")) == {"job.json", "000001.tar"}
    run(job, shapes_pipe, shards=job.incomplete(), quiet=True)
    finish(job)
    assert contents(tmp_path / "out") == whole


def test_finish_collects_errors_once_all_shards_are_complete(job, shapes_pipe, tmp_path):
    run(job, shapes_pipe, shards=[0, 2], quiet=True)
    report = finish(job)
    assert (report.complete, report.failed, report.failed_shards) == (False, 0, [])
    assert not (tmp_path / "out" / "errors.jsonl").exists()
    given = run(job, shapes_pipe, shards=[1], quiet=True)
    assert not (tmp_path / "out" / "errors.jsonl").exists()
    for _ in range(2):
        report = finish(job, given)
        assert report is given
        assert (report.complete, report.failed, report.failed_shards) == (True, 1, ["000002.tar"])
        [error] = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
        assert (error["row"], "prompt" in error["error"]) == (7, True)


def test_stop_is_asked_midway(job, whole, shapes_pipe, tmp_path):
    stop = Stop(grace=0)
    report = run(
        job, shapes_pipe, shards=iter(range(3)), on_shard=lambda _: stop.ask(), stop=stop, overlap=False, quiet=True
    )
    assert (report.stopped, report.shards) == (True, 1)
    assert shard_files(tmp_path) == ["000000.tar"]
    run(job, shapes_pipe, shards=job.incomplete(), quiet=True)
    finish(job)
    assert contents(tmp_path / "out") == whole


def test_while_an_iterator_waits_stop_and_errors_end_the_run(job, shapes_pipe, tmp_path):
    """Both are noticed though no shard is found any more."""
    stop, found = Stop(), threading.Event()

    def dealt() -> Iterator[int]:
        yield from job.incomplete()[:1]
        assert found.wait(60)

    def refuse(result: ShardResult) -> None:
        raise ConnectionError(f"shard {result.shard} cannot be reported")

    report = run(job, shapes_pipe, shards=dealt(), on_shard=lambda _: stop.ask(), stop=stop, quiet=True)
    assert (report.stopped, report.shards) == (True, 1)
    with pytest.raises(ConnectionError, match="shard 1 cannot be reported"):
        run(job, shapes_pipe, shards=dealt(), on_shard=refuse, quiet=True)
    assert not found.is_set()
    found.set()
    assert shard_files(tmp_path) == ["000000.tar", "000001.tar"]


@pytest.mark.parametrize("seconds", [0.0, 3600.0])
def test_a_shard_that_another_process_has_completed_is_left(job, whole, shapes_pipe, tmp_path, monkeypatch, seconds):
    """It is looked up from time to time, and its other calls are not made."""
    monkeypatch.setattr(batch_runner, "RECHECK_SECONDS", seconds)

    class CompletedMeanwhile(CountedCalls):
        def took(self, seconds: float) -> None:
            super().took(seconds)
            (tmp_path / "its.tar").write_bytes(whole["000000.tar"])
            shutil.move(tmp_path / "its.tar", tmp_path / "out" / "000000.tar")

    stop, results = CompletedMeanwhile(), []
    report = run(job, shapes_pipe, shards=[0], on_shard=results.append, stop=stop, quiet=True)
    assert [(result.shard, result.written, result.images) for result in results] == [(0, False, 0)]
    assert (report.shards, report.skipped) == (0, 1)
    assert stop.calls == (1 if seconds == 0 else CALLS)
    assert (tmp_path / "out" / "000000.tar").read_bytes() == whole["000000.tar"]
