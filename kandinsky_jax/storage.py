"""Files and folders: configurations read, and folders written that are complete or absent, whatever interrupts."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kandinsky_jax import reading
from kandinsky_jax.tensors.files import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or a CheckpointError."""
    try:
        return reading.read_json_object(path)
    except FileNotFoundError:
        raise CheckpointError(reading.of_file(path, "is missing")) from None
    except reading.ReadError as error:
        raise CheckpointError(reading.of_file(path, error)) from None


def user_cache() -> Path | None:
    """Where this library keeps what it would otherwise compute again; None where the user has no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kandinsky_jax"
    except RuntimeError:
        return None


def replace_file(path: Path, data: bytes) -> None:
    """Write a file that other processes see whole or not at all; OSError where that fails."""
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def check_replaceable(target: str | os.PathLike[str]) -> None:
    """Raise where `target` is something else than a model or an empty folder, which overwriting would lose."""
    target = Path(target)
    if (
        target.exists()
        and not (target / "model_index.json").is_file()
        and not (target.is_dir() and not any(target.iterdir()))
    ):
        raise FileExistsError(f"{target} exists and is no model (it has no model_index.json), so it is not replaced")


def check_room(folder: Path, name: str, needed_bytes: int) -> None:
    """Raise OSError where the disk of `folder` has less than `needed_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OSError(errno.ENOSPC, f"{folder} has {free:,} bytes free, {name} needs about {needed_bytes:,}")


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
    check_room(parent, target.name, needed_bytes)
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
