"""Finding captioned pictures in folders, tars and Parquet files; pictures are read later."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from kandinsky_jax.common.errors import shorten
from kandinsky_jax.training.data.captions import MARKS, caption_from, caption_of, decode, parse_json
from kandinsky_jax.training.data.files import DataFile, Folder, in_order, open_folder
from kandinsky_jax.training.data.items import (
    CAPTION_KEYS,
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
ARCHIVES_AT_ONCE = 16  # of remote ones
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
ARCHIVES = (".zip", ".7z", ".rar", ".arrow", ".feather", ".tfrecord", ".h5", ".lmdb", ".mdb")


def listing(
    path: str | os.PathLike[str],
    *,
    exclude: Sequence[str | os.PathLike[str]] = (),
    scratch: Path | None = None,
    needs_captions: bool = True,
) -> Listing:
    """List the captioned pictures of a folder and its subfolders, or of one .tar or .parquet file.

    All of these may be mixed: `metadata.jsonl` (`file_name`, and `text`, `caption` or `prompt`), WebDataset
    tars, Parquet files, and pictures with a .txt or .json of their name. A depth map is `hint_file_name` in
    metadata.jsonl, `KEY.hint.png` next to `KEY.png` in a folder or a tar, and the column `hint` in Parquet. The picture
    to which this one is preferred is `rejected_file_name`, and in Parquet the column `rejected_image`. Files with a
    suffix of any format in `images.READABLE`, in upper or lower case, are pictures. Names that begin with a dot are
    hidden, and skipped.

    Args:
        path: the folder or file, a local path or an fsspec URL such as `gs://bucket/photos`.
        exclude: folders to skip, such as that of the results; paths or URLs.
        scratch: a folder for temporary files (see `kandinsky_jax.training.data.parquet`).
        needs_captions: skip pictures without a caption; otherwise theirs is empty.
    Returns:
        the usable pictures, and in `skipped` unused data: pictures without a caption, captions without a picture,
        damaged files.
    Raises:
        DataError: if there is no usable picture.
    """
    skipped = Skipped()
    try:
        folder = open_folder(path)
        files = list(folder.files(exclude, skipped))
    except (OSError, ValueError) as error:
        raise DataError(os.fspath(path), [shorten(getattr(error, "strerror", None) or str(error))]) from None
    used: set[PurePosixPath] = set()
    found: list[Captioned] = []
    for file in files:
        if file.name.name == METADATA_FILE:
            found += _of_metadata(file, folder, used, skipped, needs_captions)
    for is_parquet in (False, True):
        some = [file for file in files if (file.name.suffix.lower() == ".parquet") == is_parquet]
        found += _of_archives(some, folder, skipped, scratch, needs_captions)
    found += _of_pairs(files, used, folder, skipped, needs_captions)
    items = []
    for item in found:
        if item.text.strip() or not needs_captions:
            items.append(item)
        else:
            skipped.add(f"{item.name}: its caption is empty")
    if not items:
        nothing = (
            f"there is no picture in it; looked for {METADATA_FILE}, .tar, .parquet, and pictures with a .txt each"
        )
        raise DataError(os.fspath(path), skipped.faults or [nothing])
    return Listing(items, skipped)


def _of_archives(
    files: Sequence[DataFile], folder: Folder, skipped: Skipped, scratch: Path | None, needs_captions: bool
) -> Iterator[Captioned]:
    """Yield the captioned pictures of all tars and Parquet files; several remote ones are read at once."""

    def read(file: DataFile) -> tuple[list[Captioned], Skipped]:
        own = Skipped()
        return list(_of_archive(file, own, scratch, needs_captions)), own

    for found, own in in_order(read, files, min(folder.threads, ARCHIVES_AT_ONCE)):
        skipped.merge(own)
        yield from found


def _of_archive(file: DataFile, skipped: Skipped, scratch: Path | None, needs_captions: bool) -> Iterator[Captioned]:
    suffix = file.name.suffix.lower()
    if suffix == ".tar":
        yield from read_tar(file, skipped, needs_captions)
    elif suffix == ".parquet":
        yield from read_parquet(file, skipped, scratch, needs_captions)
    elif file.name.name.lower().endswith(COMPRESSED_SUFFIXES):
        skipped.add(f"{file.name}: a compressed tar is not read; decompress it")
    elif suffix in ARCHIVES:
        skipped.add(f"{file.name}: files of this kind are not read; unpack it, or write tars or Parquet")
    elif file.name.name == "metadata.csv":
        skipped.add(f"{file.name}: is not read; needed is {METADATA_FILE}")


# metadata.jsonl ---------------------------------------------------------------------------------------------------


def _of_metadata(
    file: DataFile, folder: Folder, used: set[PurePosixPath], skipped: Skipped, needs_captions: bool
) -> Iterator[Captioned]:
    try:
        for number, line in enumerate(_lines(file), 1):
            if not line.strip():
                continue
            try:
                yield _of_row(parse_json(line), folder, file.name.parent, used, needs_captions)
            except (ValueError, OSError) as error:
                skipped.add(f"{file.name}, line {number}: {error}")
    except (ValueError, OSError) as error:
        skipped.add(f"{file.name}: {error}")


def _lines(metadata: DataFile) -> Iterator[bytes | str]:
    """Yield the lines of a file, split at line feeds only, since JSON may contain characters such as U+2028."""
    with metadata.open() as file:
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


def _of_row(
    row: dict[str, object], folder: Folder, below: PurePosixPath, used: set[PurePosixPath], needs_captions: bool
) -> Captioned:
    """Return the picture of one line; ValueError or OSError if it cannot be used."""
    text = None if needs_captions else ""
    if any(key in row for key in CAPTION_KEYS):
        text = caption_of(row)
    given = row.get("file_name")
    if text is None or given is None:
        raise ValueError("needed are file_name and text")
    names = {"read": given, "hint": row.get("hint_file_name"), "rejected": row.get("rejected_file_name")}
    files = {part: _inside(folder, below, name) for part, name in names.items() if name is not None}
    used.update(file.name for file in files.values())
    return _item(str(given), text, files)


def _inside(folder: Folder, below: PurePosixPath, name: object) -> DataFile:
    """Find a file named in metadata; ValueError if it is missing, or outside the folder of the metadata.

    Args:
        below: the folder of the metadata, relative to `folder`.
    """
    if not isinstance(name, str):
        raise ValueError(f"a file's name must be a text, got {shorten(name, 60)}")
    parts = os.path.normpath(name)
    if os.path.isabs(parts) or parts.split(os.sep)[0] == os.pardir:
        raise ValueError(f"{shorten(name)!r} leads out of the folder")
    if (file := folder.find(below / Path(parts).as_posix())) is None:
        raise ValueError(f"{shorten(name)}: there is no such file")
    return file


def _item(name: str, text: str, files: Mapping[str, DataFile]) -> Captioned:
    """Return a captioned picture.

    Args:
        files: by the fields of `Captioned` that read them.
    """
    stats = [file.stat() for file in files.values()]
    size, modified = sum(size for size, _ in stats), max(modified for _, modified in stats)
    if size > MAX_PICTURE_BYTES:
        raise ValueError(f"{name} has {size:,} bytes, at most {MAX_PICTURE_BYTES:,} are read")
    read = {part: file.read for part, file in files.items()}
    return Captioned(name, text, size=size, modified=modified, **read)


# Pictures with a caption file each --------------------------------------------------------------------------------


def _of_pairs(
    files: Sequence[DataFile], used: set[PurePosixPath], folder: Folder, skipped: Skipped, needs_captions: bool
) -> Iterator[Captioned]:
    """Yield pictures with a .txt or .json of the same name, except those in `used`, which have captions."""
    pictures = {file.name: file for file in files if file.name.suffix.lower() in picture_suffixes()}
    stems = {name.with_suffix("") for name in pictures}
    hints: dict[PurePosixPath, DataFile] = {}  # by the name of their picture, without its suffix
    for name in sorted(pictures):
        of = name.with_suffix("")
        if of.suffix.lower() == ".hint" and of.with_suffix("") in stems:
            hints[of.with_suffix("")] = pictures[name]
    captions = {file.name.with_suffix(""): file for file in files if file.name.suffix.lower() == ".json"}
    captions |= {file.name.with_suffix(""): file for file in files if file.name.suffix.lower() == ".txt"}
    apart = used | {hint.name for hint in hints.values()}
    stems_to_read = {name.with_suffix("") for name in pictures if name not in apart}
    to_read = [caption for stem, caption in captions.items() if stem in stems_to_read]
    texts = dict(zip([file.name for file in to_read], in_order(_caption_in, to_read, folder.threads), strict=True))
    for file in files:
        stem, suffix = file.name.with_suffix(""), file.name.suffix.lower()
        if file.name in pictures and file.name not in apart:
            caption = captions.get(stem)
            if caption is None and needs_captions:
                skipped.add(f"{file.name}: there is no caption; needed is {METADATA_FILE} or {stem.name}.txt")
                continue
            text = "" if caption is None else texts[caption.name]
            try:
                if isinstance(text, Exception):
                    raise text
                hint = {"hint": hints[stem]} if stem in hints else {}
                yield _item(str(file.name), text, {"read": file, **hint})
            except (ValueError, OSError) as error:
                about = "" if caption is None else f"{caption.name.name}: "
                skipped.add(f"{file.name}: {about}{error}")
        elif suffix in unread_suffixes():
            skipped.add(f"{file.name}: pictures of this format are not read; convert it to PNG or JPEG")
        elif suffix == ".txt" and stem not in stems:
            skipped.add(f"{file.name}: there is no picture of this name")


def _caption_in(file: DataFile) -> str | Exception:
    """Return the caption in a file, or the error of reading it."""
    try:
        size, _ = file.stat()
        if size > MAX_CAPTION_BYTES:
            raise ValueError(f"a caption of {size:,} bytes is too long")
        return caption_from(file.read(), file.name.suffix.lower())
    except (ValueError, OSError) as error:
        return error
