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
from kandinsky_jax.parallel.mesh import GUIDANCE_AXIS
from kandinsky_jax.parallel.sharding import REPLICATED, batch_specs, shard_batch, sharded
from kandinsky_jax.schedulers.table import Schedule, SolverCoefficients

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


@program(static_argnames="network", donate_argnames="state")
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
) -> jax.Array:
    """Rows lo .. hi - 1 of a table.

    Args:
        network, params: what predicts; `module(sample, timestep, condition)`.
        loop_inputs: with uncond where `scale` is given, without where it is None.
        table: float32, `[MAX_STEPS, ...]`.
        state: float32 `[STATE_SLOTS, B, ...]`; donated.
        noise: one of `kandinsky_jax.diffusion.rng`.
        scale: of guidance, or None for none: then half the work, in a program of its own.
        lo, hi: int; arguments, not constants, of the compiled program.
    Returns:
        the state after row hi - 1.
    """
    mesh = network.mesh

    def local(
        params: Params,
        loop_inputs: LoopInputs,
        table: SolverCoefficients,
        state: jax.Array,
        noise: Noise,
        *scalars: Any,
    ) -> jax.Array:
        scale, lo, hi = scalars
        cond, uncond = loop_inputs.cond, loop_inputs.uncond
        guider: Guider = NoGuidance() if scale is None else ClassifierFreeGuidance(scale)
        if scale is not None and exchanges_guidance(mesh):
            guider, cond, uncond = _ExchangedGuidance(scale), own_condition(cond, uncond), None
        with matmul_precision(params):
            done = diffusion.denoise(
                network.bind(params),
                LoopState(state),
                cond,
                uncond,
                table,
                lo,
                hi,
                guider=guider,
                step_noise=noise,
                after_step=loop_inputs.blend,
            )
        return done.solver

    specs, states = functools.partial(batch_specs, mesh), batch_specs(mesh, state, 1)
    each = (REPLICATED, loop_inputs.map(specs), REPLICATED, states, noise.map(specs), *[REPLICATED] * 3)
    return sharded(mesh, local, each, states)(params, loop_inputs, table, state, noise, scale, lo, hi)


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
        after: called after each slice.
        every_step: slices of one step, for callbacks; otherwise as many steps as take about `SLICE_SECONDS`.
    Returns:
        each batch's last sample.
    """
    shape, images, mesh = latents[0].shape, len(latents[0]), network.mesh
    beside = _put_like(network, params)
    states = [beside(_first_state(x), 1) for x in latents]
    table = jax.tree.map(jnp.asarray, schedule.table)
    done, size = 0, 1
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
        states = [
            denoise_steps(network, params, one, table, state, noise, guidance, np.int32(done), np.int32(hi))
            for one, state, noise in zip(under, states, noises, strict=True)
        ]
        if mesh is not None:
            states = shard_batch(mesh, states, 1)
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
