"""A job's folder, without a model: complete shards, foreign files, and rows that cannot be written."""

from __future__ import annotations

import io
import json
import math
import os
import tarfile
import warnings
from pathlib import Path

import fsspec
import pyarrow.parquet
import pytest

from kandinsky_jax.batch import JobError
from kandinsky_jax.batch.shards import FORMAT_VERSION, GeneratedImage, Output, json_line

IDENTITY = {"rows": {"count": 9}, "seed": 0}


def pictures(shard: int, count: int = 3) -> list[GeneratedImage]:
    return [
        GeneratedImage(f"p{shard}-{i}", bytes([65 + i]) * 5000, {"id": f"p{shard}-{i}", "seed": i})
        for i in range(count)
    ]


def strict(text: bytes | str):
    """Parse standard JSON, which has no Infinity."""

    def refuse(name: str):
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(params=["disk", "memory"])
def place(request, tmp_path):
    """The URL of an empty folder, and a function that writes a file below it."""
    url = str(tmp_path / "out") if request.param == "disk" else f"memory://{tmp_path.name}/out"

    def put(name: str, data: bytes) -> None:
        with fsspec.open(f"{url}/{name}", "wb", auto_mkdir=True) as file:
            file.write(data)

    return url, put


def content(url: str, name: str) -> bytes:
    with fsspec.open(f"{url}/{name}", "rb") as file:
        return file.read()


@pytest.mark.parametrize("form", ["webdataset", "folder"])
def test_only_expected_shards_that_are_whole_count(place, form):
    """Foreign names, empty files, and shards cut at any place, a block's border too, are none."""
    url, put = place
    name = "{:06d}.tar" if form == "webdataset" else "manifest/{:06d}.parquet"
    output = Output(url, form, "png")
    output.begin(IDENTITY)
    for shard in range(3):
        assert output.write(shard, pictures(shard), [])
    assert output.complete(3) == {0, 1, 2}
    for foreign in ("999999", "3", "00000", "0000001", "\u0660" * 6, "copy of 000000"):
        put(name.format(0).replace("000000", foreign), content(url, name.format(0)))
    assert output.complete(3) == {0, 1, 2}
    assert output.complete(4) == {0, 1, 2}
    whole = content(url, name.format(1))
    lengths = {0, 1, 512, 1024, 1536, 5120, 10240, len(whole) // 2, len(whole) - 512, len(whole) - 1}
    for length in sorted(length for length in lengths if length < len(whole)):
        put(name.format(1), whole[:length])
        with pytest.warns(UserWarning, match=r"00001\.\w+ is not a complete shard and is made again"):
            assert output.complete(3) == {0, 2}, length
        assert output.write(1, pictures(1), [])
        assert content(url, name.format(1)) == whole
    put(name.format(1), b"\0" * 10240)  # as a file system may leave a file after a power failure
    with pytest.warns(UserWarning, match="not a complete shard"):
        assert output.complete(3) == {0, 2}


@pytest.mark.parametrize("form", ["webdataset", "folder"])
def test_what_is_complete_is_not_written_again(place, form):
    url, _ = place
    output = Output(url, form, "png")
    assert output.write(0, pictures(0), [])
    before = content(url, "000000.tar" if form == "webdataset" else "manifest/000000.parquet")
    assert not Output(url, form, "png").write(0, pictures(0, 2), [])
    assert content(url, "000000.tar" if form == "webdataset" else "manifest/000000.parquet") == before


def test_a_shard_of_bad_rows_alone_is_complete(place):
    url, _ = place
    output = Output(url, "webdataset", "png")
    output.write(0, [], [{"row": 0, "id": None, "error": "prompt is missing"}])
    assert output.complete(1) == {0}
    output.finish(1)
    assert content(url, "errors.jsonl") == b'{"row": 0, "id": null, "error": "prompt is missing"}\n'


def test_errors_are_those_of_the_jobs_shards_in_their_order(place):
    """Not what an earlier run found wrong, nor what lies in the folder besides."""
    url, put = place
    put("errors/000001.jsonl", b'{"row": 1, "error": "the disk was away"}\n')
    for name in (".000000.jsonl.0123456789abcdef.partial", "000002.jsonl", "notes.txt"):
        put(f"errors/{name}", b"{")
    put("errors.jsonl", b"of an earlier run\n")
    output = Output(url, "webdataset", "png")
    output.sweep()
    output.write(1, pictures(1), [])
    output.write(0, pictures(0), [{"row": 0, "id": "a", "error": "x"}])
    output.finish(2)
    assert content(url, "errors.jsonl") == b'{"row": 0, "id": "a", "error": "x"}\n'
    with pytest.raises(FileNotFoundError):
        content(url, "errors/000001.jsonl")


@pytest.mark.parametrize("form", ["webdataset", "folder"])
def test_rows_that_failed_are_tried_again_without_their_shards_file(place, form):
    """Whether they fail again or not; other shards stay."""
    url, _ = place
    error = {"row": 3, "id": None, "error": "image: there is no file a.png"}
    output = Output(url, form, "png")
    output.write(0, pictures(0), [])
    output.write(1, pictures(1, 1), [error, error | {"row": 4}])
    failed = output.finish(2)
    assert failed == (2, ["000001.tar" if form == "webdataset" else "manifest/000001.parquet"])
    for left in ([error], []):
        fs, root = fsspec.core.url_to_fs(url)
        fs.rm_file(f"{root}/{failed.shards[0]}")
        output = Output(url, form, "png")
        assert output.complete(2) == {0}
        output.sweep()
        assert output.write(1, pictures(1, 3 - len(left)), left)
        assert output.complete(2) == {0, 1}
        assert output.finish(2).rows == len(left)
    with pytest.raises(FileNotFoundError):
        content(url, "errors.jsonl")


def test_what_killed_runs_left_of_a_shard_that_is_complete_is_swept(tmp_path):
    """The twin of a killed process has made the shard, so none of its parts is written again."""
    output = Output(str(tmp_path), "folder", "png")
    output.write(0, pictures(0), errors=[{"row": 0, "id": None, "error": "x"}])
    before = sorted(tmp_path.rglob("*"))
    for folder in ("", "errors", "images", "images/000000", "manifest"):
        (tmp_path / folder / ".name.0123456789abcdef.partial").touch()
    (tmp_path / "images" / ".000001.partial").mkdir()  # as an older release named it
    output.sweep()
    assert sorted(tmp_path.rglob("*")) == before


def test_two_processes_may_begin_at_once(place, monkeypatch):
    """Whatever the twin does between two of our requests, both find one job."""
    url, put = place
    ours, twin = Output(url, "webdataset", "png"), Output(url, "webdataset", "png")
    listing = type(ours._files).sizes

    def and_then_the_twin(files, folder):
        found = listing(files, folder)
        monkeypatch.undo()
        twin.begin(IDENTITY)
        twin.write(0, pictures(0), [])
        return found

    monkeypatch.setattr(type(ours._files), "sizes", and_then_the_twin)
    ours.begin(IDENTITY)
    ours.begin(IDENTITY)
    with pytest.raises(JobError, match="another job"):
        ours.begin(IDENTITY | {"seed": 1})
    put("else/photo.jpg", b"mine")
    with pytest.raises(JobError, match=r"neither empty nor a job's folder; it has photo\.jpg"):
        Output(f"{url}/else", "webdataset", "png").begin(IDENTITY)


def test_the_format_of_a_job_has_a_version(place):
    url, put = place
    output = Output(url, "webdataset", "png")
    put("job.json", json.dumps(IDENTITY).encode())  # as releases before the number wrote it
    output.begin(IDENTITY)
    put("job.json", json.dumps({"format_version": FORMAT_VERSION} | IDENTITY).encode())
    output.begin(IDENTITY)
    for version in (FORMAT_VERSION + 1, 10**100, -1, "1", 1.5, None, True, [1]):
        put("job.json", json.dumps({"format_version": version} | IDENTITY).encode())
        with pytest.raises(JobError, match=r"job\.json has format version .*, this release knows 0 to 2") as caught:
            output.begin(IDENTITY)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}"),
        b'{"a": "\\ud800"}',
        json.dumps({f"key{i}" * 50: "x" * 1000 for i in range(50)}).encode(),
    ],
    ids=range(10),
)
def test_a_damaged_or_foreign_job_is_named_in_one_short_message(place, data):
    url, put = place
    put("job.json", data)
    with pytest.raises(JobError, match=r"job\.json .*damaged|holds another job") as caught:
        Output(url, "webdataset", "png").begin(IDENTITY)
    assert len(str(caught.value)) < 500
    assert content(url, "job.json") == data


@pytest.mark.parametrize("length", [1, 90, 94, 95, 96, 97, 99, 100, 101, 200, 230])
def test_identifiers_of_any_length_fit_into_a_tar(tmp_path, length):
    """Up to 94 characters the bytes are those of the releases that wrote USTAR."""
    key = "i" * length
    output = Output(str(tmp_path), "webdataset", "png")
    output.write(0, [GeneratedImage(key, b"data", {"id": key})], [])
    with tarfile.open(tmp_path / "000000.tar") as tar:
        assert tar.getnames() == [f"{key}.png", f"{key}.json"]
    if length <= 94:
        old = io.BytesIO()
        with tarfile.open(fileobj=old, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for name, data in ((f"{key}.png", b"data"), (f"{key}.json", json.dumps({"id": key}).encode() + b"\n")):
                member = tarfile.TarInfo(name)
                member.size, member.mode = len(data), 0o644
                tar.addfile(member, io.BytesIO(data))
        assert old.getvalue() == (tmp_path / "000000.tar").read_bytes()


METADATA = [
    math.inf,
    -math.inf,
    math.nan,
    {"a": [1, {"b": math.nan}]},
    "\udcff",
    {"\udcff": 1},
    b"\x00\xff",
    object(),
    (),
]


@pytest.mark.parametrize("metadata", METADATA, ids=range(9))
@pytest.mark.parametrize("form", ["webdataset", "folder"])
def test_any_metadata_becomes_json_that_every_reader_takes(tmp_path, metadata, form):
    found = []
    for run in ("a", "b"):
        output = Output(str(tmp_path / run), form, "png")
        output.write(0, [GeneratedImage("k", b"data", {"id": "k", "prompt": "\udcff", "metadata": metadata})], [])
        if form == "folder":
            [row] = pyarrow.parquet.read_table(tmp_path / run / "manifest").to_pylist()
            found.append(row["metadata"])
        else:
            with tarfile.open(tmp_path / run / "000000.tar") as tar:
                found.append(json.dumps(strict(tar.extractfile("k.json").read())["metadata"]))
    assert found[0] == found[1]
    assert "0x" not in found[0]
    if metadata is METADATA[3]:
        assert strict(found[0]) == {"a": [1, {"b": "NaN"}]}


def test_what_cannot_be_json_is_a_fault_of_its_row():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, {(1, 2): 3}, 10**5000):
        with pytest.raises(ValueError, match="cannot be written as JSON") as caught:
            json_line({"metadata": value})
        assert len(str(caught.value)) < 200


def test_errors_are_the_same_in_every_run_for_any_row(tmp_path):
    ids = [None, 3, "a", "x" * 10**6, math.nan, [math.inf] * 1000, {"a": object()}, "\udcff", object(), 10**5000]
    found = []
    for run in ("a", "b"):
        errors = [{"row": i, "id": name, "error": f"cannot read {object()!r}"} for i, name in enumerate(ids)]
        Output(str(tmp_path / run), "webdataset", "png").write(0, [], errors)
        found.append(Path(tmp_path / run / "errors" / "000000.jsonl").read_bytes())
    assert found[0] == found[1]
    lines = [strict(line) for line in found[0].splitlines()]
    assert [line["id"] for line in lines[:3]] == [None, 3, "a"]
    assert all(line["error"] == "cannot read <object object>" for line in lines)
    assert len(found[0]) < 5000


def test_no_warning_for_a_healthy_folder(place):
    url, _ = place
    output = Output(url, "webdataset", "png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert output.complete(5) == set()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["000001.tar", "manifest/000001.parquet"])
def test_a_pipe_of_a_shards_name_is_no_shard(tmp_path, name):
    output = Output(str(tmp_path), "webdataset" if name.endswith(".tar") else "folder", "png")
    output.begin(IDENTITY)
    assert output.write(0, pictures(0), [])
    os.mkfifo(tmp_path / name)
    assert output.complete(2) == {0}
    assert output.write(1, pictures(1), [])
    assert output.complete(2) == {0, 1}
