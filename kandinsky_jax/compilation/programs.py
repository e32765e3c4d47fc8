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

from kandinsky_jax.common.malloc import return_freed_memory
from kandinsky_jax.common.types import PyTree
from kandinsky_jax.compilation.local_cache import COMPILED, CacheWarning
from kandinsky_jax.compilation.quick import QUICK_OPTIONS, GoodPrograms, quick_programs

THREADS = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)

LONG_SECONDS = 1.0  # of compiling, or of reading from the cache, after which memory may have been freed


class Program:
    """A jitted function that is compiled instead of run while compiling ahead.

    Where compiling takes minutes it runs as compiled quickly until the good program is complete, see `quick`.
    """

    def __init__(self, function: Callable[..., Any], **options: Any):
        self.jitted = jax.jit(function, **options)
        self.quick = jax.jit(function, compiler_options=dict(QUICK_OPTIONS), **options)
        self.good = GoodPrograms()
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _return_compilers_memory()
        if (rehearsal := _REHEARSAL.get()) is not None:
            return rehearsal.compile(self, args, kwargs)
        if quick_programs() and not _is_traced(args, kwargs):
            call = _Call(args, kwargs)
            if not self.good.ready(call.key, lambda: call.lower(self.jitted)):
                return self.quick(*args, **kwargs)
        return self.jitted(*args, **kwargs)


@functools.cache
def _return_compilers_memory() -> None:
    """From now on, give back what XLA's compiler has freed: over a gigabyte after the official UNet on a CPU."""

    def compiled(event: str, duration_secs: float, **_: object) -> None:
        if event == COMPILED and duration_secs > LONG_SECONDS:
            return_freed_memory()

    jax.monitoring.register_event_duration_secs_listener(compiled)


def _is_traced(*trees: PyTree) -> bool:
    """Whether a call is part of a function that JAX transforms, which compiles it then."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


class _Call:
    """Arguments of a program, and what it depends on."""

    def __init__(self, args: tuple[PyTree, ...], kwargs: dict[str, PyTree]):
        self.args, self.kwargs = args, kwargs
        leaves, tree = jax.tree.flatten((args, kwargs))
        self.key: Hashable = (tree, *map(_described, leaves))
        self.place = next((place for leaf in leaves if (place := bound_to(leaf)) is not None), None)

    def lower(self, jitted: jax.stages.Wrapped) -> jax.stages.Lowered:
        return jitted.trace(*self.args, **self.kwargs).lower()


def program(**options: Any) -> Callable[[Callable[..., Any]], Program]:
    """Decorate like `jax.jit`, with its options, a function that can be compiled ahead."""
    return functools.partial(Program, **options)


class _Rehearsal:
    """Programs of a call that is compiled ahead: each is compiled once, in threads."""

    def __init__(self, pool: ThreadPoolExecutor):
        self._pool = pool
        self._results: dict[Hashable, PyTree] = {}
        self.jobs: list[Future[object]] = []

    def compile(self, program: Program, args: tuple[PyTree, ...], kwargs: dict[str, PyTree]) -> PyTree:
        """Start compiling a program, and return zeros in the shapes of its result."""
        call = _Call(args, kwargs)
        key = (program, call.key)
        if key not in self._results:
            # Tracing and lowering hold the GIL; XLA's compilation releases it.
            traced = program.jitted.trace(*args, **kwargs)
            lowered = traced.lower()
            if quick_programs():
                quick = call.lower(program.quick)
                self.jobs.append(self._pool.submit(_compile_first, program.good, call.key, lowered, quick))
            else:
                self.jobs.append(self._pool.submit(lowered.compile))
            self._results[key] = traced.out_info
        return jax.tree.map(lambda x: jax.device_put(_zeros(x), call.place), self._results[key])


def _zeros(like: Any) -> np.ndarray | jax.Array:
    """Return zeros in the shape of a result; for random keys, one key."""
    if jax.dtypes.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), like.shape)
    return np.zeros(like.shape, like.dtype)


def _compile_first(good: GoodPrograms, key: Hashable, lowered: jax.stages.Lowered, quick: jax.stages.Lowered) -> object:
    """Compile what a call will run first; the good program goes on in its own thread."""
    return None if good.ready(key, lambda: lowered) else quick.compile()


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
def _unheard() -> Iterator[None]:
    """Hide warnings, but for those that will not be said again."""
    with warnings.catch_warnings(action="ignore"):
        warnings.filterwarnings("always", category=CacheWarning)
        yield


@contextlib.contextmanager
def compiling_ahead(call: Callable[[], object], quiet: bool = True) -> Iterator[None]:
    """Compile the programs of `call` while the block runs.

    Args:
        call: runs here and now, but its programs are compiled in threads and give zeros; their parameters may be
            `jax.ShapeDtypeStruct`s.
        quiet: hide what it warns of, since the real call will say it. False beside other threads: they share the
            filters of warnings, and would lose theirs.

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
            with _unheard() if quiet else contextlib.nullcontext():
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
