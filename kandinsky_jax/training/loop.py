"""The training loop: batches, steps, checkpoints, metrics, sample pictures, and the result.

A run that is killed and started again goes on from its last checkpoint, and ends with the weights of a run that nothing
happened to: the state holds the weights, the optimizer, the step (which decides all noise) and the place in the data.

    OUT/checkpoints/STEP/    Orbax: the state, and where the data stands
    OUT/metrics.jsonl        one line a step: loss, gradient_norm, learning_rate, images_per_second
    OUT/events/, OUT/wandb/  the same for TensorBoard, and for Weights & Biases (see `metrics`)
    OUT/samples/STEP.png     the validation prompts
    OUT/encoded/             with `precompute`: latents and embeddings of all the data
    OUT/bad_data.txt         pictures that could not be read, and batches whose loss was not finite
    OUT/model/               the result: the pipeline in diffusers' layout, or pytorch_lora_weights.safetensors
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from tqdm.auto import tqdm

from kandinsky_jax import images
from kandinsky_jax.stop import Stop
from kandinsky_jax.training.config import Config
from kandinsky_jax.training.data import Batches, Captioned, DataError, listing
from kandinsky_jax.training.encoded import Encoded, encoded
from kandinsky_jax.training.foundations import CLIPTask, MoVQTask
from kandinsky_jax.training.kinds import Kind
from kandinsky_jax.training.mesh import gathered, make_training_mesh, parts
from kandinsky_jax.training.metrics import Metrics
from kandinsky_jax.training.step import Trainer, TrainState
from kandinsky_jax.training.tasks import DiffusionTask, Task

TASKS: dict[Kind, type[Task]] = {Kind.MOVQ: MoVQTask, Kind.CLIP: CLIPTask}  # the others diffuse
MOST_BAD = 10  # steps in a row without a finite loss, after which going on makes no sense


class TrainingError(RuntimeError):
    """Training cannot go on; what was kept stays."""


class Run:
    """One training run.

    Args:
        kind: what is trained.
        config: see `Config`.
        pipe: the model, float32; None loads it.
        quiet: no progress bars.
    Raises:
        DataError: where the data cannot be trained on, before the model is loaded where that can be known.
        ValueError: where a setting is not one of this kind's.
    """

    def __init__(self, kind: Kind, config: Config, pipe: Any = None, *, quiet: bool = False):
        self.config, self.folder, self.quiet = config, Path(config.output), quiet
        mesh = make_training_mesh(config.mesh.data, config.mesh.fsdp)
        _check_batch(config, parts(mesh))
        if config.precompute and kind in TASKS:
            raise ValueError(f"precompute is of no use for {kind}: nothing before it stays as it is")
        self.items: list[Captioned] = listing(config.data)
        task_class = TASKS.get(kind, DiffusionTask)
        pipe = task_class.load(config) if pipe is None else pipe
        pipe.set_progress_bar_config(disable=True)
        self.task = task_class(pipe, kind, config)
        if faults := self.task.faults(self.items):
            raise DataError(config.data, faults)
        self.trainer = Trainer(self.task.loss(), config.optimizer, self.task.frozen(), mesh)
        self.key, self._first_key = jax.random.split(jax.random.key(config.seed))
        self._bad_in_a_row = 0
        self.reader: Any = self.task.reader()
        rows: Any = self.items
        if config.precompute:
            self.reader = self._precomputed()
            rows = range(len(self.items))
        self.batches = Batches(rows, self.reader, config.train_batch_size, config.seed)

    def _precomputed(self) -> Encoded:
        """The encoded items, those that could be read."""
        assert isinstance(self.task, DiffusionTask)
        self.folder.mkdir(parents=True, exist_ok=True)
        reader, faults = encoded(self.folder / "encoded", self.task, self.items, self.quiet)
        self._report([f"before the first step: {fault}" for fault in faults])
        self.items = [self.items[i] for i in reader.which]
        return reader

    def train(self, *, stop: Stop | None = None) -> Path | None:
        """Train to the end; the folder of the result, or None where a signal came before.

        Raises:
            TrainingError: where the loss stays not finite.
        """
        stop, config = stop or Stop(), self.config
        self.folder.mkdir(parents=True, exist_ok=True)
        state = self.trainer.init(self.task.initial(self._first_key))
        with self._checkpoints() as manager, Metrics(self.folder, config) as metrics:
            state = self._resume(manager, state)
            done, last = int(state.step), config.optimizer.max_train_steps
            metrics.forget_after(done)
            with tqdm(total=last, initial=done, desc=self.task.kind, unit="step", disable=self.quiet) as bar:
                while done < last and not stop.asked:
                    state, found = self._one(state, done)
                    done += 1
                    metrics.write(done, found)
                    bar.set_postfix(loss=f"{found['loss']:.4f}", images_s=f"{found['images_per_second']:.1f}")
                    bar.update()
                    if done % config.checkpointing_steps == 0 or done == last:
                        self._keep(manager, state, done)
                    if config.validation_steps and (done % config.validation_steps == 0 or done == last):
                        self._sample(state, done, metrics)
            if done < last:
                self._keep(manager, state, done)
                return None
        return self.export(state)

    # Steps --------------------------------------------------------------------------------------------------------

    def _one(self, state: TrainState, done: int) -> tuple[TrainState, dict[str, float]]:
        began = time.perf_counter()
        batch = next(self.batches)
        which = batch.pop("index")
        state, found = self.trainer.step(state, batch if self.config.precompute else self.task.encode(batch), self.key)
        metrics = {name: float(value) for name, value in found.items()}
        self._judge(metrics["loss"], done, which)
        metrics["learning_rate"] = float(self.config.optimizer.rate()(done))
        metrics["images_per_second"] = len(which) / (time.perf_counter() - began)
        return state, metrics

    def _judge(self, loss: float, done: int, which: np.ndarray) -> None:
        """Report what was bad; a step without a finite loss has changed nothing."""
        faults = [f"step {done}: {fault}" for fault in self.reader.unreadable]
        self.reader.unreadable.clear()
        self._bad_in_a_row = 0 if math.isfinite(loss) else self._bad_in_a_row + 1
        if self._bad_in_a_row:
            faults.append(f"step {done}: loss {loss} of " + ", ".join(self.items[i].name for i in which))
        self._report(faults)
        if self._bad_in_a_row >= MOST_BAD:
            raise TrainingError(
                f"the loss was not finite in {MOST_BAD} steps, up to step {done}; the pictures are named in "
                f"{self.folder / 'bad_data.txt'}. Lower the learning rate, or take them out, and start again: it goes "
                "on from the last checkpoint"
            )

    def _report(self, faults: list[str]) -> None:
        if faults:
            with (self.folder / "bad_data.txt").open("a", encoding="utf-8") as file:
                file.write("\n".join(faults) + "\n")

    # The state ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _checkpoints(self) -> Iterator[ocp.CheckpointManager]:
        logging.getLogger("absl").setLevel(logging.WARNING)
        options = ocp.CheckpointManagerOptions(max_to_keep=self.config.checkpoints_total_limit)
        with ocp.CheckpointManager((self.folder / "checkpoints").absolute(), options=options) as manager:
            yield manager
            manager.wait_until_finished()

    def _keep(self, manager: ocp.CheckpointManager, state: TrainState, done: int) -> None:
        """Keep the state; it is written while the next steps are done, and is there whole or not at all."""
        if manager.latest_step() != done:
            data = {"data": self.batches.state, "kind": str(self.task.kind)}
            args = ocp.args.Composite(state=ocp.args.StandardSave(state), place=ocp.args.JsonSave(data))
            manager.save(done, args=args)

    def _resume(self, manager: ocp.CheckpointManager, state: TrainState) -> TrainState:
        latest = manager.latest_step()
        if latest is None:
            return state
        place = manager.restore(latest, args=ocp.args.Composite(place=ocp.args.JsonRestore())).place
        if place["kind"] != self.task.kind:
            raise TrainingError(f"{self.folder} holds checkpoints of {place['kind']}, not of {self.task.kind}")
        self.batches.state = place["data"]
        return manager.restore(latest, args=ocp.args.Composite(state=ocp.args.StandardRestore(state))).state

    # Pictures and the result --------------------------------------------------------------------------------------

    def _result(self, state: TrainState) -> Any:
        """What has been trained: the average of the weights, where there is one."""
        return gathered(self.trainer.mesh, state.params if state.ema is None else state.ema)

    def _sample(self, state: TrainState, done: int, metrics: Metrics) -> None:
        with self.task.installed(self._result(state)):
            sheet = self.task.sample(self.items)
        if sheet is not None:
            (self.folder / "samples").mkdir(exist_ok=True)
            about = {"prompts": list(self.config.validation_prompts), "step": done}
            images.write(self.folder / "samples" / f"{done:08d}.png", sheet, about)
            metrics.picture(done, sheet)

    def export(self, state: TrainState) -> Path:
        """Write the result; complete or absent."""
        target, trained = self.folder / "model", self._result(state)
        with self.task.installed(trained):
            self.task.export(target, trained, self.items)
        return target


def _check_batch(config: Config, devices: int) -> None:
    """Raise where a batch cannot be divided."""
    if jax.process_count() > 1:
        raise ValueError(
            f"this process is one of {jax.process_count()}, and a run is of one process with all of its devices; over "
            "several, drive kandinsky_jax.training.step.Trainer yourself"
        )
    accumulated = config.optimizer.gradient_accumulation_steps
    if config.train_batch_size % (devices * accumulated):
        raise ValueError(
            f"train_batch_size={config.train_batch_size} cannot be divided into "
            f"gradient_accumulation_steps={accumulated} parts over {devices} devices; make it a multiple of "
            f"{devices * accumulated}, or set mesh.data and mesh.fsdp for fewer devices"
        )
