"""Reading of configurations, and atomic writing of folders."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from kandinsky_jax.common import atomic, reading
from kandinsky_jax.common.errors import CheckpointError


def read_json(path: Path) -> dict[str, object]:
    """Read the object in a JSON file; CheckpointError if there is none."""
    try:
        return reading.read_json_object(path)
    except FileNotFoundError:
        raise CheckpointError(reading.of_file(path, "is missing")) from None
    except reading.ReadError as error:
        raise CheckpointError(reading.of_file(path, error)) from None


def files_below(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Yield the files in a folder and its subfolders, following links to folders as readers do.

    Args:
        above: the folders that lead here, resolved; links to them are skipped.
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
    """Return the folder for cached results of this library; None for a user without a home folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kandinsky_jax"
    except RuntimeError:
        return None


def check_replaceable(target: str | os.PathLike[str]) -> None:
    """Raise FileExistsError where `target` is neither a model nor an empty folder."""
    target = Path(target)
    atomic.sweep(target, target.resolve().name)  # of a run that was killed, see `_stays`
    if (
        target.exists()
        and not (target / "model_index.json").is_file()
        and not (target.is_dir() and not any(target.iterdir()))
    ):
        raise FileExistsError(f"{target} exists and is not a model (it has no model_index.json), so it is not replaced")


def check_free_space(folder: Path, name: str, needed_bytes: int) -> None:
    """Raise OSError if the disk of `folder` has less than `needed_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OSError(errno.ENOSPC, f"{folder} has {free:,} bytes free, {name} needs about {needed_bytes:,}")


@contextlib.contextmanager
def complete_or_absent(
    target: str | os.PathLike[str], needed_bytes: int = 0, overwrite: bool = False
) -> Iterator[Path]:
    """Make a scratch folder that becomes `target` if the block succeeds, and is removed otherwise.

    A killed run leaves its scratch folder, `.NAME.TOKEN.partial`, which the next run for the same target removes; that
    of a running process stays. `target` is never partly written. Replacing a folder takes two renames: a run killed
    between them leaves the old folder as `.NAME.old`, which the next run for the same target restores. An empty folder
    that cannot be replaced (`_stays`) is filled instead, `model_index.json` last.

    Raises:
        FileExistsError: if `target` exists without `overwrite`; checked again at the end.
        OSError: if the disk has less than `needed_bytes` free, before anything is written.
    """
    target = Path(target).resolve()  # "." and links cannot be renamed
    old = target.with_name(f".{target.name}.old")
    parent = target.parent
    if old.exists():
        with atomic.locked_folder(parent):
            if old.exists() and not target.exists():
                old.rename(target)
    _check_absent(target, overwrite)
    parent.mkdir(parents=True, exist_ok=True)
    stays = _stays(target)
    check_free_space(target if stays else parent, target.name, needed_bytes)
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
                os.chdir(target)  # this process is still in the replaced folder


def _stays(folder: Path) -> bool:
    """Return whether an empty folder cannot be replaced: it is the working directory, a mount point, or its parent is
    not writable."""
    return (
        folder.is_dir()
        and not any(folder.iterdir())
        and (_is_working_directory(folder) or os.path.ismount(folder) or not _may_write(folder.parent))
    )


def _may_write(folder: Path) -> bool:
    """Return whether the effective user may write; plain access() checks the real user."""
    return os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def _is_working_directory(folder: Path) -> bool:
    try:
        return os.path.samefile(folder, os.curdir)
    except OSError:  # one of them is gone
        return False


def _check_absent(target: Path, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists already; choose another folder, or overwrite=True (--overwrite)")


def _swap(scratch: Path, target: Path, old: Path) -> None:
    atomic.remove(old)
    if target.exists():
        target.rename(old)
    scratch.rename(target)
    atomic.remove(old)
