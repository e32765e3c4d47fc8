"""Names of types that annotations share."""

from __future__ import annotations

from typing import Any, TypeAlias

PyTree: TypeAlias = Any  # nested containers of arrays, or None; type checkers cannot describe one
Params: TypeAlias = PyTree  # a nested dict of arrays
