"""The training loop: batches, steps, checkpoints, metrics, sample pictures, and the result.

A run that is killed and started again goes on from its last checkpoint, and ends with the weights of a run that nothing
happened to: the state holds the weights, the optimizer, the step (which decides all noise) and the place in the data.

    OUT/checkpoints/STEP/    Orbax: the state, and where the data stands
    OUT/metrics.jsonl        one line a step: loss, gradient_norm, learning_rate, images_per_second
    OUT/events/, OUT/wandb/  the same for TensorBoard, and for Weights & Biases (see `metrics`)
    OUT/samples/STEP.png     the validation prompts
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

import jax
import numpy as np
import orbax.checkpoint as ocp
from PIL import Image
from tqdm.auto import tqdm

from kandinsky_jax import images, lora
from kandinsky_jax.checkpoint import flat_params, set_params
from kandinsky_jax.pipelines import KandinskyV22CombinedPipeline
from kandinsky_jax.stop import Stop
from kandinsky_jax.training.config import Config
from kandinsky_jax.training.data import Batches, Captioned, listing
from kandinsky_jax.training.kinds import Kind
from kandinsky_jax.training.metrics import Metrics
from kandinsky_jax.training.step import Trainer, TrainState
from kandinsky_jax.training.tasks import Task

MOST_BAD = 10  # steps in a row without a finite loss, after which going on makes no sense


class TrainingError(RuntimeError):
    """Training cannot go on; what was kept stays."""


class Run:
    """One training run.

    Args:
        kind: what is trained.
        config: see `Config`.
        pipe: the model, float32; None loads it.
    Raises:
        DataError: where the data cannot be trained on, before the model is loaded.
    """

    def __init__(self, kind: Kind, config: Config, pipe: KandinskyV22CombinedPipeline | None = None):
        self.config, self.folder = config, Path(config.output)
        self.items: list[Captioned] = listing(config.data)
        if pipe is None:
            pipe = KandinskyV22CombinedPipeline.from_pretrained(config.model, prior=config.prior, dtype="float32")
        pipe.set_progress_bar_config(disable=True)
        self.task = Task(pipe, kind, config.snr_gamma, config.condition_dropout, config.lora)
        flips = {"random_flip": config.random_flip, "random_crop": config.random_crop}
        self.reader = self.task.reader(config.resolution, **flips)
        self.batches = Batches(self.items, self.reader, config.train_batch_size, config.seed)
        self.trainer = Trainer(self.task.loss(), config.optimizer)
        self.key, self._first_key = jax.random.split(jax.random.key(config.seed))
        self._bad_in_a_row = 0

    def train(self, *, quiet: bool = False, stop: Stop | None = None) -> Path | None:
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
            with tqdm(total=last, initial=done, desc=self.task.kind, unit="step", disable=quiet) as bar:
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
        state, found = self.trainer.step(state, self.task.encode(batch), self.key)
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
        if faults:
            with (self.folder / "bad_data.txt").open("a", encoding="utf-8") as file:
                file.write("\n".join(faults) + "\n")
        if self._bad_in_a_row >= MOST_BAD:
            raise TrainingError(
                f"the loss was not finite in {MOST_BAD} steps, up to step {done}; the pictures are named in "
                f"{self.folder / 'bad_data.txt'}. Lower the learning rate, or take them out, and start again: it goes "
                "on from the last checkpoint"
            )

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

    @contextmanager
    def drawing(self, state: TrainState) -> Iterator[KandinskyV22CombinedPipeline]:
        """The pipeline with the weights of a state, their average where there is one."""
        module = self.task.module
        before = flat_params(module)
        trained = state.params if state.ema is None else state.ema
        set_params(module, lora.flat(self.task.network_params(trained)))
        try:
            yield self.task.pipe
        finally:
            set_params(module, before)

    def _sample(self, state: TrainState, done: int, metrics: Metrics) -> None:
        size = self.config.resolution
        prompts = list(self.config.validation_prompts) or [self.items[0].text]
        with self.drawing(state) as pipe:
            seeds = [self.config.seed] * len(prompts)
            [drawn] = pipe(prompts, height=size, width=size, num_inference_steps=25, generator=seeds, return_dict=False)
        sheet = Image.new("RGB", (size * len(drawn), size))
        for i, picture in enumerate(drawn):
            sheet.paste(picture, (size * i, 0))
        (self.folder / "samples").mkdir(exist_ok=True)
        images.write(self.folder / "samples" / f"{done:08d}.png", sheet, {"prompts": prompts, "step": done})
        metrics.picture(done, sheet)

    def export(self, state: TrainState) -> Path:
        """Write the result; complete or absent."""
        target = self.folder / "model"
        if self.task.of_lora:
            trained = state.params if state.ema is None else state.ema
            lora.write(target, trained, self.task.lora, "prior" if self.task.of_prior else "unet")
            return target
        with self.drawing(state) as pipe:
            part = pipe.prior_pipe if self.task.of_prior else pipe.decoder_pipe
            part.save_pretrained(target, overwrite=True)
        return target
