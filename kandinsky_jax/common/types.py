"""Names of types that annotations share.

Annotations of arrays carry a dtype and a shape, such as `Float[Array, "B h w 4"]`. They are strings that nothing
evaluates, so jaxtyping is no dependency; the tests import it first, and have every call checked (tests/conftest.py).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import numpy as np

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float, Int, Num
elif "jaxtyping" in sys.modules:
    from jaxtyping import Bool, Float, Int, Num

    Array = jax.Array | np.ndarray  # JAX takes NumPy's arrays wherever it takes its own
else:
    Array = Bool = Float = Int = Num = jax.Array

PyTree: TypeAlias = Any  # nested containers of arrays, or None; type checkers cannot describe one
Params: TypeAlias = PyTree  # a nested dict of arrays

__all__ = ["Array", "Bool", "Float", "Int", "Num", "Params", "PyTree"]
