"""Rows of a job, from JSONL, CSV, Parquet or plain text, in a local file or at any fsspec URL.

A file is read once completely (`scan`) to find the number of rows, where they begin, repeated identifiers, and its
SHA-256. After that, any slice can be read by itself, so that a host reads only the rows that it generates.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
import types
from array import array
from collections.abc import Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from kandinsky_jax.batch import parquet_rows, text_rows
from kandinsky_jax.batch.text_rows import STRIDE, Raw
from kandinsky_jax.common import reading
from kandinsky_jax.common.errors import MAX_MESSAGE, quote, shorten, summarize
from kandinsky_jax.common.remote import connect
from kandinsky_jax.schedulers.base import near

ROW_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
# Columns of a job's file, with their descriptions.
ROW_COLUMNS = {
    "id": "letters, digits, - and _, at most 95; names the picture; default: the row's number",
    "prompt": "what to generate",
    "negative_prompt": "what to avoid",
    "seed": "default: the job's seed plus the row's number",
    "num_images": "pictures of this row, with the same seed",
    "height": "pixels",
    "width": "pixels",
    "steps": "of the decoder",
    "guidance_scale": "of the decoder",
    "prior_steps": "of the prior",
    "prior_guidance_scale": "of the prior",
    "strength": "how far to go from the image",
    "image": "path of a picture to start from",
    "mask": "path of a mask; white is repainted",
    "hint": "path of a depth map",
    "metadata": "any value; stored with the picture, as JSON",
}
USUAL_DEFAULTS = {"num_images": 1, "strength": 0.3}  # of columns for which models recommend nothing


class JobError(ValueError):
    """A job is invalid as a whole; `faults` lists all faults, one per line of the message."""

    def __init__(self, faults: list[str]):
        self.faults = faults
        super().__init__("this job cannot be run:\n  " + summarize(faults, MAX_MESSAGE, separator="\n  "))


class RowNumbers(Set[int]):
    """A set of row numbers as a mask, one byte per row of the file."""

    def __init__(self, which: np.ndarray):
        self._which = which  # bool [rows]

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and 0 <= number < len(self._which) and bool(self._which[number])

    def __iter__(self) -> Iterator[int]:
        return map(int, np.flatnonzero(self._which))

    def __len__(self) -> int:
        return int(self._which.sum())


@dataclass
class RowFile:
    """A scanned file of rows."""

    path: str
    kind: str
    count: int = 0
    sha256: str = ""
    columns: list[str] = field(default_factory=list)  # of a CSV or Parquet file
    taken: Set[int] = frozenset()  # rows that repeat the id of an earlier row
    starts: array = field(default_factory=lambda: array("q"))  # where every STRIDE-th row begins, in bytes
    newline: str = "\n"  # of a text file
    _reader: parquet_rows.ParquetReader | None = field(default=None, repr=False)  # keeps its position
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def read(self, first: int, count: int) -> Iterator[Raw]:
        """Yield the rows first .. first + count - 1.

        Raises:
            JobError: for a file that has changed since it was scanned.
        """
        number, end = first, min(first + count, self.count)
        for raw in self._parquet(first, end) if self.kind == "parquet" else self._text(first, end):
            yield raw
            number += 1
        if number < end:
            raise JobError([f"{self.path} ends before its row {number}; it has changed since this job began"])

    def _text(self, first: int, end: int) -> Iterator[Raw]:
        if first >= end:
            return
        known = first // STRIDE
        with fsspec.open(self.path, "rb") as file:
            file.seek(self.starts[known])
            rows = text_rows.read(self.kind, file, self.newline, self.columns, known * STRIDE)
            yield from itertools.islice(rows, first - known * STRIDE, end - known * STRIDE)

    def _parquet(self, first: int, end: int) -> Iterator[Raw]:
        with self._lock:
            reader, self._reader = self._reader, None
        reader = reader or parquet_rows.ParquetReader(fsspec.open(self.path, "rb").open())
        yield from reader.rows(first, max(0, end - first))
        self._reader = reader  # only if all rows were consumed; otherwise the file is opened again


def parquet() -> types.ModuleType:
    """Import pyarrow's Parquet module, an optional dependency."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise JobError(["Parquet needs pyarrow: pip install 'kandinsky-jax[batch]'"]) from None
    return pyarrow.parquet


def scan(path: str) -> RowFile:
    """Scan a file of rows.

    Raises:
        JobError: for a file that cannot be read, or has no rows, unknown columns or no prompts.
    """
    suffix = "." + path.rsplit(".", 1)[-1].lower()
    if suffix not in ROW_FORMATS:
        raise JobError([f"{path} should end in one of {', '.join(ROW_FORMATS)}"])
    found = RowFile(path, ROW_FORMATS[suffix])
    try:
        fs, local = connect(path)
        if isinstance(fs, LocalFileSystem):
            reading.check_regular(local)  # reading a pipe would block
        marks = _scan_parquet(found) if found.kind == "parquet" else _scan_text(found)
        faults = _faults(found)
        if marks is not None and not faults:
            found.taken = RowNumbers(_repeated_ids(found, marks))
    except JobError:
        raise
    except FileNotFoundError:
        raise JobError([f"there is no file {path}"]) from None
    except reading.ReadError as error:
        raise JobError([reading.of_file(path, error)]) from None
    except Exception as error:  # remote file systems and damaged Parquet files raise many kinds
        raise JobError([f"{path} cannot be read: {type(error).__name__}: {shorten(str(error), 250)}"]) from None
    if faults:
        raise JobError([f"{path}: {fault}" for fault in faults])
    return found


def _faults(found: RowFile) -> list[str]:
    faults = []
    if found.kind in ("csv", "parquet"):
        unknown = [name for name in found.columns if name not in ROW_COLUMNS]
        twice = sorted({name for name in found.columns if found.columns.count(name) > 1})
        faults += _unknown(unknown)
        if twice:
            faults.append(f"column {', '.join(map(repr, twice))} is there more than once")
        if "prompt" not in found.columns:
            faults.append("the column 'prompt' is missing")
    if not found.count:
        faults.append("it has no rows")
    return faults


def _unknown(names: list[str]) -> list[str]:
    """List faults for unknown columns."""
    for mark, called in ((";", "semicolons"), ("\t", "tabs")):
        if any(mark in name and not ROW_COLUMNS.keys().isdisjoint(name.split(mark)) for name in names):
            return [f"its columns are separated by {called}; needed are commas"]
    faults, others = [], []
    for name in names:
        hint = near(name.strip().lower(), ROW_COLUMNS)
        if hint.startswith("did you mean"):
            faults.append(f"there is no column {quote(name, 40)}; {hint}")
        else:
            others.append(quote(name, 40))
    if others:
        faults.append(f"there is no column {summarize(others, 120, ', ')}; there are {', '.join(ROW_COLUMNS)}")
    return faults


def _scan_text(found: RowFile) -> np.ndarray:
    digest = hashlib.sha256()
    with fsspec.open(found.path, "rb") as file:
        layout = text_rows.TextLayout.of(file)
        scanned = text_rows.scan(found.kind, file, layout, digest.update, default_id)
    found.columns, found.starts, found.newline = scanned.columns, array("q", scanned.starts), layout.newline
    found.sha256, found.count = digest.hexdigest(), len(scanned.marks)
    return scanned.marks


def _scan_parquet(found: RowFile) -> np.ndarray | None:
    parquet()
    with ThreadPoolExecutor(1) as thread, fsspec.open(found.path, "rb") as file:
        digest = thread.submit(_sha256, found.path)
        found.columns, found.count, marks = parquet_rows.marks(file)
        found.sha256 = digest.result()
    return marks


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with fsspec.open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def default_id(number: int) -> str:
    """Return the identifier of a row without one."""
    return f"{number:09d}"


def _repeated_ids(found: RowFile, marks: np.ndarray) -> np.ndarray:
    """Find rows that repeat an earlier row's id, bool `[rows]`; ids with equal hashes are compared themselves."""
    order = np.sort(marks)
    equal = np.unique(order[1:][order[1:] == order[:-1]])
    taken = np.zeros(len(marks), bool)
    if not len(equal):
        return taken
    alike = np.isin(marks, equal)
    known: set[str] = set()
    for first in range(0, len(marks), STRIDE):
        if not alike[first : first + STRIDE].any():
            continue
        for raw in found.read(first, STRIDE):
            if alike[raw.number]:
                name = raw.values.get("id")
                name = default_id(raw.number) if name is None or name == "" else str(name)
                taken[raw.number] = name in known
                known.add(name)
    return taken
