"""One `kandinsky-jax` process of `shared_cache.py`, which reports what JAX has compiled.

The last line that it prints is an object: the keys that JAX's own log says it has missed and hit, its count of requests
to the cache, and the process's seconds of CPU. A line with the time is printed when the command begins.
"""

from __future__ import annotations

import collections
import json
import logging
import resource
import sys
import warnings

import jax

from kandinsky_jax.cli import app

REQUESTS = "/jax/compilation_cache/compile_requests_use_cache"


class Keys(logging.Handler):
    """Keys that JAX says it has missed or hit."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.missed: list[str] = []
        self.hit: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "CACHE MISS" in str(record.msg):
            self.missed.append(record.args[1])  # type: ignore[index, arg-type]
        elif "cache hit" in str(record.msg):
            self.hit.append(record.args[1])  # type: ignore[index, arg-type]


def main() -> None:
    """Run the command line, and report."""
    warnings.simplefilter("error", UserWarning)
    keys, events = Keys(), collections.Counter[str]()
    log = logging.getLogger("jax._src.compiler")
    log.addHandler(keys)
    log.setLevel(logging.DEBUG)
    log.propagate = False
    jax.monitoring.register_event_listener(lambda name, **_: events.update([name]))
    app(sys.argv[1:], standalone_mode=False)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu = usage.ru_utime + usage.ru_stime
    print(json.dumps({"missed": keys.missed, "hit": keys.hit, "requests": events[REQUESTS], "cpu_seconds": cpu}))


if __name__ == "__main__":
    main()
