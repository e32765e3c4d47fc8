"""Which model a batch job runs: the content of the files that are read of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from kandinsky_jax import hub, orbax
from kandinsky_jax.checkpoint.manifest import COMPONENT_FILES, sha256_of_files
from kandinsky_jax.pipelines import CombinedPipeline
from kandinsky_jax.storage import files_below
from kandinsky_jax.tensors import files


def digests(pipeline: type[CombinedPipeline], model: str, prior: str | None) -> dict[str, str]:
    """SHA-256 of each file that a pipeline is loaded from, by its path; a prior's begin with `prior/`.

    Weights, configurations and tokenizers count; a README, a manifest or weights in a format that is not chosen do not.
    Every byte is read, one thread a file, because a change of a few tensors must be noticed: 1.4 GB/s a core, so
    4 to 7 s for 10 GB on two cores, after which loading finds the files in memory. Weights in the Hub's cache cost
    nothing: their names are their digests.

    Raises:
        CheckpointError: where there is no such model, or its files cannot be read.
    """
    found: dict[str, Path] = {}
    for prefix, folder in zip(("", "prior/"), folders(pipeline, model, prior), strict=False):
        for name in sorted(hub.components(folder)):
            part = hub.component_folder(folder, name)
            found |= {f"{prefix}{name}/{path.relative_to(part).as_posix()}": path for path in _read_files(part)}
    known = sha256_of_files(found.values())
    return {name: known[path] for name, path in found.items()}


def folders(pipeline: type[CombinedPipeline], model: str, prior: str | None) -> list[Path]:
    """A decoder's folder, and its prior's, unless the decoder's has both."""
    folder = Path(hub.resolve(model, pipeline.REPOSITORY))
    if any(name.startswith("prior_") for name in hub.components(folder)):
        return [folder]
    return [folder, Path(hub.find_prior(folder, prior))]


def _read_files(part: Path) -> Iterator[Path]:
    """Of a component's folder, the files that are read."""
    yield from (part / name for name in COMPONENT_FILES if (part / name).is_file())
    if (part / orbax.FOLDER).is_dir():
        yield from sorted(path for path in files_below(part / orbax.FOLDER) if path.is_file())
    if (weights := files.find(part)) is not None:
        yield weights
        if weights.suffix == ".json":  # an index
            yield from (path for path in files.shards(weights) if path.is_file())


def changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """The files that differ, with what became of those that only one of the two has."""
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return [name + ("" if name in before and name in now else " (new)" if name in now else " (gone)") for name in names]


def names_and_sizes(pipeline: type[CombinedPipeline], model: str, prior: str | None) -> str:
    """What `job.json` of the format versions 0 and 1 has of a model: a digest of all files' names and sizes."""
    digest = hashlib.sha256()
    for place in folders(pipeline, model, prior):
        for path in sorted(p for p in files_below(place) if p.is_file()):
            digest.update(f"{path.relative_to(place)} {path.stat().st_size}\n".encode())
            if path.suffix == ".json" and path.stat().st_size < 1 << 20:
                digest.update(path.read_bytes())
    return digest.hexdigest()
