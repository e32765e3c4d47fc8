"""How the host drives the denoising loop of `kandinsky_jax.diffusion`: slices, callbacks, meshes.

A network reaches the loop as a `Network` (its structure, hashable) and its parameters (arrays). Two things are asked of
it: `module.condition(...)` once, and `module(sample, timestep, condition)` at every evaluation. The loop knows tables,
not schedulers (see `kandinsky_jax.schedulers.table`), and its bounds are arguments of the compiled program: one program
per network, shape and kind of guider serves every prompt, seed, number of steps, scheduler and scale.

What a mode adds stays outside: its first latents, its further input channels (in the condition), its `Blend`.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kandinsky_jax import diffusion
from kandinsky_jax.common.types import PyTree
from kandinsky_jax.compilation import bound_to, program
from kandinsky_jax.diffusion import (
    CondUncondGuider,
    Evaluation,
    Guider,
    LoopState,
    Network,
    NoGuidance,
    Params,
    Prediction,
    initial_state,
    matmul_precision,
)
from kandinsky_jax.diffusion.calls import exchanges_guidance, own_condition
from kandinsky_jax.diffusion.inpainting import Blend
from kandinsky_jax.diffusion.rng import GivenNoise, KeyNoise, Source
from kandinsky_jax.models.unet import FeatureCache
from kandinsky_jax.parallel.mesh import DATA_AXIS, GUIDANCE_AXIS, ROWS_AXIS
from kandinsky_jax.parallel.sharding import REPLICATED, batch_specs, shard_batch, sharded
from kandinsky_jax.schedulers.table import MAX_STEPS, Schedule, SolverCoefficients

Noise = KeyNoise | GivenNoise


class LoopInputs(NamedTuple):
    """What one batch is denoised under; the conditions are for `module(sample, timestep, condition)`."""

    cond: PyTree  # arrays [B, ...], from `diffusion.calls.condition`
    uncond: PyTree = None  # likewise; None where it is not evaluated
    blend: Blend | None = None
    weak: PyTree = None  # cond of the guider's own model, for autoguidance

    def map(self, function: Callable[[PyTree, int | None], PyTree]) -> LoopInputs:
        """A function of each array and its axis of images, None where it has none."""
        blend = None if self.blend is None else self.blend.map(function)
        return LoopInputs(function(self.cond, 0), function(self.uncond, 0), blend, function(self.weak, 0))


class Conditioning(Protocol):
    """Conditioning of a loop, which a user's callback may change between two steps."""

    def loop_inputs(self, network: Network, params: Params, guided: bool) -> Sequence[LoopInputs]:
        """Compute the inputs of each batch.

        Args:
            guided: whether uncond is evaluated.
        """

    def callback_tensors(self, guided: bool) -> dict[str, PyTree]:
        """Return what a callback sees besides the latents, by diffusers' names and in PyTorch's order of axes."""

    def with_callback_tensors(self, changed: Mapping[str, PyTree], both: bool) -> Self:
        """Return the conditioning after a callback has changed some of the tensors.

        Args:
            both: whether the tensors were of uncond and cond at first.
        """


class Steps(NamedTuple):
    """What `denoise_steps` carries from slice to slice."""

    state: jax.Array  # of the solver, float32 [STATE_SLOTS, B, ...]
    memory: PyTree = None  # of the guider, from `first_memory`
    cache: FeatureCache | None = None  # from `first_cache`; None for none: then a program of its own


@program(static_argnames=("network", "weak"), donate_argnames="steps")
def denoise_steps(
    network: Network,
    params: Params,
    loop_inputs: LoopInputs,
    table: SolverCoefficients,
    steps: Steps,
    noise: Noise,
    guider: Guider,
    lo: jax.Array,
    hi: jax.Array,
    weak: Network | None = None,
    weak_params: Params | None = None,
) -> Steps:
    """Rows lo .. hi - 1 of a table.

    Args:
        network, params: what predicts; `module(sample, timestep, condition)`.
        loop_inputs: with uncond and weak where the guider evaluates them, else without.
        table: float32, `[MAX_STEPS, ...]`.
        steps: donated.
        noise: one of `kandinsky_jax.diffusion.rng`.
        guider: its numbers are arguments; its class has a program of its own.
        lo, hi: int; arguments, not constants, of the compiled program.
        weak, weak_params: the weak model of autoguidance.
    Returns:
        the same after row hi - 1.
    """
    mesh = network.mesh

    def local(
        params: Params,
        loop_inputs: LoopInputs,
        table: SolverCoefficients,
        steps: Steps,
        noise: Noise,
        *others: Any,
    ) -> Steps:
        guider, lo, hi, weak_params = others
        cond, uncond = loop_inputs.cond, loop_inputs.uncond
        if weak is not None:
            guider = dataclasses.replace(guider, model=weak.bind(weak_params), condition=loop_inputs.weak)
        if _is_exchanged(mesh, guider):
            guider, cond, uncond = _ExchangedGuidance(guider), own_condition(cond, uncond), None
        with matmul_precision(params):
            done = diffusion.denoise(
                network.bind(params),
                LoopState(*steps),
                cond,
                uncond,
                table,
                lo,
                hi,
                guider=guider,
                step_noise=noise,
                after_step=loop_inputs.blend,
            )
        return Steps(*done)

    specs, held = functools.partial(batch_specs, mesh), _step_specs(mesh, steps, guider)
    each = (REPLICATED, loop_inputs.map(specs), REPLICATED, held, noise.map(specs), *[REPLICATED] * 4)
    arguments = (params, loop_inputs, table, steps, noise, guider, lo, hi, weak_params)
    return sharded(mesh, local, each, held)(*arguments)


@program()
def first_memory(guider: Guider, state: jax.Array) -> PyTree:
    """Make the guider's memory before the first guided step, for a solver's state `[STATE_SLOTS, B, ...]`."""
    return guider.init(state[0])


@program(static_argnames=("network", "evaluations", "exchanged"))
def first_cache(
    network: Network, params: Params, state: jax.Array, refresh: jax.Array, evaluations: int, exchanged: bool
) -> FeatureCache:
    """Make the feature cache before the first step.

    Args:
        network, params: a UNet's.
        state: of the loop, `[STATE_SLOTS, B, h, w, C]`.
        refresh: bool `[N]`; at which steps the deep blocks run, see `FeatureCache`.
        evaluations: of an image at each step on a device.
        exchanged: whether each device of the `guidance` axis does its own.
    """
    mesh = network.mesh

    def local(params: Params, state: jax.Array, refresh: jax.Array) -> FeatureCache:
        _, images, height, width, _ = state.shape
        return network.bind(params).feature_cache(evaluations * images, height, width, refresh)

    each = (REPLICATED, batch_specs(mesh, state, 1), REPLICATED)
    return sharded(mesh, local, each, _cache_specs(exchanged))(params, state, refresh)


def _step_specs(mesh: jax.sharding.Mesh | None, steps: Steps, guider: Guider) -> Any:
    """Return the partition specs of a slice's state."""
    if mesh is None:
        return REPLICATED
    images = steps.state.shape[1]
    memory = jax.tree.map(lambda x: batch_specs(mesh, x) if x.shape[:1] == (images,) else REPLICATED, steps.memory)
    cache = None if steps.cache is None else _cache_specs(_is_exchanged(mesh, guider))
    return Steps(batch_specs(mesh, steps.state, 1), memory, cache)


def _cache_specs(exchanged: bool) -> Any:
    """Return a cache of specs over the manual axes: each device keeps the features of what it evaluates."""
    images = (DATA_AXIS, GUIDANCE_AXIS) if exchanged else DATA_AXIS
    specs: dict[str, Any] = {"features": PartitionSpec(images), "refresh": REPLICATED, "done": REPLICATED}
    return FeatureCache(**specs)


def _sharded_steps(mesh: jax.sharding.Mesh | None, steps: Steps, guider: Guider) -> Steps:
    """Shard the rows of pictures too, which the specs over the manual axes leave to XLA."""
    if mesh is None:
        return steps
    images = steps.state.shape[1]
    memory = jax.tree.map(lambda x: shard_batch(mesh, x) if x.shape[:1] == (images,) else x, steps.memory)
    cache = steps.cache
    if cache is not None:
        axes, height = _cache_specs(_is_exchanged(mesh, guider)).features[0], cache.features.shape[1]
        rows = ROWS_AXIS if height % mesh.shape[ROWS_AXIS] == 0 else None
        features = jax.device_put(cache.features, NamedSharding(mesh, PartitionSpec(axes, rows)))
        cache = cache._replace(features=features)
    return Steps(shard_batch(mesh, steps.state, 1), memory, cache)


def _is_exchanged(mesh: jax.sharding.Mesh | None, guider: Guider) -> bool:
    """Whether a guider's evaluations of uncond and cond are done on a device each; others are done on both."""
    return exchanges_guidance(mesh) and getattr(type(guider), "evaluations", None) is CondUncondGuider.evaluations


class _ExchangedGuidance(NamedTuple):
    """A guider of uncond and cond where each device of a mesh's `guidance` axis evaluates one of the two."""

    guider: Guider

    def init(self, sample: jax.Array) -> PyTree:
        return self.guider.init(sample)

    def evaluations(self, cond: PyTree, uncond: None) -> Sequence[Evaluation]:
        return [Evaluation(cond)]  # on the first device, this is the unconditional one

    def combine(
        self, outputs: Sequence[jax.Array], sample: jax.Array, coefficients: SolverCoefficients, state: PyTree
    ) -> tuple[Prediction, PyTree]:
        both = jax.lax.all_gather(outputs[0], GUIDANCE_AXIS)  # [2, B, ...]
        return self.guider.combine([both[0], both[1]], sample, coefficients, state)


SLICE_SECONDS = 0.1  # how long the host lets the device run before it looks up: progress, Ctrl-C

# After each slice: (rows done, one sample [B, ...] per batch) -> the samples to go on with, or None for the same.
AfterSlice = Callable[[int, list[jax.Array]], list[jax.Array] | None]


def denoise_batches(
    network: Network,
    params: Params,
    inputs: Callable[[], tuple[Sequence[LoopInputs], Guider | None]],
    schedule: Schedule,
    latents: Sequence[jax.Array],
    source: Source,
    *,
    weak: tuple[Network, Params] | None = None,
    interval: tuple[int, int] | None = None,
    cache_interval: int = 1,
    after: AfterSlice | None = None,
    every_step: bool = False,
) -> list[jax.Array]:
    """Run a whole schedule over one or more batches of the same shape, which share one compiled program.

    Args:
        inputs: gives each batch's `LoopInputs` and the guider, its numbers float32, None for none; asked again before
            every slice, so that `after` can change them. Without a guider, a batch's uncond and weak are not read.
        latents: each batch's first sample, float32 `[B, ...]`, already scaled.
        source: the noise.
        weak: the weak model of autoguidance.
        interval: the first row with guidance and the first without it again (Kynkaanniemi et al. 2024, arXiv
            2404.07724); the others run on the conditional rows alone. None is all rows.
        cache_interval: the deep blocks run in one of so many steps, and whenever guidance begins or ends; in the others
            their last output is used (DeepCache, Ma et al. 2024, arXiv 2312.00858). 1 is every step.
        after: called after each slice.
        every_step: slices of one step, for callbacks; otherwise as many steps as take about `SLICE_SECONDS`.
    Returns:
        each batch's last sample.
    """
    shape, images, mesh = latents[0].shape, len(latents[0]), network.mesh
    beside = _put_like(network, params)
    batches = [Steps(beside(_first_state(x), 1)) for x in latents]
    memories: list[PyTree] | None = None  # of the guider; steps without guidance leave them as they are
    table = jax.tree.map(jnp.asarray, schedule.table)
    refresh = np.arange(MAX_STEPS) % cache_interval == 0
    done, size, was_guided = 0, 1, None
    first, last = (0, len(schedule)) if interval is None else interval
    while done < len(schedule):
        began = time.perf_counter()
        hi = min(done + size, len(schedule), *(end for end in (first, last) if end > done))
        under, chosen = inputs()
        guided = chosen is not None and first <= done < last
        guider: Guider = chosen if chosen is not None and guided else NoGuidance()
        if not guided:
            under = [one._replace(uncond=None, weak=None) for one in under]
        noises: list[KeyNoise | GivenNoise] = [
            *source.steps(done, hi - done, schedule.draws_noise, shape, len(batches))
        ]
        if mesh is not None:
            under = [one.map(functools.partial(shard_batch, mesh, pictures=False)) for one in under]
            noises = [noise.map(functools.partial(shard_batch, mesh)) for noise in noises]
        if guided and memories is None:
            memories = [_first_memory(guider, steps.state) for steps in batches]
        memory = [None] * len(batches) if memories is None or not guided else memories
        batches = [steps._replace(memory=own) for steps, own in zip(batches, memory, strict=True)]
        if cache_interval > 1 and guided != was_guided:
            evaluations = _plain_evaluations(mesh, guider, under[0])
            caches = [first_cache(network, params, x.state, refresh, *evaluations) for x in batches]
            batches = [steps._replace(cache=cache) for steps, cache in zip(batches, caches, strict=True)]
            was_guided = guided
        batches = [
            denoise_steps(
                network,
                params,
                one,
                table,
                _sharded_steps(mesh, steps, guider),
                noise,
                guider,
                np.int32(done),
                np.int32(hi),
                *(weak if guided and weak is not None else ()),
            )
            for one, steps, noise in zip(under, batches, noises, strict=True)
        ]
        jax.block_until_ready([steps.state for steps in batches])  # so that `after` tells of work that is done
        done, memories = hi, [steps.memory for steps in batches] if guided else memories
        if after is not None:
            changed = after(done, [_sample_of(steps.state, images) for steps in batches])
            if changed is not None:
                batches = [
                    steps._replace(state=_with_sample(steps.state, beside(x, 0)))
                    for steps, x in zip(batches, changed, strict=True)
                ]
        if not every_step and time.perf_counter() - began < SLICE_SECONDS:
            size = min(2 * size, source.chunk or len(schedule))
    return [_sample_of(steps.state, images) for steps in batches]


def _first_memory(guider: Guider, state: jax.Array) -> PyTree:
    """Make a guider's memory, by a program only where it has one."""
    shapes = jax.eval_shape(lambda state: guider.init(state[0]), state)
    return first_memory(guider, state) if jax.tree.leaves(shapes) else shapes


def _plain_evaluations(mesh: jax.sharding.Mesh | None, guider: Guider, inputs: LoopInputs) -> tuple[int, bool]:
    """Count an image's evaluations at each step on a device that take the cache, and whether devices exchange them."""
    if _is_exchanged(mesh, guider):
        return 1, True
    if inputs.weak is not None:
        return 1, False
    conditions = [one.condition for one in guider.evaluations(inputs.cond, inputs.uncond) if one.is_plain]
    return len({id(condition) for condition in conditions}), False


_first_state = jax.jit(initial_state)


def _put_like(network: Network, params: Params) -> Callable[[jax.Array, int], jax.Array]:
    """What puts an array, with its axis of images, where the parameters are: on their mesh, or bound to their device.

    Orbax restores them bound to one. What `denoise` gives is bound then, and a first slice with a free state would be
    a program of its own.
    """
    if network.mesh is not None:
        return functools.partial(shard_batch, network.mesh)
    where = bound_to(jax.tree.leaves(params)[0])
    bound = isinstance(where, jax.sharding.SingleDeviceSharding)
    return lambda array, axis: jax.device_put(array, where) if bound else array


@functools.partial(jax.jit, static_argnames="images")
def _sample_of(state: jax.Array, images: int) -> jax.Array:
    return state[0, :images]


@jax.jit
def _with_sample(state: jax.Array, sample: jax.Array) -> jax.Array:
    return state.at[0].set(sample)
