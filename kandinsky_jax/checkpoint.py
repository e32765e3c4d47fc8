"""A component's folder <-> a network: diffusers' layout (safetensors, `.bin`) and ours (Orbax), read and written.

A folder of ours has the same files as diffusers' (`model_index.json`, `config.json`, tokenizer, ...), except that a
network's tensors lie in an Orbax checkpoint, `params/`, from which a pod restores its shards straight onto its devices.
Either form is checked whole before a network is handed out.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import json
import logging
import os
import shutil
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax import nnx

from convert_weights import files, names
from convert_weights.files import CheckpointError
from kandinsky_jax.models.layers import abstract

__all__ = [
    "CheckpointError",
    "Layout",
    "Progress",
    "complete_or_absent",
    "default_dtype",
    "flat_params",
    "load_network",
    "read_json",
    "save_network",
    "stored_bytes",
]

Layout = Literal["diffusers", "orbax"]
ORBAX = "params"

T = TypeVar("T")


class Progress(Protocol):
    """What `load_network` and `save_network` need of a progress bar."""

    def update(self, n: float | None = 1, /) -> Any: ...


def default_dtype() -> jnp.dtype:
    """float32 on a CPU, bfloat16 on a TPU or GPU."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or a CheckpointError."""
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} holds {type(parsed).__name__}, needed is an object")
    return parsed


def flat_params(module: nnx.Module) -> dict[str, Any]:
    """A network's parameters by their dotted Flax names."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}


def _with_params(module: nnx.Module, params: Mapping[str, jax.Array]) -> nnx.Module:
    state = nnx.state(module, nnx.Param)
    paths = [path for path, _ in nnx.to_flat_state(state)]
    flat = {path: params[".".join(map(str, path))] for path in paths}
    nnx.update(module, nnx.from_flat_state(flat))
    return module


def load_network(
    cls: type[nnx.Module],
    folder: str | os.PathLike[str],
    dtype: Any = None,
    sharding: jax.sharding.Sharding | None = None,
    progress: Progress | None = None,
) -> Any:
    """Build the network in `folder`.

    Args:
        cls: a network class of `kandinsky_jax.models`.
        folder: holds `config.json` and tensors in either layout.
        dtype: of the parameters, and so of the computation; None keeps each tensor's own.
        sharding: where the arrays shall live; None is JAX's default device.
        progress: told the number of bytes as they are read.
    Raises:
        CheckpointError: listing every tensor that is missing, unexpected, of another shape than the configuration
            asks for, or not finite.
        ConfigError: where the configuration is not supported.
    """
    folder = Path(folder)
    config = cls.CONFIG.from_dict(read_json(folder / "config.json"), str(folder / "config.json"))
    module = abstract(cls, config)
    expected = {name: tuple(leaf.shape) for name, leaf in flat_params(module).items()}
    if (folder / ORBAX).is_dir():
        params = _read_orbax(folder, expected, dtype, sharding, progress)
    else:
        params = _read_torch(folder, expected, dtype, sharding, progress)
    return _with_params(module, params)


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
    sharding: jax.sharding.Sharding | None,
    progress: Progress | None,
) -> dict[str, jax.Array]:
    path = files.find(folder)
    if path is None:
        raise CheckpointError(f"{folder} has no tensors: looked for {ORBAX}/, {files.STEMS[0]}.safetensors and its kin")
    by_torch_name = {names.torch_name(name): name for name in expected}
    params = {}
    with files.open_tensors(path) as stored:
        tensors = {modern: t for name, t in stored.items() if (modern := names.modern_name(name)) is not None}
        wanted = {torch: names.torch_shape(flax, expected[flax]) for torch, flax in by_torch_name.items()}
        faults = _differences(folder, wanted, {name: tensor.shape for name, tensor in tensors.items()})
        for torch_name in sorted(wanted.keys() & tensors.keys()):
            name, array = by_torch_name[torch_name], tensors[torch_name].read()
            own = _own(names.to_flax(name, array) if array.shape == wanted[torch_name] else array, dtype)
            faults += _not_finite(torch_name, own)
            if not faults:
                params[name] = jax.device_put(own, sharding)
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
    sharding: jax.sharding.Sharding | None,
    progress: Progress | None,
) -> dict[str, jax.Array]:
    path = (folder / ORBAX).absolute()
    where = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    read_json(path / "_METADATA")
    if cut := _cut_short(path):
        raise CheckpointError(
            f"{path} is damaged, {len(cut)} of its files are missing or cut short:\n  " + "\n  ".join(cut)
        )
    damaged = f"{path} is damaged or no Orbax checkpoint"

    def listed(checkpointer: ocp.StandardCheckpointer) -> dict[str, Any]:
        if (tensors := checkpointer.metadata(path).item_metadata) is None:  # Orbax's way to say so
            raise CheckpointError("its list of tensors cannot be read")
        return dict(tensors)

    stored = _orbax(listed, CheckpointError, damaged)
    faults = _differences(folder, expected, {name: tuple(leaf.shape) for name, leaf in stored.items()})
    target = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if dtype is None else dtype, sharding=where)
        for name, leaf in stored.items()
    }
    params = _orbax(lambda checkpointer: checkpointer.restore(path, target), CheckpointError, damaged)
    for name, array in params.items():
        for shard in array.addressable_shards:
            if shard.replica_id == 0:
                faults += _not_finite(name, np.asarray(shard.data))
        if progress is not None:
            progress.update(array.size * stored[name].dtype.itemsize)
    _report(folder, faults)
    return params


def _cut_short(path: Path) -> list[str]:
    """The files that an Orbax checkpoint's index names and that are missing or too short.

    The index is small, so that this costs milliseconds, and it finds all files; Orbax would tell the first.
    """
    if not (path / "manifest.ocdbt").is_file():
        return []  # nothing of ours; a checkpoint in Orbax's other format has no such index
    needed: dict[str, int] = {}
    try:
        base = ts.KvStore.open({"driver": "file", "path": f"{path}/"}).result()
        nodes = [ts.ocdbt.dump(base).result()["versions"][-1]["root"]["location"]]
        while nodes:
            for entry in ts.ocdbt.dump(base, nodes.pop()).result()["entries"]:
                if "location" in entry:
                    nodes.append(entry["location"])
                elif "indirect_value" in entry:
                    # "value:FOLDER/:FILE:OFFSET:LENGTH"
                    file, offset, length = entry["indirect_value"].removeprefix("value:").rsplit(":", 2)
                    file = file.replace(":", "")
                    needed[file] = max(needed.get(file, 0), int(offset) + int(length))
    except (ValueError, LookupError) as error:
        raise CheckpointError(f"{path} is damaged: {_reason(error)}") from None
    sizes = {file: (path / file).stat().st_size if (path / file).is_file() else 0 for file in needed}
    return [f"{file}: {sizes[file]:,} of {size:,} bytes" for file, size in sorted(needed.items()) if sizes[file] < size]


def _orbax(action: Callable[[ocp.StandardCheckpointer], T], kind: type[Exception], message: str) -> T:
    """What `action` returns, given a checkpointer; or one error of this kind, where it fails in whatever way.

    Orbax handles all tensors at once. When one fails, it abandons the others, and each of them reports itself on
    stderr, then or later: hundreds of tracebacks for one full disk. Those are left out.
    """
    last_report = 0.0

    def report(record: logging.LogRecord) -> bool:
        nonlocal last_report
        last_report = time.monotonic()
        return record.levelno < logging.ERROR

    def unraisable(args: Any) -> None:
        nonlocal last_report
        last_report = time.monotonic()
        if not asyncio.iscoroutine(args.object) and "Event loop is closed" not in str(args.exc_value):
            hook(args)

    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    for logger in loggers:
        logger.addFilter(report)
    try:
        result, reason = _attempt(action)
        if reason is None:
            return result
        last_report = failed = time.monotonic()
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # "... was never awaited"
            while time.monotonic() < failed + 5 and (time.monotonic() < last_report + 0.2 or _abandoned()):
                gc.collect()
                time.sleep(0.02)
    finally:
        sys.unraisablehook = hook
        for logger in loggers:
            logger.removeFilter(report)
    raise kind(f"{message}: {reason}")


def _attempt(action: Callable[[ocp.StandardCheckpointer], T]) -> tuple[Any, str | None]:
    """(the result, None) or (None, why it failed). A function of its own, so that nothing of a failure stays alive."""
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return action(checkpointer), None
    except Exception as error:  # Orbax raises ValueError, OSError, RuntimeError, and plain Exception
        return None, _reason(error)


def _abandoned() -> bool:
    """Whether something of a failed call to Orbax is still alive."""
    return any(type(o) is types.CoroutineType and "orbax" in o.cr_code.co_filename for o in gc.get_objects())


def _reason(error: Exception) -> str:
    """The first line of what went wrong at the bottom; what Orbax puts above it is a page long."""
    text = str(error.__cause__ or error)
    return text.splitlines()[0] if text else type(error).__name__


def stored_bytes(folder: str | os.PathLike[str]) -> int:
    """How many bytes of tensors a component's folder holds."""
    folder = Path(folder)
    if (folder / ORBAX).is_dir():
        return sum(path.stat().st_size for path in (folder / ORBAX).rglob("*") if path.is_file())
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
        path = (folder / ORBAX).absolute()
        _orbax(lambda checkpointer: checkpointer.save(path, params), OSError, f"{path} could not be written")
    else:
        tensors = {
            names.torch_name(n): np.ascontiguousarray(names.to_torch(n, np.asarray(a))) for n, a in params.items()
        }
        stem = "diffusion_pytorch_model" if "_class_name" in config.to_dict() else "model"
        files.write(folder / f"{stem}.safetensors", tensors)
    if progress is not None:
        progress.update(sum(leaf.nbytes for leaf in params.values()))


@contextlib.contextmanager
def complete_or_absent(
    target: str | os.PathLike[str], needed_bytes: int = 0, overwrite: bool = False
) -> Iterator[Path]:
    """A scratch folder beside `target` that becomes `target` when the block ends well, and vanishes otherwise.

    What a killed run leaves behind is the scratch folder `.NAME.partial`, which the next run for the same target
    removes; `target` itself is never half written. Replacing a folder takes two renames: a run killed between them
    leaves the old one as `.NAME.old`, and the next run for the same target puts it back.

    Raises:
        FileExistsError: where `target` exists and `overwrite` is not given.
        OSError: where the disk has less than `needed_bytes` free, before anything is written.
    """
    target = Path(target).resolve()  # "." and links have no name that could be given to another folder
    old = target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():
        old.rename(target)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists already; choose another folder, or ask to overwrite it")
    parent = target.parent
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise OSError(errno.ENOSPC, f"{parent} has {free:,} bytes free, {target.name} needs about {needed_bytes:,}")
    scratch = parent / f".{target.name}.partial"
    _remove(scratch)
    scratch.mkdir()
    try:
        yield scratch
        _swap(scratch, target, old)
    except BaseException:
        _remove(scratch)
        raise


def _swap(scratch: Path, target: Path, old: Path) -> None:
    _remove(old)
    if target.exists():
        target.rename(old)
    scratch.rename(target)
    _remove(old)


def _remove(path: Path) -> None:
    """Remove a folder or file, if it is there."""
    for _ in range(20):  # after a failed save, Orbax's threads may still be putting files into it
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        if not path.exists():
            return
        time.sleep(0.05)
