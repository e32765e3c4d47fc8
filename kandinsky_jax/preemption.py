"""SIGTERM before a preemption: the current shard is finished if there is time for it, otherwise dropped."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOPPED = 143  # exit code of a process ended by SIGTERM, after which a scheduler restarts the job
MARGIN = 3.0  # seconds to encode and write generated pictures


class Stop:
    """Whether a job was asked to stop, and how much time is left.

    Args:
        grace: seconds from the signal until the process is killed.
        leave: ends the process. It is called from the signal's handler while there is no `work_in_hand`, so that
            nobody waits for a model that is being loaded; otherwise once `grace` seconds are over. None is never.
    Raises:
        ValueError: for a negative or infinite `grace`.
    """

    def __init__(self, grace: float = 25.0, leave: Callable[[], object] | None = None):
        if not 0 <= grace < math.inf:
            raise ValueError(f"grace must be a number of seconds from 0 on, got {grace}")
        self.grace = grace
        self.work_in_hand = False  # set by what does the work
        self._leave = leave
        self._deadline: float | None = None
        self._timer: threading.Timer | None = None
        self._seconds: list[float] = []  # of the last calls

    @property
    def asked(self) -> bool:
        """Whether the process has been asked to end."""
        return self._deadline is not None

    @property
    def seconds_left(self) -> float:
        """Seconds in which work in hand may be finished and written; infinite before the signal."""
        return math.inf if self._deadline is None else self._deadline - MARGIN - time.monotonic()

    def ask(self, *_: object) -> None:
        """Ask the job to stop; further calls change nothing."""
        if self._deadline is not None:
            return
        self._deadline = time.monotonic() + self.grace
        if self._leave is not None:
            if not self.work_in_hand:
                self._leave()
            self._timer = threading.Timer(self.grace, self._leave)
            self._timer.daemon = True
            self._timer.start()

    def took(self, seconds: float) -> None:
        """Record the duration of a call, from which that of the next ones is estimated."""
        self._seconds = [*self._seconds[-4:], seconds]

    def time_for(self, calls: int) -> bool:
        """Return whether `calls` calls can be made, and their shard written, before the process is killed."""
        if self._deadline is None:
            return True
        if not self._seconds:
            return False
        return calls * max(self._seconds) < self.seconds_left

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Handle SIGTERM while the block runs; without effect outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = signal.signal(signal.SIGTERM, self.ask)
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, before)
            if self._timer is not None:
                self._timer.cancel()
