"""Compiling ahead: a call is rehearsed, and each `Program` that it meets is compiled in a thread instead of run.

It goes through the call as it stands, with shapes alone: there is no list of shapes beside the code that makes them.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import warnings
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from kandinsky_jax.common.types import PyTree
from kandinsky_jax.compilation.local_cache import CacheWarning

THREADS = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


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
                warnings.filterwarnings("always", category=CacheWarning)  # the real call will not say it again
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
