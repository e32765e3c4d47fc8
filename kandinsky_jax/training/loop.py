"""The training loop: batches, steps, checkpoints, metrics, sample pictures, and the result.

A run that was killed continues from its last checkpoint and ends with the weights of an uninterrupted run: the state
consists of the weights, the optimizer, the step (which determines all noise) and the position in the data. A checkpoint
of other settings, data or weights is refused (see `run_record`).

On many hosts each process runs this loop, reads its examples of every batch, and writes its part of the checkpoints.
Process 0 writes everything else. Before each step they agree whether to take it (see `Agreement`).

    OUT/checkpoints/STEP/    the state, and the position in the data (see `checkpoints`)
    OUT/layout.json          processes, mesh, and bytes of weights and optimizer state in each process
    OUT/metrics.jsonl        one line a step: loss, gradient_norm, learning_rate, images_per_second
    OUT/events/, OUT/wandb/  the same for TensorBoard, and for Weights & Biases (see `metrics`)
    OUT/samples/STEP.png     the validation prompts
    OUT/encoded/             with `precompute`: latents and embeddings of all data
    OUT/bad_data.txt         data that is not used, and batches whose loss was not finite (see `bad_data`)
    OUT/model/               the result: the pipeline in diffusers' layout, or pytorch_lora_weights.safetensors
"""

from __future__ import annotations

import functools
import json
import math
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from tqdm.auto import tqdm

from kandinsky_jax import images, lora
from kandinsky_jax.checkpoint import flat_params
from kandinsky_jax.checkpoint.quantization import is_quantized
from kandinsky_jax.common.atomic import replace_file
from kandinsky_jax.common.errors import hide_secrets, shorten
from kandinsky_jax.common.types import PyTree
from kandinsky_jax.compilation import only_good_programs
from kandinsky_jax.parallel.hosts import Hosts
from kandinsky_jax.preemption import Stop
from kandinsky_jax.training.bad_data import BadData
from kandinsky_jax.training.checkpoints import Checkpoints
from kandinsky_jax.training.config import Config
from kandinsky_jax.training.data import Batches, Captioned, DataError, listing, tokens_needed, without_padding
from kandinsky_jax.training.errors import TrainingError
from kandinsky_jax.training.kinds import Kind, trains_lora
from kandinsky_jax.training.latent_cache import LatentCache, open_latent_cache
from kandinsky_jax.training.mesh import check_shared, connect, gathered, local_examples, make_training_mesh, parts
from kandinsky_jax.training.metrics import Metrics, NoMetrics
from kandinsky_jax.training.run_folder import MODEL, RunFolder
from kandinsky_jax.training.run_record import Record, check_same_run, check_same_settings, run_record, weights_digest
from kandinsky_jax.training.step import Trainer, TrainState
from kandinsky_jax.training.tasks import DiffusionTask, LoraTask, make_task, needs_captions

MOST_BAD = 10  # consecutive steps without a finite loss, after which training ends


class Agreement(NamedTuple):
    """What all processes agree on before a step."""

    tokens: int  # of the longest caption of the whole batch, see `tokens_needed`
    stop: bool  # whether a process was asked to stop
    without_data: int | None  # a process that can read no picture any more
    faults: bool  # whether there is unused data to report


class Run:
    """One training run.

    Args:
        kind: which network is trained.
        config: see `Config`.
        pipe: the model, float32; None loads it.
        hosts: the processes that train together; None is all that `jax.distributed` has connected.
        quiet: no progress bars.
        accept_changes: continue from checkpoints of other settings, data or weights.
    Raises:
        DataError: if there is no usable data, before the model is loaded where possible.
        TrainingError: if the result could not be written.
        ValueError: for a setting that this kind does not support.
    """

    def __init__(
        self,
        kind: Kind,
        config: Config,
        pipe: Any = None,
        *,
        hosts: Hosts | None = None,
        quiet: bool = False,
        accept_changes: bool = False,
    ):
        self.hosts = Hosts.here() if hosts is None else hosts
        self.config, self.quiet, self.accept_changes = config, quiet or not self.hosts.first, accept_changes
        self.run_folder = RunFolder(config.output, self.hosts.first)
        self.folder = self.run_folder.path
        check_same_settings(self.hosts, kind, config)
        mesh = make_training_mesh(config.mesh.data, config.mesh.fsdp)
        check_shared(mesh)
        _check_batch(config, parts(mesh), self.hosts)
        connect(mesh)
        if config.precompute and kind in (Kind.MOVQ, Kind.CLIP):
            raise ValueError(f"precompute is of no use for {kind}: none of its networks is frozen")
        self._mark = lora.FILE if trains_lora(kind, config) else "model_index.json"
        with in_folder(self.run_folder):
            self.run_folder.check_target(self._mark)
        captions = needs_captions(kind, config)
        found = listing(config.data, exclude=[config.output], scratch=self.folder, needs_captions=captions)
        self.task = make_task(kind, config, pipe)
        if quantized := [name for name, module in self.task.modules.items() if is_quantized(module)]:
            raise ValueError(f"the {shorten(quantized)} of {config.model} is quantized: train the full weights instead")
        self._loaded = pipe is None
        self.task.pipe.set_progress_bar_config(disable=True)
        self.items: list[Captioned] = self.task.usable(found, found.skipped)
        self._skipped = found.skipped
        if not self.items:
            raise DataError(config.data, found.skipped.faults)
        check_same_run(self.hosts, run_record(kind, config, self.items))
        self.trainer = Trainer(
            self.task.loss(),
            config.optimizer,
            self.task.frozen(),
            mesh,
            min_size=config.mesh.fsdp_min_size,
            draw=self.task.draw(),
            uses_average=self.task.uses_average,
        )
        self.key, self._first_key = jax.random.split(jax.random.key(config.seed))
        self._bad_in_a_row = 0
        self._reported = 0  # of `reader.unreadable`
        self._bad_data = BadData(self.folder / "bad_data.txt")
        self.reader: Any = self.task.reader()
        rows: Any = self.items
        if config.precompute:
            self.reader = self._precomputed()
            rows = range(len(self.items))
        examples = local_examples(mesh, config.train_batch_size)
        self.batches = Batches(rows, self.reader, config.train_batch_size, config.seed, config.data, examples)

    @only_good_programs()
    def _precomputed(self) -> LatentCache:
        """Open the cache of encoded items, and drop items that could not be read."""
        task = self.task.full if isinstance(self.task, LoraTask) else self.task
        assert isinstance(task, DiffusionTask)
        with in_folder(self.run_folder):
            self.run_folder.begin(self.hosts)
            self._checkpoints(self._record()).check_record()
            reader, unreadable = open_latent_cache(self.run_folder, task, self.items, self.quiet, self.hosts)
            for name, fault in unreadable.items():
                if self.hosts.first:
                    self._bad_data.report(fault, "before the first step", name)
        self.items = [self.items[i] for i in reader.which]
        return reader

    @only_good_programs()
    def train(self, *, stop: Stop | None = None) -> Path | epath.Path | None:
        """Train to the end; return the folder of the result, or None if a signal stopped the run.

        Raises:
            DataError: if no picture can be read any more; the state is saved.
            TrainingError: if the loss stays not finite, checkpoints are of another run or cannot be read, or a file
                cannot be written.
        """
        with in_folder(self.run_folder):
            self.run_folder.begin(self.hosts)
            self._report_skipped()
            try:
                state = self._trained(stop or Stop())
            finally:
                self.run_folder.publish()
            return None if state is None else self.export(state)

    def _trained(self, stop: Stop) -> TrainState | None:
        """Return the state after the last step, or None if a signal stopped the run."""
        config, last = self.config, self.config.optimizer.max_train_steps
        state = self.trainer.init(self.task.initial(self._first_key))
        record = self._record()
        self._offload()
        self._write_layout(state)
        checkpoints = self._checkpoints(record)
        with checkpoints, Metrics(self.folder, config) if self.hosts.first else NoMetrics() as metrics:
            if (found := checkpoints.restore(state)) is not None:
                state, self.batches.state = found
            done = saved = int(state.step)
            metrics.forget_after(done)
            with tqdm(total=last, initial=done, desc=self.task.kind, unit="step", disable=self.quiet) as bar:
                bar.set_postfix_str("compiling the first step")
                while done < last:
                    checkpoints.check()
                    began, position = time.perf_counter(), self.batches.state
                    batch, failure = self._read()
                    agreed = self._agree(batch, stop)
                    if agreed.faults:
                        self._report_unreadable(f"step {done}")
                    if agreed.stop or agreed.without_data is not None:
                        if done > saved:
                            self._save(checkpoints, done, state, position)
                        if agreed.stop:
                            return None
                        raise failure or self._without_data(agreed)
                    batch = without_padding(batch, agreed.tokens)
                    state, values = self._one(state, batch, done, began)
                    done += 1
                    metrics.write(done, values)
                    bar.set_postfix(loss=f"{values['loss']:.4f}", images_s=f"{values['images_per_second']:.1f}")
                    bar.update()
                    if done % config.checkpointing_steps == 0 or done == last:
                        self._save(checkpoints, done, state, self.batches.state)
                        saved = done
                    if config.validation_steps and (done % config.validation_steps == 0 or done == last):
                        self._sample(state, done, metrics)
        return state

    def _checkpoints(self, record: Record) -> Checkpoints:
        """Return the checkpoints of the run with this record."""
        return Checkpoints(
            self.run_folder.whole,
            record,
            self.config.checkpoints_total_limit,
            hosts=self.hosts,
            accept_changes=self.accept_changes,
        )

    def _save(self, checkpoints: Checkpoints, done: int, state: TrainState, position: dict[str, object]) -> None:
        """Write a checkpoint, after the metrics of the steps before it."""
        self.run_folder.publish()
        checkpoints.save(done, state, position)

    def _record(self) -> Record:
        """Return the identity of this run, which is the same in all processes."""
        record = run_record(self.task.kind, self.config, self.items, self._digests, self.task.further_settings)
        check_same_run(self.hosts, record)
        return record

    @functools.cached_property
    def _digests(self) -> dict[str, str]:
        """Digests of the networks' weights, before the first step."""
        return {name: weights_digest(flat_params(module)) for name, module in self.task.networks.items()}

    def _offload(self) -> None:
        """Leave the devices to the state: keep networks that no step runs on the host, for samples and the result.

        Not those of a pipeline that somebody else uses too.
        """
        if self._loaded:
            self.task.offload(self.task.networks if self.config.precompute else self.task.modules)

    def _write_layout(self, state: TrainState) -> None:
        """Write OUT/layout.json: processes, mesh, and the bytes of the state on each process's devices."""
        kept = [state, self.trainer.frozen]
        mine = sum(shard.data.nbytes for leaf in jax.tree.leaves(kept) for shard in leaf.addressable_shards)
        about = json.dumps({"host": socket.gethostname(), "devices": jax.local_device_count(), "state_bytes": mine})
        processes = [json.loads(text) for text in self.hosts.exchange(about)]
        if not self.hosts.first:
            return
        mesh = self.trainer.mesh
        whole = {"mesh": None if mesh is None else dict(mesh.shape), "processes": processes}
        whole["state_bytes"] = sum(leaf.nbytes for leaf in jax.tree.leaves(kept))
        replace_file(self.folder / "layout.json", (json.dumps(whole, indent=2) + "\n").encode())

    # Steps --------------------------------------------------------------------------------------------------------

    def _read(self) -> tuple[dict[str, np.ndarray], DataError | None]:
        """Read this process's examples of the next batch; an empty batch and the error if none can be read."""
        try:
            return next(self.batches), None
        except DataError as error:
            return {}, error

    def _agree(self, batch: dict[str, np.ndarray], stop: Stop) -> Agreement:
        """Agree with the other processes on the next step."""
        mine = [tokens_needed(batch), stop.asked, not batch, len(self.reader.unreadable) > self._reported]
        tokens, stops, without_data, faults = self.hosts.gather(mine).T
        lacking = int(without_data.argmax()) if without_data.any() else None
        return Agreement(int(tokens.max()), bool(stops.any()), lacking, bool(faults.any()))

    def _without_data(self, agreed: Agreement) -> TrainingError:
        assert agreed.without_data is not None
        return TrainingError(
            f"{self.hosts.describe(agreed.without_data)} can read no picture of {hide_secrets(self.config.data)}"
        )

    def _one(
        self, state: TrainState, batch: dict[str, np.ndarray], done: int, began: float
    ) -> tuple[TrainState, dict[str, float]]:
        which = batch.pop("index")
        state, found = self.trainer.step(state, batch if self.config.precompute else self.task.encode(batch), self.key)
        metrics = {name: float(value) for name, value in found.items()}
        self._judge(metrics, done, which)
        metrics["learning_rate"] = float(self.config.optimizer.rate()(done))
        metrics["images_per_second"] = self.config.train_batch_size / (time.perf_counter() - began)
        return state, metrics

    def _judge(self, metrics: dict[str, float], done: int, which: np.ndarray) -> None:
        """Log losses and gradients that are not finite; such a step has changed nothing."""
        bad = [name for name in ("loss", "gradient_norm") if not math.isfinite(metrics[name])]
        if not bad:
            self._bad_in_a_row = 0
            return
        self._bad_in_a_row += 1
        what, value = bad[0].replace("_", " "), metrics[bad[0]]
        names = self.hosts.exchange(", ".join(self.items[i].name for i in which))
        if self.hosts.first:
            self._bad_data.report(f"{what} {value} of " + ", ".join(names), f"step {done}")
        if self._bad_in_a_row >= MOST_BAD:
            raise TrainingError(
                f"the {what} was not finite in {MOST_BAD} steps, up to step {done}; see "
                f"{self.run_folder.below('bad_data.txt')} for the pictures. Lower the learning rate, or take them out, "
                "and start again with --accept-changes: it continues from the last checkpoint"
            )

    def _report_unreadable(self, when: str) -> None:
        """Log pictures that any process could not read since the last report."""
        found = list(self.reader.unreadable.items())
        new, self._reported = found[self._reported :], len(found)
        for text in self.hosts.exchange(json.dumps(new)):
            for name, fault in json.loads(text):
                if self.hosts.first:
                    self._bad_data.report(fault, when, name)

    def _report_skipped(self) -> None:
        """Report unused data: the first faults in a warning, all of them in the log."""
        if not self._skipped.count or not self.hosts.first:
            return
        for fault in self._skipped.faults:
            self._bad_data.report(fault, "not used")
        warnings.warn(
            f"{hide_secrets(self.config.data)}: {len(self.items)} pictures are used, not used are "
            f"{self._skipped.count} files or rows (see {self.run_folder.below('bad_data.txt')}): "
            f"{self._skipped.summary()}",
            stacklevel=3,
        )

    # Pictures and the result --------------------------------------------------------------------------------------

    def _result(self, state: TrainState) -> PyTree:
        """Return the trained values in process 0: the average of the weights, if there is one. Collective."""
        trained = state.params if state.ema is None else state.ema
        return gathered(self.trainer.mesh, trained, keep=self.hosts.first)

    def _sample(self, state: TrainState, done: int, metrics: Metrics | NoMetrics) -> None:
        """Write sample pictures, in process 0, while the others wait at the next step."""
        trained = self._result(state)
        if not self.hosts.first:
            return
        with self.task.installed(trained):
            sheet = self.task.sample(self.items)
        if sheet is not None:
            (self.folder / "samples").mkdir(exist_ok=True)
            about = {"prompts": list(self.config.validation_prompts), "step": done}
            images.write(self.folder / "samples" / f"{done:08d}.png", sheet, about)
            metrics.picture(done, sheet)

    def export(self, state: TrainState) -> Path | epath.Path:
        """Write the result atomically, in process 0, and return its folder. Collective."""
        target, trained = self.folder / MODEL, self._result(state)
        if self.hosts.first:
            with self.task.installed(trained):
                self.task.export(target, trained, self.items)
            self.run_folder.publish_folder(MODEL, self._mark)
        self.hosts.wait()  # the result is there when any process returns
        return self.run_folder.whole / MODEL if self.run_folder.remote else target


@contextmanager
def in_folder(folder: RunFolder) -> Iterator[None]:
    """Convert errors of the file system to TrainingError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or shorten(str(error), 150)
        raise TrainingError(
            f"{shorten(error.filename or str(folder), 250)}: {reason}. Start again when that is solved; training "
            "continues from the last checkpoint"
        ) from error


def _check_batch(config: Config, devices: int, hosts: Hosts) -> None:
    """Raise ValueError if a batch cannot be sharded."""
    accumulated = config.optimizer.gradient_accumulation_steps
    if config.train_batch_size % (devices * accumulated):
        into = f"gradient_accumulation_steps={accumulated} parts over " if accumulated > 1 else ""
        fewer = ", or set mesh.data and mesh.fsdp for fewer devices" if hosts.count == 1 else ""
        raise ValueError(
            f"train_batch_size={config.train_batch_size} cannot be divided into {into}{devices} devices; make it a "
            f"multiple of {devices * accumulated}{fewer}"
        )
