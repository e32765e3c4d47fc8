"""Claims: which of several hosts compiles a program, known by small files in a folder or store that all of them reach.

A claim, `claims/KEY.0`, is created only if there is none, so one host gets it. While a process holds claims it rewrites
`alive/TOKEN` every few seconds, with a number that grows. A host that waits for another looks at both: the claim is
removed when the program is there, and a holder whose number has not changed for `STALE_SECONDS` is dead. Only the
waiting host's own clock counts. A dead holder's claim stays as it is, and one of the waiting hosts gets the next one,
`claims/KEY.1`; when it is done, it removes both. A host that has found a holder dead takes over its other claims at
once, unless there is a new heartbeat.

A process that was only suspended, or whose heartbeats were lost, may compile what another host has taken over. That
costs time and nothing else.
"""

from __future__ import annotations

import atexit
import contextlib
import enum
import functools
import re
import secrets
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from kandinsky_jax.common.threads import run_in_thread

if TYPE_CHECKING:
    from collections.abc import Callable

    from kandinsky_jax.common.files import Files

T = TypeVar("T")

TOKEN_BYTES = 16
TOKEN = re.compile(rf"[0-9a-f]{{{2 * TOKEN_BYTES}}}")  # nothing else becomes part of a name
HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 30.0  # after which a holder without a heartbeat is dead
FIRST_POLL, SLOWEST_POLL = 0.1, 2.0  # seconds between looks at another host's claim
REQUEST_SECONDS = 60.0  # for one request, repeated after temporary failures
LAST_REQUEST_SECONDS = 5.0  # at the end of the process


def within(seconds: float, request: Callable[[], T]) -> T:
    """Return the result of a request that may hang; TimeoutError after `seconds`, when it goes on in its thread."""
    future = run_in_thread(request, "cache-request")
    try:
        return future.result(max(0.0, seconds))
    except TimeoutError:
        if future.done():
            raise
        raise TimeoutError(f"no answer within {seconds:.0f} seconds") from None


class Outcome(enum.Enum):
    """How waiting for another host's claim ended."""

    RELEASED = enum.auto()
    DEAD = enum.auto()
    LATE = enum.auto()


@dataclass
class _Held:
    """A claim of this process."""

    number: int
    thread: threading.Thread | None  # that compiles; None while the program is on its way to the store
    dead: list[str] = field(default_factory=list)  # tokens of the holders of lower numbers


class _Watch:
    """What has been seen of a holder."""

    def __init__(self, token: str, now: float):
        self.token = token
        self.checked = self.changed = now  # when its heartbeat was last looked at, and last had changed
        self.heartbeat: str | None = None

    def look(self, heartbeat: str | None, now: float) -> None:
        self.checked = now
        if heartbeat != self.heartbeat:
            self.heartbeat, self.changed = heartbeat, now


class Claims:
    """Claims of this process, and its looks at those of others.

    Args:
        files: the folder that all hosts reach.

    Methods raise OSError where the store cannot be reached.
    """

    def __init__(self, files: Files):
        self._files = files
        self._token = secrets.token_hex(TOKEN_BYTES)
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}
        self._dead: dict[str, str | None] = {}  # holders' tokens, and their last heartbeats
        self._heart: threading.Thread | None = None
        self._beating = False  # whether there is a file of heartbeats
        self._closed = threading.Event()

    def acquire(self, key: str, number: int, dead: list[str]) -> bool:
        """Claim a program for this thread; return whether this process has the claim.

        Args:
            number: how many holders have died.
            dead: their tokens.
        """
        name = _claim(key, number)
        if not within(REQUEST_SECONDS, lambda: self._files.create(name, self._token.encode())):
            return False
        with self._lock:
            self._held[key] = _Held(number, threading.current_thread(), dead)
            if self._heart is None:
                self._heart = threading.Thread(target=self._beat, name="cache-heartbeat", daemon=True)
                self._heart.start()
                atexit.register(self.close)
        return True

    def wait(self, key: str, number: int, deadline: float) -> tuple[Outcome, str]:
        """Wait until a claim is removed, its holder is dead, or `time.monotonic()` passes the deadline.

        Returns:
            the outcome, and the holder's token.
        """
        pause, watch = FIRST_POLL, None
        while (now := time.monotonic()) < deadline:
            try:
                token = self._read(_claim(key, number), deadline)
                if token is None:
                    return Outcome.RELEASED, ""
                if watch is None or watch.token != token:
                    if self._is_still_dead(token, deadline):
                        return Outcome.DEAD, token
                    watch = _Watch(token, now)
                elif now - watch.checked >= HEARTBEAT_SECONDS:
                    watch.look(self._heartbeat(token, deadline), now)
                    if now - watch.changed >= STALE_SECONDS:
                        self._dead[token] = watch.heartbeat
                        return Outcome.DEAD, token
            except TimeoutError:
                if time.monotonic() < deadline:
                    raise
            time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
            pause = min(1.5 * pause, SLOWEST_POLL)
        return Outcome.LATE, ""

    def _is_still_dead(self, token: str, deadline: float) -> bool:
        """Return whether a holder was found dead before and has no new heartbeat; its last one may be removed."""
        return token in self._dead and self._heartbeat(token, deadline) in (None, self._dead[token])

    def _heartbeat(self, token: str, deadline: float) -> str | None:
        return self._read(_alive(token), deadline) if TOKEN.fullmatch(token) else None

    def _read(self, name: str, deadline: float) -> str | None:
        try:
            seconds = min(REQUEST_SECONDS, deadline - time.monotonic())
            return within(seconds, lambda: self._files.read(name)).decode("ascii", "replace")[:64]
        except FileNotFoundError:
            return None

    def of_this_thread(self) -> list[str]:
        """Return the keys of programs that this thread has claimed and not passed on by `keep`."""
        with self._lock:
            return [key for key, held in self._held.items() if held.thread is threading.current_thread()]

    def keep(self, key: str) -> None:
        """Hold a claim until `release`, whatever its thread does next."""
        with self._lock:
            if key in self._held:
                self._held[key].thread = None

    def release(self, key: str) -> None:
        """Give a claim back, if there is one, and remove those of dead holders, the oldest first."""
        with self._lock:
            held = self._held.pop(key, None)
        if held is None:
            return
        names = [_claim(key, number) for number in range(held.number + 1)]
        names += [_alive(token) for token in held.dead if TOKEN.fullmatch(token)]
        for name in names:
            within(REQUEST_SECONDS, functools.partial(self._files.remove, name))

    def close(self) -> None:
        """End the heartbeats; what is still claimed is being compiled, and waiting hosts find its holder dead."""
        self._closed.set()
        with contextlib.suppress(Exception):
            within(LAST_REQUEST_SECONDS, self._end_heartbeat)

    # Heartbeats ---------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        count = 0
        while not self._closed.wait(HEARTBEAT_SECONDS):
            count += 1
            with contextlib.suppress(Exception):  # the next one may arrive, or another host takes over
                self._release_of_ended_threads()
                if self._held:
                    self._beating = True
                    self._files.write(_alive(self._token), lambda file: file.write(b"%d" % count), overwrite=True)  # noqa: B023
                else:
                    self._end_heartbeat()

    def _release_of_ended_threads(self) -> None:
        with self._lock:
            held = [(key, held.thread) for key, held in self._held.items()]
        for key, thread in held:
            if thread is not None and not thread.is_alive():
                self.release(key)

    def _end_heartbeat(self) -> None:
        if self._beating:
            self._files.remove(_alive(self._token))
            self._beating = False


def _claim(key: str, number: int) -> str:
    return f"claims/{key}.{number}"


def _alive(token: str) -> str:
    return f"alive/{token}"
