"""Rows of a text file (JSONL, CSV or plain text), read in blocks so that memory does not grow with the file.

Lines end with LF, CR LF, or CR alone in a file without LF; characters such as U+2028 are part of a line. Bytes that are
not UTF-8 become surrogates, which the validation of a row reports.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from kandinsky_jax.common.errors import quote, shorten
from kandinsky_jax.common.reading import ReadError

if TYPE_CHECKING:  # csv names no type of its readers
    from _csv import Reader

BLOCK = 1 << 17  # bytes that are read at once
MAX_LINE = 1 << 24  # bytes; the rest of a longer line is skipped, to bound memory
STRIDE = 256  # rows from one known position of a file to the next
# First bytes of files in other encodings.
BYTE_ORDER_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
UTF8_MARK = b"\xef\xbb\xbf"


class Raw(NamedTuple):
    """A row as read: its values, or a fault."""

    number: int
    values: Mapping[str, object]
    fault: str | None = None


class TextLayout(NamedTuple):
    """Layout of a text file, detected from its first block."""

    start: int  # bytes before the first line: a byte order mark
    newline: str

    @classmethod
    def of(cls, file: BinaryIO) -> TextLayout:
        """Detect the layout from a file's first block; ValueError for encodings other than UTF-8."""
        head = file.read(BLOCK)
        file.seek(0)
        encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark)), None)
        if encoding is None and head[:4096].count(0) > len(head[:4096]) // 8:
            encoding = "binary, or text in UTF-16 or UTF-32"
        if encoding is not None:
            raise ValueError(f"it is {encoding}; needed is text in UTF-8, as `iconv -f UTF-16 -t UTF-8` makes it")
        newline = "\r" if b"\r" in head and b"\n" not in head else "\n"
        return cls(len(UTF8_MARK) if head.startswith(UTF8_MARK) else 0, newline)


class Lines:
    """Lines of a binary file as one list per block, with their positions in the file.

    Args:
        file: read from its current position, which must be the beginning of a line.
        newline: "\\n" or "\\r".
        update: called with all bytes read, for hashing.
        block: bytes that are read at once.
        keep: whether lines keep their ends, as `csv.reader` needs them.
    """

    def __init__(
        self,
        file: BinaryIO,
        newline: str,
        update: Callable[[bytes], object] | None = None,
        block: int = BLOCK,
        keep: bool = False,
    ):
        self._file, self.newline, self._update, self._block, self._keep = file, newline, update, block, keep
        self._position = file.tell()  # of the first line that has not been given
        self._first = 0  # number of the first line of the last list
        self._lines: list[str] = []  # the last list
        self._starts = np.zeros(0, np.int64)  # where its lines begin
        self.count = 0  # lines given so far

    def __iter__(self) -> Iterator[list[str]]:
        for start, data in self._blocks():
            ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord(self.newline)) + 1
            text = data.decode("utf-8", errors="surrogateescape")
            lines = text.split(self.newline) if not self._keep else _with_ends(text, self.newline, len(ends))
            if not lines[-1]:
                lines.pop()
            self._first = self.count
            self._starts = start + np.concatenate([[0], ends])[: len(lines)]
            self.count += len(lines)
            self._lines = lines
            yield lines

    def start(self, number: int) -> int:
        """Return the position of a line of the last list, or of the line after it."""
        return self._position if number >= self.count else int(self._starts[number - self._first])

    def again(self, first: int, end: int, known: int, position: int) -> list[str]:
        """Return lines `first` to `end` - 1 again; lines before the last list are read again.

        Args:
            known: number of a line before them, or of the first one.
            position: of that line in the file.
        """
        if first >= self._first:
            return self._lines[first - self._first : end - self._first]
        back = self._file.tell()
        self._file.seek(position)
        lines = Lines(self._file, self.newline, block=1 << 16, keep=self._keep)
        found = list(itertools.islice(itertools.chain.from_iterable(lines), first - known, end - known))
        self._file.seek(back)
        return found

    def _blocks(self) -> Iterator[tuple[int, bytes]]:
        """Yield whole lines, about a block at a time, with their position."""
        newline, kept = self.newline.encode(), b""
        skipped = 0  # bytes dropped from a line that is too long
        while data := self._file.read(self._block):
            if self._update is not None:
                self._update(data)
            cut = data.rfind(newline) + 1
            if not cut:
                left = max(0, MAX_LINE + 1 - len(kept))
                kept, skipped = kept + data[:left], skipped + max(0, len(data) - left)
                continue
            start = self._position
            if skipped:  # the end of that line is left out too
                end = data.find(newline)
                self._position += len(kept) + skipped + end + 1
                yield start, kept + newline
                start, whole = self._position, data[end + 1 : cut]
            else:
                whole = kept + data[:cut]
            self._position = start + len(whole)
            kept, skipped = data[cut:], 0
            if whole:
                yield start, whole
        if kept:
            start = self._position
            self._position += len(kept) + skipped
            yield start, kept


def _with_ends(text: str, newline: str, count: int) -> list[str]:
    """Split a text with `count` line ends into lines with their ends, and the rest after the last one, if any."""
    if newline == "\n":
        lines = text.splitlines(keepends=True)  # also at other characters, such as U+2028
        if len(lines) == count + (not text.endswith(newline)):
            return lines
        return io.StringIO(text, newline).readlines()
    return [line + newline for line in text.split(newline)[:-1]] + [text.rpartition(newline)[2]]


class Scan(NamedTuple):
    """Result of one pass over a text file."""

    columns: list[str]  # of a CSV file
    starts: list[int]  # where every STRIDE-th row begins, in bytes
    marks: np.ndarray  # int64 [rows], equal where two rows have the same id


def scan(
    kind: str, file: BinaryIO, layout: TextLayout, update: Callable[[bytes], object], default_id: Callable[[int], str]
) -> Scan:
    """Count the rows of a file and note where they begin.

    Args:
        kind: "jsonl", "csv" or "text".
        update: called with all bytes of the file, for hashing.
        default_id: returns the id of a row without one, by its number.
    """
    if layout.start:
        update(file.read(layout.start))
    lines = Lines(file, layout.newline, update, keep=kind == "csv")
    if kind == "csv":
        return _scan_csv(lines, default_id)
    starts: list[int] = []
    marks = _Marks(default_id)
    for block in lines:
        first = lines.count - len(block)
        filled = [i for i, line in enumerate(block) if line and not line.isspace()]
        starts += [lines.start(first + i) for i in filled[-len(marks) % STRIDE :: STRIDE]]
        marks.extend([_json_id(block[i]) for i in filled] if kind == "jsonl" else [None] * len(filled))
    return Scan([], starts, marks.array())


def _scan_csv(lines: Lines, default_id: Callable[[int], str]) -> Scan:
    """Scan a CSV file.

    Raises:
        ReadError: for unbalanced quotes, after which rows cannot be found.
    """
    reader = _csv_reader(itertools.chain.from_iterable(lines))
    columns = _header(reader, lines)
    column = columns.index("id") if "id" in columns else None
    starts: list[int] = []
    marks = _Marks(default_id)
    names: list[str | None]
    width, ended = len(columns), False
    while not ended:
        line = reader.line_num
        position = lines.start(line)
        if len(marks) == len(starts) * STRIDE:
            starts.append(position)
        rows: list[list[str]] = []
        broken = False
        try:
            rows.extend(itertools.islice(reader, STRIDE - len(marks) % STRIDE))
        except csv.Error as error:  # of the row after these
            broken = True
            first = line + len(rows) + sum(cell.count(lines.newline) for cells in rows for cell in cells)
            _check_quotes(lines.again(first, reader.line_num, line, position), first + 1, error)
        ended = not rows and not broken
        # An empty line is not a row, and one with more or fewer cells has no id.
        if column is None:
            names = [None] * sum(map(bool, rows))
        else:
            names = [cells[column].strip() if len(cells) == width else None for cells in rows if cells]
        marks.extend([*names, None] if broken else names)
    return Scan(columns, starts, marks.array())


def _csv_reader(lines: Iterator[str]) -> Reader:
    """Return a strict reader, which raises for an unterminated quote instead of joining rows.

    Spaces before a cell are skipped, so that a quoted cell may follow them.
    """
    return csv.reader(lines, strict=True, skipinitialspace=True)


def _check_quotes(lines: Iterable[str], first: int, error: csv.Error) -> None:
    """Raise ReadError for wrong quotes in a CSV row, naming the line where the quote opens.

    Args:
        lines: of the row, as far as the csv module has read them.
        first: the number of the first one, counted from 1.
        error: the csv module's.
    """
    state, opened, number = "start", first, first
    for number, line in enumerate(lines, first):
        for character in line.rstrip("\r\n"):
            if state == "quoted":
                state = "closed" if character == '"' else "quoted"
            elif character == ",":
                state = "start"
            elif character == " " and state == "start":
                continue
            elif character == '"' and state != "plain":
                opened = number if state == "start" else opened
                state = "quoted"
            elif state == "closed":
                raise ReadError(
                    f"has a quote in line {opened} that is closed in line {number} with text after it: "
                    f"{quote(line.rstrip(), 60)}; needed is a comma or the line's end, and within quotes two "
                    "quotation marks for one"
                )
            else:
                state = "plain"
        if state != "quoted":
            state = "start"
    if state == "quoted":
        end = "the file's end"
        if "field larger" in str(error):
            end = f"within the {csv.field_size_limit():,} characters that a cell may have"
        raise ReadError(
            f"has a quote in line {opened} that is not closed before line {number + 1} or {end}, so "
            "later rows cannot be separated from its text; close it, or write two quotation marks for one within quotes"
        )


class _Marks:
    """64-bit hashes of the rows' ids, for little memory with millions of rows."""

    def __init__(self, default_id: Callable[[int], str]):
        self._default_id, self._parts, self._count = default_id, [np.zeros(0, np.int64)], 0

    def __len__(self) -> int:
        return self._count

    def extend(self, names: Sequence[object]) -> None:
        """Add the ids of the next rows, None or empty for rows without one."""
        if all(names) and {str}.issuperset(map(type, names)):  # the common case, twice as fast
            marks = list(map(hash, names))
        else:
            marks = [
                hash(name) if type(name) is str and name else self._other(name, number)
                for number, name in enumerate(names, self._count)
            ]
        self._parts.append(np.array(marks, np.int64))
        self._count += len(names)

    def _other(self, name: object, number: int) -> int:
        return hash(self._default_id(number) if name is None or name == "" else str(name))

    def array(self) -> np.ndarray:
        return np.concatenate(self._parts)


def read(kind: str, file: BinaryIO, newline: str, columns: list[str], number: int) -> Iterator[Raw]:
    """Yield rows from a file's current position on.

    Args:
        columns: of a CSV file, whose header is not read again.
        number: of the first row.
    """
    lines = itertools.chain.from_iterable(Lines(file, newline, block=1 << 16, keep=kind == "csv"))
    if kind == "csv":
        yield from _read_csv(lines, columns, number)
        return
    for line in lines:
        if not line or line.isspace():
            continue
        if kind == "text":
            yield Raw(number, {"prompt": line.strip()}, _too_long(line))
        else:
            yield Raw(number, *_json(line))
        number += 1


def _read_csv(lines: Iterator[str], columns: list[str], number: int) -> Iterator[Raw]:
    row: list[str] = []  # lines of the row that is being read

    def noted() -> Iterator[str]:
        for line in lines:
            row.append(line)
            yield line

    reader = _csv_reader(noted())
    while True:
        row.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Raw(number, {}, f"is not CSV: {shorten(str(error))}")
        else:
            if not cells:
                continue
            fault = None if len(cells) == len(columns) else f"has {len(cells)} cells, the header {len(columns)}"
            if any(cell != cell.strip() for cell in cells):
                cells = _without_padding(cells, "".join(row))
            values = {name: cell for name, cell in zip(columns, cells, strict=False) if cell != ""}
            yield Raw(number, {} if fault else values, fault)
        number += 1


_CELL = re.compile(r' *(?:("[^"]*(?:""[^"]*)*")|[^,]*)(?:,|\Z)')


def _without_padding(cells: list[str], text: str) -> list[str]:
    """Strip white space from the cells of a row that are not quoted in its text."""
    found = _CELL.finditer(text.rstrip("\r\n"))
    return [cell if match[1] else cell.strip() for cell, match in zip(cells, found, strict=False)]


def _header(reader: Reader, lines: Lines) -> list[str]:
    position = lines.start(0)
    try:
        return [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        _check_quotes(lines.again(0, reader.line_num, 0, position), 1, error)
        raise ReadError(f"has a header that is not CSV: {shorten(str(error))}") from None


_decode = json.JSONDecoder().raw_decode  # twice as fast as json.loads for a short line


def _json(line: str) -> tuple[dict[str, object], str | None]:
    if fault := _too_long(line):
        return {}, fault
    line = line.strip()
    try:
        parsed, end = _decode(line)
    except (ValueError, RecursionError) as error:
        return {}, f"is not JSON: {shorten(str(error))}"
    if end < len(line):
        return {}, f"is not JSON: there is more after its end, from character {end} on"
    if not isinstance(parsed, dict):
        return {}, f"is a JSON {type(parsed).__name__}, needed is an object"
    return parsed, None


def _json_id(line: str) -> object:
    """Return the id of a line, which is parsed only if it contains "id" or an escape sequence."""
    return _json(line)[0].get("id") if '"id"' in line or "\\u" in line else None


def _too_long(line: str) -> str | None:
    if len(line) <= MAX_LINE // 4 or len(line.encode(errors="surrogateescape")) <= MAX_LINE:
        return None
    return f"is a line of more than {MAX_LINE:,} bytes"
