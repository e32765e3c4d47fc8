"""Captioned pictures in all supported forms: usable data is used, other data is reported."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from kandinsky_jax import images
from kandinsky_jax.training.data import DataError, Reader, listing
from kandinsky_jax.training.data.items import picture_suffixes

PNG = io.BytesIO()
Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)).save(PNG, "PNG")
PNG = PNG.getvalue()


def texts(path: Path) -> list[str]:
    return [item.text for item in listing(path)]


def faults(path: Path) -> str:
    return "\n".join(listing(path).skipped.faults)


def tar_of(path: Path, files: dict[str, bytes] | list[tuple[str, bytes]], **options) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, content in files.items() if isinstance(files, dict) else files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


# Formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["folder", "tar", "metadata"])
def test_every_suffix_of_a_format_that_is_read_is_a_picture(tmp_path, form):
    suffixes = [*sorted(picture_suffixes()), ".TIFF", ".Jpg", ".PNG"]
    assert {".tif", ".tiff", ".jfif", ".jp2", ".ppm", ".apng", ".avif"} <= set(suffixes)
    names = [f"{i:02d}{suffix}" for i, suffix in enumerate(suffixes)]
    if form == "folder":
        for name in names:
            (tmp_path / name).write_bytes(PNG)
            (tmp_path / name).with_suffix(".TXT" if name.endswith(".PNG") else ".txt").write_text(name)
    elif form == "tar":
        files = [(name, PNG) for name in names] + [(f"{Path(name).stem}.txt", name.encode()) for name in names]
        tar_of(tmp_path / "a.tar", files)
    else:
        for name in names:
            (tmp_path / name).write_bytes(PNG)
        rows = [json.dumps({"file_name": name, "caption": name}) for name in names]
        (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    found = listing(tmp_path)
    assert [item.text for item in found] == names
    assert all(item.read() == PNG for item in found)
    assert found.skipped.count == 0


@pytest.mark.parametrize("kind", images.READABLE)
def test_pictures_of_every_format_become_arrays(tmp_path, kind):
    """Written by Pillow, but for PSD, which it only reads; with the first suffix that it has for the format."""
    suffix = next(suffix for suffix, of in Image.registered_extensions().items() if of == kind)
    picture = Image.open(io.BytesIO(PNG))
    if kind == "PSD":
        header = struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, picture.height, picture.width, 8, 3)
        planes = b"".join(plane.tobytes() for plane in picture.convert("RGB").split())
        (tmp_path / "a.psd").write_bytes(header + bytes(3 * 4 + 2) + planes)  # empty sections; uncompressed
    else:
        picture.save(tmp_path / f"a{suffix}", kind)
    (tmp_path / "a.txt").write_text("noise")
    [item] = listing(tmp_path)
    reader = Reader(64)
    assert reader(item, np.random.default_rng(0))["pixels"].shape == (64, 64, 3), reader.unreadable


def test_pictures_of_other_formats_are_named(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "a.txt").write_text("a")
    for name in ("b.heic", "c.svg", "d.eps"):
        (tmp_path / name).write_bytes(b"")
        (tmp_path / name).with_suffix(".txt").write_text("a caption")
    tar_of(tmp_path / "t.tar", {"e.heic": b"", "e.txt": b"a caption"})
    found = faults(tmp_path)
    assert all(f"{name}: pictures of this format are not read" in found for name in ("b.heic", "c.svg", "d.eps"))
    assert "t.tar/e.heic: pictures of this format are not read" in found
    assert "t.tar/e.txt: there is no picture for it" in found


def test_samples_of_a_tar_without_picture_or_caption_are_named(tmp_path):
    """Also those whose files have other endings than are known here; one line for each sample."""
    files = {"a.png": PNG, "a.txt": b"a"}
    files |= {"b.image": PNG, "b.prompt": b"b", "c.json": b"{}", "d.hint.png": PNG, "e.png": PNG, "e.prompt": b"e"}
    tar_of(tmp_path / "t.tar", files)
    found = listing(tmp_path / "t.tar")
    assert [picture.name for picture in found] == ["t.tar/a.png"]
    assert found.skipped.faults == [
        "t.tar/b.image: it is neither a picture nor a caption (.txt or .json)",
        "t.tar/c.json: there is no picture for it",
        "t.tar/d.hint.png: there is no picture for it",
        "t.tar/e.png: there is no caption for it; needed is .txt or .json",
    ]


# Folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_that_mixes_all_forms(tmp_path):
    """metadata.jsonl, a tar, Parquet, loose pictures and folders, side by side; and no picture twice."""
    for name in ("m.png", "loose.png", "both.png", "sub/deep/n.png", "sub/o.png", "depth.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(PNG)
    for name in ("loose", "both", "sub/deep/n"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    rows = [
        {"file_name": "m.png", "text": "m", "hint_file_name": "depth.png"},
        {"file_name": "./both.png", "text": "both"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "sub" / "metadata.jsonl").write_text(json.dumps({"file_name": "o.png", "text": "o"}))
    tar_of(tmp_path / "sub" / "t.tar", {"t.png": PNG, "t.txt": b"t"})
    pyarrow.parquet.write_table(pyarrow.table({"image": [PNG], "text": ["p"]}), tmp_path / "p.parquet")
    (tmp_path / ".hidden.png").write_bytes(PNG)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sample.png").write_bytes(PNG)
    found = listing(tmp_path, exclude=[tmp_path / "out"])
    assert [item.text for item in found] == ["m", "both", "o", "t", "p", "text of loose", "text of sub/deep/n"]
    assert all(item.read() == PNG for item in found)
    assert found[0].hint() == PNG
    assert found.skipped.count == 0
    assert "out/sample.png: there is no caption" in faults(tmp_path)


def test_what_has_no_partner_is_counted_and_named(tmp_path):
    for i in range(1100):
        (tmp_path / f"{i}.png").write_bytes(b"")
    (tmp_path / "0.txt").write_text("a")
    (tmp_path / "lost.txt").write_text("a")
    found = listing(tmp_path)
    assert len(found) == 1
    assert found.skipped.count == 1100
    assert len(found.skipped.faults) == 1000
    assert "1.png: there is no caption; needed is metadata.jsonl or 1.txt" in found.skipped.faults
    assert len(found.skipped.summary()) < 250
    assert found.skipped.summary().endswith("and 1097 more")


def test_links_to_folders_above_end(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "x.png").write_bytes(PNG)
    (tmp_path / "a" / "x.txt").write_text("x")
    assert texts(tmp_path) == ["x"]


def test_a_hint_next_to_a_loose_picture(tmp_path):
    for name in ("a.png", "a.hint.png"):
        (tmp_path / name).write_bytes(PNG)
    (tmp_path / "a.txt").write_text("a")
    found = listing(tmp_path)
    assert [item.hint() for item in found] == [PNG]
    assert found.skipped.count == 0


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "\ud800"])
def test_a_path_that_no_file_has(path):
    with pytest.raises(DataError, match="cannot be used") as caught:
        listing(path)
    assert len(str(caught.value)) < 500


# Captions ---------------------------------------------------------------------------------------------------------

TEXT = {
    "as it is": (b"a cat\n", "a cat"),
    "byte order mark": (b"\xef\xbb\xbfa cat", "a cat"),
    "utf-16": ("a cät".encode("utf-16"), "a cät"),
    "utf-16-be": (b"\xfe\xff" + "a cät".encode("utf-16-be"), "a cät"),
    "utf-32": ("a cät".encode("utf-32"), "a cät"),
    "line separator": ("a\u2028cat\x85in\x0ba\u2029hat".encode(), "a\u2028cat\x85in\x0ba\u2029hat"),
}


@pytest.mark.parametrize("form", ["folder", "tar"])
@pytest.mark.parametrize("name", TEXT)
def test_captions_in_unicode(tmp_path, form, name):
    data, wanted = TEXT[name]
    if form == "tar":
        tar_of(tmp_path / "a.tar", {"a.png": PNG, "a.txt": data})
    else:
        (tmp_path / "a.png").write_bytes(PNG)
        (tmp_path / "a.txt").write_bytes(data)
    assert texts(tmp_path) == [wanted]


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_captions_in_other_encodings_are_named_and_not_guessed(tmp_path, form):
    pairs = {"a.png": PNG, "a.txt": "une fée".encode("latin-1"), "b.png": PNG, "b.txt": b"b"}
    if form == "tar":
        tar_of(tmp_path / "t.tar", pairs)
    else:
        for name, data in pairs.items():
            (tmp_path / name).write_bytes(data)
    assert texts(tmp_path) == ["b"]
    assert "a.txt: the text is not UTF-8 (0xe9 at byte 5); save it as UTF-8" in faults(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_metadata_with_separators_marks_and_broken_lines(tmp_path, encoding):
    (tmp_path / "a.png").write_bytes(PNG)
    captions = ["one\u2028line", "two\x85lines", "three\x1clines", "four \x0b \x0c lines", "five\u2029"]
    lines = [json.dumps({"file_name": "a.png", "text": text}, ensure_ascii=False) for text in captions]
    wild = ["[" * 100_000, "9" * 5000, "null", '{"file_name": "a.png"}', '{"file_name": 3, "text": "a"}', "{"]
    wild += ['{"file_name": "a\\u0000.png", "text": "a"}', json.dumps({"file_name": "x" * 5000, "text": "a"})]
    (tmp_path / "metadata.jsonl").write_text("\r\n".join(lines + wild), encoding=encoding, newline="")
    found = listing(tmp_path)
    assert [item.text for item in found] == [text.strip() if text != "five\u2029" else text for text in captions]
    assert found.skipped.count == len(wild)
    assert all(
        f"metadata.jsonl, line {len(captions) + 1 + i}: " in fault for i, fault in enumerate(found.skipped.faults)
    )
    assert all(len(fault) <= 300 for fault in found.skipped.faults)


def test_one_bad_byte_costs_one_line_of_metadata(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    line = b'{"file_name": "a.png", "text": "a"}\n'
    (tmp_path / "metadata.jsonl").write_bytes(line + b'{"file_name": "a.png", "text": "\xff"}\n' + line + b"x" * 2**22)
    assert texts(tmp_path) == ["a", "a"]
    assert "line 2: the text is not UTF-8" in faults(tmp_path)
    assert "line 4" in faults(tmp_path)


def test_a_lone_surrogate_stops_nothing(tmp_path, shapes_pipe):
    (tmp_path / "a.png").write_bytes(PNG)
    rows = ['{"file_name": "a.png", "text": "a \\ud800 cat"}', '{"file_name": "a.png", "text": "\\ud83d\\ude00"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    items = listing(tmp_path)
    assert [item.text for item in items] == ["a \ufffd cat", "\U0001f600"]
    reader = Reader(64, tokenizer=shapes_pipe.prior_tokenizer)
    assert reader(items[0], np.random.default_rng(0))["text_mask"].sum() > 2
    # And one that comes by another way costs its picture, not the run.
    assert reader(items[0]._replace(text="a \ud800 cat"), np.random.default_rng(0)) is None
    assert "a.png" in reader.unreadable


# Tars -------------------------------------------------------------------------------------------------------------


def test_keys_end_at_the_first_dot(tmp_path):
    """WebDataset's rule; a caption of a picture's own name goes before the sample's."""
    files = {
        "a.input.jpg": PNG,
        "a.txt": b"a",
        "b.1.5.png": PNG,
        "b.1.5.txt": b"b 1.5",
        "b.1.6.png": PNG,
        "b.1.6.txt": b"b 1.6",
        "x.y/c.png": PNG,
        "x.y/c.hint.png": PNG,
        "x.y/c.json": b'{"caption": "c"}',
        "d.png": PNG,
        "d.mask.png": PNG,
        "d.txt": b"d",
        "e.output.png": PNG,
        "e.caption.txt": b"e",
    }
    tar_of(tmp_path / "t.tar", files)
    found = listing(tmp_path)
    assert [item.text for item in found] == ["a", "b 1.5", "b 1.6", "c", "d", "e"]
    assert found[3].hint() == PNG
    assert found.skipped.faults == ["t.tar/d.mask.png: there is no caption for it; needed is .txt or .json"]


def test_tars_that_were_joined(tmp_path):
    """`cat` and `tar -A`: names that come twice are two samples, and what follows the first end is read."""
    one = tar_of(tmp_path / "1", {"a.png": PNG, "a.txt": b"one"}).read_bytes()
    two = tar_of(tmp_path / "2", {"a.png": PNG + b" ", "a.txt": b"two"}).read_bytes()
    (tmp_path / "t.tar").write_bytes(one + two)
    found = listing(tmp_path / "t.tar")
    assert [(item.text, item.read()) for item in found] == [("one", PNG), ("two", PNG + b" ")]
    assert found.skipped.count == 0


SAMPLES = {f"{i}.{end}": data for i in range(6) for end, data in (("png", PNG), ("txt", f"text {i}".encode()))}


def members(path: Path) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(path) as tar:
        return {member.name: member for member in tar}


def test_a_tar_that_is_cut_short(tmp_path):
    path = tar_of(tmp_path / "t.tar", SAMPLES)
    whole, at = path.read_bytes(), members(path)
    for cut, says in (
        (at["3.png"].offset_data + 100, "t.tar/3.png: the tar is cut short within it"),
        (at["3.png"].offset + 100, "the header at byte"),
        (at["3.png"].offset, "t.tar: it has no end"),
    ):
        path.write_bytes(whole[:cut])
        assert texts(path) == ["text 0", "text 1", "text 2"]
        assert says in faults(path)


def test_damaged_headers_cost_their_members_alone(tmp_path):
    path = tar_of(tmp_path / "t.tar", SAMPLES)
    data, at = bytearray(path.read_bytes()), members(path)
    for name in ("0.png", "3.png"):
        data[at[name].offset + 20] ^= 1
    path.write_bytes(data)
    assert texts(path) == ["text 1", "text 2", "text 4", "text 5"]
    assert f"the header at byte {at['3.png'].offset:,}" in faults(path)
    assert "t.tar/3.txt: there is no picture for it" in faults(path)


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_damaged_headers_of_long_names(tmp_path, format):
    long = "x" * 150
    files = {"0.png": PNG, "0.txt": b"0", f"{long}.png": PNG, f"{long}.txt": b"long", "1.png": PNG, "1.txt": b"1"}
    path = tar_of(tmp_path / "t.tar", files, format=format)
    assert texts(path) == ["0", "long", "1"]
    whole, at = path.read_bytes(), members(path)
    for shift in (10, 130, 512, 516):
        data = bytearray(whole)
        data[at[f"{long}.png"].offset + shift] ^= 0x55
        path.write_bytes(data)
        found = listing(path)
        assert {"0", "1"} <= {item.text for item in found}
        assert len(found) == 3 or found.skipped.count


def test_links_sparse_files_devices_and_names_that_lead_out(tmp_path):
    path = tmp_path / "t.tar"
    (tmp_path / "sparse").write_bytes(PNG + bytes(2**20))
    with tarfile.open(path, "w") as tar:

        def add(name: str, content: bytes | None = None, **fields) -> None:
            member = tarfile.TarInfo(name)
            for field, value in fields.items():
                setattr(member, field, value)
            member.size = len(content or b"")
            tar.addfile(member, None if content is None else io.BytesIO(content))

        for name, content in (("a.png", PNG), ("a.txt", b"a"), ("../b.png", PNG), ("../b.txt", b"b")):
            add(name, content)
        for name in ("hard", "soft", "lost", "out", "pipe"):
            add(f"{name}.txt", name.encode())
        add("hard.png", type=tarfile.LNKTYPE, linkname="a.png")
        add("soft.png", type=tarfile.SYMTYPE, linkname="./a.png")
        add("lost.png", type=tarfile.SYMTYPE, linkname="nothing.png")
        add("out.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add("pipe.png", type=tarfile.FIFOTYPE)
    found = listing(path)
    assert [(item.text, item.read()) for item in found] == [("a", PNG), ("hard", PNG), ("soft", PNG)]
    named = "\n".join(found.skipped.faults)
    for says in (
        "t.tar/../b.png: its name leads out of the tar",
        "t.tar/lost.png: it is a link to nothing.png, which is not in the tar",
        "t.tar/out.png: it is a link to /etc/passwd",
        "t.tar/pipe.png: it is not a file",
    ):
        assert says in named


def test_sparse_members_are_read(tmp_path):
    """As GNU tar writes them with --sparse."""
    picture = tmp_path / "a.png"
    with picture.open("wb") as file:
        file.write(PNG)
        file.truncate(2**20)
    (tmp_path / "a.txt").write_text("a")
    for options in (["--format=gnu"], ["--format=pax"], ["--format=pax", "--sparse-version=0.1"]):
        made = subprocess.run(
            ["tar", "--sparse", *options, "-cf", "t.tar", "a.png", "a.txt"], cwd=tmp_path, capture_output=True
        )
        if made.returncode:
            pytest.skip("this tar writes no sparse files")
        [item] = listing(tmp_path / "t.tar")
        assert item.read() == picture.read_bytes()


def test_compressed_tars_are_named(tmp_path):
    tar_of(tmp_path / "a.tar", {"a.png": PNG, "a.txt": b"a"})
    for name, mode in (("b.tar.gz", "w:gz"), ("c.tar", "w:xz")):
        with tarfile.open(tmp_path / name, mode) as tar:
            tar.add(__file__, "x.txt")
    assert texts(tmp_path) == ["a"]
    assert "b.tar.gz: a compressed tar is not read; decompress it" in faults(tmp_path)
    for name in ("d.zip", "metadata.csv"):
        (tmp_path / name).write_bytes(b"x")
    assert "d.zip: files of this kind are not read; unpack it" in faults(tmp_path)
    assert "metadata.csv: is not read; needed is metadata.jsonl" in faults(tmp_path)
    assert "c.tar: it is compressed with xz" in faults(tmp_path)


# Parquet ----------------------------------------------------------------------------------------------------------


def test_rows_of_parquet_in_any_order_and_their_faults(tmp_path):
    pictures = [PNG + bytes([i]) for i in range(50)]
    rows = [{"image": {"bytes": data, "path": None}, "text": f"{i}", "hint": data} for i, data in enumerate(pictures)]
    rows[7]["text"], rows[8]["image"], rows[9]["image"] = None, None, {"bytes": None, "path": "9.png"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=7)
    pyarrow.parquet.write_table(pyarrow.table({"image": ["a"], "text": ["a"]}), tmp_path / "b.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "c.parquet")
    (tmp_path / "d.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-50])
    found = listing(tmp_path)
    assert [item.text for item in found] == [f"{i}" for i in range(50) if i != 7]
    for i in np.random.default_rng(0).permutation(len(found)):
        item = found[i]
        if item.text in ("8", "9"):
            with pytest.raises(ValueError, match="the column image is empty"):
                item.read()
        else:
            assert item.read() == item.hint() == pictures[int(item.text)]
    named = "\n".join(found.skipped.faults)
    for says in (
        "a.parquet, row 7: needed are a picture's bytes and a text",
        "b.parquet: it cannot be read: the column image must be bytes, is DataType(string)",
        "c.parquet: there is no column image",
        "d.parquet: it cannot be read",
    ):
        assert says in named


def test_a_damaged_row_group_costs_its_rows(tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"image": rng.bytes(2000), "text": f"{i}"} for i in range(30)]
    path = tmp_path / "a.parquet"
    options = {"row_group_size": 10, "compression": "none", "write_page_checksum": True, "use_dictionary": False}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + 12_000] ^= 1
    path.write_bytes(data)
    found = listing(path)
    assert len(found) == 30
    for item, row in zip(found, rows, strict=True):
        if 10 <= int(item.text) < 20:
            with pytest.raises(ValueError, match="row group 1 is damaged"):
                item.read()
        else:
            assert item.read() == row["image"]


def test_a_disk_without_room_for_a_copy_of_parquet(tmp_path, monkeypatch):
    rows = [{"image": PNG + bytes([i]), "text": f"{i}"} for i in range(40)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = listing(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.warns(UserWarning, match="the disk has no space for .* bytes of a copy"):
        assert found[33].read() == rows[33]["image"]
    assert found[3].read() == rows[3]["image"]


MEMORY = """
import resource, sys
from pathlib import Path
import pyarrow.parquet
from kandinsky_jax.training.data import listing
small, large = map(Path, sys.argv[1:])
[item.read() for item in listing(small)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
items = listing(large)
listed = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert items[-1].read()[:4] == b"\\x89PNG"
print(len(items), (listed - before) // 1024, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_parquet_is_not_read_into_memory(tmp_path):
    """50 MB in one row group: neither when it is listed, nor when its pictures are read."""
    for name, count in (("small", 2), ("large", 500)):
        rng = np.random.default_rng(0)
        table = pyarrow.table({"image": [PNG + rng.bytes(100_000) for _ in range(count)], "text": ["a"] * count})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    command = [sys.executable, "-c", MEMORY, *(str(tmp_path / f"{name}.parquet") for name in ("small", "large"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    count, listed, read = map(int, done.stdout.split())
    assert count == 500
    assert listed < 15
    assert read < 40
