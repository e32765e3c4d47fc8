"""Networks from a component's folder, in diffusers' layout (safetensors, `.bin`) or ours (Orbax).

Our layout has the same files as that of diffusers (`model_index.json`, `config.json`, tokenizer, ...), except that a
network's tensors are in an Orbax checkpoint, `params/`, from which a pod restores its shards directly to its devices.
Either is checked completely before a network is returned. A `LazyNetwork` is checked at once, except for its values,
and read when it is needed.
"""

from __future__ import annotations

import math
import os
import re
import threading
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from tqdm.auto import tqdm

from kandinsky_jax.checkpoint import orbax, tensor_files, tensor_names
from kandinsky_jax.checkpoint.tensor_checks import (
    Leaf,
    bad_values,
    by_torch_names,
    inexact_values,
    orbax_faults,
    report_faults,
    torch_faults,
)
from kandinsky_jax.checkpoint.tensor_files import PREFERRED, QUANTIZED_DTYPES, WEIGHT_DTYPES, WeightSelection
from kandinsky_jax.common.errors import CheckpointError, shorten
from kandinsky_jax.common.reading import of_file
from kandinsky_jax.common.storage import read_json
from kandinsky_jax.models.config import ConfigError, NetworkConfig
from kandinsky_jax.models.layers import abstract
from kandinsky_jax.models.quantization_config import BESIDE_WEIGHTS, has_own_dtype
from kandinsky_jax.models.structure import structure
from kandinsky_jax.parallel.mesh import Mesh
from kandinsky_jax.parallel.sharding import Rules, home, in_memory, parameter_shardings

Layout = Literal["diffusers", "orbax"]

# Parts of the names of LoRA tensors within a network, of peft and of diffusers before it.
_LORA = re.compile(r"\.(base_layer|lora_[A-Za-z_]+|\w+_lora|ia3_l|hada_w\d_[ab]|lokr_w\d)\b")


class Progress(Protocol):
    """Protocol of the progress bars of `load_network` and `save_network`."""

    def update(self, n: float | None = 1, /) -> object: ...


def default_dtype() -> jnp.dtype:
    """Return float32 on a CPU, bfloat16 on a TPU or GPU."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def network_dtype(dtype: Any) -> jnp.dtype | None:
    """Convert a name, or a dtype of NumPy, JAX or PyTorch, to a network's dtype; None stays None.

    Raises:
        ValueError: for a dtype in which networks do not run.
    """
    if dtype is None:
        return None
    text = str(dtype).removeprefix("torch.") if isinstance(dtype, str) or "torch" in type(dtype).__module__ else dtype
    text = {"half": "float16", "fp16": "float16", "bf16": "bfloat16", "float": "float32", "fp32": "float32"}.get(
        str(text), text
    )
    try:
        found = jnp.dtype(text)
    except TypeError:
        found = None
    if found not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"dtype={shorten(dtype)} is not supported, only float32, bfloat16 and float16")
    return found


def flat_params(module: nnx.Module) -> dict[str, jax.Array]:
    """Return a network's parameters by their dotted Flax names, in Flax's order."""
    if (params := _params(module)) is not None:
        return {name: param.get_value() for name, param in params}
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}


def set_params(module: nnx.Module, params: Mapping[str, jax.Array | np.ndarray | jax.ShapeDtypeStruct]) -> nnx.Module:
    """Set a network's parameters by their dotted Flax names, and return the network."""
    if (known := _params(module)) is not None:
        for name, param in known:
            param.set_value(params[name])
        return module
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param))]
    nnx.update(module, nnx.from_flat_state({path: params[".".join(map(str, path))] for path in paths}))
    return module


def _params(module: nnx.Module) -> list[tuple[str, nnx.Param]] | None:
    """Return the parameters of a plain network (see `structure`), in Flax's order; None of others."""
    found = structure(module)
    if not found.plain:
        return None
    params = [item for item in found.variables.items() if isinstance(item[1], nnx.Param)]
    return sorted(params, key=lambda item: [int(part) if part.isdecimal() else part for part in item[0].split(".")])


def describe_network(
    cls: type[nnx.Module],
    folder: str | os.PathLike[str],
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    rules: Rules = (),
) -> nnx.Module:
    """Return the network in `folder` without its arrays; its parameters are `jax.ShapeDtypeStruct`s of `dtype`.

    The loaded network runs the programs that are compiled for this one, if `load_network` gets the same dtype.

    Args:
        mesh, rules: sharding of the parameters, see `kandinsky_jax.parallel.sharding`.
    """
    module, expected = _expected(cls, Path(folder))
    shapes = {name: tuple(leaf.shape) for name, leaf in expected.items()}
    places: Mapping[str, jax.sharding.Sharding | None] = _shardings(mesh, shapes, rules)
    if mesh is None and _is_orbax(Path(folder)):
        places = dict.fromkeys(shapes, home())
    return set_params(
        module,
        {
            name: jax.ShapeDtypeStruct(
                leaf.shape,
                _dtype_of_leaf(name, leaf, dtype),
                sharding=in_memory(places[name], shapes[name]),
            )
            for name, leaf in expected.items()
        },
    )


def move_network(module: nnx.Module, mesh: Mesh | None, rules: Rules = ()) -> None:
    """Move a network's parameters to a mesh, or to JAX's default device, in place."""
    params = flat_params(module)
    places = _shardings(mesh, {name: tuple(x.shape) for name, x in params.items()}, rules)
    where = {name: home() if mesh is None else place for name, place in places.items()}
    set_params(module, {name: jax.device_put(x, in_memory(where[name], x.shape)) for name, x in params.items()})


def _shardings(
    mesh: Mesh | None, shapes: Mapping[str, tuple[int, ...]], rules: Rules
) -> dict[str, jax.sharding.NamedSharding | None]:
    """Return the sharding of each parameter; rules are for weights, what quantized ones have beside is replicated."""
    beside = [name for name in shapes if name.rpartition(".")[2] in BESIDE_WEIGHTS]
    places = parameter_shardings(mesh, {name: shapes[name] for name in shapes if name not in beside}, rules)
    return places | parameter_shardings(mesh, {name: shapes[name] for name in beside})


def load_network(
    cls: type[nnx.Module] | nnx.Module,
    folder: str | os.PathLike[str],
    dtype: object = None,
    sharding: jax.sharding.Sharding | None = None,
    progress: Progress | None = None,
    selection: WeightSelection = PREFERRED,
) -> nnx.Module:
    """Build the network in `folder`.

    Args:
        cls: a network class of `kandinsky_jax.models`, or a network from `describe_network`, which gets its arrays.
        folder: holds `config.json` and tensors in either layout.
        dtype: of the parameters, and so of the computation; None keeps each tensor's dtype. Quantized weights and their
            scales have the dtypes that the configuration says.
        sharding: of all arrays; None is that of the described network, or else JAX's default device.
        progress: updated by the number of bytes as they are read.
        selection: which files to read, where there are several.
    Raises:
        CheckpointError: listing tensors that are missing, unexpected, of another shape than the configuration says, of
            an unsupported dtype, or not finite.
        ConfigError: for a configuration that is not supported.
    """
    folder, dtype = Path(folder), network_dtype(dtype)
    module = describe_network(cls, folder) if isinstance(cls, type) else cls
    expected = flat_params(module)
    places = {name: sharding or getattr(leaf, "sharding", None) for name, leaf in expected.items()}
    if _is_orbax(folder, selection):
        params = _read_orbax(folder, expected, dtype, places, progress)
    else:
        params = _read_torch(folder, expected, dtype, places, progress, selection)
    _folders[module] = folder.absolute()
    return set_params(module, params)


def folder_of(network: nnx.Module) -> Path | None:
    """Return the folder that a network was read from by `load_network`, None for others; it may have changed since."""
    return _folders.get(network)


_folders: weakref.WeakKeyDictionary[nnx.Module, Path] = weakref.WeakKeyDictionary()


def check_network(
    cls: type[nnx.Module], folder: str | os.PathLike[str], selection: WeightSelection = PREFERRED
) -> NetworkConfig:
    """Check the network in `folder` as `load_network` does before it reads tensors, and return its configuration."""
    folder = Path(folder)
    module, expected = _expected(cls, folder)
    if _is_orbax(folder, selection):
        faults = orbax_faults(folder, expected, orbax.list_arrays(folder / orbax.FOLDER))
    else:
        faults = torch_faults(by_torch_names(expected), _torch_tensors(folder, selection))
    report_faults(folder, faults)
    return module.config


def read_params(
    folder: str | os.PathLike[str], wanted: Iterable[str], selection: WeightSelection = PREFERRED
) -> dict[str, np.ndarray]:
    """Read some parameters of a checked network by their dotted Flax names, to the host, in the dtypes of the file."""
    folder = Path(folder)
    if _is_orbax(folder, selection):
        return orbax.read(folder / orbax.FOLDER, wanted)
    tensors = _torch_tensors(folder, selection)
    return {name: tensor_names.to_flax(name, tensors[tensor_names.torch_name(name)].read()) for name in wanted}


class LazyNetwork:
    """A network that is read from its checkpoint on first use, once for all pipelines that share it.

    Args:
        cls, folder, dtype: see `load_network`, whose errors are raised at once, except for values that are not finite.
        mesh, rules: sharding of the parameters, see `kandinsky_jax.parallel.sharding`.
        selection: which files to read, where there are several.
    """

    def __init__(
        self,
        cls: type[nnx.Module],
        folder: str | os.PathLike[str],
        dtype: object = None,
        mesh: Mesh | None = None,
        rules: Rules = (),
        selection: WeightSelection = PREFERRED,
    ):
        self.cls, self.folder, self.selection = cls, Path(folder).absolute(), selection
        self._mesh, self._rules = mesh, rules
        self.dtype = network_dtype(dtype)
        self.config: Any = check_network(cls, folder, selection)
        self.zero_embed: np.ndarray | None = None  # of a vision tower, once it is known
        self.lock = threading.RLock()
        self._network: nnx.Module | None = None

    @property
    def loaded(self) -> bool:
        return self._network is not None

    @property
    def nbytes(self) -> int:
        """Size in bytes of the loaded network."""
        if self.dtype is None:
            return stored_bytes(self.folder, self.selection)
        return bytes_as(flat_params(abstract(self.cls, self.config)), self.dtype)

    def load(self) -> nnx.Module:
        """Read the network on the first call, and return it; it stays in memory."""
        with self.lock:
            if self._network is None:
                self._network = self._read()
        return self._network

    def read_once(self) -> nnx.Module:
        """Return the network; if it is not loaded, read it without keeping it."""
        return self._network if self.loaded else self._read()

    def move(self, mesh: Mesh | None, rules: Rules = ()) -> None:
        """Move the network to a mesh, or to JAX's default device: now if it is loaded, otherwise when it is."""
        with self.lock:
            self._mesh, self._rules = mesh, rules
            if self._network is not None:
                move_network(self._network, mesh, rules)

    def _read(self) -> nnx.Module:
        described: type[nnx.Module] | nnx.Module = self.cls
        if self._mesh is not None:
            described = describe_network(self.cls, self.folder, mesh=self._mesh, rules=self._rules)
        stored, name = stored_bytes(self.folder, self.selection), f"{self.folder.parent.name}/{self.folder.name}"
        # Arrays, and no tracers, also where the first use is in a function that JAX traces.
        with loading_bar(stored, name) as bar, jax.ensure_compile_time_eval():
            return load_network(described, self.folder, self.dtype, progress=bar, selection=self.selection)


def bytes_as(params: Mapping[str, jax.Array | jax.ShapeDtypeStruct], dtype: DTypeLike) -> int:
    """Return the bytes of a network's parameters in a dtype; quantized weights and their scales keep their own."""
    return sum(
        math.prod(leaf.shape) * jnp.dtype(_dtype_of_leaf(name, leaf, dtype)).itemsize for name, leaf in params.items()
    )


def loading_bar(total: int, what: str) -> tqdm:
    """Return a progress bar over the bytes read, disabled below 1 GB."""
    return tqdm(total=total, unit="B", unit_scale=True, desc=f"loading {what}", disable=total < 1e9)


def _expected(cls: type[nnx.Module], folder: Path) -> tuple[nnx.Module, dict[str, Leaf]]:
    """Build a network without arrays from the configuration in `folder`; return it and its parameters."""
    path = folder / "config.json"
    config = cls.CONFIG.from_dict(read_json(path), str(path))
    try:
        module = abstract(cls, config)
    except ConfigError as error:
        raise ConfigError(of_file(path, error)) from None
    return module, dict(flat_params(module))


def _is_orbax(folder: Path, selection: WeightSelection = PREFERRED) -> bool:
    """Return whether a network's tensors are read from an Orbax checkpoint.

    Raises:
        CheckpointError: where there are PyTorch files too, and `selection` does not decide.
    """
    if not (folder / orbax.FOLDER).is_dir():
        return False
    if (path := tensor_files.find(folder, selection)) is None:
        return True
    if selection == PREFERRED:
        raise CheckpointError(f"{folder} has both {orbax.FOLDER}/ and {path.name}: remove the one that is out of date")
    return False


def _torch_tensors(folder: Path, selection: WeightSelection) -> dict[str, tensor_files.Tensor]:
    """Open the tensors of a folder in diffusers' layout, by their names in current diffusers; none is read yet."""
    path = tensor_files.find(folder, selection)
    if path is None:
        stems = tensor_files.STEMS
        stored = tensor_files.stored_variants(folder) if folder.is_dir() else []
        kind = {None: "safetensors or .bin", True: "safetensors", False: ".bin"}[selection.use_safetensors]
        raise CheckpointError(
            f"{folder} has no tensors: looked for {orbax.FOLDER}/, {stems[0]}, {stems[1]} and "
            f"{stems[2]} as {kind}" + (f"; there are the variants {', '.join(stored)}" if stored else "")
        )
    stored_tensors = tensor_files.open_tensors(path)
    if any(_LORA.search(name) for name in stored_tensors):
        raise CheckpointError(
            f"{folder} was saved with LoRA in it. Save it without: in diffusers, call unload_lora_weights() first (and "
            "fuse_lora() before that, to keep the LoRA's effect); LoRA is loaded from its own file by load_lora_weights"
        )
    return {modern: t for name, t in stored_tensors.items() if (modern := tensor_names.modern_name(name)) is not None}


def _read_torch(
    folder: Path,
    expected: Mapping[str, Leaf],
    dtype: DTypeLike | None,
    places: Mapping[str, jax.sharding.Sharding | None],
    progress: Progress | None,
    selection: WeightSelection,
) -> dict[str, jax.Array]:
    tensors = _torch_tensors(folder, selection)
    by_torch_name = {tensor_names.torch_name(name): name for name in expected}
    params = {}
    wanted = by_torch_names(expected)
    faults = torch_faults(wanted, tensors)
    unread = {name for name, tensor in tensors.items() if tensor.dtype not in WEIGHT_DTYPES | QUANTIZED_DTYPES}
    for torch_name in sorted(wanted.keys() & tensors.keys() - unread):
        name, array = by_torch_name[torch_name], tensors[torch_name].read()
        ordered = tensor_names.to_flax(name, array) if array.shape == wanted[torch_name].shape else array
        own = _own(ordered, _dtype_of_leaf(name, expected[name], dtype))
        faults += bad_values(torch_name, own) or inexact_values(torch_name, array)
        if not faults:
            params[name] = jax.device_put(own, in_memory(places[name], own.shape))
        if progress is not None:
            progress.update(array.nbytes)
    report_faults(folder, faults)
    return params


def _dtype_of_leaf(name: str, leaf: Leaf, dtype: DTypeLike | None) -> DTypeLike | None:
    """Return the dtype to read a parameter in; None is that of the file."""
    return leaf.dtype if has_own_dtype(name, leaf.dtype) else dtype


def _own(array: np.ndarray, dtype: DTypeLike | None) -> np.ndarray:
    # A private, contiguous copy: on a CPU, JAX may otherwise alias the memory-mapped file.
    with np.errstate(over="ignore", invalid="ignore"):  # reported by _not_finite
        own = np.float32 if array.dtype == np.float64 else array.dtype
        return np.array(array, dtype=own if dtype is None else dtype, order="C")


def _read_orbax(
    folder: Path,
    expected: Mapping[str, Leaf],
    dtype: DTypeLike | None,
    places: Mapping[str, jax.sharding.Sharding | None],
    progress: Progress | None,
) -> dict[str, jax.Array]:
    path = folder / orbax.FOLDER
    stored = orbax.list_arrays(path)
    faults = orbax_faults(folder, expected, stored)
    if any(fault.startswith("dtype:") for fault in faults):
        report_faults(folder, faults)
    target = {
        name: jax.ShapeDtypeStruct(
            leaf.shape,
            _dtype_of_leaf(name, expected.get(name, leaf), dtype) or leaf.dtype,
            sharding=places.get(name) or home(),
        )
        for name, leaf in stored.items()
    }
    params = orbax.restore(path, target)
    params = {
        name: jax.device_put(array, in_memory(target[name].sharding, array.shape)) for name, array in params.items()
    }
    for name, array in params.items():
        for shard in array.addressable_shards:
            if shard.replica_id == 0:
                faults += bad_values(name, np.asarray(shard.data))
        if progress is not None:
            progress.update(array.size * stored[name].dtype.itemsize)
    report_faults(folder, faults)
    return params


def stored_bytes(folder: str | os.PathLike[str], selection: WeightSelection = PREFERRED) -> int:
    """Return the bytes of tensors in a component's folder."""
    folder = Path(folder)
    if _is_orbax(folder, selection):
        return sum(path.stat().st_size for path in (folder / orbax.FOLDER).rglob("*") if path.is_file())
    path = tensor_files.find(folder, selection)
    if path is None:
        return 0
    parts = tensor_files.shards(path) if path.suffix == ".json" else [path]
    return sum(part.stat().st_size for part in parts if part.is_file())
