"""Error handling of the command lines: one line per error instead of a traceback."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable

from kandinsky_jax.common.errors import RunError

TRACEBACK = "KANDINSKY_JAX_TRACEBACK"


def run(app: Callable[[], None]) -> None:
    """Run a command line; on an error print its message and exit with 1, or with 130 after Ctrl-C.

    With KANDINSKY_JAX_TRACEBACK=1 in the environment, errors keep their traceback. Warnings are printed as one line,
    without their source.
    """
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        app()
    except (KeyboardInterrupt, ValueError, TypeError, OSError, MemoryError, RunError) as error:
        sys.exit(report(error))


def report(error: BaseException) -> int:
    """Print an error to stderr, and return the exit code.

    Errors that a user can do something about are one line; others are printed with their traceback.
    """
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    expected = isinstance(error, (ValueError, TypeError, OSError, MemoryError, RunError))
    if not expected or os.environ.get(TRACEBACK):
        traceback.print_exception(error)
        return 1
    message = str(error)
    if isinstance(error, OSError) and error.strerror:  # without its number
        message = ": ".join([str(part) for part in (error.filename, error.strerror) if part])
    print(f"error: {message or type(error).__name__}", file=sys.stderr)
    return 1
