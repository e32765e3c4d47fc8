"""Checkpoints of a training run: written atomically, verified when they are read, versioned.

    OUT/checkpoints/STEP/state/    Orbax: the training state
    OUT/checkpoints/STEP/place/    JSON: format version, position in the data, identity of the run (see `run_record`),
                                   and checksums of the state and of this JSON
    OUT/damaged_checkpoints/       unreadable checkpoints newer than the one that was restored

All processes of a run write and read their parts of a checkpoint, in a folder that they share. Process 0 alone looks at
the folder and at the JSON, and tells the others what it found.

Orbax itself does not notice a flipped bit in the weights, and writes no checkpoint of a step below that of an existing
folder, whatever the folder contains.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from kandinsky_jax.checkpoint import orbax
from kandinsky_jax.common import reading
from kandinsky_jax.common.errors import CheckpointError, shorten, summarize
from kandinsky_jax.common.remote import is_url, read_bytes
from kandinsky_jax.parallel.hosts import Hosts
from kandinsky_jax.training.checksums import checksums, sharded_checksums
from kandinsky_jax.training.errors import TrainingError
from kandinsky_jax.training.mesh import whole
from kandinsky_jax.training.run_folder import CHECKPOINTS
from kandinsky_jax.training.run_record import DATA, PICTURES, STRUCTURE, Record, describe_changes, record_changes
from kandinsky_jax.training.step import TrainState

CHECKPOINT_VERSION = 3  # 2, with CRC-32 of whole arrays, and 1, without a record and checksums, are read as well
MAX_PLACE_BYTES = 64 * 2**20
T = TypeVar("T")
Description: TypeAlias = dict[str, Any]  # of a checkpoint, whose fields `_place` has checked
WRITING_SECONDS = 300  # that processes wait for each other's part of a checkpoint
POLL_SECONDS = 0.05
TEMPORARY = ".orbax-checkpoint-tmp"


class _Noting:
    """Base of Orbax's handlers that notes a failure to write at once; Orbax tells it after a wait for other processes.

    Args:
        failures: where to note it.
    """

    def __init__(self, failures: list[Exception]):
        super().__init__()
        self._failures = failures

    async def async_save(self, *args: Any, **kwargs: Any) -> list[Any]:
        futures = await super().async_save(*args, **kwargs)  # type: ignore[misc]
        return [_Noted(future, self._failures) for future in futures or []]


class _StateHandler(_Noting, ocp.StandardCheckpointHandler):
    """Writes this process's part of a state."""


class _PlaceHandler(_Noting, ocp.JsonCheckpointHandler):
    """Writes the JSON, in process 0."""


class _Noted:
    """A future of Orbax, whose failure is noted."""

    def __init__(self, future: Any, failures: list[Exception]):
        self._future, self._failures = future, failures

    def result(self, timeout: float | None = None) -> Any:
        try:
            return self._future.result(timeout)
        except Exception as error:
            self._failures.append(error)
            raise

    def cancel(self) -> bool | None:
        cancelled: bool | None = self._future.cancel()
        return cancelled


class Checkpoints:
    """Checkpoints of a run; a context manager that waits at its end until the last one is written.

    Args:
        folder: of the run, "OUT".
        record: identity of the run.
        limit: number of checkpoints to keep.
        hosts: the processes of the run.
        accept_changes: whether to restore a checkpoint of other settings, data or weights.
    """

    def __init__(
        self,
        folder: Path | epath.Path,
        record: Record,
        limit: int,
        *,
        hosts: Hosts | None = None,
        accept_changes: bool = False,
    ):
        self.folder, self.record, self.limit = epath.Path(folder), record, limit
        self.accept_changes = accept_changes
        self.hosts = Hosts() if hosts is None else hosts
        here = self.folder if is_url(str(folder)) else epath.Path(Path(folder).absolute())
        self._path = here / CHECKPOINTS
        self._manager: ocp.CheckpointManager | None = None
        self._failures: list[Exception] = []  # of this process, in writing

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            try:
                self._wait(manager)
                manager.close()
            except Exception as failure:
                if error is None:
                    raise self._unwritten(failure) from None

    # Writing ------------------------------------------------------------------------------------------------------

    def save(self, step: int, state: TrainState, data: dict[str, object]) -> None:
        """Write a checkpoint asynchronously.

        Args:
            step: number of steps done.
            state: after these steps.
            data: position in the data.
        Raises:
            TrainingError: if this one or the previous one could not be written.
        """
        place = {"format_version": CHECKPOINT_VERSION, "step": step, "data": data, "kind": self.record["kind"]}
        place |= {"run": self.record, "state": sharded_checksums(state, self.hosts)}
        place["checksum"] = _checksum(place)
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), place=ocp.args.JsonSave(place))
        try:
            manager = self._opened()
            self._wait(manager)
            written = manager.latest_step() == step or manager.save(step, args=args)
        except Exception as error:
            raise self._unwritten(error) from None
        if not written:
            raise TrainingError(f"the checkpoint of step {step} was not written: {self._path} holds newer ones")

    def check(self) -> None:
        """Raise TrainingError if this process could not write its part of a checkpoint."""
        if self._failures:
            raise self._unwritten(self._failures[0])

    def _wait(self, manager: ocp.CheckpointManager) -> None:
        """Wait until nothing is being written; or until this process's part has failed, where Orbax would wait on."""
        if self.hosts.count == 1:
            manager.wait_until_finished()
            return
        ended: list[Exception | None] = []

        def wait() -> None:
            try:
                manager.wait_until_finished()
                ended.append(None)
            except Exception as error:
                ended.append(error)

        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        while not ended:
            if self._failures:
                raise self._failures[0]
            waiting.join(POLL_SECONDS)
        if ended[0] is not None:
            raise ended[0]

    def _opened(self) -> ocp.CheckpointManager:
        if self._manager is None:
            logging.getLogger("absl").setLevel(logging.WARNING)
            waiting = ocp.AsyncOptions(timeout_secs=WRITING_SECONDS)
            options = ocp.CheckpointManagerOptions(max_to_keep=self.limit, async_options=waiting)
            handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
            handlers.add("state", ocp.args.StandardSave, _StateHandler(self._failures))
            handlers.add("place", ocp.args.JsonSave, _PlaceHandler(self._failures))
            self._manager = ocp.CheckpointManager(self._path, options=options, handler_registry=handlers)
        return self._manager

    def _unwritten(self, error: Exception) -> TrainingError:
        code = re.search(r"os_error_code='(\d+)'", str(error))  # at the end of a long text of tensorstore's
        number = int(code[1]) if code else getattr(error, "errno", None)
        reason = os.strerror(number) if number else shorten(str(error).split("\n")[0] or type(error).__name__, 150)
        return TrainingError(f"{self._path}: a checkpoint could not be written: {reason}; those before it stay")

    # Reading ------------------------------------------------------------------------------------------------------

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, object]] | None:
        """Restore the newest intact state and its position in the data; None without a checkpoint.

        Newer damaged checkpoints are moved away with one warning. If one of them records the current settings, data and
        weights, older ones may differ, since the change was accepted before.

        Args:
            state: has the shapes, dtypes and shardings of the result.
        Raises:
            TrainingError: if no checkpoint can be read, or the newest one is of another run or a newer version.
        """
        faults: list[str] = []
        damaged: list[epath.Path] = []
        accepted = self.accept_changes
        for path in self._candidates():
            place: Description = {}
            try:
                place = self._from_first(functools.partial(self._place, path))
                self._compare(path, place, accepted)
                restored = self._state(path, place, state)
            except TrainingError as error:
                if faults:
                    newer = (
                        f"newer checkpoints are damaged ({summarize(faults, 90)}), and of that of step {path.name}: "
                    )
                    raise TrainingError(newer + str(error)) from None
                raise
            except CheckpointError as error:
                accepted = accepted or "run" in place
                faults.append(f"{shorten(path.name, 24)}: {shorten(str(error).removeprefix(str(path)), 120)}")
                damaged.append(path)
                continue
            if faults:
                aside = self._from_first(lambda: self._moved_aside(damaged))
                if self.hosts.first:
                    warnings.warn(
                        f"{self._path}: damaged checkpoints are not used, training continues from step {path.name}; "
                        f"they are in {aside}: {summarize(faults, 200)}",
                        stacklevel=2,
                    )
            return restored, place["data"]
        if faults:
            raise TrainingError(
                f"{self._path}: no checkpoint can be read; remove the folder to start again: {summarize(faults, 200)}"
            )
        return None

    def check_record(self) -> None:
        """Compare the newest readable checkpoint with the record, before the data are encoded for nothing.

        Pictures that cannot be read are not left out of the record yet, so data are compared only where there are no
        more pictures than there were.

        Raises:
            TrainingError: for one of another run or a newer version.
        """
        for path in self._candidates():
            try:
                place = self._from_first(functools.partial(self._place, path))
            except CheckpointError:  # which `restore` judges
                continue
            if "run" in place:
                run: dict[str, Any] = place["run"]
                now: Any = self.record[PICTURES]
                unsure = (PICTURES, DATA) if run.get(PICTURES, 0) < now else ()
                known = {name: value for name, value in run.items() if name not in unsure}
                self._compare(path, place | {"run": known}, self.accept_changes)
            return

    def _from_first(self, function: Callable[[], T]) -> T:
        return self.hosts.from_first(function, (CheckpointError, TrainingError, OSError))

    def _candidates(self) -> list[epath.Path]:
        """Return folders of steps, newest first; temporary ones of killed writers are removed."""
        return [self._path / name for name in self._from_first(self._steps)]

    def _steps(self) -> list[str]:
        try:
            if not self._path.exists():
                return []
            found = list(self._path.iterdir())
        except OSError as error:
            raise TrainingError(f"{self._path} cannot be read: {error.strerror}") from None
        for path in [path for path in found if self._is_unfinished(path)]:
            found.remove(path)
            with contextlib.suppress(OSError):
                path.rmtree()
        steps = [path.name for path in found if path.name.isascii() and path.name.isdigit() and path.is_dir()]
        return sorted(steps, key=lambda name: (len(name), name), reverse=True)

    def _is_unfinished(self, path: epath.Path) -> bool:
        """Return whether a killed writer has left this; in an object store a marker is absent then."""
        remote = is_url(str(path)) and path.name.isdigit()
        return TEMPORARY in path.name or (remote and not ocp.utils.is_checkpoint_finalized(path))

    def _place(self, path: epath.Path) -> Description:
        """Read the JSON of a checkpoint.

        Raises:
            CheckpointError: if it is damaged.
            TrainingError: if it is of a newer version.
        """
        place = _read_json(path / "place" / "metadata")
        version = place.get("format_version", 1)
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise CheckpointError("its format version is not a number")
        if version > CHECKPOINT_VERSION:
            raise TrainingError(
                f"{path} is of format version {version}, this version of kandinsky_jax reads those up to "
                f"{CHECKPOINT_VERSION}: update it, or choose another output folder"
            )
        whole = dict(place)
        if version > 1 and whole.pop("checksum", None) != _checksum(whole):
            raise CheckpointError("its description is damaged")
        data = place.get("data")
        if not isinstance(place.get("kind"), str) or not isinstance(data, dict):
            raise CheckpointError("its description has no place in the data")
        if str(data.get("next_index")) != path.name:  # a step takes a batch
            raise CheckpointError(f"its place in the data is {shorten(data.get('next_index'), 24)}")
        if version == 1:
            place.pop("run", None)
        elif not isinstance(place.get("run"), dict):
            raise CheckpointError("its description has no record of the run")
        return place

    def _compare(self, path: epath.Path, place: Description, accepted: bool) -> None:
        """Raise TrainingError for a checkpoint of another run."""
        if "run" in place:
            found = record_changes(place["run"], self.record)
            if found and (not accepted or STRUCTURE & found.keys()):
                raise self._other(found)
        elif place["kind"] != self.record["kind"]:
            raise self._other({"kind": (place["kind"], self.record["kind"])})
        else:
            warnings.warn(
                f"{path} is of format version 1: it says nothing of the run's settings, which are not compared",
                stacklevel=3,
            )

    def _other(self, found: dict[str, tuple[object, object]]) -> TrainingError:
        if "kind" in found:
            before, now = found["kind"]
            return TrainingError(
                f"{self.folder} holds checkpoints of {before}, not of {now}; choose another output folder"
            )
        ways = ["change that back", "choose another output folder"]
        if STRUCTURE & found.keys():
            advice = " or ".join(ways)
        else:
            advice = f"{', '.join(ways)}, or start with --accept-changes to continue with the new ones"
        return TrainingError(
            f"{self.folder} holds the checkpoints of a run with other settings or data: changed are "
            f"{describe_changes(found)}; {advice}"
        )

    def _state(self, path: epath.Path, place: Description, like: TrainState) -> TrainState:
        """Restore the state of a checkpoint; CheckpointError in every process if one finds it damaged."""
        fault, restored = "", like
        try:
            restored = orbax.restore_tree(path / "state", like)
        except CheckpointError as error:
            fault = str(error)
        for index, found in enumerate(self.hosts.exchange(fault)):
            if found:
                raise CheckpointError(fault or f"{self.hosts.describe(index)}: {found}")
        if str(int(restored.step)) != path.name:
            raise CheckpointError(f"its state is of step {int(restored.step)}")
        if "state" in place and (sums := self._checksums(place, restored)) != place["state"]:
            wrong = [name for name in sums if place["state"].get(name) != sums[name]] or ["the list of arrays"]
            raise CheckpointError(f"{len(wrong)} of its arrays are damaged, such as {shorten(wrong[0], 60)}")
        return restored

    def _checksums(self, place: Description, state: TrainState) -> dict[str, Any]:
        """Compute the checksums that a checkpoint of this version has."""
        if place["format_version"] < CHECKPOINT_VERSION:
            return checksums(jax.tree.map(whole, state))
        return sharded_checksums(state, self.hosts)

    def _moved_aside(self, damaged: list[epath.Path]) -> str:
        aside = self.folder / "damaged_checkpoints"
        try:
            aside.mkdir(exist_ok=True)
            for path in damaged:
                if (target := aside / path.name).exists():
                    target.rmtree()
                path.rename(target)
        except OSError as error:
            raise TrainingError(
                f"{aside}: damaged checkpoints cannot be moved there ({error.strerror}); remove "
                f"{', '.join(shorten(path.name, 24) for path in damaged[:5])} from {self._path}"
            ) from None
        return aside.name


def _read_json(path: epath.Path) -> dict[str, object]:
    try:
        if is_url(str(path)):
            parsed = reading.parse_json(read_bytes(str(path), MAX_PLACE_BYTES))
            if not isinstance(parsed, dict):
                raise reading.ReadError("is no JSON object")
            return parsed
        return reading.read_json_object(path, MAX_PLACE_BYTES)
    except FileNotFoundError:
        raise CheckpointError("its description is missing") from None
    except reading.ReadError as error:
        raise CheckpointError(f"its description {error}") from None


def _checksum(place: Description) -> int:
    return zlib.crc32(json.dumps(place, sort_keys=True).encode())
