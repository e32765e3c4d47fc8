"""Reads a damaged file under limits of time and memory, and checks the outcome."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.fuzz.mutations import damage

SECONDS, GIBIBYTES = 20, 3  # of one input
MAX_MESSAGE = 500
PACKAGE = "kandinsky_jax"


class Reader(NamedTuple):
    """One kind of file that the package reads.

    Args:
        name: of the reader.
        build: write intact files into a folder; returns those that are damaged, one at a time.
        read: read them through the lowest public door.
        errors: exactly the types that may leave it.
        names_path: whether the message must name the folder (or file) that was read.
    """

    name: str
    build: Callable[[Path], list[Path]]
    read: Callable[[Path], Any]
    errors: tuple[type[Exception], ...]
    names_path: bool = True


class Trial(NamedTuple):
    """What came of one input."""

    reader: str
    index: int
    damage: str
    outcome: str  # "loaded" or the error's type
    fault: str | None  # why that is not right


class Hang(BaseException):
    """Not an Exception, so that no handler of a reader takes it for a damaged file."""


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """End what takes too long: by an exception, or, where that does not get through, by the end of the process."""

    def hung(*_: Any) -> None:
        raise Hang(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, hung)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    faulthandler.dump_traceback_later(6 * SECONDS, exit=True, file=sys.__stderr__)
    resource.setrlimit(resource.RLIMIT_AS, (used + (GIBIBYTES << 30), hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def attempt(reader: Reader, folder: Path) -> tuple[str, str | None]:
    """(outcome, fault) of reading the files in a folder."""
    with warnings.catch_warnings():
        for action in ("error", "ignore"):
            warnings.simplefilter(action)  # type: ignore[arg-type]
            try:
                with limits():
                    reader.read(folder)
                return "loaded", None
            except Warning as error:
                if not _is_ours(error):
                    return type(error).__name__, f"a third party's warning: {_told(error)}"
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                return type(error).__name__, _judge(reader, folder, error)
    raise AssertionError("a warning although all are ignored")


def _judge(reader: Reader, folder: Path, error: BaseException) -> str | None:
    if type(error) not in reader.errors:
        return f"foreign: {_told(error)}"
    message = str(error)
    if (fault := fault_of(message)) is not None:
        return fault
    if reader.names_path and str(folder) not in message:
        return f"without the path: {message}"
    return None


def fault_of(message: str) -> str | None:
    """What is wrong with the text of an error; None where it is short and can be printed."""
    if len(message) > MAX_MESSAGE:
        return f"{len(message)} characters: {message[:300]}"
    try:
        message.encode()
    except UnicodeEncodeError:
        return f"cannot be printed: {message!r}"
    return None


def check_message(message: object) -> None:
    """Raise AssertionError where a message that is no error, or that a reader handles, is not as it should be."""
    fault = fault_of(str(message))
    assert fault is None, fault


def _is_ours(warning: Warning) -> bool:
    frames = traceback.extract_tb(warning.__traceback__)
    return f"/{PACKAGE}/" in frames[-1].filename


def _told(error: BaseException) -> str:
    """An error and where it comes from, in a few lines."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    where = " < ".join(f"{'/'.join(Path(f.filename).parts[-2:])}:{f.lineno}" for f in reversed(frames))
    try:
        text = str(error)[:200]
    except Exception:
        text = "?"
    return f"{type(error).__name__}: {text!r} at {where}"


def lasting_folder() -> Path:
    """A folder for what is made once and outlives the trials; it goes with the process."""
    folder = Path(tempfile.mkdtemp(prefix="kandinsky-jax-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def trial(reader: Reader, index: int, seed: int, intact: Path, files: list[Path], folder: Path) -> Trial:
    """Damage a copy of the intact files and read it.

    Args:
        intact: the folder that `Reader.build` has filled; files: what it returned.
        folder: is made, and removed again.
    """
    rng = random.Random(f"{seed} {reader.name} {index}")
    shutil.copytree(intact, folder, symlinks=True)
    try:
        what = damage(folder / rng.choice(files).relative_to(intact), rng)
        outcome, fault = attempt(reader, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Trial(reader.name, index, what, outcome, fault)


def trials(reader: Reader, count: int, seed: int, scratch: Path) -> list[Trial]:
    """So many damaged inputs of one reader, after the intact one, which has to load."""
    intact = scratch / "intact"
    intact.mkdir()
    files = sorted(reader.build(intact))
    reader.read(intact)  # without limits: the first use imports and compiles
    return [trial(reader, i, seed, intact, files, scratch / f"{i}") for i in range(count)]
