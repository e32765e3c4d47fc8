"""SIGTERM, with which a machine is taken away: the shard in hand is finished where there is time for it, or left."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOPPED = 143  # the exit code, as a shell counts an end by SIGTERM: a scheduler then starts the job again
MARGIN = 3.0  # seconds to encode and write what is drawn


class Stop:
    """Whether a job should end, and how much time there is.

    Args:
        grace: seconds from the signal until the process is killed.
    Raises:
        ValueError: where `grace` is negative or no finite number.
    """

    def __init__(self, grace: float = 25.0):
        if not 0 <= grace < math.inf:
            raise ValueError(f"grace must be a number of seconds from 0 on, got {grace}")
        self.grace = grace
        self._deadline: float | None = None
        self._seconds: list[float] = []  # of the last calls

    @property
    def asked(self) -> bool:
        """Whether the process has been asked to end."""
        return self._deadline is not None

    def ask(self, *_: Any) -> None:
        """End soon. A second time changes nothing."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self.grace

    def took(self, seconds: float) -> None:
        """A call's time, by which the next ones' are guessed."""
        self._seconds = [*self._seconds[-4:], seconds]

    def time_for(self, calls: int) -> bool:
        """Whether so many calls can be made, and their shard written, before the process is killed."""
        if self._deadline is None:
            return True
        if not self._seconds:
            return False
        return time.monotonic() + calls * max(self._seconds) + MARGIN < self._deadline

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Let SIGTERM ask, while the block runs; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = signal.signal(signal.SIGTERM, self.ask)
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, before)
