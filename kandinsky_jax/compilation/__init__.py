"""Compilation: a persistent cache, shared by hosts if wanted, and compiling ahead of the first call.

A program is compiled once per network, shapes and machine. JAX's persistent cache keeps it for later runs; where, is
decided by `set_compilation_cache`. A URL shares it with other hosts (`shared_cache`). `programs` compiles those of a
call ahead of it.
"""

from kandinsky_jax.compilation.cache import CACHE, OFF, set_compilation_cache, use_compilation_cache
from kandinsky_jax.compilation.local_cache import CacheWarning
from kandinsky_jax.compilation.programs import Program, bound_to, compiling_ahead, for_real, program

__all__ = [
    "CACHE",
    "OFF",
    "CacheWarning",
    "Program",
    "bound_to",
    "compiling_ahead",
    "for_real",
    "program",
    "set_compilation_cache",
    "use_compilation_cache",
]
