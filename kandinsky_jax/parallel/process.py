"""Rank of this process and number of processes, as set by the launcher.

Processes of a batch job share only the output folder, so they need no other information. Those of a training run also
need the address of process 0, see `kandinsky_jax.parallel.liveness.joined`.
"""

from __future__ import annotations

import dataclasses
import os
import socket

import jax

# Environment variables of launchers: rank, number of processes. The first pair that is set applies.
VARIABLES = (
    ("KANDINSKY_JAX_PROCESS", "KANDINSKY_JAX_PROCESSES"),
    ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"),  # Kubernetes sets the first one, our manifests the second
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)
COORDINATOR_VARIABLES = ("KANDINSKY_JAX_COORDINATOR", "JAX_COORDINATOR_ADDRESS")
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


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
        distributed: initialise `jax.distributed`, as hosts of a TPU slice must, which start their chips together.
        coordinator: address and port of process 0, for `jax.distributed`.
    Raises:
        ValueError: for one number without the other, or an impossible combination.
    """
    if distributed or coordinator is not None:
        initialize(index, count, coordinator)
        try:
            return Process(jax.process_index(), jax.process_count())
        finally:
            jax.distributed.shutdown()  # devices are started; from here on processes fail independently
    return _given(index, count) or Process()


def initialize(
    index: int | None = None, count: int | None = None, coordinator: str | None = None, heartbeat_seconds: int = 100
) -> None:
    """Initialise `jax.distributed`, and start the devices.

    What is neither given nor in the launcher's variables is detected by JAX, as on a TPU slice.

    Args:
        index, count: number of this process, and of all.
        coordinator: address and port of process 0, which listens there; None is that of `COORDINATOR_VARIABLES`.
        heartbeat_seconds: silence of a process after which JAX ends all others.
    Raises:
        ValueError: if a number is missing or impossible, or no launcher is recognised.
    """
    coordinator = coordinator or next((os.environ[name] for name in COORDINATOR_VARIABLES if name in os.environ), None)
    bind = None
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or "/" in host or not port.isdecimal():
            raise ValueError(f"the coordinator must be HOST:PORT, such as 10.0.0.1:8476, got {coordinator[:80]!r}")
        bind = coordinator if host in LOOPBACK else None  # otherwise JAX listens on all addresses
    if coordinator is not None or index is not None or count is not None:
        given = _given(index, count)
        index, count = (given.index, given.count) if given is not None else (index, count)
    if index == 0 and coordinator is not None:
        _check_port(coordinator)
    jax.config.update("jax_enable_preemption_service", False)  # it would intercept SIGTERM, which we handle
    try:
        jax.distributed.initialize(
            coordinator, count, index, coordinator_bind_address=bind, heartbeat_timeout_seconds=heartbeat_seconds
        )
    except ValueError as error:
        names = " or ".join(COORDINATOR_VARIABLES)
        raise ValueError(
            f"{error} No launcher was recognised (TPU slice, Slurm, Open MPI): give --coordinator HOST:PORT of process "
            f"0, --process I and --processes N, or set {names}, {VARIABLES[0][0]} and {VARIABLES[0][1]}"
        ) from None
    jax.devices()
    if count is not None and jax.process_count() != count:
        raise ValueError(f"this process was told of {count} processes, and process 0 of {jax.process_count()}")


def _check_port(coordinator: str) -> None:
    """Raise ValueError where process 0 cannot listen at its port, which ends JAX without an explanation."""
    port = int(coordinator.rpartition(":")[2])
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
            listener.listen()
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"process 0 cannot listen at port {port} ({reason}); choose another one") from None


def _given(index: int | None, count: int | None) -> Process | None:
    """Return what the user or a launcher's variables say; None if they say nothing."""
    if (index is None) != (count is None):
        raise ValueError("give the number of this process and how many there are, or neither")
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
    return None


def _checked(index: int, count: int, what: str) -> Process:
    if count < 1 or not 0 <= index < count:
        raise ValueError(f"{what}: there is no process {index} of {count}; they are counted from 0")
    return Process(index, count)
