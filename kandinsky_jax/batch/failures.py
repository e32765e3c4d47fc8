"""Rows of a job that failed, grouped by reason, from the files in errors/."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from kandinsky_jax.common import reading
from kandinsky_jax.common.errors import shorten
from kandinsky_jax.common.files import Files

DAMAGED = "the line in errors/ that should say why is damaged"
OTHER = "other reasons"
MAX_REASONS = 1000  # that are told apart; an operator reads the first ten
READERS = 8  # files read at the same time: an object store answers each after some milliseconds
# Parts of a message in which failures of one kind differ: quoted text, names of files, numbers.
_QUOTED = re.compile(r"""(?<!\w)('[^']*'|"[^"]*")(?!\w)""")
_FILE = re.compile(r"[^\s;]*[\w-][./][^\s;]*\w")
_NUMBER = re.compile(r"\d[\d,]*")


@dataclass
class FailureReason:
    """Rows that failed for one reason.

    Args:
        reason: the message, with "..." for quoted text and names of files, and "N" for numbers.
        rows: how many there are.
        example_row: number of the first one, from 0; None where it is not known.
        example_id: its identifier as in errors.jsonl; None where it has none.
        example_error: its message as it is.
    """

    reason: str
    rows: int
    example_row: int | None
    example_id: str | int | None
    example_error: str


@dataclass
class Failures:
    """Failed rows of a job.

    Args:
        rows: how many.
        reasons: the most frequent first. A row of several pictures may fail for several reasons, and is in each.
    """

    rows: int = 0
    reasons: list[FailureReason] = field(default_factory=list)


def read_failures(files: Files, shards: Iterable[int]) -> Failures:
    """Read and group the errors of these shards.

    Args:
        files: of the job's folder.
        shards: numbers of complete ones.
    Raises:
        OSError: where a file cannot be read.
    """
    listed = files.sizes("errors")
    names = [name for shard in shards if listed.get(name := f"{shard:06d}.jsonl") is not None]
    found: dict[str, FailureReason] = {}
    total = 0
    for data in _contents(files, [f"errors/{name}" for name in names]):
        total += _add_file(found, data)
    return Failures(total, sorted(found.values(), key=lambda reason: -reason.rows))


def _contents(files: Files, names: list[str]) -> Iterator[bytes]:
    """Yield the content of files in their order; few are in memory at a time."""
    with ThreadPoolExecutor(READERS) as threads:
        for start in range(0, len(names), READERS):
            yield from threads.map(lambda name: _read(files, name), names[start : start + READERS])


def _read(files: Files, name: str) -> bytes:
    try:
        return files.read(name)
    except FileNotFoundError:  # its shard has been made again meanwhile, and nothing failed
        return b""


def _add_file(found: dict[str, FailureReason], data: bytes) -> int:
    """Add the lines of a shard's file to the reasons; return how many rows they are of."""
    rows: set[object] = set()
    of_reason: dict[str, set[object]] = {}
    for position, line in enumerate(data.splitlines()):
        row, name, error = _parse(line)
        key = (position,) if row is None else row  # a damaged line counts as a row
        rows.add(key)
        reason = reason_of(error)
        if reason not in found:
            if len(found) >= MAX_REASONS:
                reason = OTHER
            found.setdefault(reason, FailureReason(reason, 0, row, name, error))
        of_reason.setdefault(reason, set()).add(key)
    for reason, failed in of_reason.items():
        found[reason].rows += len(failed)
    return len(rows)


def _parse(line: bytes) -> tuple[int | None, str | int | None, str]:
    """Return the row, the identifier and the message of a line, whatever it holds."""
    try:
        entry = reading.parse_json(line)
    except reading.ReadError:
        return None, None, DAMAGED
    if not isinstance(entry, dict) or not isinstance(entry.get("error"), str):
        return None, None, DAMAGED
    row, name = entry.get("row"), entry.get("id")
    if not isinstance(row, int) or isinstance(row, bool) or abs(row) >= 2**63:
        return None, None, DAMAGED
    if isinstance(name, bool) or not (isinstance(name, str | int) or name is None):
        name = shorten(name, 200)
    return row, name if isinstance(name, int | None) else shorten(name, 200), shorten(entry["error"], 600)


def reason_of(error: str) -> str:
    """Return a message without what differs between failures of one kind."""
    text = _QUOTED.sub("'...'", error)
    return _NUMBER.sub("N", _FILE.sub("...", text))
