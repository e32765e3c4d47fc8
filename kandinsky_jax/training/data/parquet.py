"""Parquet files as written by `datasets`: `image` holds bytes, `text` the caption; `hint`, `rejected_image` may too.

Parquet is read by row groups, while training needs rows in any order. So a row group's pictures are copied to a
temporary file on first access, and read from there one by one; memory holds few pictures, whatever the size of the row
groups.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from kandinsky_jax.common.errors import shorten
from kandinsky_jax.training.data.captions import clean
from kandinsky_jax.training.data.files import DataFile
from kandinsky_jax.training.data.items import CAPTION_KEYS, MAX_PICTURE_BYTES, Captioned, Skipped

if TYPE_CHECKING:  # part of the extra `train`
    import pyarrow as pa
    import pyarrow.parquet as pq

PICTURES_AT_ONCE = 16
CAPTIONS_AT_ONCE = 4096


def read_parquet(
    file: DataFile, skipped: Skipped, scratch: Path | None = None, needs_captions: bool = True
) -> Iterator[Captioned]:
    """Yield the captioned pictures of a Parquet file, reading only its index and captions.

    Args:
        file: the file.
        skipped: collects unused data.
        scratch: a folder for temporary files; None, or a missing one, is the system's. The files are unnamed and
            removed with the process.
        needs_captions: see `listing`.
    """
    name = str(file.name)
    if importlib.util.find_spec("pyarrow") is None:
        skipped.add(f"{name}: Parquet needs pyarrow; pip install pyarrow")
        return
    try:
        parquet = _open(file)
        names = set(parquet.schema_arrow.names)
        text = next((key for key in CAPTION_KEYS if key in names), None)
        missing = [] if "image" in names else ["image"]
        missing += ["text"] if text is None and needs_captions else []
        if missing:
            skipped.add(f"{name}: there is no column {' and '.join(missing)}")
            return
        columns = tuple(column for column in ("image", "hint", "rejected_image") if column in names)
        for column in columns:
            _check_bytes(parquet.schema_arrow.field(column).type, column)
        pictures, (_, modified) = PictureReader(file, columns, scratch), file.stat()
        groups = parquet.metadata.num_row_groups
    except Exception as error:  # damaged files raise many kinds besides pyarrow's errors
        skipped.add(f"{name}: it cannot be read: {shorten(str(error), 120)}")
        return
    number = 0
    for group in range(groups):
        first = number
        try:
            rows = parquet.metadata.row_group(group).num_rows
            number += rows
            size = _bytes_of(parquet, group, columns)
            captions: Iterable[object] = [""] * rows if text is None else _captions(parquet, group, text)
            for row, caption in enumerate(captions):
                full = f"{name}, row {first + row}"
                if not isinstance(caption, str):
                    skipped.add(f"{full}: needed are a picture's bytes and a text")
                    continue
                read = {column: partial(pictures.read, column, group, row) for column in columns}
                others = (read.get("hint"), size, modified, read.get("rejected_image"))
                yield Captioned(full, clean(caption), read["image"], *others)
        except Exception as error:
            skipped.add(f"{name}: row group {group} cannot be read: {shorten(str(error), 120)}")


def _open(file: DataFile) -> pq.ParquetFile:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(
        file.source(),
        memory_map=False,
        pre_buffer=False,
        buffer_size=file.request_bytes,
        page_checksum_verification=True,
    )


def _check_bytes(kind: pa.DataType, column: str) -> None:
    import pyarrow

    if pyarrow.types.is_struct(kind):
        if kind.get_field_index("bytes") < 0:
            raise ValueError(f"the column {column} has no bytes")
        kind = kind.field("bytes").type
    if not (pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)):
        raise ValueError(f"the column {column} must be bytes, is {shorten(kind, 60)}")


def _bytes_of(file: pq.ParquetFile, group: int, columns: tuple[str, ...]) -> int:
    """Return the compressed size of some columns in a row group."""
    about = file.metadata.row_group(group)
    chunks = [about.column(i) for i in range(about.num_columns)]
    return sum(chunk.total_compressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns)


def _captions(file: pq.ParquetFile, group: int, column: str) -> Iterator[object]:
    for batch in file.iter_batches(CAPTIONS_AT_ONCE, row_groups=[group], columns=[column], use_threads=False):
        for value in batch.column(0):
            try:
                yield value.as_py()
            except UnicodeDecodeError:
                yield None


class PictureReader:
    """Random access to the pictures of a Parquet file, from any thread.

    Args:
        file: the file.
        columns: those with pictures.
        scratch: a folder for temporary files; None is the system's.
    """

    def __init__(self, file: DataFile, columns: tuple[str, ...], scratch: Path | None = None):
        self._file, self._columns, self._scratch = file, columns, scratch
        self._lock = threading.Lock()
        self._copy: IO[bytes] | None = None
        self._offsets: dict[int, np.ndarray | None] = {}  # by row group, [columns, rows, (offset, length)]
        self._faults: dict[int, str] = {}  # of row groups that could not be read completely

    def read(self, column: str, group: int, row: int) -> bytes:
        """Return the bytes of one picture.

        Raises:
            OSError, ValueError: for an empty cell or a damaged file.
        """
        with self._lock:
            if group not in self._offsets:
                self._offsets[group] = self._copied(group)
            offsets = self._offsets[group]
            if offsets is None:
                return self._streamed(column, group, row)
            offset, length = (int(x) for x in offsets[self._columns.index(column), row])
            if length < 0:
                raise ValueError(self._faults.get(group, f"the column {column} is empty"))
            assert self._copy is not None  # made with the first offsets
            self._copy.seek(offset)
            return self._copy.read(length)

    def _copied(self, group: int) -> np.ndarray | None:
        """Copy a row group to the temporary file; return None if the disk is too small."""
        parquet = _open(self._file)
        about = parquet.metadata.row_group(group)
        needed = sum(about.column(i).total_uncompressed_size for i in range(about.num_columns))
        scratch = self._scratch if self._scratch is not None and self._scratch.is_dir() else tempfile.gettempdir()
        if shutil.disk_usage(scratch).free < 2 * needed:
            warnings.warn(
                f"{self._file}: the disk has no space for {needed:,} bytes of a copy, so each picture takes a pass "
                "over its row group; free some space, or write smaller row groups",
                stacklevel=2,
            )
            return None
        if self._copy is None:
            self._copy = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 (closed with this object)
            weakref.finalize(self, self._copy.close)
        self._copy.seek(0, 2)
        offset, offsets = self._copy.tell(), np.full((len(self._columns), about.num_rows, 2), -1, np.int64)
        try:
            for row, values in self._rows(parquet, group):
                for which, data in enumerate(values):
                    if data is not None:
                        self._copy.write(data)
                        offsets[which, row] = offset, len(data)
                        offset += len(data)
        except Exception as error:  # damaged files raise many kinds besides pyarrow's errors
            self._faults[group] = f"row group {group} is damaged: {shorten(str(error), 120)}"
        return offsets

    def _streamed(self, column: str, group: int, row: int) -> bytes:
        for number, values in self._rows(_open(self._file), group):
            if number == row and (data := values[self._columns.index(column)]) is not None:
                return bytes(data)
        raise ValueError(f"the column {column} is empty")

    def _rows(self, file: pq.ParquetFile, group: int) -> Iterator[tuple[int, list[bytes | None]]]:
        """Yield each row's number and the bytes of its columns, None for empty or too large cells."""
        import pyarrow
        import pyarrow.compute

        number = 0
        batches = file.iter_batches(
            PICTURES_AT_ONCE, row_groups=[group], columns=list(self._columns), use_threads=False
        )
        for batch in batches:
            found = []
            for column in self._columns:
                array = batch.column(batch.schema.get_field_index(column))
                if pyarrow.types.is_struct(array.type):
                    array = pyarrow.compute.struct_field(array, "bytes")
                found.append([value.as_buffer() for value in array])
            for values in zip(*found, strict=True):
                yield number, [data if data is not None and len(data) <= MAX_PICTURE_BYTES else None for data in values]
                number += 1
