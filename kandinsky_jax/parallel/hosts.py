"""The processes of one program that runs on many hosts, and what they tell each other.

All methods are collective: every process calls them in the same order. They use JAX's collectives, so they need nothing
but `jax.distributed`. With one process they return its own values.
"""

from __future__ import annotations

import dataclasses
import json
import socket
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")


def describe(index: int, count: int, name: str) -> str:
    """Describe a process for messages, such as "process 2 of 4 (host-c)"."""
    return f"process {index} of {count}" + (f" ({name})" if name else "")


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The processes of this program.

    Args:
        index: number of this process, from 0.
        count: number of processes.
        names: their host names.
    """

    index: int = 0
    count: int = 1
    names: tuple[str, ...] = ("",)

    @classmethod
    def here(cls) -> Hosts:
        """Return the processes that `jax.distributed` has connected; collective."""
        if jax.process_count() == 1:
            return cls()
        alone = cls(jax.process_index(), jax.process_count())
        return dataclasses.replace(alone, names=tuple(alone.exchange(socket.gethostname())))

    @property
    def first(self) -> bool:
        """Whether this is process 0, which writes logs, sample pictures and the result."""
        return self.index == 0

    def describe(self, index: int) -> str:
        """Describe a process for messages, such as "process 2 of 4 (host-c)"."""
        return describe(index, self.count, self.names[index])

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.gather([0])

    def gather(self, values: Sequence[int]) -> np.ndarray:
        """Gather a few numbers of each process, 0 .. 2**31 - 1; returns int32 `[count, N]`."""
        return self.stack(np.asarray(values, np.int32))

    def stack(self, array: np.ndarray) -> np.ndarray:
        """Stack an array of each process, of one shape and a dtype of at most 32 bits; returns `[count, ...]`."""
        if self.count == 1:
            return array[None]
        return np.asarray(multihost_utils.process_allgather(array))

    def exchange(self, text: str) -> list[str]:
        """Return the texts of all processes, in their order."""
        if self.count == 1:
            return [text]
        data = text.encode("utf-8", "backslashreplace")
        lengths = self.gather([len(data)])[:, 0]
        padded = np.zeros(max(1, int(lengths.max())), np.uint8)
        padded[: len(data)] = np.frombuffer(data, np.uint8)
        found = self.stack(padded)
        return [bytes(row[:length]).decode() for row, length in zip(found, lengths, strict=True)]

    def from_first(self, function: Callable[[], T], errors: tuple[type[Exception], ...]) -> T:
        """Run a function in process 0 only, and return its result in all of them.

        Args:
            function: its result consists of JSON values.
            errors: exceptions, made of one text, that are raised in all processes where process 0 raises them.
        """
        if self.count == 1:
            return function()
        told: dict[str, object] = {}
        failure: Exception | None = None
        if self.first:
            try:
                told = {"result": function()}
            except errors as error:
                failure = error
                kind = next(i for i, cls in enumerate(errors) if isinstance(error, cls))
                told = {"error": kind, "text": str(error)}
        found = json.loads(self.exchange(json.dumps(told))[0])
        if failure is not None:
            raise failure
        if "error" in found:
            raise errors[found["error"]](found["text"])
        return found["result"]
