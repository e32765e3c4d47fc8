"""Joining the processes of many hosts, and noticing when one of them dies.

Each process writes a heartbeat to the key-value store of JAX's coordination service, which runs in process 0, and reads
those of the others. A process that is silent for `SILENT_SECONDS`, or that reports an error, ends all others, with a
message that names it. Their main threads may wait in a collective that will never end, so a thread ends the process.

If process 0 dies, the service dies with it, and JAX aborts the other processes at once (a C++ check); a handler of
SIGABRT then names process 0.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from kandinsky_jax.common.errors import RunError, shorten
from kandinsky_jax.parallel.hosts import Hosts, describe
from kandinsky_jax.parallel.process import initialize

PERIOD = 2.0  # seconds between heartbeats
SILENT_SECONDS = 30.0  # silence of a process after which it counts as dead
SILENT_AFTER_ERROR = 10.0  # the same where a collective has failed already
JAX_SECONDS = 120  # after which JAX itself ends all processes; it counts from a heartbeat up to half of it before
WAITING_SECONDS = 15.0  # until a process that waits for the others says so
REPORT_SECONDS = 6.0  # for this process to report its own error, after another one did
LINGER_SECONDS = 3 * PERIOD  # of process 0 after an error, so that the others learn of it before the service is gone
FAILED = 1  # exit code
ADVICE = "this process ends too. Start all of them again to continue from the last checkpoint"
UNCONNECTED = (
    "JAX could not connect the processes. Was each of them started, within five minutes, and can its host reach the "
    "coordinator? Give each its own --process, from 0, and all the same --processes and --coordinator"
)
# Of an error of the runtime that JAX raises as a ValueError, or Orbax as one of its own.
_STATUS = re.compile(r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): ")
_PREFIX = "kandinsky_jax/"


class HostLost(RunError):
    """Another process of this program has died, or has ended with an error."""


@contextlib.contextmanager
def joined(index: int | None = None, count: int | None = None, coordinator: str | None = None) -> Iterator[Hosts]:
    """Join the processes of one program while the block runs, see `kandinsky_jax.parallel.process.initialize`.

    After an error the process must be ended by `end_now`, because JAX would wait for the others at exit.

    Raises:
        HostLost: if the block failed because another process died.
        ValueError: see `initialize`.
    """
    last_words = LastWords()
    where = "" if coordinator is None else f" at {coordinator}"
    waiting = threading.Timer(
        WAITING_SECONDS, _say, [f"waiting for the other processes{where}, up to 5 minutes", "note"]
    )
    waiting.daemon = True
    waiting.start()
    try:
        with _interruptible():
            initialize(index, count, coordinator, JAX_SECONDS)
    finally:
        waiting.cancel()
    watch = Watch(jax.process_index(), jax.process_count())
    watch.start()
    last_words.of = watch.lost_on_abort
    last_words.linger = LINGER_SECONDS if watch.index == 0 else 0.0
    try:
        hosts = Hosts.here()
        yield hosts
        hosts.wait()  # nobody leaves before all have come here
    except BaseException as error:
        lost = watch.reason_of(error)
        if watch.index == 0 and watch.count > 1:
            time.sleep(LINGER_SECONDS)
        if lost is not None:
            raise HostLost(lost) from error
        raise
    watch.close()
    last_words.withdraw()
    jax.distributed.shutdown()


def end_now(code: int = FAILED) -> None:
    """End the process without waiting for threads or other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Watch:
    """Heartbeats of this process, and a watch over those of the others.

    Args:
        index, count: number of this process, and of all.
    """

    def __init__(self, index: int, count: int):
        self.index, self.count = index, count
        self._names: dict[int, str] = {}  # host names, which heartbeats tell
        self._closed = threading.Event()
        self._changed = dict.fromkeys(range(count), time.monotonic())  # when a heartbeat was last a new one
        self._contact = time.monotonic()  # of the coordination service
        self._ended: dict[int, str] = {}  # reasons of processes that ended with an error
        self._failing = False  # whether the main thread is ending with an error
        self._silent = SILENT_SECONDS

    def start(self) -> None:
        """Start the watch; without effect for a single process."""
        if self.count == 1:
            return
        for target in (self._beat, self._watch):
            threading.Thread(target=target, name=f"liveness{target.__name__}", daemon=True).start()

    def close(self) -> None:
        """Stop the watch, before all processes leave."""
        self._closed.set()

    def reason_of(self, error: BaseException) -> str | None:
        """Return which other process is the reason for an error of this one; None if it is this process's own.

        An error of a collective says only that another process is gone, so the watch is asked, which may take some
        seconds. Any other error is reported to the other processes.
        """
        if self.count == 1:
            return None
        self._failing = True
        if _of_a_collective(error):
            self._silent = SILENT_AFTER_ERROR
            deadline = time.monotonic() + SILENT_SECONDS + 2 * PERIOD
            while time.monotonic() < deadline:
                if (lost := self._lost()) is not None:
                    return lost
                time.sleep(PERIOD / 4)
        elif not self._ended:
            self._report("it was interrupted" if isinstance(error, KeyboardInterrupt) else _reason(error))
        return None

    # Threads ------------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        """Write heartbeats, and read those of the others."""
        client, name, number, seen = _client(), socket.gethostname(), 0, dict[int, str]()
        while not self._closed.wait(PERIOD if number else 0):
            number += 1
            try:
                client.key_value_set(f"{_PREFIX}alive/{self.index}", f"{number} {name}", allow_overwrite=True)
                alive = _read(client, "alive/")
                self._ended |= _read(client, "ended/")
            except jax.errors.JaxRuntimeError:
                continue  # the service does not answer, see `_contact`
            self._contact = time.monotonic()
            for index, beat in alive.items():
                if seen.get(index) != beat:
                    seen[index], self._names[index] = beat, beat.partition(" ")[2]
                    self._changed[index] = time.monotonic()

    def _watch(self) -> None:
        """End the process when another one is lost."""
        noticed: float | None = None
        while not self._closed.wait(PERIOD / 2):
            if (lost := self._lost()) is None:
                continue
            noticed = time.monotonic() if noticed is None else noticed
            # This process may be about to report an error of its own.
            patience = REPORT_SECONDS if self._failing or self._ended else 0.0
            patience += LINGER_SECONDS if self.index == 0 else 0.0
            if time.monotonic() - noticed < patience:
                continue
            _say(lost)
            end_now()

    def _lost(self) -> str | None:
        """Describe a process that is dead or has ended with an error; None if there is none."""
        now, me = time.monotonic(), self.index
        for index, reason in self._ended.items():
            if index != me:
                return f"{self._describe(index)} has ended: {reason}"
        if now - self._contact > self._silent:
            return self._silence(0, now - self._contact) if me else None
        silent = {index: now - then for index, then in self._changed.items() if index != me}
        longest = max(silent, key=lambda index: silent[index])
        return self._silence(longest, silent[longest]) if silent[longest] > self._silent else None

    def _describe(self, index: int) -> str:
        return describe(index, self.count, self._names.get(index, ""))

    def _silence(self, index: int, seconds: float) -> str:
        return f"{self._describe(index)} has died or cannot be reached, silent for {seconds:.0f} s; {ADVICE}"

    def _report(self, reason: str) -> None:
        """Tell the other processes why this one ends."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _client().key_value_set(f"{_PREFIX}ended/{self.index}", reason, allow_overwrite=True)

    def lost_on_abort(self) -> str:
        """Describe the process that is gone when JAX aborts this one: process 0, unless the watch knows another."""
        if (lost := self._lost()) is not None:
            return lost
        if self.index > 0 and not _reachable():
            return f"{self._describe(0)}, which coordinates the run, has died or cannot be reached; {ADVICE}"
        return (
            "JAX's runtime has ended this process, for the reason above; if that is another incarnation of a task, two "
            "processes were started with the same --process"
        )


class LastWords:
    """A message for the case that JAX aborts the process, which it explains to its developers only."""

    def __init__(self) -> None:
        self.of: Callable[[], str] = lambda: UNCONNECTED  # returns the message
        self.linger = 0.0  # seconds until the end: process 0's service tells the others the reason
        self._handler: object = None
        if sys.platform.startswith("linux"):
            self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._speak)
            ctypes.CDLL(None).signal(signal.SIGABRT, self._handler)

    def withdraw(self) -> None:
        """Leave aborts to the system again."""
        if self._handler is not None:
            ctypes.CDLL(None).signal(signal.SIGABRT, None)

    def _speak(self, number: int) -> None:
        _say(self.of())
        time.sleep(self.linger)
        end_now()


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end the process while it waits in JAX, where Python would not notice it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _reason(error: BaseException) -> str:
    """Describe an error to the other processes: one of ours by its text, any other by its class too."""
    text = shorten(error, 300)
    if isinstance(error, RunError | ValueError) and text:
        return text
    return type(error).__name__ + (f": {text}" if text else "")


def _client() -> Any:
    """Return the client of JAX's coordination service, which has no public name; Orbax uses it likewise."""
    from jax._src import distributed

    return distributed.global_state.client


def _reachable() -> bool:
    """Return whether the coordination service accepts connections."""
    from jax._src import distributed

    host, _, port = (distributed.global_state.coordinator_address or "").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
    except (OSError, ValueError):
        return False
    return True


def _read(client: Any, folder: str) -> dict[int, str]:
    entries = client.key_value_dir_get(_PREFIX + folder)
    return {int(key.rpartition("/")[2]): value for key, value in entries}


def _of_a_collective(error: BaseException | None) -> bool:
    """Return whether an error is, or follows from, one of JAX's runtime, as when another process is gone."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, jax.errors.JaxRuntimeError) or _STATUS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _say(text: str, kind: str = "error") -> None:
    sys.stderr.write(f"\n{kind}: {text}\n")
    sys.stderr.flush()
