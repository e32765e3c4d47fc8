"""A padded batch whose images come and go, each with a schedule, a guidance scale and noise of its own.

The arithmetic is that of the pipelines' loop, `kandinsky_jax.diffusion.denoise`, with a row of coefficients per image.
No image's numbers depend on another's, so at a given batch size an image has the same bits whoever is beside it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kandinsky_jax import diffusion
from kandinsky_jax.common.types import Params, PyTree
from kandinsky_jax.compilation import program
from kandinsky_jax.diffusion import (
    Evaluation,
    LoopState,
    Network,
    NoGuidance,
    Prediction,
    initial_state,
    matmul_precision,
    prediction_from_output,
    solver_step,
    split_output,
)
from kandinsky_jax.diffusion.inpainting import Blend
from kandinsky_jax.diffusion.solver import per_image
from kandinsky_jax.parallel.sharding import REPLICATED, batch_specs, shard_batch, sharded
from kandinsky_jax.pipelines.denoising import LoopInputs
from kandinsky_jax.schedulers.table import STATE_SLOTS
from kandinsky_jax.serve.batching.rows import idle_row, unpack

MOST_STEPS = 8  # of one call; a call is never longer than the shortest way that an image still has to go


class SlotGuidance(NamedTuple):
    """Classifier-free guidance with a scale per image and step; at scales up to 1, the conditional prediction alone."""

    def init(self, sample: jax.Array) -> None:
        return None

    def evaluations(self, cond: PyTree, uncond: PyTree) -> Sequence[Evaluation]:
        return [Evaluation(uncond), Evaluation(cond)]

    def combine(
        self, outputs: Sequence[jax.Array], sample: jax.Array, coefficients: Any, state: None
    ) -> tuple[Prediction, None]:
        (uncond, _), (cond, variance) = (split_output(output, sample.shape[-1]) for output in outputs)
        scale = per_image(coefficients.guidance_scale, cond.ndim)
        guided = jnp.where(scale > 1, uncond + scale * (cond - uncond), cond)
        return prediction_from_output(coefficients, sample, guided, variance), None


class SlotNoise(NamedTuple):
    """The noise of each image's own steps: from its key, or made on the host."""

    keys: jax.Array  # [B]
    first: jax.Array  # int32 [B], the row of its schedule where each image is
    given: jax.Array  # [steps, B, ...]
    uses_given: jax.Array  # bool [B]

    def __call__(self, index: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Return the noise of a step of this call, `[B, ...]`."""

        def of_key(key: jax.Array, row: jax.Array) -> jax.Array:
            return jax.random.normal(jax.random.fold_in(key, row + 1), shape[1:])

        made = jax.vmap(of_key)(self.keys, self.first + index)
        return jnp.where(per_image(self.uses_given, len(shape)), self.given[index], made)


class SlotArrays(NamedTuple):
    """What the slots of a batch have on the device."""

    inputs: LoopInputs  # of each image, [B, ...]; the blend without its levels, which are in the rows
    state: jax.Array  # of the solver, and at last the predicted clean sample, float32 [STATE_SLOTS + 1, B, ...]
    keys: jax.Array  # [B]

    def map(self, function: Callable[[PyTree, int | None], PyTree]) -> SlotArrays:
        """A function of each array and its axis of images, None where it has none."""
        return SlotArrays(self.inputs.map(function), function(self.state, 1), function(self.keys, 0))


@program(static_argnames=("network", "guided"), donate_argnames="state")
def advance(
    network: Network,
    params: Params,
    inputs: LoopInputs,
    state: jax.Array,
    rows: jax.Array,
    noise: SlotNoise,
    steps: jax.Array,
    guided: bool,
) -> jax.Array:
    """Do some steps of all slots.

    Args:
        network, params: what predicts.
        inputs: of the slots.
        state: float32 `[STATE_SLOTS + 1, B, ...]`, donated; the predicted clean sample comes last.
        rows: float32 `[MOST_STEPS, B, WIDTH]`, of the next steps of each image.
        noise: of each image.
        steps: int, at most `MOST_STEPS`; no part of the program.
        guided: whether uncond is evaluated.
    Returns:
        the next state.
    """
    mesh = network.mesh

    def local(
        params: Params, inputs: LoopInputs, state: jax.Array, rows: jax.Array, noise: SlotNoise, steps: jax.Array
    ) -> jax.Array:
        blend = inputs.blend

        def step(coefficients: Any, state: jax.Array, prediction: Prediction, noise: jax.Array) -> jax.Array:
            following = solver_step(coefficients, state[:STATE_SLOTS], prediction, noise)
            clean = prediction.x0
            if blend is not None:
                levels = coefficients.kept_levels
                following = following.at[0].set(_with_kept(blend, following[0], levels[:, 0], levels[:, 1]))
                clean = _with_kept(blend, clean, jnp.ones_like(levels[:, 0]), jnp.zeros_like(levels[:, 0]))
            return jnp.concatenate([following, clean[None]])

        with matmul_precision(params):
            done = diffusion.denoise(
                network.bind(params),
                LoopState(state),
                inputs.cond,
                inputs.uncond,
                unpack(rows),
                0,
                steps,
                guider=SlotGuidance() if guided else NoGuidance(),
                step_noise=noise,
                step=step,
            )
        return done.solver

    images, of_state = functools.partial(batch_specs, mesh), batch_specs(mesh, state, 1)
    of_given = batch_specs(mesh, noise.given, 1)
    noises = SlotNoise(images(noise.keys), images(noise.first), of_given, images(noise.uses_given))
    each = (REPLICATED, inputs.map(images), of_state, batch_specs(mesh, rows, 1), noises, REPLICATED)
    return sharded(mesh, local, each, of_state)(params, inputs, state, rows, noise, steps)


def _with_kept(blend: Blend, sample: jax.Array, signal: jax.Array, sigma: jax.Array) -> jax.Array:
    """Return a sample `[B, h, w, C]` with the kept parts of its images, at a level per image."""
    signal, sigma = per_image(signal, sample.ndim), per_image(sigma, sample.ndim)
    return blend.keep * (signal * blend.picture + sigma * blend.noise) + (1 - blend.keep) * sample


@program(donate_argnames="arrays")
def insert(arrays: SlotArrays, inputs: LoopInputs, start: jax.Array, key: jax.Array, slot: jax.Array) -> SlotArrays:
    """Put an image into a slot.

    Args:
        arrays: of the batch, donated.
        inputs, start, key: of the image; the first entry of each array is taken.
        slot: int.
    """

    def put(batch: jax.Array, image: jax.Array, axis: int = 0) -> jax.Array:
        first = jax.lax.slice_in_dim(image, 0, 1, axis=axis)
        return jax.lax.dynamic_update_index_in_dim(batch, first.astype(batch.dtype), slot, axis)

    state = put(arrays.state, initial_state(start, STATE_SLOTS + 1), 1)
    return SlotArrays(jax.tree.map(put, arrays.inputs, inputs), state, put(arrays.keys, key))


@program(static_argnames="row")
def take(state: jax.Array, slot: jax.Array, row: int) -> jax.Array:
    """Return a row of a slot's state, `[1, ...]`: 0 is the sample, `STATE_SLOTS` the predicted clean one."""
    return jax.lax.dynamic_slice_in_dim(state[row], slot, 1)


@dataclass
class SlotJob:
    """One image's way through one network's loop.

    Args:
        inputs: LoopInputs of a batch of one, as a pipeline computes them.
        start: the first sample, `[1, ...]`.
        rows: of its schedule, see `schedule_rows`.
        key: `[1]`, its noise.
        given: noise made on the host instead, float32 `[evaluations, ...]`.
        done: evaluations that have been started.
        slot: where it is, None before and after.
        result: the last sample `[1, ...]`, once it is there.
    """

    inputs: LoopInputs
    start: jax.Array
    rows: np.ndarray
    key: jax.Array
    given: np.ndarray | None = None
    done: int = 0
    slot: int | None = None
    result: jax.Array | None = None

    @property
    def left(self) -> int:
        """Evaluations that are still to be done."""
        return len(self.rows) - self.done


@dataclass
class SlotBatch:
    """The slots of one network, sample shape and padded batch size.

    Args:
        network, params: what predicts.
        size: number of slots; a multiple of the mesh's devices.
        guided: whether uncond is evaluated.
        is_prior: whether the network is the prior.
    """

    network: Network
    params: Params
    size: int
    guided: bool
    is_prior: bool = False
    jobs: dict[int, SlotJob] = field(default_factory=dict)
    seconds_per_step: float = 0.0  # as measured, 0 before
    steps_done: int = 0
    _arrays: SlotArrays | None = None
    _no_noise: jax.Array | None = None

    @property
    def free(self) -> int:
        """Number of slots without an image."""
        return self.size - len(self.jobs)

    def add(self, job: SlotJob) -> None:
        """Put a job into a free slot."""
        slot = next(i for i in range(self.size) if i not in self.jobs)
        inputs = _without_levels(job.inputs, self.guided)
        if self._arrays is None:
            self._arrays = self._zeros(inputs, job.start.shape[1:])
        self._arrays = insert(self._arrays, inputs, job.start, job.key, np.int32(slot))
        if self.network.mesh is not None:
            self._arrays = self._arrays.map(functools.partial(shard_batch, self.network.mesh, pictures=False))
        job.slot = slot
        self.jobs[slot] = job

    def remove(self, job: SlotJob) -> None:
        """Take a job out of its slot, finished or not."""
        if job.slot is not None and self.jobs.get(job.slot) is job:
            del self.jobs[job.slot]
            job.slot = None

    def advance(self, longest: float = 0.1) -> list[SlotJob]:
        """Start as many steps as every image has to go, but about `longest` seconds at most.

        Returns:
            the jobs whose last step this was; they have left their slots, and their results may still be computed.
        """
        assert self._arrays is not None
        most = max(1, int(longest / self.seconds_per_step)) if self.seconds_per_step else 1
        steps = min(MOST_STEPS, most, *(job.left for job in self.jobs.values()))
        state = advance(
            self.network,
            self.params,
            self._arrays.inputs,
            self._arrays.state,
            self._rows(steps),
            self._noise(steps),
            np.int32(steps),
            self.guided,
        )
        self._arrays = self._arrays._replace(state=state)
        self.steps_done += steps
        finished = []
        for slot, job in list(self.jobs.items()):
            job.done += steps
            if not job.left:
                job.result = take(state, np.int32(slot), 0)
                self.remove(job)
                finished.append(job)
        return finished

    def wait(self, began: float, steps: int) -> None:
        """Wait for the device, and note how long its steps took.

        Args:
            began: when the steps were started, by `time.perf_counter`.
            steps: how many.
        """
        if self._arrays is not None:
            jax.block_until_ready(self._arrays.state)
            seconds = (time.perf_counter() - began) / max(steps, 1)
            before = self.seconds_per_step or seconds
            self.seconds_per_step = 0.7 * before + 0.3 * seconds

    def predicted(self, slot: int) -> np.ndarray:
        """Return the predicted clean sample of a slot, float32 `[...]`; waits for the device."""
        assert self._arrays is not None
        return np.asarray(take(self._arrays.state, np.int32(slot), STATE_SLOTS))[0]

    def _rows(self, steps: int) -> np.ndarray:
        rows = np.tile(_IDLE, (MOST_STEPS, self.size, 1))
        for slot, job in self.jobs.items():
            rows[:steps, slot] = job.rows[job.done : job.done + steps]
        return self._sharded(rows, 1)

    def _noise(self, steps: int) -> SlotNoise:
        assert self._arrays is not None
        first, uses = np.zeros(self.size, np.int32), np.zeros(self.size, bool)
        shape = self._arrays.state.shape[2:]
        if self._no_noise is None:
            self._no_noise = self._sharded(jnp.zeros((MOST_STEPS, self.size, *shape), jnp.float32), 1)
        given: Any = self._no_noise
        for slot, job in self.jobs.items():
            first[slot] = job.done
            if job.given is not None:
                given = np.zeros((MOST_STEPS, self.size, *shape), np.float32) if given is self._no_noise else given
                given[:steps, slot] = job.given[job.done : job.done + steps]
                uses[slot] = True
        if given is not self._no_noise:
            given = self._sharded(given, 1)
        return SlotNoise(self._arrays.keys, self._sharded(first), given, self._sharded(uses))

    def _zeros(self, inputs: LoopInputs, shape: tuple[int, ...]) -> SlotArrays:
        """Return arrays of empty slots, for images with such inputs and samples of a shape."""

        def zeros(tree: PyTree, axis: int | None) -> PyTree:
            if axis is None:  # the blend's levels
                return tree
            return jax.tree.map(lambda leaf: self._sharded(jnp.zeros((self.size, *leaf.shape[1:]), leaf.dtype)), tree)

        state = jnp.zeros((STATE_SLOTS + 1, self.size, *shape), jnp.float32)
        keys = jax.random.split(jax.random.key(0), self.size)
        return SlotArrays(inputs.map(zeros), self._sharded(state, 1), self._sharded(keys))

    def _sharded(self, array: Any, axis: int = 0) -> Any:
        mesh = self.network.mesh
        return array if mesh is None else shard_batch(mesh, array, axis, pictures=False)


_IDLE = idle_row()


def _without_levels(inputs: LoopInputs, guided: bool) -> LoopInputs:
    """Return an image's inputs as slots keep them: what is not evaluated is left out, and so are the blend's levels."""
    blend = None if inputs.blend is None else inputs.blend._replace(levels=None)  # type: ignore[arg-type]
    return inputs._replace(uncond=inputs.uncond if guided else None, blend=blend)
