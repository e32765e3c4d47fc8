"""Rows of a job that failed, grouped by reason, from the files in errors/."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kandinsky_jax.common import reading
from kandinsky_jax.common.errors import shorten
from kandinsky_jax.common.files import Files

DAMAGED = "the line in errors/ that should say why is damaged"
OTHER = "other reasons"
MAX_LINE = 1 << 20  # bytes; what is longer is not from a job, and counts as several damaged lines
MAX_REASONS = 1000  # that are told apart; an operator reads the first ten
READERS = 8  # files read at the same time: an object store answers each after some milliseconds
# Parts of a message in which failures of one kind differ: quoted text, names of files, numbers.
_QUOTED = re.compile(r"""(?<!\w)('[^']*'|"[^"]*")(?!\w)""")
_WORD = re.compile(r"[^\s;]+")
_SUFFIX = re.compile(r"[\w-][./]")
_LAST = re.compile(r"\w(?=\W*$)")
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


class _Group(NamedTuple):
    """Rows of a shard that failed for one reason."""

    first: FailureReason
    rows: set[object]


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
    for rows, groups in _summaries(files, [f"errors/{name}" for name in names]):
        total += rows
        for reason, group in groups.items():
            name = _slot(found, reason)
            found.setdefault(name, dataclasses.replace(group.first, reason=name)).rows += len(group.rows)
    return Failures(total, sorted(found.values(), key=lambda reason: -reason.rows))


def _slot(found: dict[str, Any], reason: str) -> str:
    """Return a reason, or that of all others where there are many already."""
    return reason if reason in found or len(found) < MAX_REASONS else OTHER


def _summaries(files: Files, names: list[str]) -> Iterator[tuple[int, dict[str, _Group]]]:
    """Yield the failures in files, in their order; few are in memory at a time."""
    with ThreadPoolExecutor(READERS) as threads:
        for start in range(0, len(names), READERS):
            yield from threads.map(lambda name: _summary(files, name), names[start : start + READERS])


def _summary(files: Files, name: str) -> tuple[int, dict[str, _Group]]:
    """Return how many rows a shard's file names, and these by reason; a damaged line counts as a row."""
    rows: set[object] = set()
    groups: dict[str, _Group] = {}
    try:
        file = files.open(name)
    except FileNotFoundError:  # its shard has been made again meanwhile, and nothing failed
        return 0, {}
    with file:
        for position, line in enumerate(iter(functools.partial(file.readline, MAX_LINE), b"")):
            row, identifier, error = _parse(line)
            key = (position,) if row is None else row
            rows.add(key)
            reason = _slot(groups, reason_of(error))
            groups.setdefault(reason, _Group(FailureReason(reason, 0, row, identifier, error), set())).rows.add(key)
    return len(rows), groups


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
    text = _WORD.sub(_without_file, _QUOTED.sub("'...'", error))
    return _NUMBER.sub("N", text)


def _without_file(word: re.Match[str]) -> str:
    """Return a word, with "..." for a name of a file: up to its last letter, with a dot or slash on the way."""
    text = word[0]
    last = _LAST.search(text)
    end = last.end() if last else 0
    return "..." + text[end:] if _SUFFIX.search(text, 0, end - 1) else text
