"""Shards in an object store whose requests fail: none is truncated, lost or published twice."""

from __future__ import annotations

import gc
import io
import json
import random
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from kandinsky_jax.batch.shards import GeneratedImage, Output
from tests.batch.store import FAULTS, object_store
from tests.batch.test_jobs import PROMPTS, contents, job_of, run_job
from tests.conftest import quick_and_slow


@pytest.fixture(scope="module")
def store():
    with object_store("bucket") as store:
        yield store


@pytest.fixture
def healthy(store):
    return store.heal()


def pictures(shard: int, size: int = 40_000) -> list[GeneratedImage]:
    rng = random.Random(shard)
    return [
        GeneratedImage(f"p{shard}-{i}", rng.randbytes(rng.randrange(size)), {"id": f"p{shard}-{i}"}) for i in range(4)
    ]


def errors(shard: int) -> list[dict]:
    return [{"row": shard, "id": None, "error": "prompt is missing or empty"}] if shard % 5 == 0 else []


def objects(url: str) -> dict[str, bytes]:
    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    return {path.removeprefix(f"{root}/"): fs.cat_file(path) for path in fs.find(root)}


def make(url: str, count: int, form: str = "webdataset", until: int | None = None) -> list[bool]:
    """Do what a run does, eight shards at a time; a killed run stops at a shard."""
    output = Output(url, form, "png")
    output.begin({"seed": 0})
    left = sorted(set(range(count)) - output.complete(count))
    output.sweep()
    with ThreadPoolExecutor(8) as threads:
        written = list(threads.map(lambda shard: output.write(shard, pictures(shard), errors(shard)), left[:until]))
    if until is None:
        assert output.complete(count) == set(range(count))
        output.finish(count)
    return written


def faulty_job(store, tmp_path: Path, count: int, form: str, seed: int, share: float) -> None:
    url = f"gs://bucket/{form}-{count}-{seed}"
    make(str(tmp_path / "whole"), count, form)
    whole = contents(tmp_path / "whole")
    store.random_faults(seed, share)
    assert all(make(url, count, form, until=count // 2))
    assert all(make(url, count, form))
    store.fault = lambda method, path: None
    assert objects(url) == whole
    shards = {name: times for name, times in store.published.items() if name.endswith((".tar", ".parquet"))}
    assert len(shards) == count
    assert set(shards.values()) == {1}
    assert make(url, count, form) == []  # started again, there is nothing to do, and the bytes stay
    assert objects(url) == whole


@pytest.mark.parametrize("form", quick_and_slow(("webdataset", "folder"), "webdataset"))
def test_shards_arrive_whole_and_once(healthy, tmp_path, form):
    faulty_job(healthy, tmp_path, 6, form, seed=3, share=0.25)
    assert sum(healthy.faults.values()) > 5


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(3))
def test_200_shards_arrive_whole_and_once(healthy, tmp_path, seed):
    faulty_job(healthy, tmp_path, 200, "webdataset", seed, share=0.3)
    assert set(healthy.faults) == set(FAULTS)
    print(json.dumps({"shards": 200, "seed": seed, "faults": dict(healthy.faults)}))


@pytest.mark.parametrize("fault", quick_and_slow(("503", "429", "dropped", "cut"), "cut"))
def test_an_upload_that_fails_publishes_nothing(healthy, fault):
    """Nor does the collection of what was left of it, when the store is well again."""
    url = f"gs://bucket/failed-{fault}"
    output = Output(url, "webdataset", "png")
    output.begin({"seed": 0})
    healthy.fault = lambda method, path: fault if method == "POST" else None
    with pytest.raises(OSError, match=r"failed-.*000000\.tar") as caught:
        output.write(0, pictures(0, 400_000), [])
    assert len(str(caught.value)) < 500
    healthy.fault = lambda method, path: None
    del caught
    gc.collect()
    assert set(objects(url)) == {"job.json"}
    assert output.write(0, pictures(0, 400_000), [])
    assert output.complete(1) == {0}


def test_a_reply_that_is_lost_is_no_failure(healthy):
    """The repeated request finds its own object there."""
    lost = iter([None, "lost", "lost"])
    healthy.fault = lambda method, path: next(lost, None) if method == "POST" else None
    output = Output("gs://bucket/lost", "webdataset", "png")
    output.begin({"seed": 0})
    assert output.write(0, pictures(0), [])
    assert healthy.faults == {"lost": 2}
    assert healthy.published["lost/000000.tar"] == 1


def test_a_stopped_process_does_not_replace_its_twins_shard(healthy):
    """Its request is sent when the twin's object is there: the precondition refuses it."""
    slow, twin = (Output("gs://bucket/twins", "webdataset", "png") for _ in range(2))

    def stopped(method: str, path: str) -> None:
        if method == "POST":
            healthy.fault = lambda method, path: None
            assert twin.write(0, pictures(0), [])

    healthy.fault = stopped
    assert slow.write(0, pictures(0), []) in (True, False)
    assert healthy.published["twins/000000.tar"] == 1
    other = [GeneratedImage("other", b"bytes", {})]  # from another machine, say
    before = objects("gs://bucket/twins")
    healthy.fault = lambda method, path: None
    assert not slow.write(0, other, [])
    assert objects("gs://bucket/twins") == before


def test_a_shard_that_an_older_release_left_truncated_is_made_again(healthy):
    output = Output("gs://bucket/truncated", "webdataset", "png")
    output.begin({"seed": 0})
    assert output.write(0, pictures(0), [])
    fs = fsspec.filesystem("gs")
    whole = fs.cat_file("bucket/truncated/000000.tar")
    fs.pipe_file("bucket/truncated/000000.tar", whole[: len(whole) // 20480 * 10240])
    with pytest.warns(UserWarning, match=r"000000\.tar is not a complete shard and is made again"):
        assert output.complete(1) == set()
    assert output.write(0, pictures(0), [])
    assert fs.cat_file("bucket/truncated/000000.tar") == whole


@pytest.mark.slow
def test_a_job_of_a_model_in_a_faulty_store(healthy, shapes_pipe, tmp_path):
    """Its shards are those of the same job on a disk."""
    rows = [{"prompt": PROMPTS[i % 5], "seed": i} for i in range(7)] + [{"prompt": ""}]
    rows[0] |= {"id": "i" * 95, "metadata": {"a": float("inf")}}
    assert run_job(job_of(tmp_path, rows), shapes_pipe).complete
    healthy.random_faults(1, 0.2)
    assert run_job(job_of(tmp_path, rows, "gs://bucket/model"), shapes_pipe).complete
    assert run_job(job_of(tmp_path, rows, "gs://bucket/model"), shapes_pipe).skipped == 3
    healthy.fault = lambda method, path: None
    found = objects("gs://bucket/model")
    assert found == contents(tmp_path / "out")
    assert json.loads(found["errors.jsonl"])["row"] == 7
    with tarfile.open(fileobj=io.BytesIO(found["000000.tar"])) as tar:
        assert json.loads(tar.extractfile("i" * 95 + ".json").read())["metadata"] == {"a": "Infinity"}
