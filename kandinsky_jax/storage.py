"""Files and folders: configurations read, and folders written that are complete or absent, whatever interrupts."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kandinsky_jax import atomic, reading
from kandinsky_jax.tensors.files import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or a CheckpointError."""
    try:
        return reading.read_json_object(path)
    except FileNotFoundError:
        raise CheckpointError(reading.of_file(path, "is missing")) from None
    except reading.ReadError as error:
        raise CheckpointError(reading.of_file(path, error)) from None


def files_below(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """What lies in a folder and those below it, but for folders; links to folders are followed, as readers do.

    Args:
        above: the folders that lead here, resolved; a link to one of them is passed over.
    """
    real = folder.resolve()
    if real in above:
        return
    for path in folder.iterdir():
        if path.is_dir():
            yield from files_below(path, above | {real})
        else:
            yield path


def user_cache() -> Path | None:
    """Where this library keeps what it would otherwise compute again; None where the user has no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kandinsky_jax"
    except RuntimeError:
        return None


def check_replaceable(target: str | os.PathLike[str]) -> None:
    """Raise where `target` is something else than a model or an empty folder, which overwriting would lose."""
    target = Path(target)
    atomic.sweep(target, target.resolve().name)  # of a run that was killed, see `_stays`
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

    What a killed run leaves behind is its scratch folder, `.NAME.TOKEN.partial`, which the next run for the same target
    removes; that of a run that is still alive stays. `target` itself is never half written. Replacing a folder takes
    two renames: a run killed between them leaves the old one as `.NAME.old`, and the next run for the same target puts
    it back. An empty folder that cannot be exchanged for another (`_stays`) is filled instead, `model_index.json` last.

    Raises:
        FileExistsError: where `target` exists and `overwrite` is not given, at the end too.
        OSError: where the disk has less than `needed_bytes` free, before anything is written.
    """
    target = Path(target).resolve()  # "." and links have no name that could be given to another folder
    old = target.with_name(f".{target.name}.old")
    parent = target.parent
    if old.exists():
        with atomic.locked_folder(parent):
            if old.exists() and not target.exists():
                old.rename(target)
    _check_absent(target, overwrite)
    parent.mkdir(parents=True, exist_ok=True)
    stays = _stays(target)
    check_room(target if stays else parent, target.name, needed_bytes)
    atomic.sweep(parent, target.name)
    with atomic.scratch_folder(target / target.name if stays else target) as scratch:
        yield scratch
        with atomic.locked_folder(parent):
            if stays:
                for path in sorted(scratch.iterdir(), key=lambda path: path.name == "model_index.json"):
                    path.rename(target / path.name)
                return
            _check_absent(target, overwrite)
            here = _is_working_directory(target)
            _swap(scratch, target, old)
            if here:
                os.chdir(target)  # this process was left in the folder that was replaced


def _stays(folder: Path) -> bool:
    """Whether an empty folder must not be exchanged for another: someone works in it, it is mounted, or its parent
    cannot be written."""
    return (
        folder.is_dir()
        and not any(folder.iterdir())
        and (_is_working_directory(folder) or os.path.ismount(folder) or not _may_write(folder.parent))
    )


def _may_write(folder: Path) -> bool:
    """By the identity that counts when it writes; access() asks for that of who started the process."""
    return os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def _is_working_directory(folder: Path) -> bool:
    try:
        return os.path.samefile(folder, os.curdir)
    except OSError:  # one of them is gone
        return False


def _check_absent(target: Path, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists already; choose another folder, or ask to overwrite it")


def _swap(scratch: Path, target: Path, old: Path) -> None:
    atomic.remove(old)
    if target.exists():
        target.rename(old)
    scratch.rename(target)
    atomic.remove(old)
