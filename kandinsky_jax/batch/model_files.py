"""Identity of a batch job's model: digests of the files that loading reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from kandinsky_jax.checkpoint import fast_adapters, hub, orbax, tensor_files
from kandinsky_jax.checkpoint.manifest import COMPONENT_FILES, sha256_of_files
from kandinsky_jax.common.storage import files_below
from kandinsky_jax.pipelines import CombinedPipeline


def digests(pipeline: type[CombinedPipeline], model: str, prior: str | None, fast: bool = False) -> dict[str, str]:
    """Compute SHA-256 of each file that a pipeline is loaded from, by path; those of a prior begin with `prior/`.

    Weights, configurations and tokenizers are included; a README, a manifest or weights in a format that is not read
    are not; with `fast`, fast adapters are. Every byte is read, in one thread per file, so that a change of few tensors
    is noticed: 1.4 GB/s per core, 4 to 7 s for 10 GB on two cores, after which loading finds the files in the page
    cache. Weights in the Hub's cache take no time: they are named by their digests.

    Raises:
        CheckpointError: for a model that does not exist, or files that cannot be read.
    """
    found: dict[str, Path] = {}
    where = folders(pipeline, model, prior)
    for prefix, adapter in zip(("", "prior/"), fast_adapters.of_model(where) if fast else (), strict=False):
        found |= {} if adapter is None else {f"{prefix}{adapter.path.name}": adapter.path}
    for prefix, folder in zip(("", "prior/"), where, strict=False):
        for name in sorted(hub.components(folder)):
            part = hub.component_folder(folder, name)
            found |= {f"{prefix}{name}/{path.relative_to(part).as_posix()}": path for path in _read_files(part)}
    known = sha256_of_files(found.values())
    return {name: known[path] for name, path in found.items()}


def network_digests(folder: Path) -> dict[str, str]:
    """Compute SHA-256 of each file that a network is loaded from, by its path in the network's folder."""
    known = sha256_of_files(_read_files(folder))
    return {path.relative_to(folder).as_posix(): digest for path, digest in known.items()}


def folders(pipeline: type[CombinedPipeline], model: str, prior: str | None) -> list[Path]:
    """Return the folder of a decoder and that of its prior, or one folder that has both."""
    return hub.with_prior(hub.resolve(model, pipeline.REPOSITORY), prior)


def _read_files(part: Path) -> Iterator[Path]:
    """Yield the files of a component's folder that loading reads."""
    yield from (part / name for name in COMPONENT_FILES if (part / name).is_file())
    if (part / orbax.FOLDER).is_dir():
        yield from sorted(path for path in files_below(part / orbax.FOLDER) if path.is_file())
    if (weights := tensor_files.find(part)) is not None:
        yield weights
        if weights.suffix == ".json":  # an index
            yield from (path for path in tensor_files.shards(weights) if path.is_file())


def changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """List the files that differ; those on one side only are marked as new or gone."""
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return [name + ("" if name in before and name in now else " (new)" if name in now else " (gone)") for name in names]


def names_and_sizes(pipeline: type[CombinedPipeline], model: str, prior: str | None) -> str:
    """Compute the model's digest of format versions 0 and 1 of `job.json`: of all files' names and sizes."""
    digest = hashlib.sha256()
    for folder in folders(pipeline, model, prior):
        for path in sorted(p for p in files_below(folder) if p.is_file()):
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
            if path.suffix == ".json" and path.stat().st_size < 1 << 20:
                digest.update(path.read_bytes())
    return digest.hexdigest()
