"""Error handling of the command lines: one line per error instead of a traceback."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable

TRACEBACK = "KANDINSKY_JAX_TRACEBACK"


def run(app: Callable[[], None]) -> None:
    """Run a command line; on an error print its message and exit with 1, or with 130 after Ctrl-C.

    With KANDINSKY_JAX_TRACEBACK=1 in the environment, errors keep their traceback. Warnings are printed as one line,
    without their source.
    """
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        app()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, TypeError, OSError, MemoryError) as error:
        if os.environ.get(TRACEBACK):
            raise
        message = str(error)
        if isinstance(error, OSError) and error.strerror:  # without its number
            message = ": ".join([str(part) for part in (error.filename, error.strerror) if part])
        print(f"error: {message or type(error).__name__}", file=sys.stderr)
        sys.exit(1)
