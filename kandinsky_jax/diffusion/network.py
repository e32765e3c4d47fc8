"""A network as a structure and its arrays, for functions that JAX transforms."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from kandinsky_jax.common.types import Params
from kandinsky_jax.parallel.mesh import DATA_AXIS, mesh_of


class Network:
    """A module's structure without its arrays, hashable, so that a jitted function can take it as a static argument.

    Two networks built alike are equal, so pipelines that share a network share its compiled programs.

    Args:
        graphdef: the structure, from `nnx.split`.
        mesh: what the parameters lie on, None for a single device.
    """

    def __init__(self, graphdef: nnx.GraphDef, mesh: jax.sharding.Mesh | None = None):
        self.graphdef, self.mesh = graphdef, mesh
        self._hash = hash((graphdef, mesh))  # costs milliseconds for the UNet, and jit asks at every call

    @classmethod
    def split(cls, module: nnx.Module) -> tuple[Network, Params]:
        """Split a module into its structure and its parameters, a nested dict of the module's own arrays (no copy)."""
        graphdef, state = nnx.split(module)
        params = nnx.to_pure_dict(state)
        return cls(graphdef, mesh_of(next(iter(jax.tree.leaves(params)), None))), params

    @property
    def devices(self) -> int:
        """Over how many devices the images of a batch are sharded."""
        return 1 if self.mesh is None else self.mesh.shape[DATA_AXIS]

    def bind(self, params: Params) -> nnx.Module:
        """Return the module with these parameters; they may be tracers, so a loss can be a function of them."""
        return nnx.merge(self.graphdef, params)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Network) or self.mesh != other.mesh:
            return False
        return self.graphdef is other.graphdef or self.graphdef == other.graphdef


@contextlib.contextmanager
def matmul_precision(params: Params) -> Iterator[None]:
    """Compute float32 products in float32 within the block, where any of the parameters is float32.

    TPUs and GPUs compute them in bfloat16 or TF32 by default: not what someone who asks for float32 wants, and not the
    reference's picture. Parameters in bfloat16 leave JAX's setting as it is.
    """
    exact = any(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    with jax.default_matmul_precision("highest") if exact else contextlib.nullcontext():
        yield
