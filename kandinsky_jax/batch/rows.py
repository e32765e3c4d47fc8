"""A job's rows, read from JSONL, CSV, Parquet or plain text, on this machine or at any URL that fsspec knows.

A file is read whole once (`scan`): how many rows it has, where they begin, which identifiers are taken twice, and its
SHA-256. After that, any slice of it is read by itself, so that a host reads what it draws.
"""

from __future__ import annotations

import csv
import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

import fsspec
import numpy as np

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
STRIDE = 256  # rows from one known place of a text file to the next
# The columns that a job may have, and what they mean.
COLUMNS = {
    "id": "letters, digits, - and _; names the picture; default: the row's number",
    "prompt": "what to draw",
    "negative_prompt": "what to keep away from",
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
    "metadata": "anything; is copied beside the picture",
}


class JobError(ValueError):
    """What is wrong with a job as a whole, one fault a line."""

    def __init__(self, faults: list[str]):
        self.faults = faults
        super().__init__("this job cannot be run:\n  " + "\n  ".join(faults))


class Raw(NamedTuple):
    """A row as it was found: its values, or what is wrong with it."""

    number: int
    values: dict[str, Any]
    fault: str | None = None


@dataclass
class RowFile:
    """A scanned file of rows."""

    path: str
    kind: str
    count: int = 0
    sha256: str = ""
    columns: list[str] = field(default_factory=list)  # of a CSV or Parquet file
    taken: frozenset[int] = frozenset()  # rows whose id an earlier row has
    starts: array = field(default_factory=lambda: array("q"))  # where every STRIDE-th row begins, in bytes

    def read(self, first: int, count: int) -> Iterator[Raw]:
        """The rows first .. first + count - 1."""
        count = min(count, self.count - first)
        rows = self._parquet(first) if self.kind == "parquet" else self._text(first)
        for _ in range(count):
            yield next(rows)

    def _text(self, first: int) -> Iterator[Raw]:
        known = first // STRIDE
        with fsspec.open(self.path, "rb") as file:
            file.seek(self.starts[known])
            for number, _, values, fault in _parse(self.kind, file, self.columns, known * STRIDE):
                if number >= first:
                    yield Raw(number, values, fault)

    def _parquet(self, first: int) -> Iterator[Raw]:
        with fsspec.open(self.path, "rb") as file:
            table = parquet().ParquetFile(file)
            number = 0
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                if number + rows <= first:
                    number += rows
                    continue
                for part in table.iter_batches(batch_size=STRIDE, row_groups=[group]):
                    for values in part.slice(max(0, first - number)).to_pylist():
                        yield Raw(max(number, first), values)
                        number = max(number, first) + 1


def parquet() -> Any:
    """pyarrow's reader and writer of Parquet, which only those need who use that format."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise JobError(["Parquet needs pyarrow: pip install 'kandinsky-jax[batch]'"]) from None
    return pyarrow.parquet


def scan(path: str) -> RowFile:
    """Look through a file of rows.

    Raises:
        JobError: where it cannot be read, has no row, or has columns that do not exist, or no prompts.
    """
    suffix = "." + path.rsplit(".", 1)[-1].lower()
    if suffix not in FORMATS:
        raise JobError([f"{path} should end in one of {', '.join(FORMATS)}"])
    found = RowFile(path, FORMATS[suffix])
    try:
        _scan_parquet(found) if found.kind == "parquet" else _scan_text(found)
    except JobError:
        raise
    except FileNotFoundError:
        raise JobError([f"there is no file {path}"]) from None
    except Exception as error:  # whatever a remote file system or a broken Parquet file raises
        raise JobError([f"{path} cannot be read: {type(error).__name__}: {error}"]) from None
    if faults := _faults(found):
        raise JobError([f"{path}: {fault}" for fault in faults])
    return found


def _faults(found: RowFile) -> list[str]:
    faults = []
    if found.kind in ("csv", "parquet"):
        unknown = [name for name in found.columns if name not in COLUMNS]
        twice = sorted({name for name in found.columns if found.columns.count(name) > 1})
        if unknown:
            faults.append(f"there is no column {', '.join(map(repr, unknown))}; there are {', '.join(COLUMNS)}")
        if twice:
            faults.append(f"column {', '.join(map(repr, twice))} is there more than once")
        if "prompt" not in found.columns:
            faults.append("the column 'prompt' is missing")
    if not found.count:
        faults.append("it has no rows")
    return faults


def _scan_text(found: RowFile) -> None:
    digest, ids = hashlib.sha256(), array("Q")
    with fsspec.open(found.path, "rb") as file:
        lines = _Hashed(file, digest)
        for number, start, values, _ in _parse(found.kind, lines, found.columns, 0):
            if number % STRIDE == 0:
                found.starts.append(start)
            ids.append(_mark(values.get("id"), number))
            found.count = number + 1
    found.sha256, found.taken = digest.hexdigest(), _repeated(ids)


def _scan_parquet(found: RowFile) -> None:
    digest, ids = hashlib.sha256(), array("Q")
    with fsspec.open(found.path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        file.seek(0)
        table = parquet().ParquetFile(file)
        found.columns, found.count = list(table.schema_arrow.names), table.metadata.num_rows
        if "id" in found.columns:
            for part in table.iter_batches(columns=["id"]):
                for value in part.column(0).to_pylist():
                    ids.append(_mark(value, len(ids)))
    found.sha256, found.taken = digest.hexdigest(), _repeated(ids)


def _mark(name: Any, number: int) -> int:
    """64 bits of an identifier, so that a million of them fit into memory; rows without one have their number."""
    text = default_id(number) if name is None or name == "" else str(name)
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest(), "little")


def default_id(number: int) -> str:
    """The identifier of a row that names none."""
    return f"{number:09d}"


def _repeated(ids: array) -> frozenset[int]:
    marks = np.frombuffer(ids, np.uint64) if len(ids) else np.zeros(0, np.uint64)
    _, first = np.unique(marks, return_index=True)
    return frozenset(np.setdiff1d(np.arange(len(marks)), first).tolist())


class _Hashed:
    """The lines of a file, each of them hashed on its way."""

    def __init__(self, file: BinaryIO, digest: Any):
        self._file, self._digest = file, digest

    def readline(self) -> bytes:
        line = self._file.readline()
        self._digest.update(line)
        return line

    def tell(self) -> int:
        return self._file.tell()


def _parse(
    kind: str, file: Any, columns: list[str], number: int
) -> Iterator[tuple[int, int, dict[str, Any], str | None]]:
    """Rows of a text file from where it stands: (number, where it begins, values, fault).

    Bytes that are not UTF-8 become surrogates here; the check of a row finds them.
    """
    lines = _Lines(file)
    if kind == "csv":
        reader = csv.reader(lines)
        if not columns:
            columns += [name.strip() for name in next(reader, [])]
            columns[:1] = [name.removeprefix("\ufeff") for name in columns[:1]]
        while True:
            start = file.tell()
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, start, {}, f"is not CSV: {error}"
            else:
                if not cells:  # an empty line
                    continue
                fault = None if len(cells) == len(columns) else f"has {len(cells)} cells, the header {len(columns)}"
                values = {name: cell for name, cell in zip(columns, cells, strict=False) if cell != ""}
                yield number, start, {} if fault else values, fault
            number += 1
    for start, line in lines.with_places():
        if not line.strip():
            continue
        if kind == "text":
            yield number, start, {"prompt": line.strip()}, None
        else:
            yield number, start, *_json(line)
        number += 1


def _json(line: str) -> tuple[dict[str, Any], str | None]:
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {}, f"is not JSON: {error}"
    if not isinstance(parsed, dict):
        return {}, f"is a JSON {type(parsed).__name__}, needed is an object"
    return parsed, None


class _Lines:
    """The lines of a binary file as text, read one by one, so that the file stands behind the last of them."""

    def __init__(self, file: Any):
        self._file = file

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._file.readline()
        if not line:
            raise StopIteration
        return line.decode("utf-8", errors="surrogateescape")

    def with_places(self) -> Iterator[tuple[int, str]]:
        while True:
            start = self._file.tell()
            try:
                line = next(self)
            except StopIteration:
                return
            yield start, line.removeprefix("\ufeff") if start == 0 else line
