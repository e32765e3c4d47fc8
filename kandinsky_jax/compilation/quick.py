"""A quick program first, and the good one behind it.

Where XLA compiles for minutes, a program is first compiled with less effort, in an eighth of the time. The good one is
compiled in a thread meanwhile, and takes the quick one's place as soon as it is complete. The two add up in different
orders, so their results agree to the platform's rounding, not to the bit. The persistent cache keeps both; a good
program that is in the cache already is used from the start.

Batch jobs and training wait for the good program (`only_good_programs`). So do processes of one cluster, which would
have to change programs at the same moment. What levels of effort cost and bring: tpu_scripts/results/NOTES.md.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import Future, wait

import jax

from kandinsky_jax.common.errors import quote, shorten
from kandinsky_jax.common.threads import run_in_thread

QUICK_PROGRAMS = "KANDINSKY_JAX_QUICK_PROGRAMS"  # the environment's variable: "on", "off", or unset for TPUs alone
QUICK_PLATFORMS = ("tpu",)  # where compiling takes minutes
# XLA's options for a quick program: an effort, for which newer versions of JAX have levels.
QUICK_OPTIONS: Mapping[str, float | str] = (
    {"exec_time_optimization_effort": -1.0}
    if hasattr(jax.config, "jax_exec_time_optimization_effort")
    else {"optimization_level": "O0"}
)
GRACE_SECONDS = 5.0  # a good program from the cache is complete by then


class CompilationWarning(UserWarning):
    """A program could not be compiled as well as it should be."""


def quick_programs() -> bool:
    """Return whether programs are compiled quickly first.

    Raises:
        ValueError: where the environment's variable is neither "on", "off" nor empty.
    """
    choice = os.environ.get(QUICK_PROGRAMS, "").lower()
    if choice not in ("", "on", "off"):
        raise ValueError(f'{QUICK_PROGRAMS} must be "on", "off" or unset, got {quote(choice)}')
    if _only_good.depth or choice == "off" or jax.process_count() > 1:
        return False
    return choice == "on" or jax.default_backend() in QUICK_PLATFORMS


class _OnlyGood:
    """How many blocks of `only_good_programs` are being run; of all threads, since jobs have several."""

    def __init__(self) -> None:
        self.depth = 0
        self.lock = threading.Lock()

    def change(self, by: int) -> None:
        with self.lock:
            self.depth += by


_only_good = _OnlyGood()


@contextlib.contextmanager
def only_good_programs() -> Iterator[None]:
    """Wait for good programs within the block, in all threads: equal bits however often a job is restarted."""
    _only_good.change(1)
    try:
        yield
    finally:
        _only_good.change(-1)


class GoodPrograms:
    """The good programs of one function that are complete or being compiled in threads."""

    def __init__(self) -> None:
        self._jobs: dict[Hashable, Future[object]] = {}
        self._failed: set[Hashable] = set()  # that have been warned of
        self._lock = threading.Lock()

    def ready(self, key: Hashable, lower: Callable[[], jax.stages.Lowered]) -> bool:
        """Return whether a program is complete; if it is new, start to compile it, and wait a moment.

        Args:
            key: what the program depends on.
            lower: the function for these arguments.
        """
        with self._lock:
            new = key not in self._jobs
            job = self._jobs.setdefault(key, Future())
        if new:
            try:
                compile_program = lower().compile
            except BaseException:
                with self._lock:
                    del self._jobs[key]
                raise
            _compile_in_thread(job, compile_program)
            wait([job], GRACE_SECONDS)
        if not job.done():
            return False
        if (error := job.exception()) is None:
            return True
        with self._lock:
            said = key in self._failed
            self._failed.add(key)
        if not said:
            warnings.warn(
                f"a program stays as it was compiled quickly, since the good one failed: {shorten(error, 200)}",
                CompilationWarning,
                stacklevel=2,
            )
        return False


# The end of the process ------------------------------------------------------------------------------------------

_pending: set[Future[object]] = set()  # of all functions


def _compile_in_thread(job: Future[object], compile_program: Callable[[], object]) -> None:
    if not _pending:  # last of all, so that it is the first to run
        atexit.unregister(_wait_at_exit)
        atexit.register(_wait_at_exit)
    _pending.add(job)
    job.add_done_callback(_pending.discard)
    try:
        run_in_thread(compile_program, "compile-good", job)
    except RuntimeError as error:  # no thread can be started
        job.set_exception(error)


def _wait_at_exit() -> None:
    """Wait for good programs: Python aborts where XLA's compiler returns to an interpreter that is ending."""
    if not _pending:
        return
    try:
        print("the good programs are still being compiled, for later runs; Ctrl-C ends without them", file=sys.stderr)
        wait(list(_pending))
    except KeyboardInterrupt:
        leave(130)


def leave(code: int) -> None:
    """End the process at once if good programs are still being compiled, without waiting for them; else return."""
    if _pending:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
