"""Files of a data set, in a local folder or an fsspec file system, by names relative to the folder.

A remote folder is listed in one request for each 1,000 objects, with sizes and times, so that no file needs a request
before it is read.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol, TypeVar

from kandinsky_jax.common.errors import hide_secrets
from kandinsky_jax.common.reading import ReadError
from kandinsky_jax.common.remote import connect, is_url, tried
from kandinsky_jax.training.data.items import Skipped

T = TypeVar("T")
Result = TypeVar("Result")

REMOTE_THREADS = 64  # requests for small files mostly wait
ITEMS_AT_ONCE = 4096  # that wait for a thread
TIMES = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")  # in file systems' listings
VERSIONS = ("generation", "ETag", "etag", "md5Hash", "checksum")


class DataFile(Protocol):
    """A file of a data set. All methods raise OSError if it cannot be read, and may be called from any thread."""

    @property
    def name(self) -> PurePosixPath:
        """Name relative to the listed folder."""

    @property
    def request_bytes(self) -> int:
        """How many bytes to read at once from a large file."""

    def stat(self) -> tuple[int, int]:
        """Return the size in bytes, and the modification time in nanoseconds (see `Captioned.modified`)."""

    def read(self) -> bytes:
        """Return the content."""

    def read_range(self, start: int, length: int) -> bytes:
        """Return a part of the content, shorter at its end."""

    def open(self) -> BinaryIO:
        """Open the file for reading in one thread."""

    def source(self) -> Path | BinaryIO:
        """Return what pyarrow reads from."""


class Folder(Protocol):
    """A listed folder, or the folder of a single listed file."""

    threads: int  # for reading small files

    def files(self, exclude: Sequence[str | os.PathLike[str]], skipped: Skipped) -> Iterator[DataFile]:
        """Yield the files of the folder and then of its subfolders, sorted by name; or the single file.

        Names that begin with a dot are skipped.

        Args:
            exclude: folders to skip, paths or URLs.
            skipped: collects what cannot be used.
        """

    def find(self, name: PurePosixPath) -> DataFile | None:
        """Return the file of a name, None if there is none."""


def open_folder(path: str | os.PathLike[str]) -> Folder:
    """Open a folder or a file at a local path or an fsspec URL.

    Raises:
        OSError, ValueError: if it does not exist or cannot be listed.
    """
    local = _local(path)
    return RemoteFolder(os.fspath(path)) if local is None else LocalFolder(local)


def _local(path: str | os.PathLike[str]) -> Path | None:
    """Return a local path; None for a URL of another file system."""
    if not is_url(path):
        return Path(path)
    from fsspec.implementations.local import LocalFileSystem

    fs, inner = connect(os.fspath(path))
    return Path(inner or "/") if isinstance(fs, LocalFileSystem) else None


def in_order(function: Callable[[T], Result], items: Sequence[T], threads: int) -> Iterator[Result]:
    """Yield a function's results in the order of the items, computed by some threads."""
    if threads == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, len(items), ITEMS_AT_ONCE):
            yield from pool.map(function, items[first : first + ITEMS_AT_ONCE])


# Local ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalFile:
    """A file on a local disk.

    Args:
        name: relative to the listed folder.
        path: its path.
    """

    name: PurePosixPath
    path: Path
    request_bytes = 2**20

    def __str__(self) -> str:
        return str(self.path)

    def stat(self) -> tuple[int, int]:
        found = self.path.stat()
        return found.st_size, found.st_mtime_ns

    def read(self) -> bytes:
        return self.path.read_bytes()

    def read_range(self, start: int, length: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(length)

    def open(self) -> BinaryIO:
        return self.path.open("rb")

    def source(self) -> Path:
        return self.path


class LocalFolder:
    """A folder on a local disk, followed through links; or one file.

    Args:
        path: of the folder or file.
    """

    threads = 1

    def __init__(self, path: Path):
        if not path.exists():
            raise ValueError("it does not exist")
        self._path = path
        self._root = path.parent if path.is_file() else path

    def files(self, exclude: Sequence[str | os.PathLike[str]], skipped: Skipped) -> Iterator[LocalFile]:
        if self._root != self._path:
            yield LocalFile(PurePosixPath(self._path.name), self._path)
            return
        visited = {path.resolve() for path in map(_local, exclude) if path is not None}

        def denied(error: OSError) -> None:
            skipped.add(f"{error.filename}: {error.strerror}")

        for folder, below, names in os.walk(self._path, onerror=denied, followlinks=True):
            real = Path(folder).resolve()
            if real in visited and Path(folder) != self._path:  # a link to a parent folder, or an excluded folder
                below.clear()
                continue
            visited.add(real)
            below[:] = sorted(name for name in below if not name.startswith("."))
            relative = PurePosixPath(Path(folder).relative_to(self._path).as_posix())
            for name in sorted(name for name in names if not name.startswith(".")):
                file = LocalFile(relative / name, Path(folder, name))
                if file.path.is_file():
                    yield file
                else:  # reading a pipe or a device may block
                    skipped.add(f"{file.name}: it is not a regular file, or a link to nothing")

    def find(self, name: PurePosixPath) -> LocalFile | None:
        file = LocalFile(name, self._root / name)
        try:
            return file if file.path.is_file() else None
        except (OSError, ValueError):  # too long, or with invalid characters
            return None


# Remote -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RemoteFile:
    """A file in an fsspec file system.

    Args:
        name: relative to the listed folder.
        fs: the file system.
        path: its path there.
        size: in bytes.
        modified: see `Captioned.modified`.
    """

    name: PurePosixPath
    fs: Any
    path: str
    size: int
    modified: int
    request_bytes = 2**22  # takes about as long as the wait for the first byte

    def __str__(self) -> str:
        return hide_secrets(self.path)

    def stat(self) -> tuple[int, int]:
        return self.size, self.modified

    def read(self) -> bytes:
        return self._tried(lambda: self.fs.cat_file(self.path))

    def read_range(self, start: int, length: int) -> bytes:
        stop = min(start + length, self.size)
        return self._tried(lambda: self.fs.cat_file(self.path, start=start, end=stop)) if start < stop else b""

    def open(self) -> BinaryIO:
        return io.BufferedReader(RangeReader(self), self.request_bytes)

    def source(self) -> BinaryIO:
        # Unbuffered, since pyarrow buffers each column itself. Typeshed does not count raw files as binary ones.
        reader: Any = RangeReader(self)
        return reader

    def _tried(self, request: Callable[[], bytes]) -> bytes:
        try:
            return bytes(tried(self.path, request))
        except FileNotFoundError:  # some file systems' errors have the path alone
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.path) from None


class RangeReader(io.RawIOBase):
    """Raw binary file of which each read is one request."""

    def __init__(self, file: RemoteFile):
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.size}[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self._file.read_range(self._position, len(view))
        if len(data) > len(view):
            raise OSError(errno.EIO, "the server does not send parts of files", self._file.path)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)


class RemoteFolder:
    """A folder in an fsspec file system, as it is when this object is made; or one file.

    Args:
        url: of the folder or file.
    """

    threads = REMOTE_THREADS

    def __init__(self, url: str):
        self._fs, self._path = connect(url)
        self._root = self._path
        found = self._listed(self._path)
        self._single: str | None = None
        if [*found] == [self._path]:
            self._root, _, self._single = self._path.rpartition("/")
        self._infos = self._relative(found)

    def _listed(self, path: str) -> dict[str, dict[str, Any]]:
        """Return what is known of a file, or of all files below a folder, by path."""
        self._fs.invalidate_cache()
        try:
            if "/" in path.strip("/"):  # a bucket is no file, and asking about it takes another permission
                info = tried(path, lambda: self._fs.info(path))
                if info["type"] == "file":
                    return {path: info}
            found: dict[str, dict[str, Any]] = tried(path, lambda: self._fs.find(path, detail=True))
        except FileNotFoundError:
            found = {}
        except OSError as error:
            raise OSError(error.errno, f"it cannot be listed: {error.strerror or error}") from None
        self._fs.invalidate_cache()  # nothing else reads this cache, which may be large
        if not found:
            raise ValueError("it does not exist")
        return found

    def _relative(self, found: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Return the entries of files below the root, by their names relative to it."""
        prefix = f"{self._root}/" if self._root else ""
        names = {path: path.removeprefix(prefix or "/") for path in found if path.startswith(prefix)}
        return {name: found[path] | {"name": path} for path, name in names.items()}

    def files(self, exclude: Sequence[str | os.PathLike[str]], skipped: Skipped) -> Iterator[RemoteFile]:
        if self._single is not None:
            if self._infos[self._single].get("size") is None:
                raise ValueError("its server does not say its size")
            yield self._file(self._single)
            return
        excluded = tuple(f"{name}/" for name in map(self._excluded, exclude) if name)
        for name in sorted(self._infos, key=_walk_order):
            info, parts = self._infos[name], name.split("/")
            if (
                info["type"] == "directory"
                or name.endswith("/")  # an empty object that stands for the folder
                or any(part.startswith(".") for part in parts)
                or name.startswith(excluded)
            ):
                continue
            if "" in parts:
                skipped.add(f"{name}: it has an empty name, or is in a folder of an empty name")
            elif info.get("size") is None:
                skipped.add(f"{name}: its server does not say its size")
            else:
                yield self._file(name)

    def find(self, name: PurePosixPath) -> RemoteFile | None:
        if self._single is not None and len(self._infos) == 1:  # next to a single metadata.jsonl
            self._infos = self._relative(self._listed(self._root))
        info = self._infos.get(str(name))
        if info is None or info["type"] == "directory" or info.get("size") is None:
            return None
        return self._file(str(name))

    def _file(self, name: str) -> RemoteFile:
        info = self._infos[name]
        shown = name.partition("?")[0] if is_url(info["name"]) else name  # HTTP's paths are URLs; a query may be secret
        return RemoteFile(PurePosixPath(shown), self._fs, info["name"], int(info["size"] or 0), _modified(info))

    def _excluded(self, path: str | os.PathLike[str]) -> str | None:
        """Return the name of an excluded folder; None if it is not below this folder."""
        if not is_url(path):
            return None
        with contextlib.suppress(ReadError):
            fs, inner = connect(os.fspath(path))
            prefix = f"{self._root}/" if self._root else "/"
            if type(fs) is type(self._fs) and inner.startswith(prefix):
                return inner.removeprefix(prefix)
        return None


def _walk_order(name: str) -> list[tuple[bool, str]]:
    """Return a key that sorts names as `os.walk` yields them: the files of a folder before its subfolders."""
    *folders, file = name.split("/")
    return [*((True, folder) for folder in folders), (False, file)]


def _modified(info: Mapping[str, Any]) -> int:
    """Return the modification time in nanoseconds, or a digest of the version where a store says no time."""
    for key in TIMES:
        if isinstance(time := info.get(key), datetime.datetime):
            return round(time.timestamp() * 1e6) * 1000
        if isinstance(time, int | float):
            return int(time * 1e9)
    version = next((str(info[key]) for key in VERSIONS if info.get(key)), "")
    return int.from_bytes(hashlib.sha256(version.encode()).digest()[:7]) if version else 0
