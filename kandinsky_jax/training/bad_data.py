"""OUT/bad_data.txt: what was not used of the data, each picture once, in a file of bounded length."""

from __future__ import annotations

import errno
from pathlib import Path

from kandinsky_jax.errors import shorten

MAX_LINES = 2000
END = "further ones are not listed"


class BadData:
    """The file.

    Args:
        path: of the file. What an earlier start of the run has written is kept, and not written again.
    """

    def __init__(self, path: Path):
        self._path = path
        self._lines = 0
        self._named: set[str] = set()
        self._before: list[str] | None = None  # faults of earlier starts

    def report(self, fault: str, when: str, name: str | None = None) -> None:
        """Write one line, unless one of this name is there.

        Args:
            fault: what is wrong; it begins with the name.
            when: begins the line, such as "step 3".
            name: what it is wrong with; None is the whole fault.
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
            raise FileExistsError(errno.EEXIST, "it is no file", str(self._path))
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
