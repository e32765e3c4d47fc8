"""Atomic writes of files and folders on a local disk, safe against concurrent writers.

Everything is written under a scratch name, `.NAME.TOKEN.partial`, and renamed when it is complete. The token is random,
so two processes never share a scratch file, even with the same process id in two containers. A writer holds a lock
(`flock`) on its scratch file, which the system releases when the process ends for any reason; a process that acquires
the lock may remove the file as abandoned. A suspended process keeps its lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # no flock on Windows, where only old scratch files count as abandoned
    fcntl = None  # type: ignore[assignment]

PARTIAL = ".partial"
ABANDONED_SECONDS = 24 * 3600.0  # age of an abandoned scratch file on file systems without locks
TRIES = 5  # if another host removes a scratch file on a file system without locks
_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)

Fill = Callable[[BinaryIO], object]  # writes the content into the given file


def replace_file(path: Path, data: bytes) -> None:
    """Write or replace a file atomically.

    Abandoned scratch files of the same name are removed first.

    Raises:
        OSError: naming the file, if it cannot be written; nothing is left behind.
    """
    sweep(path.parent, path.name)
    fill_file(path, lambda file: file.write(data))


def fill_file(path: Path, fill: Fill, *, overwrite: bool = True) -> bool:
    """Write a file atomically.

    Args:
        fill: writes the content; called again if the scratch file is lost.
        overwrite: False keeps an existing file, or one that another process completes first.
    Returns:
        whether this call wrote the file.
    Raises:
        OSError: naming the file, if it cannot be written; nothing is left behind.
    """
    for attempt in range(TRIES):
        try:
            return _fill_once(path, fill, overwrite)
        except FileNotFoundError as error:
            if attempt == TRIES - 1 or not path.parent.is_dir():
                raise _named(error, path) from None
        except OSError as error:
            raise _named(error, path) from None
    raise AssertionError("not reached")


def _fill_once(path: Path, fill: Fill, overwrite: bool) -> bool:
    scratch, handle = _create(path)
    try:
        with open(handle, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(handle)
            if overwrite:
                os.replace(scratch, path)
                return True
            return _link(scratch, path)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def _link(scratch: Path, path: Path) -> bool:
    """Give a complete scratch file its final name unless that exists; return whether it was given."""
    try:
        os.link(scratch, path)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    if path.exists():
        return False
    os.replace(scratch, path)
    return True


@contextlib.contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Make a scratch folder next to `target`; it is removed at the end unless the block has renamed it."""
    while True:
        scratch = target.with_name(_scratch_name(target.name))
        scratch.mkdir()
        handle = _open_to_lock(scratch)
        if handle is None or _lock(handle, scratch):
            break
        os.close(handle)
    try:
        yield scratch
    finally:
        remove(scratch)
        if handle is not None:
            os.close(handle)


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder; without effect on file systems without locks."""
    handle = _open_to_lock(folder)
    try:
        if handle is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove scratch files and folders of killed processes; those of running or suspended processes stay.

    Args:
        name: of the target file or folder; None for all.
    """
    stem = ".+" if name is None else re.escape(_stem(name))
    pattern = re.compile(rf"\.{stem}(\.[0-9a-f]{{16}})?{re.escape(PARTIAL)}", re.DOTALL)
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for found in names:
        if pattern.fullmatch(found):
            _remove_abandoned(folder / found)


def _remove_abandoned(scratch: Path) -> None:
    """Remove a scratch file or folder unless its writer is alive, holding its lock meanwhile."""
    handle = _open_to_lock(scratch)
    try:
        if handle is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif _age(scratch) < ABANDONED_SECONDS:
            return
        remove(scratch)
    except OSError as error:
        if error.errno not in _BUSY and _age(scratch) > ABANDONED_SECONDS:  # no locks on this file system
            remove(scratch)
    finally:
        if handle is not None:
            os.close(handle)


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def remove(path: Path) -> None:
    """Remove a folder or file, if it exists."""
    for _ in range(20):  # after a failed save, Orbax's threads may still be writing into it
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        if not path.exists():
            return
        time.sleep(0.05)


# Scratch names and locks ------------------------------------------------------------------------------------------


def _stem(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:200])  # a name has at most 255 bytes


def _scratch_name(name: str) -> str:
    return f".{_stem(name)}.{secrets.token_hex(8)}{PARTIAL}"


def _create(path: Path) -> tuple[Path, int]:
    """Create a locked scratch file; return its path and handle."""
    while True:
        scratch = path.with_name(_scratch_name(path.name))
        handle = os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0), 0o666)
        if _lock(handle, scratch):
            return scratch, handle
        os.close(handle)


def _lock(handle: int, scratch: Path) -> bool:
    """Lock a new scratch file; False if it was removed before it was locked."""
    if fcntl is None:
        return True
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        found, own = os.stat(scratch), os.fstat(handle)
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino)


def _open_to_lock(path: Path) -> int | None:
    """Open a file or folder for locking; None where that is not possible."""
    if fcntl is None:
        return None
    try:
        return os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError:
        return None


def _named(error: OSError, path: Path) -> OSError:
    return OSError(error.errno, f"could not be written: {error.strerror or error}", os.fspath(path))
