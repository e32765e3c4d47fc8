"""What a job's folder says of the job: real jobs of the small model, and folders with times of our choosing."""

from __future__ import annotations

import datetime
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from kandinsky_jax.batch import failures
from kandinsky_jax.batch.failures import DAMAGED, MAX_REASONS, OTHER, read_failures, reason_of
from kandinsky_jax.batch.shards import FORMAT_VERSION, GeneratedImage, Output
from kandinsky_jax.batch.status import RECENT_SECONDS, STALL_SECONDS, Status, status
from kandinsky_jax.common import reading
from kandinsky_jax.common.files import LocalFiles, open_files, time_in_utc
from tests.batch.store import object_store
from tests.batch.test_jobs import contents, job_of, run_job

START = 1_750_000_000  # seconds since 1970
BEGUN = datetime.datetime.fromtimestamp(START, datetime.UTC)


def after(seconds: float) -> datetime.datetime:
    return BEGUN + datetime.timedelta(seconds=seconds)


def set_times(folder: Path, seconds: dict[int, float], begun: float = 0) -> None:
    """Let job.json and shards have been written so many seconds after the start."""
    times = {"job.json": begun} | {f"{shard:06d}.tar": after for shard, after in seconds.items()}
    for name, after in times.items():
        os.utime(folder / name, (START + after, START + after))


def identity(rows: int, per_shard: int, form: str = "webdataset", **others: object) -> dict[str, object]:
    facts = {"rows": {"sha256": "0" * 64, "count": rows}, "mode": "generate", "format": form, "pictures": "png"}
    return facts | {"rows_per_shard": per_shard, "defaults": {"num_images": 1}} | others


def folder_of(url: str, rows: int, per_shard: int, done: int, errors: dict[int, list[dict]] | None = None) -> Output:
    """A job's folder with its first shards complete, one picture in each."""
    output = Output(url, "webdataset", "png")
    output.begin(identity(rows, per_shard))
    for shard in range(done):
        output.write(shard, [GeneratedImage(f"p{shard}", b"data", {})], (errors or {}).get(shard, []))
    return output


def at(found: Status, *names: str) -> list[object]:
    return [getattr(found, name) for name in names]


# Real jobs --------------------------------------------------------------------------------------------------------


def test_a_complete_job(whole, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    set_times(folder, {0: 60, 1: 100, 2: 160})
    before = contents(folder)
    found = status(str(folder), now=after(10_000))
    assert at(found, "output", "mode", "format", "encoding", "format_version") == [
        *(str(folder), "generate", "webdataset", "png", FORMAT_VERSION)
    ]
    assert at(found, "rows", "rows_per_shard", "shards", "shards_complete", "rows_done") == [8, 3, 3, 3, 8]
    assert at(found, "damaged", "rows_failed", "failures") == [[], 0, []]
    assert at(found, "started", "last_shard", "finished", "checked") == [
        *(BEGUN, after(160), after(160), after(10_000))
    ]
    assert at(found, "complete", "stalled", "idle_seconds", "seconds_left") == [True, False, None, 0.0]
    assert at(found, "rows_per_second", "overall_rows_per_second", "recent_seconds") == [8 / 160, 8 / 160, 160]
    assert at(found, "pictures", "pictures_exact") == [8, False]  # one of its rows asks for three
    counted = status(str(folder), count=True)
    assert at(counted, "pictures", "pictures_exact", "overall_pictures_per_second") == [10, True, 10 / 160]
    assert contents(folder) == before


def test_a_job_in_a_folder_of_pictures_has_them_counted(rows, shapes_pipe, tmp_path):
    bad = [rows[0], rows[1], {"prompt": ""}, {"prompt": "yellow ring", "num_images": 0}]
    run_job(job_of(tmp_path, bad, form="folder"), shapes_pipe)
    found = status(str(tmp_path / "out"))
    assert at(found, "complete", "format", "pictures", "pictures_exact") == [True, "folder", 4, True]
    assert found.rows_failed == 2
    assert [(reason.rows, reason.example_row, reason.example_id) for reason in found.failures] == [
        *((1, 2, None), (1, 3, None))
    ]
    assert found.failures[0].example_error == "prompt: is empty"
    (tmp_path / "out" / "manifest" / "000001.parquet").unlink()
    found = status(str(tmp_path / "out"))
    assert at(found, "complete", "shards_complete", "rows_done", "pictures", "rows_failed") == [False, 1, 3, 4, 1]


def test_neither_a_model_nor_a_device_is_needed(whole):
    """JAX has no platform of that name; the first use of a device would fail. Nor is the model's reader needed."""
    program = """
import sys
from kandinsky_jax.batch.contact_sheet import contact_sheet
from kandinsky_jax.batch.status import status
assert status(sys.argv[1]).complete
assert contact_sheet(sys.argv[1], 0).pictures == 5
needless = {"torch", "diffusers", "orbax", "tensorstore", "grain", "ray", "tokenizers"} & set(sys.modules)
assert not needless, needless
"""
    environment = os.environ | {"JAX_PLATFORMS": "no_such_platform"}
    done = subprocess.run(
        [sys.executable, "-c", program, whole], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_job_in_an_object_store(whole):
    """Its times are those of the objects."""
    with object_store("bucket") as store:
        fs = fsspec.filesystem("gs")
        for name, data in sorted(contents(whole).items(), key=lambda item: item[0] != "job.json"):
            fs.pipe_file(f"bucket/out/{name}", data)
        began = datetime.datetime.now(datetime.UTC)
        store.random_faults(1, 0.2)
        found = status("gs://bucket/out", count=True)
        store.heal()
        assert at(found, "complete", "rows_done", "pictures", "damaged") == [True, 8, 10, []]
        assert abs(found.finished - began) < datetime.timedelta(minutes=1)
        assert found.started <= found.last_shard
        fs.pipe_file("bucket/out/000001.tar", b"cut")
        found = status("gs://bucket/out")
        assert at(found, "complete", "shards_complete", "damaged") == [False, 2, ["000001.tar"]]
        with pytest.raises(ValueError, match=r"gs://bucket/else holds no job\.json"):
            status("gs://bucket/else")


# Times ------------------------------------------------------------------------------------------------------------


def test_the_recent_rate_is_that_of_the_last_quarter_of_an_hour(tmp_path):
    """Slow shards first, quick ones now: the window begins where a shard was completed, and ends with the last."""
    folder_of(str(tmp_path), rows=403, per_shard=4, done=60)
    times = {i: 600 * (i + 1) for i in range(30)} | {30 + i: 18_000 + 40 * (i + 1) for i in range(30)}
    set_times(tmp_path, times)
    found = status(str(tmp_path), now=after(19_230))
    # Of the last 900 s are 23 shards; the one before ended 920 s before the last.
    assert found.recent_seconds == 920 > RECENT_SECONDS
    assert found.rows_per_second == pytest.approx(4 * 23 / 920)
    assert found.overall_rows_per_second == pytest.approx(240 / 19_200)
    assert at(found, "idle_seconds", "stalled") == [30, False]
    assert found.seconds_left == pytest.approx(163 / 0.1)
    assert at(found, "shards", "finished", "pictures") == [101, None, 240]


def test_shards_that_take_long_are_rated_over_five_of_them(tmp_path):
    folder_of(str(tmp_path), rows=100, per_shard=4, done=8)
    set_times(tmp_path, {i: 2000 * (i + 1) for i in range(8)})
    found = status(str(tmp_path), now=after(18_500))
    assert found.recent_seconds == 10_000
    assert found.rows_per_second == pytest.approx(20 / 10_000)


@pytest.mark.parametrize(
    ("wait", "idle", "stalled"),
    [(60, STALL_SECONDS - 1, False), (60, 720, True), (600, 720, False), (600, 1801, True)],
)
def test_a_job_without_a_shard_for_long_is_stalled(tmp_path, wait, idle, stalled):
    """Long as against its own shards."""
    folder_of(str(tmp_path), rows=100, per_shard=4, done=8)
    set_times(tmp_path, {i: wait * (i + 1) for i in range(8)})
    found = status(str(tmp_path), now=after(8 * wait + idle))
    assert at(found, "idle_seconds", "stalled") == [idle, stalled]
    assert (found.seconds_left is None) == stalled
    assert found.rows_per_second == pytest.approx(4 / wait)


def test_a_job_without_a_shard(tmp_path):
    folder_of(str(tmp_path), rows=100, per_shard=30, done=0)
    set_times(tmp_path, {})
    found = status(str(tmp_path), now=after(90))
    assert at(found, "shards", "shards_complete", "rows_done", "pictures", "pictures_exact") == [4, 0, 0, 0, True]
    assert at(found, "started", "idle_seconds", "last_shard", "stalled") == [BEGUN, 90, None, None]
    assert at(found, "rows_per_second", "overall_rows_per_second", "seconds_left") == [None, None, None]


def test_a_copy_of_a_folder_does_not_pretend_to_know_its_times(tmp_path):
    folder_of(str(tmp_path), rows=100, per_shard=4, done=3)
    set_times(tmp_path, {0: 0, 1: 40, 2: 80}, begun=100)
    found = status(str(tmp_path), now=after(90))
    assert found.started is None
    assert found.overall_rows_per_second == pytest.approx(8 / 80)  # from the first shard on
    set_times(tmp_path, {0: 0, 1: 0, 2: 0}, begun=100)
    found = status(str(tmp_path), now=after(-5))  # the clock of a store may be ahead
    assert at(found, "rows_per_second", "overall_rows_per_second", "seconds_left", "idle_seconds") == [
        *(None, None, None, 0)
    ]


class TimelessFileSystem(MemoryFileSystem):
    """A file system that does not say when files were written, but for one of them."""

    protocol = "timeless"

    def ls(self, path, detail=True, **options):
        found = super().ls(path, detail=True, **options)
        if not detail:
            return found
        kept = {"name", "size", "type"}
        return [
            part if part["name"].endswith("000000.tar") else {name: part[name] for name in part if name in kept}
            for part in found
        ]


def test_times_that_a_file_system_does_not_say_are_unknown():
    fsspec.register_implementation("timeless", TimelessFileSystem, clobber=True)
    folder_of("timeless://timeless/out", rows=9, per_shard=3, done=2)
    found = status("timeless://timeless/out")
    assert at(found, "shards_complete", "rows_done", "damaged") == [2, 6, []]
    unknown = "started last_shard finished idle_seconds stalled rows_per_second seconds_left".split()
    assert at(found, *unknown) == [None] * len(unknown)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (START, BEGUN),
        (float(START), BEGUN),
        (BEGUN, BEGUN),
        (BEGUN.replace(tzinfo=None), BEGUN),
        (BEGUN.astimezone(datetime.timezone(datetime.timedelta(hours=5))), BEGUN),
        ("2025-06-15T15:06:40Z", BEGUN),
        ("2025-06-15T17:06:40.000+02:00", BEGUN),
        *((value, None) for value in (None, 0, -1, "", "yesterday", 1e300, float("nan"), [], b"2025")),
    ],
)
def test_times_of_all_file_systems_are_read(value, expected):
    found = time_in_utc(value)
    assert found == expected
    assert found is None or found.tzinfo == datetime.UTC


# Rows that failed -------------------------------------------------------------------------------------------------


def test_failed_rows_are_grouped_by_reason(tmp_path):
    missing = [{"row": i, "id": f"r{i}", "error": f"image: there is no file a/b{i} c.png"} for i in range(7)]
    empty = [{"row": i, "id": None, "error": "prompt is missing or empty"} for i in (8, 9)]
    parts = [
        {"row": 10, "id": "x", "error": f"the model's picture {i} has numbers that are not finite"} for i in (0, 3)
    ]
    errors = {0: missing[:3], 1: [*missing[3:], *empty], 2: parts, 4: [{"row": 17, "id": None, "error": "not yet"}]}
    folder_of(str(tmp_path), rows=20, per_shard=4, done=5, errors=errors)
    (tmp_path / "000004.tar").unlink()  # its errors are those of a shard that is made again
    found = status(str(tmp_path))
    assert found.rows_failed == 10
    told = [(each.rows, each.example_row, each.example_id, each.example_error) for each in found.failures]
    assert told == [
        (7, 0, "r0", "image: there is no file a/b0 c.png"),
        (2, 8, None, "prompt is missing or empty"),
        (1, 10, "x", "the model's picture 0 has numbers that are not finite"),
    ]
    assert found.failures[1].reason == "prompt is missing or empty"
    assert found.pictures == 16 - 10


@pytest.mark.parametrize(
    "errors",
    [
        ["id 'a' is an earlier row's", "id 'b c' is an earlier row's"],
        ["height: must be a number, got 'tall'", 'height: must be a number, got "64\'"'],
        ["image: https://a/b.png?x=1 cannot be read: 404", "image: c.jpg cannot be read: 404"],
        ["'../x' leads out of the job's folder by a link", "'/etc' leads out of the job's folder by a link"],
        ["height=63 is too small", "height=1,000 is too small"],
    ],
)
def test_messages_of_one_kind_are_one_reason(errors):
    first, second = map(reason_of, errors)
    assert first == second
    assert reason_of("width: must be a number, got 'tall'") != first


@pytest.mark.parametrize("error", ["-." * 300, "'\"" * 300, "a/" * 300 + ";", "." * 600, "é-" * 300])
def test_messages_made_to_take_long_do_not(error):
    began = time.process_time()
    reason_of(error)
    assert time.process_time() - began < 0.1


def test_large_files_are_not_read_whole(tmp_path, monkeypatch):
    """A job.json is refused by its size; errors are read line by line."""
    errors = {0: [{"row": i, "id": None, "error": "no"} for i in range(1000)]}
    folder_of(str(tmp_path), rows=2000, per_shard=1000, done=1, errors=errors)
    monkeypatch.setattr(failures, "MAX_LINE", 8192)
    with (tmp_path / "errors" / "000000.jsonl").open("ab") as file:
        file.write(b'{"row": 1, "error": "' + b"x" * 100_000)
    found = status(str(tmp_path))
    assert found.failures[0].rows == 1000
    assert found.failures[1].reason == DAMAGED
    (tmp_path / "job.json").write_bytes(b" " * (reading.MAX_FILE_BYTES + 1))
    with pytest.raises(ValueError, match=r"job\.json is larger than 67,108,864 bytes"):
        status(str(tmp_path))


def test_many_reasons_are_told_apart_up_to_a_number(tmp_path):
    letters = "abcdefghij"
    words = ["".join(letters[int(digit)] for digit in str(i)) for i in range(MAX_REASONS + 50)]
    errors = {0: [{"row": i, "id": None, "error": f"no {word}"} for i, word in enumerate(words)]}
    folder_of(str(tmp_path), rows=10_000, per_shard=5000, done=1, errors=errors)
    found = status(str(tmp_path))
    assert found.rows_failed == len(words)
    assert (found.failures[0].reason, found.failures[0].rows) == (OTHER, 50)
    assert len(found.failures) == MAX_REASONS + 1


PIECES = (
    *(b'{"row": 1, "id": "a", "error": "no"}', b"\n", b"\n\n", b"{", b"}", b"\xff\xfe", b"\0", b"null", b"[]", b"\r"),
    *(b'{"row": true, "error": "x"}', b'{"row": 1.5, "error": "x"}', b'{"row": ' + b"9" * 5000 + b"}", b"[" * 10_000),
    *(b'{"row": 2, "error": 3}', b'{"row": 3, "id": [1], "error": "y"}', b'{"row": 4, "id": "\\ud800", "error": "z"}'),
    *(b'{"row": 5, "id": {"a": "' + b"x" * 5000 + b'"}, "error": "' + b"e" * 5000 + b'"}', b'{"error": "lone"}'),
    *('{"row": 6, "error": "\u2028é"}'.encode(), b'{"row": 1e400, "error": "x"}', b'{"row": -1, "error": ""}'),
)


@pytest.mark.parametrize("seed", range(40))
def test_any_content_of_error_files_is_reported(tmp_path, seed):
    """Damaged lines are counted as rows, and end nothing; what is reported has bounded length and is JSON."""
    rng = random.Random(seed)
    folder_of(str(tmp_path), rows=9, per_shard=3, done=3)
    (tmp_path / "errors").mkdir()
    data = b"".join(rng.choice(PIECES) + rng.choice((b"\n", b"\n", b"")) for _ in range(rng.randrange(30)))
    (tmp_path / "errors" / "000001.jsonl").write_bytes(data)
    found = status(str(tmp_path))
    assert found.rows_failed <= len(data.splitlines())
    assert bool(found.rows_failed) == bool(data)
    assert found.pictures >= 0
    text = json.dumps(found.as_json(), allow_nan=False)
    text.encode()
    assert all(len(each.example_error) <= 600 for each in found.failures)
    assert all(len(str(each.example_id)) <= 200 for each in found.failures)
    assert sum(reason.rows for reason in found.failures) >= found.rows_failed


def test_a_damaged_line_hides_no_other(tmp_path):
    (tmp_path / "errors").mkdir()
    (tmp_path / "errors" / "000000.jsonl").write_bytes(b'{"row": 1, "error": "a"}\n{"ro\n{\n{"row": 2, "error": "a"}\n')
    found = read_failures(LocalFiles(tmp_path), [0, 1])
    assert [(each.rows, each.reason, each.example_row) for each in found.reasons] == [(2, "a", 1), (2, DAMAGED, None)]
    assert found.rows == 4


# Folders of other kinds -------------------------------------------------------------------------------------------


def test_a_damaged_shard_is_named(tmp_path):
    folder_of(str(tmp_path), rows=12, per_shard=3, done=4)
    whole = (tmp_path / "000002.tar").read_bytes()
    (tmp_path / "000002.tar").write_bytes(whole[:1024])
    (tmp_path / "000000.tar").write_bytes(b"")
    (tmp_path / "000009.tar").write_bytes(b"no shard of this job")
    found = status(str(tmp_path))
    assert at(found, "damaged", "shards_complete", "rows_done") == [["000000.tar", "000002.tar"], 2, 6]
    assert (tmp_path / "000002.tar").stat().st_size == 1024


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    about = tarfile.TarInfo(name)
    about.size, about.type = size, kind
    return about.tobuf(tarfile.GNU_FORMAT)


HOSTILE_TARS = {
    "longer than the file": header("a.png", 2**50),
    "longer than any file": header("a.png", 2**70),
    "of negative size": header("a.png", -5120),
    "headers of headers": b"".join(header("././@LongLink", 0, tarfile.GNUTYPE_LONGNAME) for _ in range(5000)),
    "no numbers": header("x", 29, tarfile.XHDTYPE)
    + b"29 GNU.sparse.map=a,b,c,d,e,\n".ljust(512, b"\0")
    + header("a", 0),
}


@pytest.mark.parametrize("data", HOSTILE_TARS.values(), ids=HOSTILE_TARS)
def test_a_hostile_tar_file_is_one_sentence(tmp_path, data):
    folder_of(str(tmp_path), rows=3, per_shard=3, done=1)
    (tmp_path / "000000.tar").write_bytes(data.ljust(-(-len(data) // 10240) * 10240 + 10240, b"\0"))
    with pytest.raises(ValueError, match=r"000000\.tar cannot be read: "):
        status(str(tmp_path), count=True)


@pytest.mark.parametrize("version", range(FORMAT_VERSION + 1))
def test_jobs_of_older_releases_are_reported(whole, tmp_path, version):
    shutil.copytree(whole, tmp_path / "out")
    known = json.loads((tmp_path / "out" / "job.json").read_text())
    known["format_version"] = version
    if version < 2:
        known["model"] = "0" * 64
    if version < 1:
        del known["format_version"]
    (tmp_path / "out" / "job.json").write_text(json.dumps(known))
    found = status(str(tmp_path / "out"))
    assert at(found, "format_version", "complete", "rows_done") == [version, True, 8]


def test_a_folder_that_is_no_jobs_is_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"mine")
    for name in ("empty", "photos", "missing", "é" * 120):
        with pytest.raises(ValueError, match=r"holds no job\.json; needed is the folder that") as caught:
            status(str(tmp_path / name))
        assert len(str(caught.value)) < 500
    with pytest.raises(NotADirectoryError, match="is a file; needed is a folder"):
        status(str(tmp_path / "photos" / "a.png"))
    with pytest.raises(ValueError, match="no-such://x cannot be opened: Protocol not known"):
        status("no-such://x")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format_version": 3}, "has format version 3, this release knows 0 to 2"),
        ({"rows": None}, r"is no batch job's: rows\.count is None"),
        ({"rows": {"count": True}}, r"is no batch job's: rows\.count is True"),
        ({"rows": {"count": 0}}, r"is no batch job's: rows\.count is 0"),
        ({"rows_per_shard": -1}, r"rows_per_shard is -1, needed is a whole number above 0"),
        ({"rows_per_shard": "x" * 1000}, r"rows_per_shard is 'xxx"),
        ({"defaults": {"num_images": 1.5}}, r"defaults\.num_images is 1\.5"),
        ({"format": "zip"}, "is no batch job's: format is 'zip'"),
        ({"format": ["folder"]}, "is no batch job's: format is"),
        ({"pictures": 3}, "pictures 3, needed is"),
    ],
)
def test_a_job_file_of_another_kind_is_one_sentence(tmp_path, change, says):
    (tmp_path / "job.json").write_text(json.dumps(identity(9, 3) | change))
    with pytest.raises(ValueError, match=says) as caught:
        status(str(tmp_path))
    assert len(str(caught.value)) < 500
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_a_damaged_job_file_is_one_sentence(tmp_path, data):
    (tmp_path / "job.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"job\.json .*; it is damaged") as caught:
        status(str(tmp_path))
    assert len(str(caught.value).splitlines()) == 1


def test_a_job_of_any_size_is_looked_at_by_its_files(tmp_path):
    (tmp_path / "job.json").write_text(json.dumps(identity(10**18, 1)))
    found = status(str(tmp_path))
    assert at(found, "shards", "shards_complete") == [10**18, 0]


def test_files_are_opened_piece_by_piece(tmp_path):
    data = random.Random(0).randbytes(20 << 20)
    url = f"memory://{tmp_path.name}/pieces"
    fsspec.filesystem("memory").pipe_file(f"/{tmp_path.name}/pieces/a", data)
    (tmp_path / "a").write_bytes(data)
    for files in (open_files(url), open_files(str(tmp_path))):
        with files.open("a") as file:
            assert file.read(1000) + file.read(9 << 20) + file.read() == data
            assert file.read(5) == b""
        with pytest.raises(FileNotFoundError):
            files.open("b")
