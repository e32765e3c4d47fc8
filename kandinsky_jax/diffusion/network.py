"""A network as a structure and its arrays, for functions that JAX transforms."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from kandinsky_jax.common.types import Params
from kandinsky_jax.models.layers import dtypes_of
from kandinsky_jax.models.structure import Identities, Structure, structure, value_of
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
        """Split a module into its structure and its parameters, a nested dict of the module's own arrays (no copy).

        Flax does not look again at a module whose structure is as it was the last time: with small networks, that took
        half of a pipeline's call.
        """
        found = structure(module)
        known = _splits.get(module)
        if known is not None and found.plain and known.is_of(found):
            params = jax.tree.unflatten(known.treedef, [value_of(found.variables[name]) for name in known.names])
            if known.network.mesh != (mesh := _mesh(params)):
                known.network = cls(known.network.graphdef, mesh)
            return known.network, params
        graphdef, state = nnx.split(module)
        params = nnx.to_pure_dict(state)
        network = cls(graphdef, _mesh(params))
        leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
        names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
        if found.plain and sorted(names) == sorted(found.variables):
            _splits[module] = _Split(network, treedef, names, list(found.variables), Identities(found.others))
        return network, params

    @property
    def devices(self) -> int:
        """Over how many devices the images of a batch are sharded."""
        return 1 if self.mesh is None else self.mesh.shape[DATA_AXIS]

    def bind(self, params: Params) -> nnx.Module:
        """Return the module with these parameters; they may be tracers, so a loss can be a function of them.

        Raises:
            ValueError: for parameters of another structure.
        """
        try:
            return nnx.merge(self.graphdef, params)
        except ValueError as error:
            raise ValueError(
                f"these are not the parameters of this network, as Network.split gives them: {error}"
            ) from None

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Network) or self.mesh != other.mesh:
            return False
        return self.graphdef is other.graphdef or self.graphdef == other.graphdef


@dataclass
class _Split:
    """What a module was split into, and the structure that it had."""

    network: Network
    treedef: jax.tree_util.PyTreeDef  # of the parameters
    names: list[str]  # of the variables, in the order of the tree's leaves
    variables: list[str]
    others: Identities

    def is_of(self, found: Structure) -> bool:
        """Return whether a structure is known to be the one that was split."""
        return list(found.variables) == self.variables and self.others.are(found.others)


def _mesh(params: Params) -> jax.sharding.Mesh | None:
    return mesh_of(next(iter(jax.tree.leaves(params)), None))


_splits: weakref.WeakKeyDictionary[nnx.Module, _Split] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def matmul_precision(params: Params) -> Iterator[None]:
    """Compute float32 products in float32 within the block, where any of the parameters is float32.

    TPUs and GPUs compute them in bfloat16 or TF32 by default: not what someone who asks for float32 wants, and not the
    reference's picture. Parameters in bfloat16 leave JAX's setting as it is, and so do scales of quantized weights.
    """
    exact = any(dtype == jnp.float32 for dtype in dtypes_of(params))
    with jax.default_matmul_precision("highest") if exact else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def model_precision(model: object) -> Iterator[None]:
    """`matmul_precision` of a module's parameters; around any other function, JAX's setting stays as it is."""
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param)) if isinstance(model, nnx.Module) else ()
    with matmul_precision(params):
        yield
