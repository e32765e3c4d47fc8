"""Whether memory that was freed stays with the process: glibc's malloc, which XLA's CPU backend allocates with."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

# Of glibc's <malloc.h>.
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX, ARENA_MAX = -1, -2, -4, -8
PAD = 256 * 2**20


@functools.cache
def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for later allocations; return whether that is possible here.

    For training steps, which allocate the same memory repeatedly. By default glibc returns large blocks to the kernel
    at once, which has to clear them page by page in the next step: about a fifth of MoVQ's training step, and not
    measurable for a small UNet. In exchange the process stays at its peak size.
    """
    mallopt = _function("mallopt")
    if mallopt is None:
        return False
    # No separate mappings for large blocks, and the end of the heap is never returned.
    return all([mallopt(MMAP_MAX, 0), mallopt(TRIM_THRESHOLD, -1), mallopt(TOP_PAD, PAD)])


def return_freed_memory() -> bool:
    """Give memory that has been freed back to the kernel now; return whether that is possible here.

    After work that is not repeated, such as compiling. It takes milliseconds.
    """
    malloc_trim = _function("malloc_trim")
    if malloc_trim is None:
        return False
    malloc_trim(ctypes.c_size_t(0))
    return True


def share_arenas(arenas: int = 2) -> bool:
    """Make threads allocate from a few arenas; return whether that is possible here.

    For servers. By default each of up to eight threads a core gets an arena of its own, and each keeps what was freed
    in it: many threads that decode a large picture once in a while hold the memory of many.
    """
    mallopt = _function("mallopt")
    return mallopt is not None and bool(mallopt(ARENA_MAX, arenas))


@functools.cache
def _function(name: str) -> Callable[..., int] | None:
    """A function of glibc; None where there is another C library."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
