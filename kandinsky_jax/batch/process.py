"""Rank of this process and number of processes, as set by the launcher.

Processes of a batch job share only the output folder, so they need no other information.
"""

from __future__ import annotations

import dataclasses
import os

import jax

# Environment variables of launchers: rank, number of processes. The first pair that is set applies.
VARIABLES = (
    ("KANDINSKY_JAX_PROCESS", "KANDINSKY_JAX_PROCESSES"),
    ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"),  # Kubernetes sets the first one, our manifests the second
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)


@dataclasses.dataclass(frozen=True)
class Process:
    """One of the processes of a job; number `index` of `count`, from 0."""

    index: int = 0
    count: int = 1


def this_process(
    index: int | None = None, count: int | None = None, distributed: bool = False, coordinator: str | None = None
) -> Process:
    """Determine the rank of this process.

    Args:
        index, count: given by the user; they take precedence over the launcher's variables.
        distributed: initialise `jax.distributed`, as hosts of a TPU slice must, which start its chips together. It
            detects values that are not given.
        coordinator: address and port of process 0, for `jax.distributed`.
    Raises:
        ValueError: for one number without the other, or an impossible combination.
    """
    if (index is None) != (count is None):
        raise ValueError("give the number of this process and how many there are, or neither")
    if distributed or coordinator is not None:
        return _joined(index, count, coordinator)
    if index is not None and count is not None:
        return _checked(index, count, "this process")
    for number, total in VARIABLES:
        if number in os.environ:
            if total not in os.environ:
                raise ValueError(f"the environment says {number}={os.environ[number]}, but not how many; set {total}")
            try:
                found = int(os.environ[number]), int(os.environ[total])
            except ValueError:
                raise ValueError(f"{number} and {total} in the environment must be whole numbers") from None
            return _checked(*found, f"{number} and {total}")
    hosts = [host for host in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    if len(hosts) > 1 and os.environ.get("TPU_WORKER_ID", "").isdecimal():
        return _checked(int(os.environ["TPU_WORKER_ID"]), len(hosts), "TPU_WORKER_ID and TPU_WORKER_HOSTNAMES")
    return Process()


def _joined(index: int | None, count: int | None, coordinator: str | None) -> Process:
    """Initialise `jax.distributed` to start the devices, then shut it down, so that processes fail independently."""
    jax.config.update("jax_enable_preemption_service", False)  # it would intercept SIGTERM, which the job handles
    jax.distributed.initialize(coordinator, count, index)
    try:
        return Process(jax.process_index(), jax.process_count())
    finally:
        jax.distributed.shutdown()


def _checked(index: int, count: int, what: str) -> Process:
    if count < 1 or not 0 <= index < count:
        raise ValueError(f"{what}: there is no process {index} of {count}; they are counted from 0")
    return Process(index, count)
