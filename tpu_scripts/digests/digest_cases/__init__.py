"""Cases for `tpu_scripts/digests/digests.py`: small runs of everything whose results a refactoring must keep.

A case uses the names in `kandinsky_jax.__all__`, the command lines and files, so that the same case runs on commits
before and after code has moved. Modules import kandinsky_jax inside functions: listing the cases loads nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# One process each. The value is how many CPU devices it has.
GROUPS = {
    "modes": 1,
    "depth_and_inpainting": 1,
    "priors": 1,
    "solvers": 1,
    "adapters": 1,
    "files": 1,
    "commands": 1,
    "batch_jobs": 1,
    "training": 1,
    "devices": 2,
}


@dataclass(frozen=True)
class Case:
    """A named result.

    Args:
        name: stable and readable, parts separated by slashes.
        run: given an empty folder, returns what is digested: arrays, bytes, numbers, texts, or dicts and lists of them.
        quick: whether it belongs to the subset of `--quick`.
    """

    name: str
    run: Callable[[Path], Any]
    quick: bool = False


def cases_of(group: str, quick: bool = False) -> list[Case]:
    """The cases of one group, in the order in which they run.

    Raises:
        ValueError: where two cases have one name.
    """
    found: list[Case] = importlib.import_module(f"digest_cases.{group}").cases()
    names = [case.name for case in found]
    if len(set(names)) < len(names):
        raise ValueError(f"{group}: two cases have the name {max(names, key=names.count)!r}")
    return [case for case in found if case.quick or not quick]
