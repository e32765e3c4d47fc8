"""Captioned pictures of a data set, and records of unused data."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from PIL import Image

from kandinsky_jax import images
from kandinsky_jax.common.errors import shorten, summarize

MAX_KEPT = 1000  # faults that are kept by name; further ones are counted
MAX_PICTURE_BYTES = 2**30
MAX_CAPTION_BYTES = 2**20
CAPTION_KEYS = ("text", "caption", "prompt")  # of JSON


class DataError(ValueError):
    """Training data cannot be used; `faults` lists all faults by file name."""

    def __init__(self, where: str, faults: Sequence[str]):
        self.faults = list(faults)
        found = summarize(self.faults, separator="\n  ")
        super().__init__(f"{shorten(where, 300)} cannot be used:\n  {found}")


class Captioned(NamedTuple):
    """A captioned picture that has not been read yet.

    Args:
        name: of the file, or of the archive with the member or row.
        text: the caption.
        read: returns the bytes of the picture's file.
        hint: returns the bytes of its depth map, if it has one.
        size: bytes of all its files; in a Parquet file, of the row group's column.
        modified: modification time of the file in nanoseconds; for a remote file without one, a digest of its version.
        rejected: returns the bytes of the picture to which this one is preferred, if there is one.
    """

    name: str
    text: str
    read: Callable[[], bytes]
    hint: Callable[[], bytes] | None = None
    size: int = 0
    modified: int = 0
    rejected: Callable[[], bytes] | None = None


class Skipped:
    """Record of unused data: the number of items, and the first faults."""

    def __init__(self) -> None:
        self.count = 0
        self.faults: list[str] = []

    def add(self, fault: str) -> None:
        """Add one unused file, row or member with the reason."""
        self.count += 1
        if len(self.faults) < MAX_KEPT:
            self.faults.append(shorten(fault, 300))

    def merge(self, other: Skipped) -> None:
        """Add what another record has."""
        self.count += other.count
        self.faults += other.faults[: MAX_KEPT - len(self.faults)]

    def summary(self, limit: int = 200) -> str:
        """Return the first faults in about `limit` characters, and the number of others."""
        shown = summarize(self.faults[:3], limit)
        more = self.count - min(3, len(self.faults))
        return f"{shown}; and {more} more" if more > 0 and " more" not in shown[-12:] else shown


class Listing(list[Captioned]):
    """The captioned pictures of a data set, and in `skipped` the unused data."""

    def __init__(self, items: Iterable[Captioned], skipped: Skipped):
        super().__init__(items)
        self.skipped = skipped


@functools.cache
def picture_suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case, of the formats that `images.read` opens."""
    Image.init()
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in images.READABLE)


@functools.cache
def unread_suffixes() -> frozenset[str]:
    """Return the suffixes of picture formats that are reported as not supported."""
    Image.init()
    raw = {".heic", ".heif", ".svg", ".jxl", ".exr", ".hdr", ".dng", ".cr2", ".cr3", ".nef", ".arw"}
    pictures = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return frozenset((pictures | raw) - picture_suffixes() - {".pdf", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr"})


def data_fingerprint(items: Iterable[Captioned], *, modified: bool = False) -> str:
    """Compute a digest of pictures without reading them: of names, captions and sizes in order.

    Args:
        modified: include modification times.
    """
    found = hashlib.sha256()
    for item in items:
        found.update(repr((item.name, item.text, item.size, item.modified if modified else 0)).encode())
    return found.hexdigest()
