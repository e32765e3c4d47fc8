"""The C library's heap, for steps that ask for the same memory again and again."""

from __future__ import annotations

import ctypes
import functools
import sys

# Of glibc's <malloc.h>.
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
PAD = 256 * 2**20


@functools.cache
def keep_freed_memory() -> bool:
    """Have glibc keep the memory that this process frees, for what it asks for next; whether that can be done here.

    XLA's CPU backend takes every step's temporaries from malloc. By default glibc gives large ones back to the kernel
    at once, which clears them, page by page, when the next step asks again: about a fifth of MoVQ's training step,
    nothing that could be measured of a small UNet's. The price is that the process stays as large as it once was.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # No mappings of their own for large blocks, and the heap's end is never given back.
    return all([mallopt(MMAP_MAX, 0), mallopt(TRIM_THRESHOLD, -1), mallopt(TOP_PAD, PAD)])
