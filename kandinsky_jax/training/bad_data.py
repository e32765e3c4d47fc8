"""OUT/bad_data.txt: log of unused data, each picture once, of bounded length."""

from __future__ import annotations

import errno
from pathlib import Path

from kandinsky_jax.common.errors import shorten

MAX_LINES = 2000
END = "further ones are not listed"


class BadData:
    """Log of unused data.

    Args:
        path: of the file. Entries of earlier starts of the run are kept and not repeated.
    """

    def __init__(self, path: Path):
        self._path = path
        self._lines = 0
        self._named: set[str] = set()
        self._before: list[str] | None = None  # faults of earlier starts

    def report(self, fault: str, when: str, name: str | None = None) -> None:
        """Log one fault, unless one with this name is there.

        Args:
            fault: description, which begins with the name.
            when: prefix of the line, such as "step 3".
            name: of the picture; None is the whole fault.
        """
        if self._before is None:
            self._before = self._read()
        key = shorten(fault if name is None else name, 200)
        if key in self._named or self._lines > MAX_LINES:
            return
        self._named.add(key)
        if any(line.startswith(key) for line in self._before):
            return
        self._lines += 1
        line = END if self._lines > MAX_LINES else f"{when}: {shorten(fault, 400)}"
        with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line + "\n")

    def _read(self) -> list[str]:
        found: list[str] = []
        if self._path.exists() and not self._path.is_file():
            raise FileExistsError(errno.EEXIST, "it is not a file", str(self._path))
        try:
            with self._path.open("rb") as file:
                for raw in file:
                    self._lines += 1
                    if self._lines > MAX_LINES:
                        break
                    found.append(raw[:1000].decode("utf-8", "replace").strip().partition(": ")[2])
        except FileNotFoundError:
            pass
        return found
