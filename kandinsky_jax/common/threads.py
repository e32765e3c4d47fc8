"""Work in a thread whose end nothing waits for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def run_in_thread(function: Callable[[], T], name: str, result: Future[T] | None = None) -> Future[T]:
    """Run a function in a daemon thread, and return the future of its result or exception.

    Args:
        name: of the thread.
        result: the future to use; None makes one.
    """
    future: Future[T] = Future() if result is None else result

    def run() -> None:
        try:
            found = function()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(found)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
