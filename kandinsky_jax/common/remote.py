"""Requests to fsspec file systems (`gs://`, `s3://` and others), repeated after temporary failures."""

from __future__ import annotations

import errno
import os
import random
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from kandinsky_jax.common.errors import shorten
from kandinsky_jax.common.reading import ReadError, check_size

T = TypeVar("T")

_ONE_SLASH = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/(?!/)")
WAITS = (1.0, 4.0, 10.0)  # seconds between tries; most file systems repeat requests themselves too
PERMANENT = (  # errors for which a request is not repeated
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    ValueError,
    TypeError,
    NotImplementedError,
    ImportError,
)


def is_url(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is an fsspec URL."""
    return isinstance(path, str) and "://" in path


def check_slashes(path: str) -> None:
    """Raise ReadError for `gs:/bucket` and the like, which would be a folder here."""
    start = _ONE_SLASH.match(path)
    if start:
        import fsspec  # it takes long to import

        if start[1].lower() in fsspec.available_protocols():
            raise ReadError(f"has one slash after {start[1]}:, needed are two, as in {start[1]}://")


def connect(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL or a local path, and the path in it, without a slash at the end.

    Raises:
        ReadError: for an unknown protocol, a missing package, missing credentials, or `gs:/bucket`, which would be a
            folder here.
    """
    import fsspec

    check_slashes(url)
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except Exception as error:  # file systems raise many kinds
        raise ReadError(f"cannot be opened: {shorten(str(error) or type(error).__name__, 200)}") from None
    return fs, path.rstrip("/")


def tried(path: str, request: Callable[[], T]) -> T:
    """Return the result of a request, repeated after temporary failures.

    Args:
        path: for errors.
        request: called until it returns, a few times.
    Raises:
        FileNotFoundError, FileExistsError: as raised by the file system.
        OSError: for all other errors, with the path.
    """
    for wait in (*WAITS, None):
        try:
            return request()
        except (FileNotFoundError, FileExistsError):
            raise
        except Exception as error:  # file systems raise many kinds
            if wait is None or isinstance(error, PERMANENT):
                reason = shorten(str(error) or type(error).__name__, 200)
                raise OSError(getattr(error, "errno", None) or errno.EIO, reason, path) from error
            time.sleep(wait * random.uniform(0.5, 1.5))
    raise AssertionError("not reached")


def read_bytes(url: str, limit: int) -> bytes:
    """Read a file of at most `limit` bytes at a URL.

    Raises:
        FileNotFoundError: where there is none.
        ReadError: for whatever else: a folder, no permission, too large.
    """
    fs, path = connect(url)
    try:
        info = tried(path, lambda: fs.info(path))
        if info["type"] == "directory":
            raise ReadError("is a folder, needed is a file")
        check_size(info.get("size") or 0, limit)
        data = tried(path, lambda: fs.cat_file(path))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ReadError(f"cannot be read: {error.strerror or error}") from None
    check_size(len(data), limit)
    return bytes(data)
