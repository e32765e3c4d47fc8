"""A Python script in a process of its own, asked and answered in lines of JSON: one side of a benchmark."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Any


class WorkerFailed(Exception):
    """The process has ended without an answer; the message is what it wrote on standard error."""


class WorkerTimeout(WorkerFailed):
    """The process gave no answer in time, and was ended."""


class WorkerProcess:
    """A process that works only while it is asked to.

    Args:
        name: what messages call it.
        script: reads a JSON object from each line of standard input, and answers with one line of JSON.
        environment: variables beside this process's own; None removes one.
        log: where its standard error goes; by default a temporary file.
    """

    def __init__(
        self, name: str, script: Path, environment: dict[str, str | None] | None = None, log: Path | None = None
    ):
        self.name = name
        merged: dict[str, str | None] = {**os.environ, **(environment or {})}
        self._errors: IO[str] = tempfile.TemporaryFile("w+") if log is None else log.open("a+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={name: value for name, value in merged.items() if value is not None},
        )
        self._answers: queue.Queue[str] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def ask(self, question: dict[str, Any], timeout: float | None = None) -> dict[str, Any]:
        """Send one line and wait for one, for at most `timeout` seconds.

        Raises:
            WorkerTimeout: after which the process is closed.
            WorkerFailed: with the end of what the process said, where it has died.
        """
        assert self._process.stdin is not None
        answer = ""
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            answer = self._answers.get(timeout=timeout)
        except queue.Empty:
            self.close()
            raise WorkerTimeout(f"{self.name}: no answer in {timeout:.0f} s") from None
        except BrokenPipeError:
            pass
        if answer:
            return json.loads(answer)
        code = self._process.wait()
        self._errors.seek(0)
        raise WorkerFailed(f"{self.name} ended with exit status {code}:\n{self._errors.read()[-3000:]}")

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._listener.join()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            if file is not None and not file.closed:
                file.close()
