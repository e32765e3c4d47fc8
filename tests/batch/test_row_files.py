"""Reading any slice of a file of rows, for all layouts, encodings and kinds of damage. No model is needed."""

from __future__ import annotations

import csv
import datetime
import json
import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kandinsky_jax.batch import parquet_rows, text_rows
from kandinsky_jax.batch.parquet_rows import _hash
from kandinsky_jax.batch.rows import JobError, RowFile, scan
from kandinsky_jax.batch.text_rows import STRIDE

SLICES = [(0, 1), (0, 999), (255, 3), (256, 1), (257, 300), (300, 1), (512, 8), (519, 5)]


def prompts(found: RowFile, first: int, count: int) -> list[str | None]:
    rows = list(found.read(first, count))
    assert [row.number for row in rows] == list(range(first, first + len(rows)))
    return [row.values.get("prompt") for row in rows]


@pytest.mark.parametrize("group", [None, 520, 300, 256, 255, 100, 1])
def test_parquet_slices_of_any_row_group_layout(tmp_path, group):
    wanted = [f"p{i}" for i in range(520)]
    pq.write_table(pa.table({"prompt": wanted}), tmp_path / "a.parquet", row_group_size=group)
    found = scan(str(tmp_path / "a.parquet"))
    order = SLICES * 2
    random.Random(0).shuffle(order)  # rising and falling
    for first, count in order:
        assert prompts(found, first, count) == wanted[first : first + count]


def test_parquet_slices_in_rising_order_are_read_once(tmp_path, monkeypatch):
    """A row group is not begun again for each slice of it."""
    pq.write_table(pa.table({"prompt": [f"p{i}" for i in range(5000)]}), tmp_path / "a.parquet")
    found, opened = scan(str(tmp_path / "a.parquet")), []
    real = parquet_rows.open_parquet
    monkeypatch.setattr(parquet_rows, "open_parquet", lambda file: opened.append(file) or real(file))
    for first in range(0, 5000, 300):
        assert prompts(found, first, 256)[0] == f"p{first}"
    assert len(opened) == 1


def test_parquet_slices_read_at_once(tmp_path):
    """Two readers, as of a rehearsal and of the job, do not disturb each other."""
    pq.write_table(pa.table({"prompt": [f"p{i}" for i in range(900)]}), tmp_path / "a.parquet")
    found = scan(str(tmp_path / "a.parquet"))
    one, other = found.read(0, 600), found.read(300, 600)
    pairs = list(zip(one, other, strict=True))
    assert [(a.values["prompt"], b.values["prompt"]) for a, b in pairs] == [
        (f"p{i}", f"p{i + 300}") for i in range(600)
    ]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_parquet_text_of_any_type(tmp_path, kind):
    ids = pa.array(["a", None, "", "b", "a", "00000000", "000000001"]).cast(kind)
    table = pa.table({"id": ids, "prompt": pa.array([f"p{i}" for i in range(7)]).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    found = scan(str(tmp_path / "a.parquet"))
    assert prompts(found, 2, 9) == ["p2", "p3", "p4", "p5", "p6"]
    assert found.taken == {4, 6}  # the second row's own id is its number, which the last one takes


def test_parquet_metadata_of_any_type(tmp_path):
    """The same values with and without pandas, which pyarrow asks for nanoseconds."""
    moment = pa.array([1], pa.timestamp("ns", tz="Europe/Paris"))
    day, span = pa.array([datetime.date(2024, 2, 29)]), pa.array([7], pa.duration("ms"))
    late = pa.array([2**62], pa.timestamp("us"))  # no datetime has such a year
    struct = pa.StructArray.from_arrays(
        [moment, day, span, late, pa.array([[1, None]]), pa.array([[("k", 2)]], pa.map_(pa.string(), pa.int64()))],
        ["moment", "day", "span", "late", "list", "map"],
    )
    pq.write_table(pa.table({"prompt": ["x"], "metadata": struct}), tmp_path / "a.parquet")
    [row] = scan(str(tmp_path / "a.parquet")).read(0, 1)
    late = row.values["metadata"].pop("late")
    assert late.startswith("148108-")
    assert row.values["metadata"] == {
        "moment": "1970-01-01T00:00:00.000000001Z",
        "day": "2024-02-29",
        "span": "7 ms",
        "list": [1, None],
        "map": [["k", 2]],
    }


def test_parquet_damage_costs_the_rows_that_it_hits(tmp_path):
    """A page that cannot be decoded: its rows have a fault, those before it and of other row groups are read."""
    path = tmp_path / "a.parquet"
    wanted = [f"prompt {i} {random.Random(i).random()}" for i in range(3000)]
    table = pa.table({"prompt": wanted})
    pq.write_table(table, path, row_group_size=1000, data_page_size=4096, use_dictionary=False, compression="zstd")
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    middle = chunk.data_page_offset + chunk.total_compressed_size // 2
    data[middle : middle + 400] = bytes(400)
    path.write_bytes(data)
    found = scan(str(path))
    rows = list(found.read(0, 3000))
    bad = [row.number for row in rows if row.fault]
    assert bad == list(range(bad[0], 2000))
    assert 1000 <= bad[0] < 2000
    assert "row group 1 of the file is damaged" in rows[1999].fault
    assert [row.values["prompt"] for row in rows[2000:]] == wanted[2000:]
    assert [row.fault for row in scan(str(path)).read(1800, 300)] == [row.fault for row in rows[1800:2100]]


def test_parquet_text_that_is_not_utf8_costs_its_row(tmp_path):
    bad = pa.Array.from_buffers(pa.string(), 3, [None, *pa.array([b"good", b"caf\xe9", b"fine"]).buffers()[1:]])
    pq.write_table(pa.table({"prompt": bad}), tmp_path / "a.parquet")
    assert prompts(scan(str(tmp_path / "a.parquet")), 0, 3) == ["good", "caf\udce9", "fine"]


# Text -------------------------------------------------------------------------------------------------------------

ODD = ["plain", "a\u2028b", "a\x85b\x0cc\x1cd", "tab\tand “quotes”", "émoji 🎈", 'quoted, "and" comma', " spaces "]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "BOM"])
def test_text_lines_end_at_line_feeds_only(tmp_path, newline, mark):
    """Not at U+2028 and its kin, in any format, with any of the usual line ends, after a byte order mark or none."""
    wanted = ODD * 60
    (tmp_path / "a.txt").write_bytes(mark + newline.join(wanted).encode())
    (tmp_path / "a.jsonl").write_bytes(
        mark + "".join(json.dumps({"prompt": x}, ensure_ascii=False) + newline for x in wanted).encode()
    )
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig" if mark else "utf-8") as file:
        writer = csv.writer(file, lineterminator=newline, quoting=csv.QUOTE_ALL)
        writer.writerows([["prompt", "seed"], *([x, i] for i, x in enumerate(wanted))])
    assert prompts(scan(str(tmp_path / "a.txt")), 0, 999) == [x.strip() for x in wanted]
    for name in ("a.jsonl", "a.csv"):
        found = scan(str(tmp_path / name))
        assert found.count == len(wanted)
        for first, count in ((0, 999), (255, 3), (300, 9)):
            assert prompts(found, first, count) == wanted[first : first + count]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("ending", ["txt", "csv", "jsonl"])
def test_text_in_another_encoding_is_named(tmp_path, encoding, ending):
    (tmp_path / f"a.{ending}").write_bytes("prompt\na cat\n".encode(encoding))
    with pytest.raises(JobError, match=r"a\.\w+ cannot be read: .*UTF-(16|32).*needed is text in UTF-8"):
        scan(str(tmp_path / f"a.{ending}"))


def test_text_rows_of_other_encodings_are_kept_apart(tmp_path):
    """Bytes that are not UTF-8 are in the row for its check to find; the other rows are as they were."""
    (tmp_path / "a.csv").write_bytes(b"prompt\nfine\ncaf\xe9\nalso\n")
    assert prompts(scan(str(tmp_path / "a.csv")), 0, 9) == ["fine", "caf\udce9", "also"]
    (tmp_path / "a.jsonl").write_bytes(b'{"id": "\\ud800", "prompt": "x"}\n{"id": "b", "prompt": "caf\xe9"}\n')
    assert prompts(scan(str(tmp_path / "a.jsonl")), 0, 9) == ["x", "caf\udce9"]


@pytest.mark.parametrize("ending", ["txt", "jsonl", "csv"])
def test_text_line_that_is_too_long_costs_itself(tmp_path, monkeypatch, ending):
    """Also one of many blocks; what is not kept of it does not come back as a line."""
    monkeypatch.setattr(text_rows, "MAX_LINE", 200_000)
    monkeypatch.setattr(text_rows, "BLOCK", 1 << 16)
    long = "é" * 300_000 if ending != "csv" else "e" * 600_000
    lines = {"txt": ["one", long, "two"], "csv": ["prompt", "one", long, "two"]}
    lines["jsonl"] = [json.dumps({"prompt": x}, ensure_ascii=False) for x in ("one", long, "two")]
    (tmp_path / f"a.{ending}").write_text("\n".join(lines[ending]) + "\n", encoding="utf-8")
    rows = list(scan(str(tmp_path / f"a.{ending}")).read(0, 9))
    assert [row.number for row in rows] == [0, 1, 2]
    assert [row.values["prompt"] for row in (rows[0], rows[2])] == ["one", "two"]
    assert "field larger than" in rows[1].fault if ending == "csv" else "more than 200,000 bytes" in rows[1].fault


def test_json_beyond_its_limits_costs_its_line(tmp_path):
    lines = [
        "[" * 100_000,
        '{"prompt": "x", "seed": ' + "9" * 5000 + "}",
        '{"prompt": "y"} trailing',
        '{"prompt": "z"}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    rows = list(scan(str(tmp_path / "a.jsonl")).read(0, 9))
    assert [bool(row.fault) for row in rows] == [True, True, True, False]
    assert all(len(row.fault) < 300 for row in rows[:3])


QUOTES = {
    '"cat\ndog\nbird\n': "a quote in line 2 that is not closed before line 5 ",
    'cat\n"dog\n"bird"\nfish\n': 'a quote in line 3 that is closed in line 4 with text after it: ."bird".',
    '"a" b\nc\n': 'a quote in line 2 that is closed in line 2 with text after it: ."a" b.',
    "x\n" * 300 + '"y\nz"\n"\n' + "w\n" * 9: "a quote in line 304 that is not closed before line 314 ",
    "x\n" * 99 + '"y\n' + "z\n" * 99_999: "a quote in line 101 that is not closed before line ",  # a field's limit
    '"' + "e" * 200_000 + '\nb"\nc\n': "a quote in line 2 that is not closed before line 3",
}


@pytest.mark.parametrize("text", QUOTES, ids=range(len(QUOTES)))
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_csv_quote_without_end_takes_no_rows_along(tmp_path, text, newline):
    """Rows after the quote cannot be separated from its text, so the job is refused."""
    path = tmp_path / "a.csv"
    path.write_text("prompt\n" + text, newline=newline)
    with pytest.raises(JobError, match=rf"a\.csv has {QUOTES[text]}") as caught:
        scan(str(path))
    assert len(str(caught.value)) < 500


def test_csv_header_with_a_quote_without_end_is_named(tmp_path):
    (tmp_path / "a.csv").write_text('id,"prompt\na,cat\n')
    with pytest.raises(JobError, match="has a quote in line 1 that is not closed before line 3"):
        scan(str(tmp_path / "a.csv"))


def test_csv_quotes_that_are_right_are_text(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,seed\na "b" c",1\n"d ""e"", f\ng",2\n"",3\n"h"\n')
    rows = list(scan(str(tmp_path / "a.csv")).read(0, 9))
    assert [row.values.get("prompt") for row in rows] == ['a "b" c"', 'd "e", f\ng', None, None]
    assert rows[3].fault == "has 1 cells, the header 2"


def test_csv_padding_is_no_part_of_a_cell_unless_it_is_quoted(tmp_path):
    """In every column; a cell may be quoted after spaces."""
    names = ["id", "prompt", "seed", "image", "mask", "hint", "metadata"]
    lines = [
        ",".join(f" {name}\t" for name in names),
        "a, cat, 1, a.png, b.png ,\tc.png,  x ",
        'b ,"  cat, ""too"" ", "2", "a b.png","b.png",  ,"\n y"',
        "  b,dog,,,,,",
    ]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    found = scan(str(tmp_path / "a.csv"))
    rows = [row.values for row in found.read(0, 9)]
    assert rows[0] == dict(zip(names, ["a", "cat", "1", "a.png", "b.png", "c.png", "x"], strict=True))
    assert rows[1] == {
        "id": "b",
        "prompt": '  cat, "too" ',
        "seed": "2",
        "image": "a b.png",
        "mask": "b.png",
        "metadata": "\n y",
    }
    assert found.taken == {2}


def test_scan_and_read_agree_on_any_text(tmp_path):
    """Random lines, good, broken and empty, at every start of a slice."""
    rng = random.Random(3)
    pool = [
        '{"prompt": "x"}',
        "",
        "  ",
        "{",
        '{"id": "a", "prompt": "y"}',
        "[]",
        '{"\\u0069d": "b", "prompt": ""}',
        "1 2",
    ]
    cells = ["a", "", "a,b", '"x"', 'b"', "a,b,c", '"q,1\n\n2"', '"q",2', "\r", "a\rb", " a , b ", ' "c "']
    for ending, choices in (("jsonl", pool), ("csv", cells), ("txt", cells)):
        lines = (["prompt,id"] if ending == "csv" else []) + rng.choices(choices, k=1500)
        (tmp_path / f"a.{ending}").write_text("\n".join(lines), newline="")
        found = scan(str(tmp_path / f"a.{ending}"))
        whole = list(found.read(0, found.count))
        assert [row.number for row in whole] == list(range(found.count))
        assert found.count > 3 * STRIDE or ending == "csv"
        for first in (*range(0, found.count, 61), STRIDE, found.count - 1):
            assert list(found.read(first, 70)) == whole[first : first + 70]
        seen: set[str] = set()
        for row in whole:
            name = row.values.get("id") or f"{row.number:09d}"
            assert (row.number in found.taken) == (name in seen)
            seen.add(name)


def test_ids_with_equal_hashes_are_distinguished(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"id": "{x}", "prompt": "p"}}\n' for x in "abcbd"))
    monkeypatch.setattr(text_rows, "hash", lambda name: 7, raising=False)
    assert scan(str(tmp_path / "a.jsonl")).taken == {3}


def test_parquet_hash_distinguishes_strings():
    """By any byte of any position up to 208, and by their length."""
    import numpy as np

    strings = ["", "a", "b", "ab", "ba", "a" * 8, "a" * 9, "a" * 7 + "b", "\0", "\0\0"]
    strings += ["x" * i + "y" + "x" * (207 - i) for i in range(208)]
    lengths = np.array([len(s) for s in strings])
    data = np.frombuffer("".join(strings).encode(), np.uint8)
    assert len(set(_hash(data, np.cumsum(lengths) - lengths, lengths).tolist())) == len(strings)
    twice = _hash(np.tile(data, 2), np.concatenate([[0], np.cumsum(np.tile(lengths, 2))[:-1]]), np.tile(lengths, 2))
    assert (twice[: len(strings)] == twice[len(strings) :]).all()


def test_a_file_that_has_changed_is_an_error(tmp_path):
    path = Path(tmp_path / "a.txt")
    path.write_text("one\ntwo\nthree\n")
    found = scan(str(path))
    path.write_text("one\n")
    with pytest.raises(JobError, match=r"a\.txt ends before its row 1; it has changed"):
        list(found.read(0, 3))


def test_a_job_error_is_short_and_keeps_all_faults():
    error = JobError([f"fault {i} {'x' * 50}" for i in range(1000)])
    assert len(str(error)) < 500
    assert len(error.faults) == 1000


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize("scheme", ["", "file://", "local://"])
def test_a_pipe_is_no_file_of_rows(tmp_path, name, scheme):
    os.mkfifo(tmp_path / name)
    with pytest.raises(JobError, match="is not a regular file"):
        scan(f"{scheme}{tmp_path / name}")


def test_damaged_csv_rows_are_not_read_again(tmp_path, monkeypatch):
    """Each affects only itself; quotes are checked in memory, except for rows that begin in an earlier block."""
    made, real = [], text_rows.Lines
    monkeypatch.setattr(text_rows, "Lines", lambda *a, **k: made.append(a) or real(*a, **k))
    (tmp_path / "a.csv").write_bytes(b"prompt,id\n" + b"a\rb,c\n" * 30_000)
    assert scan(str(tmp_path / "a.csv")).count == 30_000
    assert len(made) < 10


def test_csv_cell_beyond_the_limit(tmp_path):
    """On one line it costs its row; over several, the rows after it cannot be known."""
    (tmp_path / "a.csv").write_bytes(b'prompt,id\n"' + b"xxxx " * 30_000 + b'",1\ny,a\n')
    assert [row.fault is None for row in scan(str(tmp_path / "a.csv")).read(0, 9)] == [False, True]
    (tmp_path / "a.csv").write_bytes(b'prompt,id\n"' + b"xxxx\n" * 30_000 + b'",1\ny,a\n')
    with pytest.raises(JobError, match=r"quote in line 2 that is not closed .* within the 131,072 characters"):
        scan(str(tmp_path / "a.csv"))
