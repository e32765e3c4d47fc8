"""Identity of a training run: stored in its checkpoints, compared when it is resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping, Sequence

from kandinsky_jax.common.errors import shorten, summarize
from kandinsky_jax.common.types import PyTree
from kandinsky_jax.parallel.hosts import Hosts
from kandinsky_jax.training.checksums import checksums
from kandinsky_jax.training.config import Config
from kandinsky_jax.training.data import Captioned, data_fingerprint
from kandinsky_jax.training.errors import TrainingError
from kandinsky_jax.training.kinds import DISTILLATION, DPO, Kind, trains_lora

# Settings that may change between starts: they affect neither the result nor the random numbers. Paths may change
# because the content of the files is compared.
FREE = frozenset(
    {
        "model",
        "prior",
        "data",
        "output",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "validation_prompts",
        "validation_steps",
        "wandb_project",
        "mesh.data",
        "mesh.fsdp",
        "mesh.fsdp_min_size",
        "optimizer.max_train_steps",
        "optimizer.remat",
        "distillation.num_inference_steps",
    }
)
# Settings that may differ between the processes of a run.
PATHS = frozenset({"model", "prior", "data", "output"})
VERSIONS = ("kandinsky_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
# Settings that determine the structure of the state; a checkpoint with other ones cannot be used.
STRUCTURE = frozenset({"kind", "lora.rank", "lora.pattern", "distillation.lora", "dpo.lora", "average of the weights"})

# Names of entries.
PICTURES, DATA = "number of pictures", "data"

Record = dict[str, object]


def run_record(
    kind: Kind,
    config: Config,
    items: Sequence[Captioned],
    digests: Mapping[str, str] | None = None,
    further: Mapping[str, object] | None = None,
) -> Record:
    """Return the settings, data and weights that determine a run's result, as JSON values.

    Args:
        kind: which network is trained.
        config: settings of the run.
        items: the pictures; their names, captions and sizes are compared.
        digests: of the weights of all networks before the first step (`weights_digest`), by name.
        further: see `TrainingTask.further_settings`.
    """
    unused = _unused_tables(kind, config)
    settings = {
        name: value
        for name, value in _flat(dataclasses.asdict(config))
        if name not in FREE and name.partition(".")[0] not in unused
    }
    return {
        "kind": str(kind),
        **settings,
        "average of the weights": config.optimizer.ema_decay is not None,
        PICTURES: len(items),
        DATA: data_fingerprint(items)[:16],
        **(further or {}),
        **{f"weights of {name}": digest for name, digest in sorted((digests or {}).items())},
    }


def _unused_tables(kind: Kind, config: Config) -> set[str]:
    """Return the tables of a configuration that a kind of training does not read."""
    read = {"lora": trains_lora(kind, config), "distillation": kind in DISTILLATION, "dpo": kind in DPO}
    return {table for table, is_read in read.items() if not is_read}


def check_same_settings(hosts: Hosts, kind: Kind, config: Config) -> None:
    """Raise TrainingError in every process where one has another kind, settings or versions than process 0.

    Paths may differ. All other settings must not, because they decide when processes wait for each other.
    """
    settings = {name: value for name, value in _flat(dataclasses.asdict(config)) if name not in PATHS}
    versions = {f"version of {name}": importlib.metadata.version(name) for name in VERSIONS}
    check_same_run(hosts, {"kind": str(kind), **settings, **versions})


def check_same_run(hosts: Hosts, record: Record) -> None:
    """Raise TrainingError in every process where one has another record of the run than process 0."""
    first, *others = (json.loads(text) for text in hosts.exchange(json.dumps(record)))
    faults = [
        f"{hosts.describe(index)} differs in {describe_changes(found)}"
        for index, other in enumerate(others, 1)
        if (found := record_changes(first, other))
    ]
    if faults:
        raise TrainingError(
            f"all processes must train with the same settings, versions, data and weights; beside {hosts.describe(0)}: "
            + summarize(faults, 300)
        )


def record_changes(before: Mapping[str, object], now: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """Return differences, (before, now) by name; entries of one record only are not compared."""
    names = [name for name in now if name in before]
    return {name: (before[name], now[name]) for name in names if before[name] != now[name]}


def describe_changes(changed: Mapping[str, tuple[object, object]]) -> str:
    """Describe changes briefly, such as "seed (0, now 1)"."""
    given = dict(changed)
    if PICTURES in given:
        given.pop(DATA, None)
    parts = []
    for name, (before, now) in list(given.items())[:4]:
        opaque = name == DATA or name.startswith("weights of ")  # digests say nothing to a reader
        parts.append(name if opaque else f"{name} ({shorten(before, 24)}, now {shorten(now, 24)})")
    return ", ".join(parts) + (f" and {len(given) - 4} more" if len(given) > 4 else "")


def weights_digest(params: PyTree) -> str:
    """Compute a digest of a tree of arrays: names, shapes and values."""
    return hashlib.sha256(repr(sorted(checksums(params).items())).encode()).hexdigest()[:16]


def _flat(tree: Mapping[str, object], prefix: str = "") -> Iterable[tuple[str, object]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value
