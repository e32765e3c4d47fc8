"""Files of rows: read from any position in any format, with all faults reported at once. No model is needed."""

from __future__ import annotations

import csv
import json
import signal
import threading

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from kandinsky_jax.batch.job import Job, open_job
from kandinsky_jax.batch.requests import below
from kandinsky_jax.batch.rows import STRIDE, JobError, scan
from kandinsky_jax.preemption import Stop

COUNT = 2 * STRIDE + 7
ROWS = [{"id": f"r{i}", "prompt": f"a “{i}”,\nround" if i % 5 == 0 else f"prompt {i}", "seed": i} for i in range(COUNT)]


def write(path, rows) -> str:
    """Rows in the format that the ending of a path names."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" + "\n" * (i % 3 == 0) for i, row in enumerate(rows)))
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)
    else:
        path.write_text("\n".join(row["prompt"].replace("\n", " ") for row in rows) + "\n\n")
    return str(path)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet", "txt"])
def test_any_part_of_a_file(tmp_path, ending):
    found = scan(write(tmp_path / f"rows.{ending}", ROWS))
    assert found.count == COUNT
    assert not found.taken
    for first, count in ((0, 3), (1, 1), (STRIDE - 1, 3), (2 * STRIDE, 7), (COUNT - 2, 99), (99, 3), (100, 201)):
        rows = list(found.read(first, count))
        assert [row.number for row in rows] == list(range(COUNT))[first : first + count]
        for row in rows:
            assert row.fault is None
            wanted = ROWS[row.number]
            if ending == "txt":
                assert row.values == {"prompt": wanted["prompt"].replace("\n", " ")}
            else:
                assert {k: str(v) for k, v in row.values.items()} == {k: str(v) for k, v in wanted.items()}


def test_a_url():
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/jobs/rows.txt", b"one\ntwo\n")
    found = scan("memory://jobs/rows.txt")
    assert [row.values["prompt"] for row in found.read(0, 9)] == ["one", "two"]


def test_the_hash_is_of_the_bytes(tmp_path):
    import hashlib

    for ending in ("jsonl", "csv", "parquet", "txt"):
        path = write(tmp_path / f"rows.{ending}", ROWS)
        assert scan(path).sha256 == hashlib.sha256((tmp_path / f"rows.{ending}").read_bytes()).hexdigest()


def test_a_byte_order_mark_is_none_of_the_prompt(tmp_path):
    for ending, text in (("txt", "a cat\n"), ("csv", "prompt\na cat\n"), ("jsonl", '{"prompt": "a cat"}\n')):
        (tmp_path / f"a.{ending}").write_bytes(b"\xef\xbb\xbf" + text.encode())
        [row] = scan(str(tmp_path / f"a.{ending}")).read(0, 1)
        assert row == (0, {"prompt": "a cat"}, None)


def test_rows_that_are_broken_are_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "ok"}\nno json\n[1]\n{"prompt": "\xff"}\n')
    rows = list(scan(str(tmp_path / "a.jsonl")).read(0, 9))
    assert [row.fault and row.fault[:11] for row in rows] == [None, "is not JSON", "is a JSON l", None]
    (tmp_path / "a.csv").write_text("id,prompt\n1,ok\n2\n\n3,a,b\n4,fine\n")
    rows = list(scan(str(tmp_path / "a.csv")).read(0, 9))
    assert [row.number for row in rows] == [0, 1, 2, 3]
    assert rows[1].fault == "has 1 cells, the header 2"
    assert rows[3].values == {"id": "4", "prompt": "fine"}


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_an_id_that_is_taken_is_found(tmp_path, ending):
    rows = [{"id": name, "prompt": "x"} for name in ("a", "b", "a", "000000004", None, "b")]
    found = scan(write(tmp_path / f"rows.{ending}", rows))
    assert found.taken == {2, 4, 5}  # the fifth row's own id would be its number, which is taken


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("rows.xlsx", "", "should end in one of .jsonl"),
        ("rows.txt", "\n \n", "it has no rows"),
        ("rows.csv", "id,promt\n1,x\n", "there is no column 'promt'.*\n.*the column 'prompt' is missing"),
        ("rows.csv", "Prompt,Seed\nx,1\n", r"'Prompt'; did you mean prompt\?\n.*'Seed'; did you mean seed\?"),
        ("rows.csv", "prompt;seed\nx;1\n", "its columns are separated by semicolons; needed are commas"),
        ("rows.csv", "prompt\tseed\nx\t1\n", "its columns are separated by tabs; needed are commas"),
        ("rows.csv", "prompt,colour\nx,1\n", "there is no column 'colour'; there are id, prompt, "),
        ("rows.csv", "prompt,id,id\nx,1,2\n", "column 'id' is there more than once"),
        ("rows.parquet", "PAR1 but not", "cannot be read"),
        ("absent.txt", None, "there is no file"),
        (".txt", None, "there is no file"),
    ],
)
def test_a_bad_file(tmp_path, name, text, says):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(JobError, match=says):
        scan(str(tmp_path / name))


def test_the_output_is_a_file(tmp_path):
    (tmp_path / "rows.txt").write_text("x\n")
    with pytest.raises(JobError, match=r"rows\.txt is a file; needed is a folder"):
        open_job(Job(str(tmp_path / "rows.txt"), str(tmp_path / "rows.txt")))


def test_all_faults_of_a_job_are_reported_at_once(tmp_path):
    (tmp_path / "rows.csv").write_text("promt\nx\n")
    job = Job(
        str(tmp_path / "rows.csv"),
        str(tmp_path / "out"),
        mode="paint",
        form="zip",
        pictures="bmp",
        rows_per_shard=0,
        batch=-1,
        seed=-1,
        defaults={"height": 3, "width": "x", "num_images": 0, "guidance_scale": float("nan"), "step": 3},
    )
    with pytest.raises(JobError) as caught:
        open_job(job)
    for part in (
        "mode=",
        "format=",
        "pictures=",
        "rows_per_shard",
        "batch",
        "seed",
        "height",
        "width",
        "num_images",
        "guidance_scale",
        "'step'",
        "'promt'",
        "'prompt' is missing",
    ):
        assert sum(part in fault for fault in caught.value.faults) >= 1, part
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("columns", "mode"),
    [
        ({"prompt": "x"}, "generate"),
        ({"prompt": "x", "image": "a.png"}, "img2img"),
        ({"prompt": "x", "image": "a.png", "mask": "b.png"}, "inpaint"),
        ({"prompt": "x", "hint": "a.png"}, "controlnet"),
        ({"prompt": "x", "image": "a.png", "hint": "b.png"}, "controlnet-img2img"),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_columns_tell_the_mode(tmp_path, columns, mode, ending):
    path = write(tmp_path / f"rows.{ending}", [columns])
    assert open_job(Job(path, str(tmp_path / "out"), model="tiny")).mode == mode


def test_columns_that_fit_no_mode(tmp_path):
    path = write(tmp_path / "rows.csv", [{"prompt": "x", "mask": "b.png"}])
    with pytest.raises(JobError, match="no mode takes mask alone"):
        open_job(Job(path, str(tmp_path / "out"), model="tiny"))


# Paths ------------------------------------------------------------------------------------------------------------


def test_paths_stay_below_their_folder(tmp_path):
    (tmp_path / "job" / "sub").mkdir(parents=True)
    (tmp_path / "job" / "link").symlink_to(tmp_path)
    root = str(tmp_path / "job")
    assert below(root, "sub/a.png") == f"{root}/sub/a.png"
    assert below(root, "./a.png") == f"{root}/a.png"
    assert below("gs://bucket/job/", "a/b.png") == "gs://bucket/job/a/b.png"
    for path in (
        "../a.png",
        "/etc/passwd",
        "sub/../../a.png",
        "link/a.png",
        "..\\a.png",
        "C:\\a.png",
        "gs://b/a.png",
        "",
        "zip://a::b",
    ):
        with pytest.raises(ValueError, match="leads out of the job's folder"):
            below(root, path)


# When to stop ---------------------------------------------------------------------------------------------------


def test_a_shard_is_finished_where_there_is_time():
    stop = Stop(grace=100)
    stop.took(5)
    assert not stop.asked
    assert stop.time_for(10**6)
    stop.ask()
    assert stop.asked
    assert stop.time_for(15)
    assert not stop.time_for(25)
    soon = Stop(grace=0)
    soon.took(0.01)
    soon.ask()
    assert not soon.time_for(1)


def test_nobody_waits_for_a_process_without_work_in_hand():
    """It leaves at once, from the handler; with work in hand it leaves when the time is over."""
    left = threading.Event()
    Stop(grace=100, leave=left.set).ask()
    assert left.is_set()
    left.clear()
    stop = Stop(grace=0.2, leave=left.set)
    stop.work_in_hand = True
    stop.ask()
    assert not left.is_set()
    assert left.wait(20)


def test_a_process_that_ends_in_time_is_not_ended_again():
    left = threading.Event()
    stop = Stop(grace=0.5, leave=left.set)
    stop.work_in_hand = True
    with stop.listening():
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked
    assert not left.wait(1)
