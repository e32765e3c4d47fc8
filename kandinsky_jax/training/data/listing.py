"""Finding captioned pictures in folders, tars and Parquet files; pictures are read later."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from kandinsky_jax.common.errors import shorten
from kandinsky_jax.training.data.captions import MARKS, caption_from, caption_of, decode, parse_json
from kandinsky_jax.training.data.items import (
    MAX_CAPTION_BYTES,
    MAX_PICTURE_BYTES,
    Captioned,
    DataError,
    Listing,
    Skipped,
    picture_suffixes,
    unread_suffixes,
)
from kandinsky_jax.training.data.parquet import read_parquet
from kandinsky_jax.training.data.webdataset import read_tar

METADATA_FILE = "metadata.jsonl"
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
ARCHIVES = (".zip", ".7z", ".rar", ".arrow", ".feather", ".tfrecord", ".h5", ".lmdb", ".mdb")


def listing(path: str | os.PathLike[str], *, exclude: Sequence[Path] = (), scratch: Path | None = None) -> Listing:
    """List the captioned pictures of a folder and its subfolders, or of one .tar or .parquet file.

    All of these may be mixed: `metadata.jsonl` (`file_name`, and `text`, `caption` or `prompt`), WebDataset
    tars, Parquet files, and pictures with a .txt or .json of their name. A depth map is `hint_file_name` in
    metadata.jsonl, `KEY.hint.png` next to `KEY.png` in a folder or a tar, and the column `hint` in Parquet. Files with
    a suffix of any format in `images.READABLE`, in upper or lower case, are pictures. Names that begin with a dot are
    hidden, and skipped.

    Args:
        path: the folder or file.
        exclude: folders to skip, such as that of the results.
        scratch: a folder for temporary files (see `kandinsky_jax.training.data.parquet`).
    Returns:
        the usable pictures, and in `skipped` unused data: pictures without a caption, captions without a picture,
        damaged files.
    Raises:
        DataError: if there is no usable picture.
    """
    path, skipped = Path(path), Skipped()
    try:
        files = list(_files(path, [folder.resolve() for folder in exclude], skipped))
    except (OSError, ValueError) as error:
        raise DataError(str(path), [shorten(str(error))]) from None
    used: set[Path] = set()
    found: list[Captioned] = []
    for file in files:
        if file.name == METADATA_FILE:
            found += _of_metadata(file, path, used, skipped)
    for file in files:
        if file.suffix.lower() == ".tar":
            found += read_tar(file, _name(file, path), skipped)
        elif file.name.lower().endswith(COMPRESSED_SUFFIXES):
            skipped.add(f"{_name(file, path)}: a compressed tar is not read; decompress it")
        elif file.suffix.lower() in ARCHIVES:
            skipped.add(f"{_name(file, path)}: files of this kind are not read; unpack it, or write tars or Parquet")
        elif file.name == "metadata.csv":
            skipped.add(f"{_name(file, path)}: is not read; needed is {METADATA_FILE}")
    for file in files:
        if file.suffix.lower() == ".parquet":
            found += read_parquet(file, _name(file, path), skipped, scratch)
    found += _of_pairs(files, used, path, skipped)
    items = []
    for item in found:
        if item.text.strip():
            items.append(item)
        else:
            skipped.add(f"{item.name}: its caption is empty")
    if not items:
        nothing = (
            f"there is no picture in it; looked for {METADATA_FILE}, .tar, .parquet, and pictures with a .txt each"
        )
        raise DataError(str(path), skipped.faults or [nothing])
    return Listing(items, skipped)


def _files(path: Path, exclude: Sequence[Path], skipped: Skipped) -> Iterator[Path]:
    """Yield the files of a folder and then of its subfolders, sorted by name; or a single file."""
    if not path.exists():
        raise ValueError("it does not exist")
    if path.is_file():
        yield path
        return
    visited: set[Path] = set(exclude)

    def denied(error: OSError) -> None:
        skipped.add(f"{error.filename}: {error.strerror}")

    for folder, below, names in os.walk(path, onerror=denied, followlinks=True):
        real = Path(folder).resolve()
        if real in visited and Path(folder) != path:  # a link to a parent folder, or an excluded folder
            below.clear()
            continue
        visited.add(real)
        below[:] = sorted(name for name in below if not name.startswith("."))
        for file in (Path(folder, name) for name in sorted(names) if not name.startswith(".")):
            if file.is_file():
                yield file
            else:  # reading a pipe or a device may block
                skipped.add(f"{_name(file, path)}: it is not a regular file, or a link to nothing")


def _name(file: Path, base: Path) -> str:
    """Return a file's name relative to the listed folder, for messages."""
    return file.name if file == base else file.relative_to(base).as_posix()


# metadata.jsonl ---------------------------------------------------------------------------------------------------


def _of_metadata(path: Path, base: Path, used: set[Path], skipped: Skipped) -> Iterator[Captioned]:
    name = _name(path, base)
    try:
        for number, line in enumerate(_lines(path), 1):
            if not line.strip():
                continue
            try:
                yield _of_row(parse_json(line), path.parent, used)
            except (ValueError, OSError) as error:
                skipped.add(f"{name}, line {number}: {error}")
    except (ValueError, OSError) as error:
        skipped.add(f"{name}: {error}")


def _lines(path: Path) -> Iterator[bytes | str]:
    """Yield the lines of a file, split at line feeds only, since JSON may contain characters such as U+2028."""
    with path.open("rb") as file:
        start = file.read(4)
        mark = next((mark for mark, _ in MARKS if start.startswith(mark)), b"")
        if mark and mark != MARKS[0][0]:  # UTF-16 or UTF-32
            yield from decode(start + file.read()).split("\n")
            return
        file.seek(len(mark))
        while line := file.readline(MAX_CAPTION_BYTES):
            if len(line) < MAX_CAPTION_BYTES or line.endswith(b"\n"):
                yield line
                continue
            while rest := file.readline(MAX_CAPTION_BYTES):
                if rest.endswith(b"\n"):
                    break
            yield b"a line of more than 1 MiB"  # not JSON, so it is reported


def _of_row(row: dict[str, object], folder: Path, used: set[Path]) -> Captioned:
    """Return the picture of one line; ValueError or OSError if it cannot be used."""
    text = caption_of(row) if any(key in row for key in ("text", "caption", "prompt")) else None
    given = row.get("file_name")
    if text is None or given is None:
        raise ValueError("needed are file_name and text")
    names = [given] + ([row["hint_file_name"]] if row.get("hint_file_name") is not None else [])
    files = [_inside(folder, name) for name in names]
    used.update(files)
    return _item(str(given), text, files)


def _inside(folder: Path, name: object) -> Path:
    """Resolve a file named in metadata; ValueError if it is missing, or outside the folder."""
    if not isinstance(name, str):
        raise ValueError(f"a file's name must be a text, got {shorten(name, 60)}")
    parts = os.path.normpath(name)
    if os.path.isabs(parts) or parts.split(os.sep)[0] == os.pardir:
        raise ValueError(f"{shorten(name)!r} leads out of the folder")
    file = folder / parts
    try:
        there = file.is_file()
    except (OSError, ValueError):  # too long, or with invalid characters
        there = False
    if not there:
        raise ValueError(f"{shorten(name)}: there is no such file")
    return file


def _item(name: str, text: str, files: Sequence[Path]) -> Captioned:
    stats = [file.stat() for file in files]
    size, modified = sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats)
    if size > MAX_PICTURE_BYTES:
        raise ValueError(f"{name} has {size:,} bytes, at most {MAX_PICTURE_BYTES:,} are read")
    read = [partial(Path.read_bytes, file) for file in files]
    return Captioned(name, text, read[0], read[1] if len(read) > 1 else None, size, modified)


# Pictures with a caption file each --------------------------------------------------------------------------------


def _of_pairs(files: Sequence[Path], used: set[Path], base: Path, skipped: Skipped) -> Iterator[Captioned]:
    """Yield pictures with a .txt or .json of the same name, except those in `used`, which have captions."""
    pictures = {file for file in files if file.suffix.lower() in picture_suffixes()}
    stems = {file.with_suffix("") for file in pictures}
    hints: dict[Path, Path] = {}  # by the name of their picture, without its suffix
    for file in sorted(pictures):
        of = file.with_suffix("")
        if of.suffix.lower() == ".hint" and of.with_suffix("") in stems:
            hints[of.with_suffix("")] = file
    captions = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".json"}
    captions |= {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    apart = used | set(hints.values())
    for file in files:
        stem, name, suffix = file.with_suffix(""), _name(file, base), file.suffix.lower()
        if file in pictures and file not in apart:
            if (caption := captions.get(stem)) is None:
                skipped.add(f"{name}: there is no caption; needed is {METADATA_FILE} or {stem.name}.txt")
                continue
            try:
                text = _caption_in(caption)
                yield _item(name, text, [file, hints[stem]] if stem in hints else [file])
            except (ValueError, OSError) as error:
                skipped.add(f"{name}: {caption.name}: {error}")
        elif suffix in unread_suffixes():
            skipped.add(f"{name}: pictures of this format are not read; convert it to PNG or JPEG")
        elif suffix == ".txt" and stem not in stems:
            skipped.add(f"{name}: there is no picture of this name")


def _caption_in(file: Path) -> str:
    if file.stat().st_size > MAX_CAPTION_BYTES:
        raise ValueError(f"a caption of {file.stat().st_size:,} bytes is too long")
    return caption_from(file.read_bytes(), file.suffix.lower())
