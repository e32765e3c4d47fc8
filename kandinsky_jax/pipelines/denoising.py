"""How the host drives the denoising loop of `kandinsky_jax.diffusion`: slices, callbacks, meshes.

A network reaches the loop as a `Network` (its structure, hashable) and its parameters (arrays). Two things are asked of
it: `module.condition(...)` once, and `module(sample, timestep, condition)` at every evaluation. The loop knows tables,
not schedulers (see `kandinsky_jax.schedulers.table`), and its bounds are arguments of the compiled program: one program
per network, shape and guidance on or off serves every prompt, seed, number of steps and scheduler.

What a mode adds stays outside: its first latents, its further input channels (in the condition), its `Blend`.
"""

from __future__ import annotations

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
    ClassifierFreeGuidance,
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
    uncond: PyTree = None  # likewise; None where guidance is off
    blend: Blend | None = None

    def map(self, function: Callable[[PyTree, int | None], PyTree]) -> LoopInputs:
        """A function of each array and its axis of images, None where it has none."""
        blend = None if self.blend is None else self.blend.map(function)
        return LoopInputs(function(self.cond, 0), function(self.uncond, 0), blend)


class Conditioning(Protocol):
    """Conditioning of a loop, which a user's callback may change between two steps."""

    def loop_inputs(self, network: Network, params: Params, guided: bool) -> Sequence[LoopInputs]:
        """Compute the inputs of each batch; with uncond where guidance is on."""

    def callback_tensors(self, guided: bool) -> dict[str, PyTree]:
        """Return what a callback sees besides the latents, by diffusers' names and in PyTorch's order of axes."""

    def with_callback_tensors(self, changed: Mapping[str, PyTree], both: bool) -> Self:
        """Return the conditioning after a callback has changed some of the tensors.

        Args:
            both: whether the tensors were of uncond and cond at first.
        """


@program(static_argnames="network", donate_argnames=("state", "cache"))
def denoise_steps(
    network: Network,
    params: Params,
    loop_inputs: LoopInputs,
    table: SolverCoefficients,
    state: jax.Array,
    noise: Noise,
    scale: jax.Array | None,
    lo: jax.Array,
    hi: jax.Array,
    cache: FeatureCache | None = None,
) -> tuple[jax.Array, FeatureCache | None]:
    """Rows lo .. hi - 1 of a table.

    Args:
        network, params: what predicts; `module(sample, timestep, condition)`.
        loop_inputs: with uncond where `scale` is given, without where it is None.
        table: float32, `[MAX_STEPS, ...]`.
        state: float32 `[STATE_SLOTS, B, ...]`; donated.
        noise: one of `kandinsky_jax.diffusion.rng`.
        scale: of guidance, or None for none: then half the work, in a program of its own.
        lo, hi: int; arguments, not constants, of the compiled program.
        cache: from `first_cache` or an earlier call; donated. None for none: then a program of its own.
    Returns:
        the state after row hi - 1, and the cache.
    """
    mesh = network.mesh

    def local(
        params: Params,
        loop_inputs: LoopInputs,
        table: SolverCoefficients,
        state: jax.Array,
        noise: Noise,
        cache: FeatureCache | None,
        *scalars: Any,
    ) -> tuple[jax.Array, FeatureCache | None]:
        scale, lo, hi = scalars
        cond, uncond = loop_inputs.cond, loop_inputs.uncond
        guider: Guider = NoGuidance() if scale is None else ClassifierFreeGuidance(scale)
        if scale is not None and exchanges_guidance(mesh):
            guider, cond, uncond = _ExchangedGuidance(scale), own_condition(cond, uncond), None
        with matmul_precision(params):
            done = diffusion.denoise(
                network.bind(params),
                LoopState(state, cache=cache),
                cond,
                uncond,
                table,
                lo,
                hi,
                guider=guider,
                step_noise=noise,
                after_step=loop_inputs.blend,
            )
        return done.solver, done.cache

    specs, states = functools.partial(batch_specs, mesh), batch_specs(mesh, state, 1)
    caches = None if cache is None else _cache_specs(mesh, scale is not None)
    each = (REPLICATED, loop_inputs.map(specs), REPLICATED, states, noise.map(specs), caches, *[REPLICATED] * 3)
    return sharded(mesh, local, each, (states, caches))(params, loop_inputs, table, state, noise, cache, scale, lo, hi)


@program(static_argnames=("network", "guided"))
def first_cache(network: Network, params: Params, state: jax.Array, refresh: jax.Array, guided: bool) -> FeatureCache:
    """Make the feature cache before the first step.

    Args:
        network, params: a UNet's.
        state: of the loop, `[STATE_SLOTS, B, h, w, C]`.
        refresh: bool `[N]`; at which steps the deep blocks run, see `FeatureCache`.
        guided: whether cond and uncond are evaluated at each step.
    """
    mesh = network.mesh

    def local(params: Params, state: jax.Array, refresh: jax.Array) -> FeatureCache:
        _, images, height, width, _ = state.shape
        evaluations = 2 if guided and not exchanges_guidance(mesh) else 1
        return network.bind(params).feature_cache(evaluations * images, height, width, refresh)

    each = (REPLICATED, batch_specs(mesh, state, 1), REPLICATED)
    return sharded(mesh, local, each, _cache_specs(mesh, guided))(params, state, refresh)


def _cache_specs(mesh: jax.sharding.Mesh | None, guided: bool) -> Any:
    """Return a cache of specs over the manual axes: each device keeps the features of what it evaluates."""
    images = (DATA_AXIS, GUIDANCE_AXIS) if guided and exchanges_guidance(mesh) else DATA_AXIS
    specs: dict[str, Any] = {"features": PartitionSpec(images), "refresh": REPLICATED, "done": REPLICATED}
    return FeatureCache(**specs)


def _shard_cache(mesh: jax.sharding.Mesh | None, cache: FeatureCache | None, guided: bool) -> FeatureCache | None:
    """Shard the rows of a cache's pictures too, which the specs over the manual axes leave to XLA."""
    if mesh is None or cache is None:
        return cache
    images, height = _cache_specs(mesh, guided).features[0], cache.features.shape[1]
    rows = ROWS_AXIS if height % mesh.shape[ROWS_AXIS] == 0 else None
    features = jax.device_put(cache.features, NamedSharding(mesh, PartitionSpec(images, rows)))
    return cache._replace(features=features)


class _ExchangedGuidance(NamedTuple):
    """Classifier-free guidance where each device of a mesh's `guidance` axis evaluates one condition of the two."""

    scale: jax.Array

    def init(self, sample: jax.Array) -> None:
        return None

    def evaluations(self, cond: PyTree, uncond: None) -> Sequence[Evaluation]:
        return [Evaluation(cond)]  # on the first device, this is the unconditional one

    def combine(
        self, outputs: Sequence[jax.Array], sample: jax.Array, coefficients: SolverCoefficients, state: None
    ) -> tuple[Prediction, None]:
        both = jax.lax.all_gather(outputs[0], GUIDANCE_AXIS)  # [2, B, ...]
        return ClassifierFreeGuidance(self.scale).combine([both[0], both[1]], sample, coefficients, state)


SLICE_SECONDS = 0.1  # how long the host lets the device run before it looks up: progress, Ctrl-C

# After each slice: (rows done, one sample [B, ...] per batch) -> the samples to go on with, or None for the same.
AfterSlice = Callable[[int, list[jax.Array]], list[jax.Array] | None]


def denoise_batches(
    network: Network,
    params: Params,
    inputs: Callable[[], tuple[Sequence[LoopInputs], float | None]],
    schedule: Schedule,
    latents: Sequence[jax.Array],
    source: Source,
    *,
    interval: tuple[int, int] | None = None,
    cache_interval: int = 1,
    after: AfterSlice | None = None,
    every_step: bool = False,
) -> list[jax.Array]:
    """Run a whole schedule over one or more batches of the same shape, which share one compiled program.

    Args:
        inputs: gives each batch's `LoopInputs` and the scale of guidance, None for none; asked again before every
            slice, so that `after` can change them. Without guidance, a batch's uncond is not read.
        latents: each batch's first sample, float32 `[B, ...]`, already scaled.
        source: the noise.
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
    states = [beside(_first_state(x), 1) for x in latents]
    table = jax.tree.map(jnp.asarray, schedule.table)
    refresh = np.arange(MAX_STEPS) % cache_interval == 0
    caches: list[FeatureCache | None] = [None] * len(states)
    done, size, was_guided = 0, 1, None
    first, last = (0, len(schedule)) if interval is None else interval
    while done < len(schedule):
        began = time.perf_counter()
        hi = min(done + size, len(schedule), *(end for end in (first, last) if end > done))
        under, scale = inputs()
        guidance = jnp.float32(scale) if scale is not None and first <= done < last else None
        if guidance is None:
            under = [one._replace(uncond=None) for one in under]
        noises: list[KeyNoise | GivenNoise] = [*source.steps(done, hi - done, schedule.draws_noise, shape, len(states))]
        if mesh is not None:
            under = [one.map(functools.partial(shard_batch, mesh, pictures=False)) for one in under]
            noises = [noise.map(functools.partial(shard_batch, mesh)) for noise in noises]
        guided = guidance is not None
        if cache_interval > 1 and guided != was_guided:
            caches = [
                _shard_cache(mesh, first_cache(network, params, state, refresh, guided), guided) for state in states
            ]
            was_guided = guided
        results = [
            denoise_steps(network, params, one, table, state, noise, guidance, np.int32(done), np.int32(hi), cache)
            for one, state, noise, cache in zip(under, states, noises, caches, strict=True)
        ]
        states, caches = [state for state, _ in results], [cache for _, cache in results]
        if mesh is not None:
            states = shard_batch(mesh, states, 1)
            caches = [_shard_cache(mesh, cache, guided) for cache in caches]
        jax.block_until_ready(states)  # so that `after` tells of work that is done
        done = hi
        if after is not None:
            changed = after(done, [_sample_of(state, images) for state in states])
            if changed is not None:
                states = [_with_sample(state, beside(x, 0)) for state, x in zip(states, changed, strict=True)]
        if not every_step and time.perf_counter() - began < SLICE_SECONDS:
            size = min(2 * size, source.chunk or len(schedule))
    return [_sample_of(state, images) for state in states]


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
