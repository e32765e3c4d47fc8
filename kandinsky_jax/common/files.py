"""Files of a folder, on a local disk or in an object store, written atomically.

On a local disk a file is written under a scratch name and renamed (`kandinsky_jax.common.atomic`). In an object store
it is sent from memory in one request: nothing is published before it has arrived completely, and there is no file
object whose closing or garbage collection could publish a part. It is created only if no object of that name exists (a
generation precondition in Google Cloud Storage, `If-None-Match` in S3), and verified afterwards. Requests that fail
temporarily (503, 429, a lost connection, a timeout) are repeated.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import errno
import hashlib
import inspect
import io
import os
import posixpath
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

from kandinsky_jax.common import atomic, reading
from kandinsky_jax.common.atomic import PARTIAL, Fill
from kandinsky_jax.common.remote import connect, tried

# Stores where one request publishes a whole object. Elsewhere (SFTP, HDFS, SMB) a scratch name is used.
ATOMIC_STORES = {"gs", "gcs", "s3", "s3a", "abfs", "abfss", "az", "oss", "oci", "ocilake", "memory"}


READ_AHEAD = 8 << 20  # bytes of an open remote file that one request asks for


class FileInfo(NamedTuple):
    """What a folder's listing says of a file."""

    size: int | None  # bytes; None for non-files
    modified: datetime.datetime | None  # in UTC; None where the file system does not say


class Files(Protocol):
    """Protocol of the files in a folder, by names relative to it."""

    def details(self, folder: str) -> dict[str, FileInfo]:
        """Return names in a folder with sizes and times of modification; empty if the folder does not exist."""

    def sizes(self, folder: str) -> dict[str, int | None]:
        """Return names in a folder with sizes in bytes, None for non-files; empty if the folder does not exist."""

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes; None if it does not exist."""

    def read(self, name: str) -> bytes:
        """Return a file's content; FileNotFoundError if it does not exist."""

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading piece by piece; FileNotFoundError if it does not exist."""

    def ends(self, known: dict[str, int], head: int, tail: int) -> list[tuple[bytes, bytes]]:
        """Return the first `head` and last `tail` bytes of files of known sizes."""

    def write(self, name: str, fill: Fill, *, overwrite: bool = False) -> bool:
        """Write a file; return False, without `overwrite`, if it exists already."""

    def create(self, name: str, data: bytes) -> bool:
        """Create a small file; return False if it exists with other content: the first of several writers wins."""

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""

    def sweep(self, folders: Sequence[str]) -> None:
        """Remove scratch files of killed processes in these folders."""


def read_small(files: Files, name: str, limit: int = reading.MAX_FILE_BYTES) -> bytes:
    """Return the content of a file of at most `limit` bytes.

    Raises:
        FileNotFoundError: where there is none.
        ReadError: where it is larger.
    """
    with files.open(name) as file:
        data = file.read(limit + 1)
    reading.check_size(len(data), limit)
    return data


def open_files(url: str) -> Files:
    """Open the folder at a local path or an fsspec URL.

    Raises:
        ReadError: for a URL that cannot be opened, see `connect`.
        NotADirectoryError: for a file.
    """
    fs, root = connect(url)
    if not isinstance(fs, LocalFileSystem):
        return RemoteFiles(fs, root)
    root = root or "/"
    if Path(root).is_file():
        raise NotADirectoryError(f"{url} is a file; needed is a folder")
    return LocalFiles(Path(root))


class LocalFiles:
    """Files on a local disk.

    Args:
        root: the folder, created with the first file.
    """

    def __init__(self, root: Path):
        self._root = root

    def details(self, folder: str) -> dict[str, FileInfo]:
        found: dict[str, FileInfo] = {}
        try:
            with os.scandir(self._root / folder) as entries:
                for entry in entries:
                    try:
                        status = entry.stat()
                        size = status.st_size if entry.is_file() else None
                        found[entry.name] = FileInfo(size, time_in_utc(status.st_mtime))
                    except FileNotFoundError:  # renamed by its writer meanwhile, or a link to nothing
                        continue
                    except OSError:  # a link to itself
                        found[entry.name] = FileInfo(None, None)
        except FileNotFoundError:
            return {}
        return found

    def sizes(self, folder: str) -> dict[str, int | None]:
        return {name: info.size for name, info in self.details(folder).items()}

    def size(self, name: str) -> int | None:
        path = self._root / name
        try:
            return path.stat().st_size if path.is_file() else None
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def open(self, name: str) -> BinaryIO:
        path = self._root / name
        try:
            reading.check_regular(path)
        except reading.ReadError as error:
            raise OSError(reading.of_file(path, error)) from None
        return path.open("rb")

    def ends(self, known: dict[str, int], head: int, tail: int) -> list[tuple[bytes, bytes]]:
        return [self._ends(self._root / name, size, head, tail) for name, size in known.items()]

    def _ends(self, path: Path, size: int, head: int, tail: int) -> tuple[bytes, bytes]:
        try:
            with path.open("rb") as file:
                first = file.read(head)
                file.seek(max(0, size - tail))
                return first, file.read(tail)
        except FileNotFoundError:
            return b"", b""

    def write(self, name: str, fill: Fill, *, overwrite: bool = False) -> bool:
        path = self._root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return atomic.fill_file(path, fill, overwrite=overwrite)

    def create(self, name: str, data: bytes) -> bool:
        if self.write(name, lambda file: file.write(data)):
            return True
        try:
            return self.read(name) == data
        except FileNotFoundError:  # removed meanwhile
            return False

    def remove(self, name: str) -> None:
        (self._root / name).unlink(missing_ok=True)

    def sweep(self, folders: Sequence[str]) -> None:
        for folder in folders:
            atomic.sweep(self._root / folder)


class RemoteFiles:
    """Files at an fsspec URL.

    Args:
        fs: the file system.
        root: the folder's path in it.
    """

    def __init__(self, fs: fsspec.AbstractFileSystem, root: str):
        self._fs, self._root = fs, root.rstrip("/")
        protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
        self._one_request = bool(protocols & ATOMIC_STORES)
        publish = getattr(fs, "_pipe_file", fs.pipe_file)
        self._can_create = self._one_request and "mode" in inspect.signature(publish).parameters

    def details(self, folder: str) -> dict[str, FileInfo]:
        path = self._path(folder)
        try:
            entries = tried(path, lambda: self._fresh().ls(path, detail=True))
        except FileNotFoundError:
            return {}
        found = {}
        for entry in entries:
            if entry["name"].strip("/") != path.strip("/"):  # an empty object that stands for the folder
                name = posixpath.basename(entry["name"].rstrip("/"))
                size = None if entry["type"] == "directory" else int(entry["size"] or 0)
                found[name] = FileInfo(size, _modified(entry))
        return found

    def sizes(self, folder: str) -> dict[str, int | None]:
        return {name: info.size for name, info in self.details(folder).items()}

    def size(self, name: str) -> int | None:
        path = self._path(name)
        info = tried(path, lambda: self._info(path))
        return None if info is None or info["type"] == "directory" else int(info["size"] or 0)

    def read(self, name: str) -> bytes:
        path = self._path(name)
        return tried(path, lambda: self._fs.cat_file(path))

    def open(self, name: str) -> BinaryIO:
        size = self.size(name)
        if size is None:
            raise FileNotFoundError(errno.ENOENT, "there is no such file", self._path(name))
        return io.BufferedReader(_RemoteReader(self._fs, self._path(name), size), READ_AHEAD)

    def ends(self, known: dict[str, int], head: int, tail: int) -> list[tuple[bytes, bytes]]:
        spans = [(self._path(name), 0, min(head, size)) for name, size in known.items() if size]
        spans += [(self._path(name), max(0, size - tail), size) for name, size in known.items() if size]
        if not spans:
            return [(b"", b"")] * len(known)
        paths, starts, stops = zip(*spans, strict=True)
        parts = self._fs.cat_ranges([*paths], [*starts], [*stops], on_error="return")
        found = {span: self._part(span, part) for span, part in zip(spans, parts, strict=True)}
        return [
            (found.get((path, 0, min(head, size)), b""), found.get((path, max(0, size - tail), size), b""))
            for path, size in ((self._path(name), size) for name, size in known.items())
        ]

    def _part(self, span: tuple[str, int, int], part: bytes | Exception) -> bytes:
        path, start, stop = span
        if not isinstance(part, Exception):
            return bytes(part)
        try:
            return tried(path, lambda: self._fs.cat_file(path, start=start, end=stop))
        except FileNotFoundError:
            return b""

    def write(self, name: str, fill: Fill, *, overwrite: bool = False) -> bool:
        path, memory = self._path(name), io.BytesIO()
        fill(memory)
        data = memory.getvalue()
        del memory
        try:
            return tried(path, lambda: self._send(path, data, overwrite))
        except FileNotFoundError:
            raise OSError(errno.ENOENT, "could not be written: there is no such bucket or folder", path) from None

    def create(self, name: str, data: bytes) -> bool:
        path = self._path(name)
        try:
            return tried(path, lambda: self._create(path, data))
        except FileNotFoundError:
            raise OSError(errno.ENOENT, "could not be written: there is no such bucket or folder", path) from None

    def _create(self, path: str, data: bytes) -> bool:
        """Create an object without verifying it afterwards; another process may have removed it already.

        After a lost reply, the file system may repeat its request and find its own object there.
        """
        try:
            if not self._can_create:
                if self._info(path) is not None:
                    return self._holds(path, data)
                self._send_renamed(path, data)
            else:
                self._fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return self._holds(path, data)
        return True

    def _send(self, path: str, data: bytes, overwrite: bool) -> bool:
        """Publish an object, and verify that it is the one that was sent.

        After a lost reply, the file system may repeat its request and find its own object there.
        """
        if not overwrite and not self._can_create and self._info(path) is not None:
            return self._holds(path, data)
        try:
            if not self._one_request:
                self._send_renamed(path, data)
            elif overwrite or not self._can_create:
                self._fs.pipe_file(path, data)
            else:
                self._fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return self._holds(path, data)
        if not self._holds(path, data, thorough=False):
            if overwrite:
                raise OSError(errno.EIO, "the stored object is not what was sent", path)
            return self._send(path, data, overwrite=True)
        return True

    def _send_renamed(self, path: str, data: bytes) -> None:
        folder, name = posixpath.split(path)
        scratch = posixpath.join(folder, f".{name[:200]}.{secrets.token_hex(8)}{PARTIAL}")
        self._fs.makedirs(folder, exist_ok=True)
        try:
            self._fs.pipe_file(scratch, data)
            self._fs.mv(scratch, path)
        except BaseException:
            with contextlib.suppress(Exception):
                self._fs.rm_file(scratch)
            raise

    def _holds(self, path: str, data: bytes, thorough: bool = True) -> bool:
        """Return whether an object has this content, or without `thorough` at least this size."""
        info = self._info(path)
        if info is None or int(info.get("size") or 0) != len(data):
            return False
        if digest := info.get("md5Hash"):  # Google's store
            return digest == base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        return not thorough or self._fs.cat_file(path) == data

    def _info(self, path: str) -> dict[str, Any] | None:
        try:
            return self._fresh().info(path)
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> None:
        path = self._path(name)
        with contextlib.suppress(FileNotFoundError):
            tried(path, lambda: self._fs.rm_file(path))

    def sweep(self, folders: Sequence[str]) -> None:
        """Remove old scratch files; there are none where one request publishes an object."""
        if self._one_request:
            return
        for folder in folders:
            for name in self.sizes(folder):
                if name.startswith(".") and name.endswith(PARTIAL):
                    with contextlib.suppress(Exception):  # no time of modification, or another process was first
                        path = self._path(folder, name)
                        if time.time() - self._fs.modified(path).timestamp() > atomic.ABANDONED_SECONDS:
                            self._fs.rm_file(path)

    # Requests -----------------------------------------------------------------------------------------------------

    def _path(self, *names: str) -> str:
        return posixpath.join(self._root, *filter(None, names))

    def _fresh(self) -> fsspec.AbstractFileSystem:
        """Return the file system after clearing its cache of listings, since other processes write there too."""
        self._fs.invalidate_cache()
        return self._fs


class _RemoteReader(io.RawIOBase):
    """A remote file, read from its beginning on by requests that are repeated after temporary failures."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str, size: int):
        self._fs, self._path, self._size = fs, path, size
        self._position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        start, stop = self._position, min(self._position + len(buffer), self._size)
        if start == stop:
            return 0
        data = tried(self._path, lambda: self._fs.cat_file(self._path, start=start, end=stop))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


# Names that file systems of fsspec have for the time of modification, or for that of an object that is never modified.
_TIMES = ("mtime", "updated", "LastModified", "last_modified", "modified", "created", "timeCreated")


def _modified(entry: dict[str, Any]) -> datetime.datetime | None:
    for name in _TIMES:
        if (found := time_in_utc(entry.get(name))) is not None:
            return found
    return None


def time_in_utc(value: object) -> datetime.datetime | None:
    """Convert a time as file systems give it: seconds since 1970, ISO 8601 text, or a datetime, naive ones in UTC.

    Returns:
        None for what is no time, or is 1970 or earlier, which stands for an unknown one.
    """
    try:
        if isinstance(value, str):
            value = datetime.datetime.fromisoformat(value)
        elif isinstance(value, int | float):
            value = datetime.datetime.fromtimestamp(value, datetime.UTC)
        if not isinstance(value, datetime.datetime):
            return None
        known = value.replace(tzinfo=datetime.UTC) if value.tzinfo is None else value.astimezone(datetime.UTC)
    except (ValueError, OverflowError, OSError):
        return None
    return known if known.timestamp() > 0 else None
