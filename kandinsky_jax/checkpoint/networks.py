"""A component's folder <-> a network: diffusers' layout (safetensors, `.bin`) and ours (Orbax), read and written.

A folder of ours has the same files as diffusers' (`model_index.json`, `config.json`, tokenizer, ...), except that a
network's tensors lie in an Orbax checkpoint, `params/`, from which a pod restores its shards straight onto its devices.
Either form is checked whole before a network is handed out. A `Deferred` network is checked at once, but for its
numbers, and read when it is needed.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm.auto import tqdm

from kandinsky_jax import orbax
from kandinsky_jax.models.config import NetworkConfig
from kandinsky_jax.models.layers import abstract
from kandinsky_jax.sharding import Mesh, Rules, parameter_places
from kandinsky_jax.storage import read_json
from kandinsky_jax.tensors import files, names
from kandinsky_jax.tensors.files import CheckpointError

Layout = Literal["diffusers", "orbax"]


class Progress(Protocol):
    """What `load_network` and `save_network` need of a progress bar."""

    def update(self, n: float | None = 1, /) -> Any: ...


def default_dtype() -> jnp.dtype:
    """float32 on a CPU, bfloat16 on a TPU or GPU."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def flat_params(module: nnx.Module) -> dict[str, Any]:
    """A network's parameters by their dotted Flax names."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}


def set_params(module: nnx.Module, params: Mapping[str, jax.Array | jax.ShapeDtypeStruct]) -> nnx.Module:
    """Put parameters, by their dotted Flax names, into a network, which is returned."""
    state = nnx.state(module, nnx.Param)
    paths = [path for path, _ in nnx.to_flat_state(state)]
    flat = {path: params[".".join(map(str, path))] for path in paths}
    nnx.update(module, nnx.from_flat_state(flat))
    return module


def describe_network(
    cls: type[nnx.Module],
    folder: str | os.PathLike[str],
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    rules: Rules = (),
) -> Any:
    """The network in `folder` without its arrays: its parameters are `jax.ShapeDtypeStruct`s of `dtype`.

    A program that is compiled for it is the one that the loaded network runs, where `load_network` gets this dtype.

    Args:
        mesh, rules: where the parameters are to lie, see `kandinsky_jax.sharding`.
    """
    module, shapes = _expected(cls, Path(folder))
    places: Mapping[str, Any] = parameter_places(mesh, shapes, rules)
    if mesh is None and (Path(folder) / orbax.FOLDER).is_dir():
        places = dict.fromkeys(shapes, _home())
    return set_params(
        module,
        {name: jax.ShapeDtypeStruct(shape, dtype, sharding=places[name]) for name, shape in shapes.items()},
    )


def move_network(module: nnx.Module, mesh: Mesh | None, rules: Rules = ()) -> None:
    """Put a network's parameters on a mesh, or on JAX's default device, in place."""
    params = flat_params(module)
    places = parameter_places(mesh, {name: tuple(x.shape) for name, x in params.items()}, rules)
    where = {name: _home() if mesh is None else place for name, place in places.items()}
    set_params(module, {name: jax.device_put(x, where[name]) for name, x in params.items()})


def _home() -> jax.sharding.Sharding:
    """JAX's default device, for arrays that are bound to it: Orbax makes no others."""
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def load_network(
    cls: type[nnx.Module] | nnx.Module,
    folder: str | os.PathLike[str],
    dtype: Any = None,
    sharding: jax.sharding.Sharding | None = None,
    progress: Progress | None = None,
) -> Any:
    """Build the network in `folder`.

    Args:
        cls: a network class of `kandinsky_jax.models`, or what `describe_network` has made, which then gets its arrays.
        folder: holds `config.json` and tensors in either layout.
        dtype: of the parameters, and so of the computation; None keeps each tensor's own.
        sharding: where the arrays shall live; None is where `cls` is described to have them, or else JAX's default
            device.
        progress: told the number of bytes as they are read.
    Raises:
        CheckpointError: listing every tensor that is missing, unexpected, of another shape than the configuration
            asks for, or not finite.
        ConfigError: where the configuration is not supported.
    """
    folder = Path(folder)
    module = describe_network(cls, folder) if isinstance(cls, type) else cls
    leaves = flat_params(module)
    expected = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    places = {name: sharding or getattr(leaf, "sharding", None) for name, leaf in leaves.items()}
    if (folder / orbax.FOLDER).is_dir():
        params = _read_orbax(folder, expected, dtype, places, progress)
    else:
        params = _read_torch(folder, expected, dtype, places, progress)
    return set_params(module, params)


def check_network(cls: type[nnx.Module], folder: str | os.PathLike[str]) -> NetworkConfig:
    """What `load_network` says of the network in `folder` before it reads a tensor: its configuration, or the error."""
    folder = Path(folder)
    module, expected = _expected(cls, folder)
    if (folder / orbax.FOLDER).is_dir():
        stored = orbax.listing(folder / orbax.FOLDER)
        faults = _differences(folder, expected, {name: tuple(leaf.shape) for name, leaf in stored.items()})
    else:
        wanted = {names.torch_name(name): names.torch_shape(name, shape) for name, shape in expected.items()}
        faults = _differences(folder, wanted, {name: t.shape for name, t in _torch_tensors(folder).items()})
    _report(folder, faults)
    return module.config


def read_params(folder: str | os.PathLike[str], wanted: Iterable[str]) -> dict[str, np.ndarray]:
    """Some parameters of a checked network by their dotted Flax names, on the host, in the dtypes of the file."""
    folder = Path(folder)
    if (folder / orbax.FOLDER).is_dir():
        return orbax.read(folder / orbax.FOLDER, wanted)
    tensors = _torch_tensors(folder)
    return {name: names.to_flax(name, tensors[names.torch_name(name)].read()) for name in wanted}


class Deferred:
    """A network of a checkpoint that is read when it is first needed, once for all pipelines that share it.

    Args:
        cls, folder, dtype: see `load_network`, whose errors come at once, but for the numbers that are not finite.
        mesh, rules: where its parameters will lie, see `kandinsky_jax.sharding`.
    """

    def __init__(
        self,
        cls: type[nnx.Module],
        folder: str | os.PathLike[str],
        dtype: Any = None,
        mesh: Mesh | None = None,
        rules: Rules = (),
    ):
        self.cls, self.folder = cls, Path(folder).absolute()
        self._mesh, self._rules = mesh, rules
        self.dtype = None if dtype is None else jnp.dtype(dtype)
        self.config: Any = check_network(cls, folder)
        self._network: Any = None
        self._lock = threading.Lock()

    @property
    def loaded(self) -> bool:
        return self._network is not None

    @property
    def nbytes(self) -> int:
        """How many bytes it takes when it is loaded."""
        leaves = flat_params(abstract(self.cls, self.config)).values()
        return stored_bytes(self.folder) if self.dtype is None else sum(x.size for x in leaves) * self.dtype.itemsize

    def load(self) -> Any:
        """The network; it stays in memory."""
        with self._lock:
            if self._network is None:
                self._network = self._read()
        return self._network

    def peek(self) -> Any:
        """The network, for a moment: where nobody has needed it yet, it is read and not kept."""
        return self._network if self.loaded else self._read()

    def move(self, mesh: Mesh | None, rules: Rules = ()) -> None:
        """Put the network on a mesh, or on JAX's default device: now if it is loaded, else when it is."""
        with self._lock:
            self._mesh, self._rules = mesh, rules
            if self._network is not None:
                move_network(self._network, mesh, rules)

    def _read(self) -> Any:
        described: Any = self.cls
        if self._mesh is not None:
            described = describe_network(self.cls, self.folder, mesh=self._mesh, rules=self._rules)
        with loading_bar(stored_bytes(self.folder), f"{self.folder.parent.name}/{self.folder.name}") as bar:
            return load_network(described, self.folder, self.dtype, progress=bar)


def loading_bar(total: int, what: str) -> Any:
    """A progress bar over the bytes that are read, for more than a second's worth."""
    return tqdm(total=total, unit="B", unit_scale=True, desc=f"loading {what}", disable=total < 1e9)


def _expected(cls: type[nnx.Module], folder: Path) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """A network without its arrays, and their shapes by name, as the configuration in `folder` has them."""
    path = folder / "config.json"
    module = abstract(cls, cls.CONFIG.from_dict(read_json(path), str(path)))
    return module, {name: tuple(leaf.shape) for name, leaf in flat_params(module).items()}


def _torch_tensors(folder: Path) -> dict[str, files.Tensor]:
    """The tensors of a folder in diffusers' layout by their names in today's diffusers; none is read yet."""
    path = files.find(folder)
    if path is None:
        raise CheckpointError(
            f"{folder} has no tensors: looked for {orbax.FOLDER}/, {files.STEMS[0]}.safetensors and its kin"
        )
    stored = files.open_tensors(path)
    return {modern: t for name, t in stored.items() if (modern := names.modern_name(name)) is not None}


def _differences(
    folder: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> list[str]:
    faults = [f"missing: {n} {list(expected[n])}" for n in sorted(expected.keys() - found.keys())]
    faults += [f"unexpected: {n} {list(found[n])}" for n in sorted(found.keys() - expected.keys())]
    faults += [
        f"shape: {n} is {list(found[n])}, {folder / 'config.json'} asks for {list(expected[n])}"
        for n in sorted(expected.keys() & found.keys())
        if found[n] != expected[n]
    ]
    return faults


def _report(folder: Path, faults: list[str]) -> None:
    if faults:
        raise CheckpointError(
            f"{folder} does not hold the network that its config.json describes, {len(faults)} tensors differ:\n  "
            + "\n  ".join(faults)
        )


def _not_finite(name: str, array: np.ndarray) -> list[str]:
    """Looked for in the dtype asked for, which may be too narrow for what the file holds."""
    bad = array.size - int(np.isfinite(array).sum())
    return [f"not finite as {array.dtype}: {name}, {bad} of {array.size} numbers"] if bad else []


def _read_torch(
    folder: Path,
    expected: Mapping[str, tuple[int, ...]],
    dtype: Any,
    places: Mapping[str, jax.sharding.Sharding | None],
    progress: Progress | None,
) -> dict[str, jax.Array]:
    tensors = _torch_tensors(folder)
    by_torch_name = {names.torch_name(name): name for name in expected}
    params = {}
    wanted = {torch: names.torch_shape(flax, expected[flax]) for torch, flax in by_torch_name.items()}
    faults = _differences(folder, wanted, {name: tensor.shape for name, tensor in tensors.items()})
    for torch_name in sorted(wanted.keys() & tensors.keys()):
        name, array = by_torch_name[torch_name], tensors[torch_name].read()
        own = _own(names.to_flax(name, array) if array.shape == wanted[torch_name] else array, dtype)
        faults += _not_finite(torch_name, own)
        if not faults:
            params[name] = jax.device_put(own, places[name])
        if progress is not None:
            progress.update(array.nbytes)
    _report(folder, faults)
    return params


def _own(array: np.ndarray, dtype: Any) -> np.ndarray:
    # A private, contiguous copy: on a CPU, JAX may otherwise keep looking at the file's memory.
    with np.errstate(over="ignore", invalid="ignore"):  # _not_finite says it better
        return np.array(array, dtype=array.dtype if dtype is None else dtype, order="C")


def _read_orbax(
    folder: Path,
    expected: Mapping[str, tuple[int, ...]],
    dtype: Any,
    places: Mapping[str, jax.sharding.Sharding | None],
    progress: Progress | None,
) -> dict[str, jax.Array]:
    path = folder / orbax.FOLDER
    stored = orbax.listing(path)
    faults = _differences(folder, expected, {name: tuple(leaf.shape) for name, leaf in stored.items()})
    target = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype if dtype is None else dtype, sharding=places.get(name) or _home()
        )
        for name, leaf in stored.items()
    }
    params = orbax.restore(path, target)
    for name, array in params.items():
        for shard in array.addressable_shards:
            if shard.replica_id == 0:
                faults += _not_finite(name, np.asarray(shard.data))
        if progress is not None:
            progress.update(array.size * stored[name].dtype.itemsize)
    _report(folder, faults)
    return params


def stored_bytes(folder: str | os.PathLike[str]) -> int:
    """How many bytes of tensors a component's folder holds."""
    folder = Path(folder)
    if (folder / orbax.FOLDER).is_dir():
        return sum(path.stat().st_size for path in (folder / orbax.FOLDER).rglob("*") if path.is_file())
    path = files.find(folder)
    if path is not None and path.name.endswith(".index.json"):
        return sum(shard.stat().st_size for shard in folder.glob("*.safetensors"))
    return 0 if path is None else path.stat().st_size


def save_network(
    module: nnx.Module,
    folder: str | os.PathLike[str],
    layout: Layout = "diffusers",
    progress: Progress | None = None,
) -> None:
    """Write a network's `config.json` and tensors into `folder`, which is made where it is missing.

    Args:
        layout: "diffusers" writes the safetensors file that diffusers or transformers reads; "orbax" writes `params/`.
        progress: told the number of bytes as they are handed over.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = module.config
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n")
    params = flat_params(module)
    if layout == "orbax":
        orbax.save(folder / orbax.FOLDER, params)
    else:
        tensors = {names.torch_name(name): _unread(name, array) for name, array in params.items()}
        stem = "diffusion_pytorch_model" if "_class_name" in config.to_dict() else "model"
        files.write(folder / f"{stem}.safetensors", tensors)
    if progress is not None:
        progress.update(sum(leaf.nbytes for leaf in params.values()))


def _unread(name: str, array: jax.Array) -> files.Tensor:
    """A parameter as a PyTorch tensor that is fetched from its device when it is written."""
    return files.Tensor(
        names.torch_shape(name, array.shape), lambda: names.to_torch(name, np.asarray(array)), np.dtype(array.dtype)
    )
