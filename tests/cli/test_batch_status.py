"""`kandinsky-jax batch status`, and `batch JOB` beside it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from kandinsky_jax import images
from kandinsky_jax.batch.contact_sheet import contact_sheet
from kandinsky_jax.batch.shards import GeneratedImage, Output
from kandinsky_jax.batch.status import status
from kandinsky_jax.cli import app
from kandinsky_jax.cli.batch_status import length, lines
from kandinsky_jax.cli.main import main
from tests.batch.test_status import START, folder_of, set_times


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["batch", *arguments])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A job of three shards with pictures."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    output = folder_of(str(folder), rows=9, per_shard=3, done=0)
    for shard in range(3):
        data = images.encode(Image.new("RGB", (64, 64), (80 * shard, 0, 0)), "png")
        output.write(shard, [GeneratedImage(f"p{shard}-{i}", data, {"prompt": "red"}) for i in range(5)], [])
    return folder


def begun_ago(folder: Path, shards: dict[int, float], ago: float) -> None:
    """Let shards have been completed so many seconds after the start, which is `ago` seconds ago."""
    begun = time.time() - ago - START
    set_times(folder, {shard: begun + seconds for shard, seconds in shards.items()}, begun)


@pytest.mark.parametrize("name", ["mode", "pictures"])
def test_a_job_file_cannot_write_to_the_terminal(tmp_path, name):
    folder_of(str(tmp_path), rows=9, per_shard=3, done=0)
    about = json.loads((tmp_path / "job.json").read_text()) | {name: "\x1b]0;title\x07\nfake: line"}
    (tmp_path / "job.json").write_text(json.dumps(about))
    done = invoke("status", str(tmp_path))
    assert done.exit_code == 0, done.exception
    assert "fake: line" in done.output.splitlines()[0]
    assert all(line.isprintable() for line in done.output.splitlines())


def test_a_running_job_in_words(tmp_path):
    errors = {
        0: [{"row": i, "id": f"r{i}", "error": f"image: there is no file {i}.png"} for i in range(2)],
        1: [{"row": 4, "id": None, "error": "prompt is missing or empty"}],
    }
    folder_of(str(tmp_path), rows=1000, per_shard=4, done=8, errors=errors)
    (tmp_path / "000007.tar").write_bytes(b"cut")
    begun_ago(tmp_path, {i: 100 * (i + 1) for i in range(7)}, ago=720)
    done = invoke("status", str(tmp_path))
    assert done.exit_code == 0, done.exception
    name, *told = done.output.splitlines()
    assert name == f"{tmp_path}: generate, 1,000 rows in 250 shards of 4, webdataset of png"
    assert told[:7] == [
        "done: 7 of 250 shards (2.8 %), 28 of 1,000 rows",
        "pictures: 25, if no row asks for another number than the job's default",
        "failed: 3 rows",
        "          2  such as image: there is no file 0.png (row 0, id 'r0')",
        "          1  prompt is missing or empty (row 4, id None)",
        "damaged: 000007.tar; made again when the job goes on",
        time.strftime("started: %Y-%m-%d %H:%M UTC", time.gmtime((tmp_path / "job.json").stat().st_mtime)),
    ]
    assert told[7] == "rate: 0.0357 pictures/s in the last 11 min 40 s of work, 0.0357 overall"
    assert told[8] in [f"last shard: {seconds} s ago" for seconds in range(20, 60)]
    assert told[9:] == ["left: about 6 h 45 min"]


def test_a_stalled_job_and_one_without_a_shard_in_words(tmp_path):
    folder_of(str(tmp_path), rows=100, per_shard=4, done=3)
    begun_ago(tmp_path, {0: 10, 1: 20, 2: 30}, ago=30 + 720)
    assert invoke("status", str(tmp_path)).output.splitlines()[-1].startswith("stalled: nothing was written for 12 min")
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    *told, last = invoke("status", str(tmp_path)).output.splitlines()
    assert told[1:] == [
        "done: 0 of 25 shards (0.0 %), 0 of 100 rows",
        "pictures: 0",
        time.strftime("started: %Y-%m-%d %H:%M UTC", time.gmtime((tmp_path / "job.json").stat().st_mtime)),
    ]
    assert last.startswith("no shard is complete yet, 12 min 3")
    assert last.endswith(" after the start; rate and time left are unknown")


def test_a_complete_job_says_so(tmp_path):
    folder_of(str(tmp_path), rows=9, per_shard=4, done=3)
    set_times(tmp_path, {0: 3600, 1: 7200, 2: 90_000})
    told = invoke("status", str(tmp_path), "--count").output.splitlines()
    fast = dataclasses.replace(status(str(tmp_path)), pictures_per_second=1234.5, overall_pictures_per_second=9.876)
    assert "rate: 1,234 pictures/s in the last 1 d 1 h of work, 9.88 overall" in lines(fast)
    assert told[1:4] == ["complete: all 3 shards, 9 rows", "pictures: 3", "failed: no rows"]
    assert told[-1].startswith("finished: 2025-06-16 16:06 UTC, 1 d 1 h later")


def test_nearly_complete_is_not_all(tmp_path):
    folder_of(str(tmp_path), rows=9, per_shard=4, done=2)
    nearly = dataclasses.replace(status(str(tmp_path)), shards=100_000, shards_complete=99_999)
    assert lines(nearly)[1].startswith("done: 99,999 of 100,000 shards (99.9 %)")


def test_json_has_the_fields_of_the_status(tmp_path):
    folder_of(str(tmp_path), rows=9, per_shard=4, done=3, errors={0: [{"row": 1, "id": 2, "error": "x"}]})
    told = json.loads(invoke("status", str(tmp_path), "--json").output)
    found = status(str(tmp_path)).as_json()
    assert told.pop("checked")
    del found["checked"]
    assert told == json.loads(json.dumps(found))
    assert told["complete"] is True
    assert told["failures"] == [{"reason": "x", "rows": 1, "example_row": 1, "example_id": 2, "example_error": "x"}]


def test_long_lists_are_cut(tmp_path):
    errors = {0: [{"row": i, "id": None, "error": "a" + "bcdefghijklmnopq"[i] * 300} for i in range(16)]}
    folder_of(str(tmp_path), rows=400, per_shard=20, done=20, errors=errors)
    for shard in range(20):
        (tmp_path / f"{shard:06d}.tar").write_bytes(b"")
    Output(str(tmp_path), "webdataset", "png").write(0, [GeneratedImage("p", b"data", {})], errors[0])
    told = invoke("status", str(tmp_path)).output.splitlines()
    assert "          6  for 6 other reasons, see --json" in told
    assert max(map(len, told)) < 300
    assert next(line for line in told if line.startswith("damaged: ")).count("tar") < 19
    assert len(json.loads(invoke("status", str(tmp_path), "--json").output)["failures"]) == 16


def test_it_is_repeated_until_the_job_is_complete(tmp_path):
    output = folder_of(str(tmp_path), rows=9, per_shard=4, done=2)

    def finish() -> None:
        time.sleep(0.3)
        output.write(2, [GeneratedImage("p2", b"data", {})], [])

    writer = threading.Thread(target=finish)
    writer.start()
    done = invoke("status", str(tmp_path), "--watch", "0.05", "--json")
    writer.join()
    told = [json.loads(line) for line in done.output.splitlines()]
    assert len(told) >= 3
    assert [each["complete"] for each in told] == [False] * (len(told) - 1) + [True]
    assert invoke("status", str(tmp_path), "--watch", "60").output.count("complete: all 3 shards") == 1


# Contact sheets ---------------------------------------------------------------------------------------------------


def test_a_contact_sheet_is_written(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = invoke("status", str(whole), "--sheet", "0")
    assert done.output == "sheet.png: 5 pictures of shard 0\n"
    assert os.listdir(tmp_path) == ["sheet.png"]
    with Image.open("sheet.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.copy() == contact_sheet(str(whole), 0).image
    shutil.copytree(whole, "out")
    os.utime("out/000001.tar", (START, START))
    os.utime("out/000002.tar", (START, START))
    assert invoke("status", "out", "--sheet", "last", "--sheet-file", "a.png").output.endswith(" of shard 0\n")
    assert sorted(os.listdir(tmp_path)) == ["a.png", "out", "sheet.png"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["missing"], "missing holds no job.json; needed is the folder that `kandinsky-jax batch` fills"),
        (["out", "--watch", "0"], "--watch must be a number of seconds from 0.01 to 86400, got 0.0"),
        (["out", "--watch", "nan"], "--watch must be a number of seconds from 0.01 to 86400, got nan"),
        (["out", "--watch", "1e300"], "--watch must be a number of seconds from 0.01 to 86400, got 1e+300"),
        (["out", "--sheet", "first"], "--sheet is 'first'; needed is the number of a shard, or last"),
        (["out", "--sheet", "9"], "there is no shard 9 in out: the job has 0 to 2"),
        (["out", "--sheet", "0", "--json"], "leave out --json and --watch"),
        (["out", "--sheet", "0", "--sheet-file", "sheet.gif"], "sheet.gif should end in one of .png"),
        (["out", "--sheet", "0", "--sheet-file", "no/sheet.png"], "no does not exist"),
        (["missing", "--sheet", "0"], "missing holds no job.json"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    folder_of("out", rows=9, per_shard=3, done=1)
    monkeypatch.setattr(sys, "argv", ["kandinsky-jax", "batch", "status", *arguments])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # main() changes both for its process
    monkeypatch.setenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert says in said
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    assert os.listdir(tmp_path) == ["out"]


# The command beside it --------------------------------------------------------------------------------------------


def test_batch_takes_a_job_as_before(tmp_path):
    """Options may stand on either side of it, `batch` alone or with two jobs is refused, and its help names both."""
    rows = tmp_path / "rows.txt"
    for arguments in (
        [str(rows), "-o", "out", "-q"],
        ["-o", "out", "-q", str(rows)],
        ["--seed", "-1", str(rows), "-oa"],
    ):
        done = invoke(*arguments)
        assert "this job cannot be run" in str(done.exception)
        assert str(rows) in str(done.exception)
    assert invoke("-o", "out").exit_code == 2
    assert "Missing argument 'JOB'" in invoke("-o", "out").output
    done = invoke("a.txt", "b.txt", "-o", "out")
    assert done.exit_code == 2
    assert "unexpected extra argument" in done.output
    shown = " ".join(invoke("--help").output.split())
    for part in ("[OPTIONS] {JOB}", "--rows-per-shard", "--output", "what to generate", "Commands", "status"):
        assert part in shown


def test_the_help_has_an_example(whole, tmp_path, monkeypatch):
    shown = " ".join(invoke("status", "--help").output.split())
    assert "batch status [OPTIONS] {OUTPUT}" in shown
    assert "--rows-per-shard" not in shown
    _, _, example = shown.partition("Example: kandinsky-jax batch ")
    monkeypatch.chdir(tmp_path)
    done = invoke(*(str(whole) if word.startswith("gs://") else word for word in example.split()))
    assert done.exit_code == 0, done.exception
    assert os.listdir(tmp_path) == ["sheet.png"]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (61, "1 min 1 s"),
        (3600, "1 h"),
        (8000, "2 h 13 min"),
        (1e6, "11 d 13 h"),
    ],
)
def test_lengths_of_time_have_two_units(seconds, shown):
    assert length(seconds) == shown
