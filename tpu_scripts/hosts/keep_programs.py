"""Imported by each process that stands for a host: all of them keep what they compile, which takes most of their time.

JAX keeps the programs of process 0 alone, for all. On CPUs each process's programs differ, so the others would find
nothing and compile again at every start.
"""

from __future__ import annotations

from typing import Any

from jax._src import compiler, distributed

_cache_write = compiler._cache_write


def _write_as_process_0(*args: Any, **options: Any) -> None:
    state = distributed.global_state
    process, state.process_id = state.process_id, 0
    try:
        _cache_write(*args, **options)
    finally:
        state.process_id = process


compiler._cache_write = _write_as_process_0
