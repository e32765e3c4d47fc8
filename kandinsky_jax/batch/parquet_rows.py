"""Rows of a Parquet file, with few of them in memory whatever the size of its row groups."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from kandinsky_jax.batch.text_rows import STRIDE, Raw
from kandinsky_jax.common.errors import shorten

if TYPE_CHECKING:  # part of the extra `batch`
    import pyarrow as pa
    import pyarrow.parquet as pq

BATCH = 1 << 16  # rows whose ids are looked at together
BUFFER = 1 << 20  # bytes of a column that are read at once
_WORD = 8
_PRIME = np.uint64(0x9E3779B97F4A7C15)


def open_parquet(file: BinaryIO) -> pq.ParquetFile:
    """Open a `ParquetFile` that reads its columns in pieces."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False)


class ParquetReader:
    """Random access to the rows of a file; fastest in ascending order.

    Damaged rows, up to the end of their row group, are yielded with a fault.
    """

    def __init__(self, file: BinaryIO):
        self._file, self._table = file, open_parquet(file)
        weakref.finalize(self, file.close)
        meta = self._table.metadata
        self._begins = np.cumsum([0, *(meta.row_group(i).num_rows for i in range(meta.num_row_groups))])
        self._group, self._next = -1, 0  # the row group that is being read, and the number of its next row
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._batch: pa.RecordBatch | None = None
        self._begin = 0  # the last batch, and the number of its first row
        self._damage: dict[int, tuple[int, str]] = {}  # by row group: the first row that cannot be read, and why

    def rows(self, first: int, count: int) -> Iterator[Raw]:
        """Yield the rows first .. first + count - 1, up to the end of the file."""
        number, end = first, min(first + count, int(self._begins[-1]))
        while number < end:
            group = int(np.searchsorted(self._begins, number, side="right")) - 1
            part = self._part(group, number, end)
            if part is None:
                fault = f"cannot be read: row group {group} of the file is damaged ({self._damage[group][1]})"
                last = min(end, int(self._begins[group + 1]))
                yield from (Raw(row, {}, fault) for row in range(number, last))
                number = last
            else:
                columns = {name: _values(part.column(name)) for name in part.schema.names}
                for i in range(part.num_rows):
                    yield Raw(number + i, {name: values[i] for name, values in columns.items()})
                number += part.num_rows

    def _part(self, group: int, number: int, end: int) -> pa.RecordBatch | None:
        """Return some rows from `number` on, at most to `end`; None if they are damaged."""
        for attempt in range(2):  # the second one repairs transmission errors
            if group in self._damage and number >= self._damage[group][0]:
                return None
            try:
                self._load(group, number)
            except (OSError, ValueError, NotImplementedError) as error:
                if isinstance(error, OSError) and not _is_damage(error):
                    raise
                if attempt:
                    self._damage[group] = (self._next, shorten(str(error)))
                self._group, self._table = -1, open_parquet(self._file)
            else:
                assert self._batch is not None
                skipped = number - self._begin
                return self._batch.slice(skipped, min(end - number, self._batch.num_rows - skipped))
        return None

    def _load(self, group: int, number: int) -> None:
        """Advance to the batch that contains row `number`."""
        if group == self._group and self._begin <= number < self._next:
            return
        if group != self._group or number < self._next:
            self._group, self._begin, self._next = group, 0, int(self._begins[group])
            self._batch, self._batches = None, self._table.iter_batches(batch_size=STRIDE, row_groups=[group])
        for batch in self._batches:
            self._batch, self._begin, self._next = batch, self._next, self._next + batch.num_rows
            if number < self._next:
                return
        raise ValueError("it has fewer rows than it says")


def _is_damage(error: OSError) -> bool:
    """Return whether pyarrow raised the error for damaged data, rather than a file system."""
    return type(error) is OSError and error.errno is None


def _values(column: pa.Array) -> list[object]:
    """Convert a column to Python objects, the same with and without pandas."""
    if not _has_times(column.type):
        with contextlib.suppress(ValueError, OverflowError):  # text that is not UTF-8
            return column.to_pylist()
    return [_value(scalar) for scalar in column]


def _has_times(kind: pa.DataType) -> bool:
    import pyarrow.types

    if pyarrow.types.is_dictionary(kind):
        return _has_times(kind.value_type)
    if pyarrow.types.is_nested(kind):
        return any(_has_times(kind.field(i).type) for i in range(kind.num_fields))
    return pyarrow.types.is_temporal(kind)


def _value(scalar: pa.Scalar) -> object:
    """Convert a value, with times in ISO 8601 (pyarrow's conversion of nanoseconds needs pandas) and surrogates for
    bytes that are not UTF-8."""
    import pyarrow.types

    kind = scalar.type
    if not scalar.is_valid:
        return None
    if pyarrow.types.is_dictionary(kind):
        return _value(scalar.value)
    if pyarrow.types.is_map(kind):
        return [[_value(entry["key"]), _value(entry["value"])] for entry in scalar.values]
    if pyarrow.types.is_struct(kind):
        return {name: _value(scalar[i]) for i, name in enumerate(scalar)}
    if pyarrow.types.is_nested(kind):
        return [_value(item) for item in scalar.values]
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind):
        return scalar.as_buffer().to_pybytes().decode("utf-8", errors="surrogateescape")
    return _time(scalar) if pyarrow.types.is_temporal(kind) else scalar.as_py()


def _time(scalar: pa.Scalar) -> str:
    import pyarrow.types

    kind = scalar.type
    if pyarrow.types.is_date32(kind):
        return str(np.datetime64(scalar.value, "D"))
    if pyarrow.types.is_date64(kind):
        return str(np.datetime64(scalar.value, "ms").astype("datetime64[D]"))
    if pyarrow.types.is_timestamp(kind):  # with a time zone, it is an instant in UTC
        return str(np.datetime64(scalar.value, kind.unit)) + ("Z" if kind.tz else "")
    if pyarrow.types.is_time(kind):
        return str(np.datetime64(scalar.value, kind.unit)).partition("T")[2]
    if pyarrow.types.is_duration(kind):
        return f"{scalar.value} {kind.unit}"
    return str(scalar.as_py())


# Identifiers ------------------------------------------------------------------------------------------------------


def marks(file: BinaryIO) -> tuple[list[str], int, np.ndarray | None]:
    """Return the columns, the number of rows, and hashes of the rows' ids, int64 `[rows]`.

    The hashes are None without a column of ids.
    """
    table = open_parquet(file)
    columns = list(table.schema_arrow.names)
    count = sum(table.metadata.row_group(i).num_rows for i in range(table.num_row_groups))
    if columns.count("id") != 1:
        return columns, count, None
    found, number = [np.zeros(0, np.int64)], 0
    for batch in table.iter_batches(batch_size=BATCH, columns=["id"]):
        found.append(_marks(batch.column(0), number))
        number += batch.num_rows
    if number != count:
        raise ValueError(f"it has {number} ids for {count} rows")
    return columns, count, np.concatenate(found)


def _marks(column: pa.Array, number: int) -> np.ndarray:
    """Hash ids to 64 bits; a row without one has its number in nine digits as id."""
    import pyarrow
    import pyarrow.compute

    try:
        names = pyarrow.compute.cast(column, pyarrow.large_string())
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError):
        names = pyarrow.nulls(len(column), pyarrow.large_string())  # of a type that no id can have
    missing = pyarrow.compute.or_kleene(names.is_null(), pyarrow.compute.equal(names, ""))
    if missing.true_count:
        numbers = pyarrow.array(np.arange(number, number + len(names))).cast(pyarrow.large_string())
        numbers = pyarrow.compute.utf8_lpad(numbers, 9, "0")
        names = pyarrow.compute.if_else(missing, numbers, names)
    ends = np.frombuffer(names.buffers()[1], np.int64)[names.offset : names.offset + len(names) + 1]
    data = np.frombuffer(names.buffers()[2] or b"", np.uint8)[ends[0] : ends[-1]]
    return _hash(data, ends[:-1] - ends[0], np.diff(ends))


def _hash(data: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Hash the strings `data[start : start + length]` to int64, vectorised over all of them; meant for short ids."""
    padded = np.concatenate([data, np.zeros(2 * _WORD, np.uint8)])
    words = np.ndarray(len(padded) - _WORD, np.dtype("<u8"), padded.data, strides=(1,))  # one from every byte on
    result = lengths.astype(np.uint64)
    for begin in range(0, min(int(lengths.max(initial=0)), 256), _WORD):
        which = np.flatnonzero(lengths > begin)
        word = words[starts[which] + begin]
        unused = np.maximum(0, begin + _WORD - lengths[which]) * 8  # bits that belong to the next string
        word = word << unused.astype(np.uint64)
        mixed = (result[which] ^ word) * _PRIME
        result[which] = mixed ^ (mixed >> np.uint64(32))
    return result.view(np.int64)
