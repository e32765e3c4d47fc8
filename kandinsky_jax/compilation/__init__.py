"""Compilation: a persistent cache, shared by hosts if wanted, and compiling ahead of the first call.

A program is compiled once per network, shapes and machine. JAX's persistent cache keeps it for later runs; where, is
decided by `set_compilation_cache`. A URL shares it with other hosts (`shared_cache`). `programs` compiles those of a
call ahead of it. On TPUs, `quick` has a program that compiles quickly run until the good one is complete.
"""

from kandinsky_jax.compilation.cache import CACHE, OFF, set_compilation_cache, use_compilation_cache
from kandinsky_jax.compilation.local_cache import CacheWarning
from kandinsky_jax.compilation.programs import Program, bound_to, compiling_ahead, for_real, program
from kandinsky_jax.compilation.quick import CompilationWarning, only_good_programs

__all__ = [
    "CACHE",
    "OFF",
    "CacheWarning",
    "CompilationWarning",
    "Program",
    "bound_to",
    "compiling_ahead",
    "for_real",
    "only_good_programs",
    "program",
    "set_compilation_cache",
    "use_compilation_cache",
]
