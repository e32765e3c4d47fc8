"""Files and folders on a local disk that are complete or absent, whoever else writes them at the same time.

Everything is written under a scratch name first, `.NAME.TOKEN.partial`, and renamed when it is complete. The token is
random, so two processes never share a scratch file, also where they have the same number in two containers. A writer
holds a lock (`flock`) on its scratch file, which the system drops when the process ends, however it ends: whoever gets
the lock knows that the file is abandoned and may be removed. A stopped process keeps its lock.
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
except ImportError:  # Windows has no flock: only old scratch files count as abandoned there
    fcntl = None  # type: ignore[assignment]

PARTIAL = ".partial"
ABANDONED_SECONDS = 24 * 3600.0  # age of a scratch file that nobody writes, where the file system knows no locks
TRIES = 5  # where a scratch file vanishes, because another host has swept it on a disk without locks
_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)

Fill = Callable[[BinaryIO], object]  # writes the content into the file that it gets


def replace_file(path: Path, data: bytes) -> None:
    """Write a file that other processes see complete or not at all, in the place of an earlier one.

    Abandoned scratch files of the same name are removed first.

    Raises:
        OSError: naming the file, where it cannot be written; nothing is left then.
    """
    sweep(path.parent, path.name)
    fill_file(path, lambda file: file.write(data))


def fill_file(path: Path, fill: Fill, *, overwrite: bool = True) -> bool:
    """Write a file that other processes see complete or not at all.

    Args:
        fill: writes the content; called again where the scratch file is lost.
        overwrite: False leaves a file that is there already, or that another process makes first, as it is.
    Returns:
        whether this call made the file.
    Raises:
        OSError: naming the file, where it cannot be written; nothing is left then.
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
    """Give a complete scratch file its name, unless there is a file of that name."""
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
    """A new folder beside `target`, removed at the end where it is still there; the block may rename it."""
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
    """Wait until no other process is in such a block for the folder; without effect where there are no locks."""
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
    """Remove scratch files and folders that killed processes left; those of running or stopped ones stay.

    Args:
        name: of the file or folder that they were to become; None removes those of every name.
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
    """Remove a scratch file or folder unless its writer is alive; the lock is held until it is gone."""
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
    """Remove a folder or file, if it is there."""
    for _ in range(20):  # after a failed save, Orbax's threads may still be putting files into it
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
    """A new scratch file and its handle, which holds the lock."""
    while True:
        scratch = path.with_name(_scratch_name(path.name))
        handle = os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0), 0o666)
        if _lock(handle, scratch):
            return scratch, handle
        os.close(handle)


def _lock(handle: int, scratch: Path) -> bool:
    """Lock a new scratch file; False where it was swept before it was locked."""
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
    """A handle for a lock; None where there can be none."""
    if fcntl is None:
        return None
    try:
        return os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError:
        return None


def _named(error: OSError, path: Path) -> OSError:
    return OSError(error.errno, f"could not be written: {error.strerror or error}", os.fspath(path))
