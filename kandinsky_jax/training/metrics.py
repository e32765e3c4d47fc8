"""Metrics of each step: a JSONL file, TensorBoard, and Weights & Biases on request.

The file is always written. The other two are optional packages; failures of Weights & Biases are warnings.

    OUT/metrics.jsonl        one line per step
    OUT/events/              for TensorBoard, if tensorboardX is installed
    OUT/wandb/               files of Weights & Biases, if a project is configured and wandb is installed
"""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image

from kandinsky_jax.common import reading
from kandinsky_jax.common.atomic import fill_file, replace_file
from kandinsky_jax.common.errors import hide_secrets
from kandinsky_jax.training.config import Config
from kandinsky_jax.training.errors import TrainingError

if TYPE_CHECKING:  # part of the extra `train`
    from tensorboardX import SummaryWriter

START_SECONDS, FINISH_SECONDS = 30, 60  # longest wait for a server, before the first step and after the last


class Metrics:
    """Writer of metrics and sample pictures.

    Args:
        folder: of the run.
        config: of the run, whose `wandb_project` asks for Weights & Biases.
    """

    def __init__(self, folder: Path, config: Config):
        self._path = folder / "metrics.jsonl"
        self._board = _tensorboard(folder / "events")
        self._wandb = None if config.wandb_project is None else WandbRun(folder, config.wandb_project, config)

    def forget_after(self, step: int) -> None:
        """Drop lines of steps that will be repeated, and lines that cannot be read."""
        try:
            reading.check_regular(self._path)
        except FileNotFoundError:
            return
        except (OSError, reading.ReadError) as error:
            reason = getattr(error, "strerror", None) or error
            raise TrainingError(f"{reading.of_file(self._path, reason)}: move it away to continue") from None

        def keep(kept: BinaryIO) -> None:
            with self._path.open("rb") as file:
                for line in file:
                    if _step_of(line) <= step:
                        kept.write(line if line.endswith(b"\n") else line + b"\n")

        fill_file(self._path, keep)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one step."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **metrics})

    def picture(self, step: int, image: Image.Image) -> None:
        """Write sample pictures generated after a step."""
        if self._board is not None:
            self._board.add_image("samples", np.asarray(image), step, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.log({"step": step, "samples": image})

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.close(failed=kind is not None)


class NoMetrics:
    """Stands for `Metrics` in the processes that write none."""

    def forget_after(self, step: int) -> None:
        """Do nothing."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Do nothing."""

    def picture(self, step: int, image: Image.Image) -> None:
        """Do nothing."""

    def __enter__(self) -> NoMetrics:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class WandbRun:
    """A run of Weights & Biases without prompts or long waits, whose failures are warnings.

    WANDB_MODE is respected. Without a login, files are written for `wandb sync`. A resumed training run resumes its run
    there; the id is stored in the folder.
    """

    def __init__(self, folder: Path, project: str, config: Config):
        self._run: Any = None
        try:
            import wandb
        except Exception as error:
            self._fail(f"wandb cannot be imported ({error}); `pip install wandb`, or leave wandb_project out")
            return
        self._image = wandb.Image
        try:
            wandb.setup(wandb.Settings(silent=True))  # silent also avoids the prompt for a key
            try:
                self._run = self._start(wandb, folder, project, config, id=_run_id(folder), resume="allow")
            except Exception as error:
                self._fail(f"{error}; metrics are kept in {folder / 'wandb'}, for `wandb sync`")
                # With an id of its own: the other one may be taken by the run that failed.
                self._run = self._start(wandb, folder, project, config, mode="offline")
            self._run.define_metric("*", step_metric="step")  # wandb's own steps cannot be repeated after a kill
        except Exception as error:
            self._fail(error)

    def _start(self, wandb: Any, folder: Path, project: str, config: Config, **how: str) -> Any:
        waiting = {"init_timeout": START_SECONDS, "finish_timeout": FINISH_SECONDS}
        settings = wandb.Settings(silent=True, console="off", save_code=False, **waiting)
        return wandb.init(project=project, dir=str(folder), config=_public(config), settings=settings, **how)

    def log(self, values: Mapping[str, object]) -> None:
        """Log numbers and pictures, including `step`."""
        if self._run is None:
            return
        try:
            self._run.log({k: self._image(v) if isinstance(v, Image.Image) else v for k, v in values.items()})
        except Exception as error:
            self._fail(error)

    def close(self, *, failed: bool) -> None:
        """Send remaining data and finish the run."""
        run, self._run = self._run, None
        try:
            if run is not None:
                run.finish(exit_code=int(failed))
        except Exception as error:
            self._fail(error)

    def _fail(self, error: object) -> None:
        self._run = None
        warnings.warn(f"Weights & Biases: {error}", stacklevel=3)


def _public(config: Config) -> dict[str, object]:
    """Return a configuration without secrets in URLs."""
    found = dataclasses.asdict(config)
    return {name: hide_secrets(value) if isinstance(value, str) else value for name, value in found.items()}


def _run_id(folder: Path) -> str:
    path = folder / "wandb" / "run_id.txt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, secrets.token_hex(4).encode())
    return path.read_text()


def _tensorboard(folder: Path) -> SummaryWriter | None:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))


def _step_of(line: bytes) -> float:
    """Return the step of a line; infinity for a truncated or damaged line."""
    try:
        found = json.loads(line.decode())["step"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return math.inf
    return found if isinstance(found, int | float) else math.inf
