"""A server that watches itself: which files it opens and where it connects, its memory, and its queue.

`python -m tests.serve.hostile_server` prints its port; when its input ends, it stops and prints what it has seen.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OWN = tuple(
    str(Path(path).resolve())
    for path in (ROOT / "kandinsky_jax", sys.prefix, sys.base_prefix, os.environ.get("JAX_COMPILATION_CACHE_DIR", ROOT))
)
WATCHED = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "urllib.Request")
MAX_QUEUE = 4


class Watch:
    """Notes what the process does, once it is switched on."""

    def __init__(self) -> None:
        self.on = False
        self.strange: list[str] = []
        self.most_queued = 0
        self.memory: list[float] = []
        sys.addaudithook(self.see)

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in WATCHED:
            self.note(event, arguments)
        if event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith(OWN) and path != "/proc/self/statm":
                self.note(event, arguments)

    def note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if len(self.strange) < 20:
            self.strange.append(f"{event} {arguments!r}"[:300])

    def sample(self, service: Any) -> None:
        """Look at the queue and the memory, for ever."""
        import psutil

        process, passed = psutil.Process(), 0
        while True:
            state = service.state
            self.most_queued = max(self.most_queued, state.waiting + state.running)
            if passed % 100 == 0:
                self.on, before = False, self.on  # psutil opens files of /proc
                self.memory.append(process.memory_info().rss / 2**20)
                self.on = before
            passed += 1
            time.sleep(0.01)


def main() -> None:
    """Serve until the input ends."""
    from kandinsky_jax.serve.api import ServerThread, make_app, no_telemetry
    from kandinsky_jax.serve.api import server as http
    from kandinsky_jax.serve.served_model import ServedModel
    from kandinsky_jax.serve.server_settings import ServerSettings
    from kandinsky_jax.serve.service import Service

    no_telemetry()
    http.HEADER_SECONDS = 2.0
    watch = Watch()
    settings = ServerSettings(
        port=0,
        batch_sizes=(1,),
        max_body=2 * 2**20,
        max_images=2,
        max_steps=8,
        max_queue=MAX_QUEUE,
        time_limit=30.0,
        body_time=2.0,
    )
    service = Service(ServedModel.load("tiny"), settings)
    add_page = None
    if "--page" in sys.argv:
        from kandinsky_jax.serve.page import mount_page as add_page
    service.start()
    with ServerThread(service, settings, make_app(service, settings, add_page)) as server:
        while not service.state.ready:
            time.sleep(0.1)
        threading.Thread(target=watch.sample, args=(service,), daemon=True).start()
        print(server.url.rpartition(":")[2], flush=True)
        sys.stdin.readline()  # the first requests have been served, and what is imported late is there
        watch.on = True
        sys.stdin.read()
        time.sleep(1.0)
        watch.on = False
        state = service.state
    print(
        json.dumps(
            {
                "strange": watch.strange,
                "most_queued": watch.most_queued,
                "memory": watch.memory,
                "left": state.waiting + state.running,
                "threads": threading.active_count(),
            }
        ),
        flush=True,
    )
    os._exit(0)


if __name__ == "__main__":
    main()
