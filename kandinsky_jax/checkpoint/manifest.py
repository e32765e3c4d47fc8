"""Checksums of a model's files: written when a model is saved, and compared on request.

A file can be damaged in ways that no reader notices, such as a flipped bit that leaves a weight finite. There are three
sources of checksums: the manifest from `write_manifest`; the Hub's cache, where a file is named by its SHA-256 (large
files) or its git SHA-1 (small ones); and the metadata that `hf download --local-dir` writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from kandinsky_jax.checkpoint import orbax, recommended_settings, tokenizer
from kandinsky_jax.checkpoint.tensor_files import PREVIEW_MAP, WEIGHT_FILE, ZERO_EMBED
from kandinsky_jax.common.atomic import replace_file
from kandinsky_jax.common.errors import CheckpointError, quote, shorten
from kandinsky_jax.common.reading import ReadError, check_regular, of_file, read_text
from kandinsky_jax.common.storage import files_below, read_json
from kandinsky_jax.images import CLIPImageProcessor

MANIFEST = "kandinsky_jax_manifest.json"
INDEX_FILES = ("model_index.json", "recommended_settings.json")  # of a model's folder, read when it is loaded
MANIFEST_VERSION = 1
# Files of a component's folder that loading reads, besides tensors.
COMPONENT_FILES = ("config.json", "scheduler_config.json", CLIPImageProcessor.FILE, *tokenizer.FILES)

Status = Literal["ok", "damaged", "missing", "unexpected", "extra", "not covered"]
FAULTS: tuple[Status, ...] = ("damaged", "missing", "unexpected")

_SHA256, _SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
_LOCAL = Path(".cache/huggingface/download")
_CHUNK = 1 << 22
_LEVELS = 3  # how far above a folder a manifest may lie: PARAMS in COMPONENT in MEMBER in FAMILY


@dataclass(frozen=True)
class FileReport:
    """Result of checking one file.

    Attributes:
        path: within the folder, with slashes.
        status: "not covered" if no checksum is known. In a folder whose other files have checksums, a file without one
            is "unexpected" if loading the model reads it (tensors, configurations, the tokenizer's), otherwise "extra".
        detail: what differs, or where the checksum comes from.
    """

    path: str
    status: Status
    detail: str = ""


@dataclass(frozen=True)
class _Expected:
    """Expected digest and size of a file; -1 for an unknown size."""

    digest: str
    source: str
    size: int = -1


def write_manifest(folder: str | os.PathLike[str], progress: Callable[[int], object] | None = None) -> Path:
    """Write the sizes and checksums of a model's files into its folder; hidden files and folders are left out.

    Args:
        progress: called with numbers of bytes as they are read.
    """
    folder = Path(folder)
    _write(folder / MANIFEST, _entries(folder, progress))
    return folder / MANIFEST


def _entries(folder: Path, progress: Callable[[int], object] | None = None) -> dict[str, dict[str, object]]:
    return {
        name: {"bytes": path.stat().st_size, "sha256": _digest(path, "sha256", progress)}
        for name, path in _files(folder)
    }


def _write(path: Path, entries: Mapping[str, Mapping[str, object]]) -> None:
    text = json.dumps({"format_version": MANIFEST_VERSION, "files": entries}, indent=1, sort_keys=True) + "\n"
    replace_file(path, text.encode())


def note_saved(folder: str | os.PathLike[str], own: bool = True) -> None:
    """Update the manifests that list a folder's files, after something was saved into it.

    Args:
        folder: of a model or a component. Manifests of the folder and of the model that contains it are updated.
        own: False where the folder's own manifest has just been written.
    """
    folder = Path(os.path.abspath(folder))
    found: dict[str, dict[str, object]] | None = None
    for parent in [folder, *list(folder.parents)[:_LEVELS]]:
        path, prefix = parent / MANIFEST, "" if parent == folder else f"{folder.relative_to(parent).as_posix()}/"
        if not path.is_file() or (parent == folder and not own):
            continue
        entries = {name: {"bytes": x.size, "sha256": x.digest} for name, x in _read_manifest(path).items()}
        others = {name: entry for name, entry in entries.items() if not name.startswith(prefix)}
        if len(others) == len(entries):
            continue
        found = _entries(folder) if found is None else found
        _write(path, others | {prefix + name: entry for name, entry in found.items()})


def verify(folder: str | os.PathLike[str], progress: Callable[[int], object] | None = None) -> list[FileReport]:
    """Compare a folder's files with their known checksums; the reports are sorted by path.

    Args:
        progress: called with numbers of bytes as they are read.
    Raises:
        CheckpointError: for a manifest that cannot be read.
    """
    folder = Path(os.path.abspath(folder))
    present = dict(_files(folder))
    listed, roots = _listed(folder)
    expected = {
        name: listed.get(name) or _by_name_in_cache(path) or _noted_by_download(folder, name)
        for name, path in present.items()
    }
    covered = {PurePosixPath(name).parent for name, known in expected.items() if known is not None}
    components = {root: _components(folder / root) | _folders_of(listed, root) for root in roots}
    adapters = {root + name for root in roots for name in recommended_settings.lora_files(folder / root)}
    reports = [_missing(name, listed[name]) for name in listed.keys() - present.keys()]
    for name, path in present.items():
        root = next((root for root in sorted(roots, key=len, reverse=True) if name.startswith(root)), None)
        if (known := expected[name]) is not None:
            reports.append(_compare(name, path, known, progress))
        elif (root is not None and _is_read(name.removeprefix(root), components[root])) or (
            name in adapters or (roots and name in INDEX_FILES)  # the latter make one model of a family's folder
        ):
            detail = "not in the manifest, but loading reads it: remove it, or --update if it belongs there"
            reports.append(FileReport(name, "unexpected", detail))
        elif root is not None:
            reports.append(FileReport(name, "extra", "not in the manifest"))
        elif PurePosixPath(name).parent in covered and _is_read_in_component(PurePosixPath(name).name):
            detail = "its neighbours have checksums and it has none, but loading reads it: remove it"
            reports.append(FileReport(name, "unexpected", detail))
        else:
            reports.append(FileReport(name, "not covered", "no checksum of it is known"))
    reports += _missing_components(folder, {report.path for report in reports})
    return sorted(reports, key=lambda report: report.path)


def manifest_above(folder: str | os.PathLike[str]) -> Path | None:
    """Return the manifest of the model that a folder is part of, if it lists files of the folder."""
    folder = Path(os.path.abspath(folder))
    for parent in list(folder.parents)[:_LEVELS]:
        path, prefix = parent / MANIFEST, f"{folder.relative_to(parent).as_posix()}/"
        if path.is_file() and any(name.startswith(prefix) for name in _read_manifest(path)):
            return path
    return None


def _listed(folder: Path) -> tuple[dict[str, _Expected], set[str]]:
    """Return the manifests' entries for a folder's files, and the parts ("", "MEMBER/") that they list completely.

    The manifest of a model takes precedence over that of a part.
    """
    listed: dict[str, _Expected] = {}
    roots = set()
    for path in sorted(folder.glob(f"*/{MANIFEST}")):
        prefix = f"{path.parent.name}/"
        if path.parent.is_symlink():  # its files are skipped as well
            continue
        roots.add(prefix)
        listed |= {prefix + name: expected for name, expected in _read_manifest(path).items()}
    if (folder / MANIFEST).is_file():
        roots.add("")
        listed |= _read_manifest(folder / MANIFEST)
    if (above := manifest_above(folder)) is not None:
        roots.add("")
        prefix = f"{folder.relative_to(above.parent).as_posix()}/"
        found = _read_manifest(above).items()
        listed |= {name.removeprefix(prefix): expected for name, expected in found if name.startswith(prefix)}
    return listed, roots


def _components(folder: Path) -> set[str]:
    """Return the folders that a model's `model_index.json` names."""
    try:
        entries = read_json(folder / "model_index.json")
    except (CheckpointError, OSError):
        return set()
    return {name for name, value in entries.items() if not name.startswith("_") and isinstance(value, list)}


def _folders_of(listed: Iterable[str], root: str) -> set[str]:
    """Return the folders with files that a manifest lists; "" where the folder itself is a component."""
    inner = [name.removeprefix(root) for name in listed if name.startswith(root)]
    found = {name.partition("/")[0] for name in inner if "/" in name}
    return found if "model_index.json" in inner else found | {""}


def _is_read(name: str, components: set[str]) -> bool:
    """Return whether loading a model reads the file with this path in the model's folder."""
    first, _, rest = name.partition("/")
    if name in INDEX_FILES or ("" in components and _is_read_in_component(name)):
        return True
    return first in components and _is_read_in_component(rest)


def _is_read_in_component(name: str) -> bool:
    return (
        name in (*COMPONENT_FILES, ZERO_EMBED, PREVIEW_MAP)
        or name.startswith(f"{orbax.FOLDER}/")
        or WEIGHT_FILE.fullmatch(name) is not None
    )


def sha256_of_files(paths: Iterable[Path]) -> dict[Path, str]:
    """Compute SHA-256 of files in threads; for files in the Hub's cache, it is taken from their names.

    Raises:
        CheckpointError: naming a file that cannot be read.
    """

    def digest(path: Path) -> str:
        cached = _by_name_in_cache(path)
        if cached is not None and _SHA256.fullmatch(cached.digest):
            return cached.digest
        try:
            check_regular(path)  # reading a pipe would block
            return _digest(path, "sha256", None)
        except ReadError as error:
            raise CheckpointError(of_file(path, error)) from None
        except OSError as error:
            raise CheckpointError(of_file(path, f"cannot be read: {error.strerror or error}")) from None

    wanted = list(paths)
    with ThreadPoolExecutor() as pool:  # hashlib releases the GIL
        return dict(zip(wanted, pool.map(digest, wanted), strict=True))


def total_bytes(folder: str | os.PathLike[str]) -> int:
    """Return an upper bound of the bytes that `verify` reads."""
    return sum(path.stat().st_size for _, path in _files(Path(folder)) if path.is_file())


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield a folder's files with their paths within it, including broken links."""
    for path in sorted(files_below(folder)):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts) or name.name == MANIFEST:
            continue
        if path.is_file() or (path.is_symlink() and not path.exists()):
            yield name.as_posix(), path


def _read_manifest(path: Path) -> dict[str, _Expected]:
    content = read_json(path)
    version = content.get("format_version")
    if type(version) is not int or version != MANIFEST_VERSION:
        raise CheckpointError(
            of_file(path, f"has the format version {quote(version)}, this release knows {MANIFEST_VERSION}")
        )
    entries = content.get("files")
    if not isinstance(entries, dict):
        raise CheckpointError(of_file(path, "is not a manifest: it has no object files"))
    found = {}
    for name, entry in entries.items():
        digest, size = (entry.get("sha256"), entry.get("bytes")) if isinstance(entry, dict) else (None, None)
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or name in ("", "."):
            fault = "is not a path within the folder"
        elif not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            fault = "has no SHA-256 (sha256, 64 digits)"
        elif type(size) is not int or size < 0:
            fault = f"has the size {quote(size)}, needed is a whole number of bytes"
        else:
            found[name] = _Expected(digest, "manifest", size)
            continue
        raise CheckpointError(
            of_file(path, f"is not a manifest: {quote(name, 100)} {shorten(fault, 200)}; --update writes it anew")
        )
    return found


def _by_name_in_cache(path: Path) -> _Expected | None:
    """Return the checksum in a file's name in the Hub's cache, where files are links to blobs."""
    if not path.is_symlink():
        return None
    name = Path(os.readlink(path)).name
    known = _SHA256.fullmatch(name) or _SHA1.fullmatch(name)
    return _Expected(name, "Hub's cache") if known else None


def _noted_by_download(folder: Path, name: str) -> _Expected | None:
    """Return the checksum in the metadata of `hf download --local-dir` (commit, checksum, time)."""
    for parent, inner in ((folder, name), (folder.parent, f"{folder.name}/{name}")):
        try:
            lines = read_text(parent / _LOCAL / f"{inner}.metadata").splitlines()
        except (OSError, ReadError):
            continue
        if len(lines) >= 2 and (_SHA256.fullmatch(lines[1]) or _SHA1.fullmatch(lines[1])):
            return _Expected(lines[1], "download's notes")
    return None


def _missing(name: str, expected: _Expected) -> FileReport:
    return FileReport(name, "missing", f"it is in the {expected.source}, {expected.size:,} bytes")


def _compare(name: str, path: Path, expected: _Expected, progress: Callable[[int], object] | None) -> FileReport:
    if not path.is_file():
        return FileReport(name, "missing", "it is a link to nothing")
    try:
        size = path.stat().st_size
        if expected.size not in (-1, size):
            detail = f"{size:,} bytes, {expected.size:,} in the {expected.source}"
        elif _digest(path, "sha256" if len(expected.digest) == 64 else "git", progress) == expected.digest:
            return FileReport(name, "ok", expected.source)
        else:
            detail = f"other content than in the {expected.source}"
    except OSError as error:
        detail = f"cannot be read: {error.strerror}"
    edited = " (if you edited it: --update)" if expected.source == "manifest" and path.suffix in _TEXT else ""
    return FileReport(name, "damaged", detail + edited)


_TEXT = (".json", ".txt", ".md")


def _digest(path: Path, kind: str, progress: Callable[[int], object] | None) -> str:
    """Compute SHA-256 of a file, or its git SHA-1."""
    found = hashlib.sha256() if kind == "sha256" else hashlib.sha1(usedforsecurity=False)
    if kind == "git":
        found.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return found.hexdigest()


def _missing_components(folder: Path, known: set[str]) -> list[FileReport]:
    """Report components that `model_index.json` names and that are missing; a model family may share one MoVQ."""
    reports = []
    for index in [folder / "model_index.json", *folder.glob("*/model_index.json")]:
        try:
            entries = read_json(index) if index.is_file() else {}
        except CheckpointError:
            continue  # reported as damaged, where a checksum is known
        for name, value in entries.items():
            named = not name.startswith("_") and isinstance(value, list) and len(value) == 2 and value[1] is not None
            if named and name != "movq" and not (index.parent / name).is_dir():
                path = (index.parent / name).relative_to(folder).as_posix()
                if not any(other.startswith(f"{path}/") for other in known):
                    reports.append(FileReport(path, "missing", "model_index.json names it"))
        for name in recommended_settings.lora_files(index.parent):
            path = (index.parent / name).relative_to(folder).as_posix()
            if path not in known:
                reports.append(FileReport(path, "missing", f"{recommended_settings.FILE} names it"))
    return reports
