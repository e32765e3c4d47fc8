"""Orbax checkpoints of a flat dictionary of arrays, with one error per failure."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np

from kandinsky_jax.common.errors import MAX_MESSAGE, CheckpointError, shorten, summarize
from kandinsky_jax.common.reading import of_file
from kandinsky_jax.common.remote import is_url
from kandinsky_jax.common.storage import read_json

if TYPE_CHECKING:  # importing Orbax takes a second or two, and most models are read from safetensors
    import orbax.checkpoint as ocp
    from etils import epath

FOLDER = "params"  # of a component, instead of diffusers' tensor file

CONCURRENT_GB = 1  # in flight at once; Orbax's default, 96, amounts to a second copy of a network

_FOLDERS = re.compile(r'"/[^"]*/')  # of a quoted path
T = TypeVar("T")


def save(path: Path, params: Mapping[str, jax.Array]) -> None:
    """Write a new checkpoint; OSError where that fails."""
    import orbax.checkpoint as ocp

    path = path.absolute()
    _run(
        lambda checkpointer: checkpointer.save(path, args=ocp.args.StandardSave(dict(params))),
        OSError,
        f"{path} could not be written",
    )


def list_arrays(path: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """List the arrays of a checkpoint by name, each with `shape` and `dtype`.

    Raises:
        CheckpointError: where it is damaged; every file that is cut short is listed.
    """
    path = path.absolute()
    _check_files(path)
    read_json(path / "_METADATA")
    if cut := _cut_short(path):
        raise CheckpointError(
            of_file(path, f"is damaged, {len(cut)} of its files are missing or cut short: {summarize(cut, 250)}")
        )

    def listed(checkpointer: ocp.Checkpointer) -> dict[str, jax.ShapeDtypeStruct]:
        if (arrays := checkpointer.metadata(path).item_metadata) is None:  # Orbax's way to say so
            raise CheckpointError("its list of arrays cannot be read")
        found = dict(arrays)
        if odd := [name for name, leaf in found.items() if not hasattr(leaf, "shape")]:
            raise CheckpointError(f"it holds something else than arrays: {summarize(odd, 150)}")
        return found

    return _run(listed, CheckpointError, f"{path} is damaged or no Orbax checkpoint")


def restore(path: Path, target: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Restore the arrays of a checkpoint, with dtypes and shardings of `target`; CheckpointError if it is damaged."""
    import orbax.checkpoint as ocp

    path = path.absolute()
    damaged = f"{path} is damaged or no Orbax checkpoint"
    return _run(
        lambda checkpointer: checkpointer.restore(path, args=ocp.args.StandardRestore(dict(target))),
        CheckpointError,
        damaged,
    )


def restore_tree(path: Path | epath.Path, target: T) -> T:
    """Restore a checkpoint of any tree of arrays, with the shapes, dtypes and shardings of `target`.

    Each process reads its shards and waits for no other.

    Args:
        path: a folder, also in an object store.

    Raises:
        CheckpointError: where it is damaged, or of another structure or other shapes.
    """
    import orbax.checkpoint as ocp

    if not is_url(str(path)):
        path = local = Path(path).absolute()
        _check_files(local)
        read_json(local / "_METADATA")
        if cut := _cut_short(local):
            raise CheckpointError(f"{path} is damaged, {len(cut)} of its files are missing or cut short: {cut[0]}")

    def action(_: ocp.Checkpointer) -> T:
        # Without a checkpointer, which waits for all processes: one that fails here does not come.
        handler = ocp.StandardCheckpointHandler(restore_concurrent_gb=CONCURRENT_GB)
        restored: T = handler.restore(path, args=ocp.args.StandardRestore(target))
        return restored

    return _run(action, CheckpointError, f"{path} is damaged or of another structure")


def read(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Read some arrays of a checkpoint to the host, in their stored dtypes; CheckpointError if it is damaged."""
    import orbax.checkpoint as ocp

    path, item = path.absolute(), dict.fromkeys(names, 0)
    arguments = ocp.args.PyTreeRestore(
        item=item,
        restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in item},
        partial_restore=True,  # not available in the handler of the other functions
    )

    def action(_: ocp.Checkpointer) -> dict[str, np.ndarray]:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(restore_concurrent_gb=CONCURRENT_GB)) as checkpointer:
            return dict(checkpointer.restore(path, args=arguments))

    return _run(action, CheckpointError, f"{path} is damaged or no Orbax checkpoint")


def _check_files(path: Path) -> None:
    """Raise where a part of a checkpoint is a pipe or a device, on which its readers would block."""
    for part in sorted(path.rglob("*")):
        if not (part.is_file() or part.is_dir()):  # the Hub's cache consists of links to files
            raise CheckpointError(of_file(path, f"is damaged: {shorten(part.name)} is not a regular file"))


def _cut_short(path: Path) -> list[str]:
    """List files that an Orbax checkpoint's index names and that are missing or too short.

    The index is small, so this costs milliseconds; Orbax itself would report only the first file.
    """
    if not (path / "manifest.ocdbt").is_file():
        return []  # nothing of ours; a checkpoint in Orbax's other format has no such index
    import tensorstore as ts

    needed: dict[str, int] = {}
    try:
        base = ts.KvStore.open({"driver": "file", "path": f"{path}/"}).result()
        nodes = [ts.ocdbt.dump(base).result()["versions"][-1]["root"]["location"]]
        seen: set[str] = set()
        while nodes:
            node = nodes.pop()
            if (mark := repr(node)) in seen:
                raise ValueError("its index leads back to itself")
            seen.add(mark)
            for entry in ts.ocdbt.dump(base, node).result()["entries"]:
                if "location" in entry:
                    nodes.append(entry["location"])
                elif "indirect_value" in entry:
                    # "value:FOLDER/:FILE:OFFSET:LENGTH"
                    file, offset, length = entry["indirect_value"].removeprefix("value:").rsplit(":", 2)
                    file = file.replace(":", "")
                    needed[file] = max(needed.get(file, 0), int(offset) + int(length))
    except Exception as error:  # of tensorstore, or of an index that is not what it was
        raise CheckpointError(of_file(path, f"is damaged: {_reason(error)}")) from None
    sizes = {file: (path / file).stat().st_size if (path / file).is_file() else 0 for file in needed}
    return [f"{file}: {sizes[file]:,} of {size:,} bytes" for file, size in sorted(needed.items()) if sizes[file] < size]


def _run(action: Callable[[ocp.Checkpointer], T], kind: type[Exception], message: str) -> T:
    """Run `action` with a checkpointer, and raise one error of this kind for any failure.

    Orbax handles all tensors concurrently. When one fails, the others are abandoned, and each reports itself on stderr,
    then or later: hundreds of tracebacks for one full disk. These are suppressed.
    """
    last_report = 0.0

    def report(record: logging.LogRecord) -> bool:
        nonlocal last_report
        last_report = time.monotonic()
        return record.levelno < logging.ERROR

    def unraisable(args: sys.UnraisableHookArgs) -> None:
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
    raise kind(f"{message}: {shorten(reason, max(100, MAX_MESSAGE - len(message)))}")


def _attempt(action: Callable[[ocp.Checkpointer], T]) -> tuple[Any, str | None]:
    """Return (result, None) or (None, reason). A separate function, so that no reference to a failed call survives."""
    import orbax.checkpoint as ocp

    try:
        handler = ocp.StandardCheckpointHandler(save_concurrent_gb=CONCURRENT_GB, restore_concurrent_gb=CONCURRENT_GB)
        with ocp.Checkpointer(handler) as checkpointer:
            return action(checkpointer), None
    except Exception as error:  # Orbax raises ValueError, OSError, RuntimeError, and plain Exception
        return None, _reason(error)


def _abandoned() -> bool:
    """Return whether a coroutine of a failed call to Orbax is still alive."""
    return any(type(o) is types.CoroutineType and "orbax" in o.cr_code.co_filename for o in gc.get_objects())


def _reason(error: Exception) -> str:
    """Return the first line of the innermost error, without folders; Orbax wraps it in many lines."""
    text = str(error.__cause__ or error)
    return _FOLDERS.sub('"', text.splitlines()[0]) if text else type(error).__name__
