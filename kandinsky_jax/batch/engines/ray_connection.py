"""Connecting to a Ray cluster, or starting one of this machine alone, while signals stay this program's."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from typing import Any

from kandinsky_jax.batch.job import JobError
from kandinsky_jax.common.errors import shorten
from kandinsky_jax.preemption import Stop

LOOPBACK = {  # a cluster of one machine: only on 127.0.0.1, whatever the system, and without reports to Ray's makers
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
NO_STATISTICS = {  # of such a cluster about itself: nobody looks at them, and they take processor time from the workers
    "RAY_enable_metrics_collection": "false",
    "RAY_event_stats": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_raylet_report_resources_period_milliseconds": "1000",
}
LOOK_SECONDS = 0.2  # between looks whether the job was asked to stop, while it connects
TRIES_TO_CONNECT = "3"  # to a cluster, of 40 seconds each where it does not answer; Ray's own number is 20


def import_ray(address: str | None) -> Any:
    """Return the module, imported with the settings that a connection to this address needs.

    Raises:
        JobError: where Ray is not installed.
    """
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")  # which ends the process at SIGTERM, with a stack
    if is_alone(address):  # all of this Ray reads when it is imported
        for name, value in (LOOPBACK | NO_STATISTICS).items():
            os.environ.setdefault(name, value)
    else:
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", TRIES_TO_CONNECT)
    try:
        import ray
    except ImportError:
        raise JobError(["--engine ray needs Ray: pip install 'kandinsky-jax[ray]'"]) from None
    return ray


def is_alone(address: str | None) -> bool:
    """Return whether a cluster of this machine alone is meant."""
    return (address or os.environ.get("RAY_ADDRESS") or "local") == "local"


def check_connected(ray: Any, address: str | None) -> None:
    """Raise ValueError where this process is connected to another cluster than is asked for."""
    found = ray.get_runtime_context().gcs_address
    if address and ":" in address and not address.startswith("ray://") and address != found:
        raise ValueError(f"address is {shorten(address, 200)}, and this process is connected to {found} already")


@contextlib.contextmanager
def connected(ray: Any, address: str | None, quiet: bool, stop: Stop) -> Iterator[None]:
    """Connect to a cluster while the block runs; an existing connection stays.

    Raises:
        ConnectionError: where no cluster answers.
        StoppedBefore: where the job is asked to stop before a cluster has answered.
    """
    if ray.is_initialized():
        yield
        return
    alone = is_alone(address)
    if not alone and not quiet:
        print(f"connecting to the Ray cluster at {_shown(address)}", file=sys.stderr)
    settings: dict[str, Any] = {"address": address or None}
    if alone:  # None would find others' clusters
        settings = {"address": "local", "include_dashboard": False}
    over = threading.Event()
    connecting = _in_a_thread(lambda: ray.init(**settings, logging_level=logging.WARNING), over)
    try:
        while not connecting.done():
            if stop.asked and not alone:
                raise StoppedBefore
            wait([connecting], timeout=LOOK_SECONDS)
        with _explained(ray, address):
            connecting.result()
        _set_handler_again()
        yield
    finally:
        if alone:
            wait([connecting])  # so that none of the cluster's processes outlives this one
        if connecting.done():
            ray.shutdown()
        over.set()


class StoppedBefore(Exception):
    """The job was asked to stop before there was a cluster."""


def _in_a_thread(init: Callable[[], object], over: threading.Event) -> Future[None]:
    """Start Ray in a thread of its own: in the main one it replaces SIGTERM's handler.

    Ray's handler raises SystemExit, which is lost where a callback is interrupted. The thread lives until it is `over`,
    since Linux kills the processes that Ray has started when the thread that started them ends.
    """
    connected: Future[None] = Future()

    def run() -> None:
        try:
            init()
        except BaseException as error:
            connected.set_exception(error)
        else:
            connected.set_result(None)
            over.wait()

    logging.getLogger("ray._private.worker").addFilter(_is_of_interest)
    threading.Thread(target=run, name="ray.init", daemon=True).start()
    return connected


def _set_handler_again() -> None:
    """Set SIGTERM's handler as it was: where Ray was imported before `import_ray`, its C++ part has replaced it."""
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is threading.main_thread() and before is not None:
        signal.signal(signal.SIGTERM, before)


def _is_of_interest(record: logging.LogRecord) -> bool:
    return "SIGTERM handler is not set" not in str(record.msg)


@contextlib.contextmanager
def _explained(ray: Any, address: str | None) -> Iterator[None]:
    """Say what to do where a cluster does not answer."""
    try:
        yield
    except ray.exceptions.AuthenticationError as error:
        raise ConnectionError(f"Ray's token: {shorten(error, 400)}") from None
    except (OSError, ValueError) as error:
        if is_alone(address):
            raise
        if _shown(address) == "auto":
            raise ConnectionError("no Ray cluster runs on this machine; give the address of one") from None
        raise ConnectionError(
            f"no Ray cluster answers at {_shown(address)}: {shorten(error, 200)}. One that has a token needs "
            "RAY_AUTH_MODE=token here, and the same token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
        ) from None


def reach(address: str | None) -> None:
    """Raise ConnectionError where nothing listens at a HOST:PORT; Ray would try for minutes."""
    given = address or os.environ.get("RAY_ADDRESS", "")
    if given == "auto":
        return
    host, _, port = given.removeprefix("ray://").rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port[:6]) < 65536:
        raise ValueError(f"the address {_shown(address)} should be HOST:PORT, ray://HOST:PORT, auto or local")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise ConnectionError(f"there is no Ray cluster at {_shown(address)}: {shorten(error, 200)}") from None


def _shown(address: str | None) -> str:
    return shorten(address or os.environ.get("RAY_ADDRESS", ""), 200)


def ask_for(hosts: int, resources: Mapping[str, float] | None) -> None:
    """Ask the cluster's autoscaler, if it has one, to keep so many hosts, instead of what it was asked before.

    Workers are bound to hosts that exist, so that it would not see that any are wanted.
    """
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[dict(resources or {"CPU": 1.0}) for _ in range(hosts)])
