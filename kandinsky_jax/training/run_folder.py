"""The folder of a run: on a disk that all processes share, or at a URL in Google's object store.

At a URL, checkpoints are written there directly, by all processes. Other files are written to a temporary folder of
each process, and published from there: an object store appends to no file.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any

from etils import epath

from kandinsky_jax.common.errors import hide_secrets, summarize
from kandinsky_jax.common.remote import connect, is_url, tried
from kandinsky_jax.parallel.hosts import Hosts
from kandinsky_jax.training.errors import TrainingError

# Of an earlier start, which this one continues.
CONTINUED = ("metrics.jsonl", "bad_data.txt", "wandb/run_id.txt")
SHARING_SECONDS = 10.0  # until a new file is seen on all hosts of a network disk
CHECKPOINTS, ENCODED, MODEL = "checkpoints", "encoded", "model"


class RunFolder:
    """The folder of a run.

    Args:
        output: a path, or a `gs://` URL.
        first: whether this process publishes files other than its own parts of shared ones.
    """

    def __init__(self, output: str, first: bool = True):
        self.output, self.first = output, first
        self._fs: Any = None
        self._root = ""
        self._begun = False
        self._published: dict[str, tuple[int, int]] = {}  # (size, time of modification) of local files, by name
        self.path = Path(output)
        if is_url(output):
            self._fs, self._root = connect(output)
            self.path = Path(tempfile.mkdtemp(prefix="kandinsky-jax-train-"))
            weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def __str__(self) -> str:
        return hide_secrets(self.output)

    @property
    def remote(self) -> bool:
        """Whether it is at a URL."""
        return self._fs is not None

    def below(self, name: str) -> str:
        """Return the path or URL of a file or folder in it, for messages."""
        return f"{str(self).rstrip('/')}/{name}" if self.remote else str(self.path / name)

    @property
    def whole(self) -> epath.Path:
        """The folder itself, which all processes share; with the methods of `pathlib`."""
        return epath.Path(self.output) if self.remote else epath.Path(self.path)

    def check_target(self, replaceable: str) -> None:
        """Raise TrainingError if the result could not be written, before training.

        Args:
            replaceable: a file that an earlier result has.
        """
        whole, target = self.whole, self.whole / MODEL
        if whole.exists() and not whole.is_dir():
            raise TrainingError(f"{self} is not a folder; choose another output")
        if not target.exists():
            return
        if not target.is_dir() or (any(target.iterdir()) and not (target / replaceable).exists()):
            raise TrainingError(
                f"{self.below(MODEL)} exists and is not a result of such a run (it has no {replaceable}), so it is not "
                "replaced; move it away, or choose another output folder"
            )

    def begin(self, hosts: Hosts | None = None) -> None:
        """Make the folder, and bring files that an earlier start has begun. Collective.

        Raises:
            TrainingError: in all processes, if some of them do not see the folder of process 0.
        """
        if self._begun:
            return
        self._begun = True
        self.path.mkdir(parents=True, exist_ok=True)
        if self.remote and self.first:
            for name in CONTINUED:
                self._bring(name)
        if hosts is not None and hosts.count > 1 and not self.remote:
            self._check_shared(hosts)

    def _check_shared(self, hosts: Hosts) -> None:
        def leave_mark() -> str:
            name = f".{secrets.token_hex(8)}.shared"
            (self.path / name).touch()
            return name

        mark = self.path / hosts.from_first(leave_mark, (OSError,))
        deadline = time.monotonic() + SHARING_SECONDS
        while not mark.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        seen = hosts.gather([mark.exists()])[:, 0]
        if hosts.first:
            mark.unlink(missing_ok=True)
        if not seen.all():
            others = summarize([hosts.describe(index) for index, found in enumerate(seen) if not found], 150, ", ")
            raise TrainingError(
                f"{self} of {others} is not the folder of {hosts.describe(0)}; output must be a folder that all hosts "
                "share, such as a network disk, or a gs:// URL"
            )

    def publish(self) -> None:
        """Publish files that have changed, in process 0: all but checkpoints, encoded data and the result."""
        if not self.remote or not self.first:
            return
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            if path.is_file() and name.split("/")[0] not in (CHECKPOINTS, ENCODED, MODEL):
                self._send(name)

    def publish_folder(self, name: str, last: str) -> None:
        """Publish a folder in place of what is there.

        Args:
            name: of the folder.
            last: file that is removed first and sent last, and so says that the others are there.
        """
        if not self.remote:
            return
        local = self.path / name
        files = [f"{name}/{path.relative_to(local).as_posix()}" for path in sorted(local.rglob("*")) if path.is_file()]
        mark = f"{name}/{last}"
        there = {path.removeprefix(f"{self._root}/") for path in self._find(name)}
        for old in sorted(there, key=lambda other: other != mark):
            if old == mark or old not in files:
                tried(self._at(old), lambda old=old: self._fs.rm_file(self._at(old)))  # type: ignore[misc]
        for file in sorted(files, key=lambda other: other == mark):
            self._published.pop(file, None)
            self._send(file)

    def bring_folder(self, name: str, last: str) -> None:
        """Copy a published folder here, unless it is here, or not complete there."""
        if not self.remote or (self.path / name / last).exists():
            return
        there = sorted(path.removeprefix(f"{self._root}/") for path in self._find(name))
        if f"{name}/{last}" in there:
            for file in there:
                self._bring(file)

    # Requests -----------------------------------------------------------------------------------------------------

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _find(self, name: str) -> list[str]:
        def request() -> list[str]:
            self._fs.invalidate_cache()
            return list(self._fs.find(self._at(name)))

        return tried(self._at(name), request)

    def _send(self, name: str) -> None:
        path = self.path / name
        about = path.stat()
        state = (about.st_size, about.st_mtime_ns)
        if self._published.get(name) != state:
            tried(self._at(name), lambda: self._fs.put_file(str(path), self._at(name)))
            self._published[name] = state

    def _bring(self, name: str) -> None:
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            tried(self._at(name), lambda: self._fs.get_file(self._at(name), str(target)))
        except FileNotFoundError:
            target.unlink(missing_ok=True)
