"""Compilation: a persistent cache, and compiling ahead of the first call.

A program is compiled once per network, shapes and machine. JAX's persistent cache keeps it for later runs; where, is
decided here (`set_compilation_cache`). In one run, a rehearsal (`compiling_ahead`) goes through a call as it stands and
has each `Program` that it meets compiled in a thread, from shapes alone, instead of run: no list of shapes beside the
code that makes them.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import stat
import time
import warnings
import zlib
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from kandinsky_jax.common.storage import user_cache
from kandinsky_jax.common.types import PyTree

try:
    import zstandard  # JAX packs compiled programs by it where it is installed
except ImportError:
    zstandard = None  # type: ignore[assignment]

CACHE, OFF = "KANDINSKY_JAX_CACHE", "off"  # the environment's variable: a folder, or "off"
MAX_CACHE_BYTES = 4 << 30  # of a folder
WRITING_SECONDS = 60.0  # an entry younger than that may be incomplete because it is being written
CHUNK_BYTES = 1 << 20
BROKEN = (zlib.error,) if zstandard is None else (zlib.error, zstandard.ZstdError)
ZSTD = b"\x28\xb5\x2f\xfd"  # how a frame of zstandard begins
MIN_SECONDS = 0.05  # programs that compile faster are not cached
JAX_MIN_SECONDS = 1.0  # JAX's default, which means that the user has not set it
THREADS = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)

# Programs ---------------------------------------------------------------------------------------------------------


class Program:
    """A jitted function that is compiled instead of run while compiling ahead."""

    def __init__(self, function: Callable[..., Any], **options: Any):
        self.jitted = jax.jit(function, **options)
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        rehearsal = _REHEARSAL.get()
        return self.jitted(*args, **kwargs) if rehearsal is None else rehearsal.compile(self.jitted, args, kwargs)


def program(**options: Any) -> Callable[[Callable[..., Any]], Program]:
    """Decorate like `jax.jit`, with its options, a function that can be compiled ahead."""
    return functools.partial(Program, **options)


class _Rehearsal:
    """Programs of a call that is compiled ahead: each is compiled once, in threads."""

    def __init__(self, pool: ThreadPoolExecutor):
        self._pool = pool
        self._results: dict[Hashable, PyTree] = {}
        self.jobs: list[Future[jax.stages.Compiled]] = []

    def compile(self, jitted: jax.stages.Wrapped, args: tuple[PyTree, ...], kwargs: dict[str, PyTree]) -> PyTree:
        """Start compiling a program, and return zeros in the shapes of its result."""
        leaves, tree = jax.tree.flatten((args, kwargs))
        places = [place for leaf in leaves if (place := bound_to(leaf)) is not None]
        key = (jitted, tree, *map(_described, leaves))
        if key not in self._results:
            traced = jitted.trace(*args, **kwargs)
            # Tracing and lowering hold the GIL; XLA's compilation releases it.
            self.jobs.append(self._pool.submit(traced.lower().compile))
            self._results[key] = traced.out_info
        where = places[0] if places else None
        return jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), where), self._results[key])


def bound_to(leaf: object) -> jax.sharding.Sharding | None:
    """Return the sharding of a committed array or `ShapeDtypeStruct`, on which programs depend; None if uncommitted."""
    return getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None


def _described(leaf: Any) -> Hashable:
    """Return the part of an argument on which the program depends: the value of a static one."""
    if not hasattr(leaf, "dtype"):
        return leaf
    return tuple(leaf.shape), leaf.dtype, bool(getattr(leaf, "weak_type", False)), bound_to(leaf)


_REHEARSAL: contextvars.ContextVar[_Rehearsal | None] = contextvars.ContextVar("rehearsal", default=None)


@contextlib.contextmanager
def compiling_ahead(call: Callable[[], object]) -> Iterator[None]:
    """Compile the programs of `call` while the block runs.

    Args:
        call: runs here and now, but its programs are compiled in threads and give zeros; their parameters may be
            `jax.ShapeDtypeStruct`s. What it warns of, the real call will say.

    The end of the block waits for the threads, unless the block raises. Within another `call`, the
    programs join that one's.
    """
    if _REHEARSAL.get() is not None:
        call()
        yield
        return
    pool = ThreadPoolExecutor(THREADS, "compile")
    rehearsal = _Rehearsal(pool)
    try:
        token = _REHEARSAL.set(rehearsal)
        try:
            with warnings.catch_warnings(action="ignore"):
                call()
        finally:
            _REHEARSAL.reset(token)
        yield
        for job in rehearsal.jobs:
            job.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def for_real() -> Iterator[None]:
    """Run the block's programs even while compiling ahead, for results that are cached."""
    token = _REHEARSAL.set(None)
    try:
        yield
    finally:
        _REHEARSAL.reset(token)


# The cache --------------------------------------------------------------------------------------------------------


_settled = False  # whether the cache was configured


def set_compilation_cache(folder: str | os.PathLike[str] | None) -> None:
    """Cache compiled programs in a folder, for this process and later ones, overriding earlier settings.

    Args:
        folder: created if missing. Its content is run, so it must be yours alone; a folder that you
            share with people whom you trust is for JAX's own JAX_COMPILATION_CACHE_DIR. None turns the cache off.

    A folder that cannot be used is a warning, and then nothing is kept.
    """
    global _settled
    _settled = True
    usable = None
    if folder is not None:
        try:
            usable = _private(Path(folder).expanduser().absolute())
            _tidy(usable)
        except (OSError, RuntimeError) as error:  # without a home, `expanduser` has a RuntimeError
            warnings.warn(f"compiled programs are not cached: {error}", stacklevel=2)
    jax.config.update("jax_compilation_cache_dir", None if usable is None else str(usable))
    compilation_cache.reset_cache()  # another one may be in use already
    if usable is not None and _configured("jax_persistent_cache_min_compile_time_secs") == JAX_MIN_SECONDS:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)


def use_compilation_cache() -> None:
    """Turn the cache on, unless something has been said about it; called when a pipeline is made.

    `KANDINSKY_JAX_CACHE` is a folder or "off"; unset, it is a folder in the user's cache directory. What is configured
    in JAX stays as it is.
    """
    global _settled
    if _settled:
        return
    _settled = True
    home = user_cache()
    choice = os.environ.get(CACHE) or (OFF if home is None else str(home / "compiled"))
    ours = _configured("jax_compilation_cache_dir") is None and _configured("jax_enable_compilation_cache")
    if choice.lower() != OFF and ours:
        set_compilation_cache(choice)


def _configured(name: str) -> object:
    return getattr(jax.config, name)


def _private(folder: Path) -> Path:
    """Return a folder, created if missing; PermissionError if others can write into it, since its content is run."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = folder.stat()
    if os.name == "posix" and (about.st_uid != os.geteuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        raise PermissionError(f"others can write to {folder}, whose content would be run")
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} is not writable")
    return folder


def _tidy(folder: Path) -> None:
    """Remove truncated entries, which JAX would fail on and never replace, and above `MAX_CACHE_BYTES` the least
    recently used ones."""
    marker = folder / "checked"  # entries that were written before its time have been checked
    checked = marker.stat().st_mtime if marker.exists() else 0.0
    complete = time.time() - WRITING_SECONDS
    total = 0
    for path, about in sorted(_entries(folder), key=_last_used, reverse=True):
        total += about.st_size
        with contextlib.suppress(FileNotFoundError):  # another process tidies up too
            if total > MAX_CACHE_BYTES or (checked <= about.st_mtime < complete and not _whole(path)):
                path.unlink()
    marker.touch()
    os.utime(marker, (complete, complete))


def _entries(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):
            yield path, path.stat()


def _last_used(entry: tuple[Path, os.stat_result]) -> float:
    return max(entry[1].st_atime, entry[1].st_mtime)


def _whole(entry: Path) -> bool:
    """Return whether an entry can be decompressed to its end."""
    with entry.open("rb") as file:
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
