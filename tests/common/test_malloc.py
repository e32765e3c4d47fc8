"""Freed memory that stays with a process or leaves it, measured in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIZE = "def size(): return int(open('/proc/self/statm').read().split()[1]) * 4096\n"

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's heap")


def printed(code: str, *words: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", SIZE + code, *words], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return [int(word) for word in done.stdout.split()]


@pytest.mark.slow
def test_freed_memory_is_kept():
    """A large block that was freed: the process stays as large as it was; without the function it does not."""
    code = (
        "import sys, numpy as np; from kandinsky_jax.common.malloc import keep_freed_memory\n"
        "assert sys.argv[1] == 'off' or keep_freed_memory()\n"
        "before = size(); block = np.ones(2**25); del block\n"
        "print(size() - before)\n"
    )
    grown = {mode: printed(code, mode)[0] for mode in ("on", "off")}
    assert grown["on"] > 2**27, grown
    assert grown["off"] < 2**26, grown


def test_what_a_compiler_has_freed_is_returned():
    """Small blocks below one that is still used, as a compiler leaves them: they stay until a program is compiled."""
    code = (
        "import numpy as np, jax\n"
        "from kandinsky_jax.compilation import program, programs\n"
        "programs.LONG_SECONDS = 0.0\n"
        "jax.numpy.zeros(1)\n"
        "before = size(); blocks = [np.ones(10**4) for _ in range(4000)]; last = blocks[-1]; del blocks\n"
        "kept = size() - before; program()(lambda x: x + 1)(np.float32(1))\n"
        "print(kept, size() - before)\n"
    )
    kept, left = printed(code)
    assert kept > 2**28, kept
    assert left < 2**26, left
