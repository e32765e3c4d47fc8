"""The local folder of compiled programs: who may write there, damaged entries, its size."""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from kandinsky_jax.common import atomic

try:
    import zstandard  # JAX packs compiled programs by it where it is installed
except ImportError:
    zstandard = None  # type: ignore[assignment]

COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX reports it in the thread that has compiled
ENDING = "-cache"  # of an entry's file, as JAX names it
_ENTRY = re.compile(rf".+-[0-9a-f]{{64}}{ENDING}", re.DOTALL)  # the program's name and a SHA-256
MAX_CACHE_BYTES = 4 << 30  # of a folder
WRITING_SECONDS = 60.0  # an entry younger than that may be incomplete because it is being written
CHUNK_BYTES = 1 << 20
BROKEN = (zlib.error,) if zstandard is None else (zlib.error, zstandard.ZstdError)
ZSTD = b"\x28\xb5\x2f\xfd"  # how a frame of zstandard begins


class CacheWarning(UserWarning):
    """Compiled programs are not cached, or not where they should be."""


def private(folder: Path) -> Path:
    """Return a folder, created if missing; PermissionError if others can write into it, since its content is run."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = folder.stat()
    if os.name == "posix" and (about.st_uid != os.geteuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        raise PermissionError(f"others can write to {folder}, whose content would be run")
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} is not writable")
    return folder


def tidy(folder: Path) -> None:
    """Remove truncated entries, which JAX would fail on and never replace, and above `MAX_CACHE_BYTES` the least
    recently used ones."""
    marker = folder / "checked"  # entries that were written before its time have been checked
    checked = marker.stat().st_mtime if marker.exists() else 0.0
    complete = time.time() - WRITING_SECONDS
    total = 0
    for path, about in sorted(_entries(folder), key=_last_used, reverse=True):
        total += about.st_size
        with contextlib.suppress(FileNotFoundError):  # another process tidies up too
            if total > MAX_CACHE_BYTES or (checked <= about.st_mtime < complete and not _is_whole(path)):
                path.unlink()
    atomic.sweep(folder)
    marker.touch()
    os.utime(marker, (complete, complete))


def _entries(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield what JAX has written, and nothing of a folder that holds other things too."""
    for path in folder.iterdir():
        if _ENTRY.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):
                about = path.stat()
                if stat.S_ISREG(about.st_mode):  # opening a pipe would wait
                    yield path, about


def _last_used(entry: tuple[Path, os.stat_result]) -> float:
    return max(entry[1].st_atime, entry[1].st_mtime)


def _is_whole(entry: Path) -> bool:
    with entry.open("rb") as file:
        return is_whole(file)


def is_whole(file: BinaryIO) -> bool:
    """Return whether an entry can be decompressed to its end."""
    zstd = file.read(len(ZSTD)) == ZSTD
    if zstd and zstandard is None:
        return True  # for another environment, whose JAX looks for it by another name
    file.seek(0)
    stream = zstandard.ZstdDecompressor().decompressobj() if zstd else zlib.decompressobj()
    try:
        while not stream.eof and (part := file.read(CHUNK_BYTES)):
            stream.decompress(part)
    except BROKEN:
        return False
    return bool(stream.eof)


def are_whole(data: bytes) -> bool:
    """Return whether an entry's bytes can be decompressed to their end."""
    return is_whole(io.BytesIO(data))
