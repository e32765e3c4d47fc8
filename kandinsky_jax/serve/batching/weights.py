"""Which LoRA files, or fast adapter, the networks have: requests with others wait until those that run are done."""

from __future__ import annotations

import threading
import warnings
from typing import TypeAlias

import jax
from flax import nnx

from kandinsky_jax.common.errors import quote
from kandinsky_jax.diffusion import Network
from kandinsky_jax.parallel.mesh import GUIDANCE_AXIS, ROWS_AXIS
from kandinsky_jax.pipelines.adapters import Adapters, adapters_of, apply_adapters
from kandinsky_jax.serve.requests import ImageRequest, RequestError
from kandinsky_jax.serve.served_model import ServedModel

# Mode, whether it is fast, and names and weights of LoRA files; () for the networks as they were loaded.
WeightsKey: TypeAlias = tuple[()] | tuple[str, bool, tuple[tuple[str, float], ...]]
PLAIN: WeightsKey = ()

_owners: dict[int, AdapterWeights] = {}  # of networks by their ids, while a server runs
_owning = threading.Lock()


def key_of(request: ImageRequest) -> WeightsKey:
    """Return the weights that a request needs."""
    if not request.fast and not request.loras:
        return PLAIN
    return request.mode, request.fast, tuple(sorted(request.loras.items()))


class AdapterWeights:
    """The networks of a served model, with one set of adapters at a time.

    Args:
        model: what is served.
    """

    def __init__(self, model: ServedModel):
        self.model = model
        self.current: WeightsKey = PLAIN
        networks: list[nnx.Module] = []
        for pipe in model.by_repository.values():
            networks += [part for part in (pipe.unet, pipe.prior_prior) if all(part is not one for one in networks)]
        self._as_loaded: list[tuple[nnx.Module, Adapters]] = [(network, adapters_of(network)) for network in networks]
        network = Network.split(networks[0])[0]
        check_mesh(network.mesh)
        self.devices = network.devices

    def claim(self) -> None:
        """Make the networks this server's, which changes their weights; ValueError where another one has them."""
        with _owning:
            if any(_owners.get(id(network), self) is not self for network, _ in self._as_loaded):
                raise ValueError(
                    "these networks are served already, and LoRA of one server's requests would change the other's "
                    "pictures; stop that one first, or load the model again"
                )
            _owners.update({id(network): self for network, _ in self._as_loaded})

    def release(self) -> None:
        """Let another server have the networks."""
        with _owning:
            for key in [key for key, owner in _owners.items() if owner is self]:
                del _owners[key]

    def shares_networks(self, other: AdapterWeights) -> bool:
        """Whether another server's networks are among these."""
        own = {id(network) for network, _ in self._as_loaded}
        return any(id(network) in own for network, _ in other._as_loaded)

    def use(self, key: WeightsKey) -> None:
        """Change the networks' weights in place.

        Raises:
            RequestError: for a file that cannot be used; the networks are as they were loaded then.
        """
        with self.model.lock:  # nobody looks at networks that are half changed
            self._use(key)

    def _use(self, key: WeightsKey) -> None:
        if key == self.current:
            return
        self._reset()
        if not key:
            return
        mode, fast, loras = key
        pipe = self.model.pipe(mode)
        try:
            for name, _ in loras:
                pipe.load_lora_weights(self.model.lora_files[name], adapter_name=name)
            if loras:
                pipe.set_adapters([name for name, _ in loras], [weight for _, weight in loras])
            if fast:
                pipe._apply_fast()  # requests name their schedulers and settings
        except Exception as error:
            self._reset()
            named = ", ".join(name for name, _ in loras) or "fast adapter"
            warnings.warn(f"LoRA of a request cannot be used: {error}", stacklevel=2)  # with paths, for the operator
            raise RequestError(
                f"the LoRA {quote(named, 200)} cannot be used; the server's log says why", "loras"
            ) from None
        finally:
            self.model.weights_changed()
        self.current = key

    def _reset(self) -> None:
        """Give the networks back the weights that they were loaded with, bit for bit."""
        apply_adapters(self._as_loaded)
        self.model.weights_changed()
        self.current = PLAIN


def check_mesh(mesh: jax.sharding.Mesh | None) -> None:
    """Raise ValueError for a mesh whose devices do not have their own images."""
    if mesh is not None and mesh.shape[GUIDANCE_AXIS] * mesh.shape[ROWS_AXIS] > 1:
        raise ValueError(
            "a server shards images over devices, each with its own: give a mesh with guidance and rows of 1, such as "
            "--mesh 8,1,1"
        )
