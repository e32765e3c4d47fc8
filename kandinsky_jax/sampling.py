"""The one denoising loop: guidance, the step, and how the host drives it.

A network reaches the loop as a `Network` (its structure, hashable) and its parameters (arrays). The loop asks two
things of it: `module.condition(...)` once, and `module(sample, timestep, condition)` at every evaluation. It knows
tables, not schedulers (see `kandinsky_jax.schedulers.table`), and its bounds are arguments of the compiled program:
one program per network, shape and guidance on or off serves every prompt, seed, number of steps and scheduler.

What a mode adds stays outside: its first latents, its further input channels (in the condition), its `Blend`.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kandinsky_jax.compilation import bound_to, program
from kandinsky_jax.noise import GivenNoise, KeyNoise, Source
from kandinsky_jax.schedulers.table import SLOTS, Schedule, Table
from kandinsky_jax.sharding import DATA_AXIS, GUIDANCE_AXIS, REPLICATED, batch_specs, mesh_of, shard_batch, sharded

Params = Any  # a nested dict of arrays
Noise = KeyNoise | GivenNoise


class Network:
    """A module's structure without its arrays, hashable, so that a jitted function can take it as a static argument.

    Two networks built alike are equal, so pipelines that share a network share its compiled programs. `mesh` is what
    the parameters lie on, None for a single device.
    """

    def __init__(self, graphdef: nnx.GraphDef, mesh: jax.sharding.Mesh | None = None):
        self.graphdef, self.mesh = graphdef, mesh
        self._hash = hash((graphdef, mesh))  # costs milliseconds for the UNet, and jit asks at every call

    @classmethod
    def split(cls, module: nnx.Module) -> tuple[Network, Params]:
        graphdef, state = nnx.split(module)
        params = nnx.to_pure_dict(state)
        return cls(graphdef, mesh_of(next(iter(jax.tree.leaves(params)), None))), params

    @property
    def devices(self) -> int:
        """How many have images of their own."""
        return 1 if self.mesh is None else self.mesh.shape[DATA_AXIS]

    def bind(self, params: Params) -> Any:
        """The module again."""
        return nnx.merge(self.graphdef, params)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Network) or self.mesh != other.mesh:
            return False
        return self.graphdef is other.graphdef or self.graphdef == other.graphdef


@contextlib.contextmanager
def _precision(params: Params) -> Iterator[None]:
    # On TPUs and GPUs a float32 product is by default done in bfloat16 or TF32: not what someone who asks for float32
    # wants, and not the reference's picture.
    exact = any(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    with jax.default_matmul_precision("highest") if exact else contextlib.nullcontext():
        yield


def call(network: Network, params: Params, *args: Any, method: str = "__call__") -> Any:
    """Run one method of a network on arrays `[B, ...]`, compiled once per structure and shapes."""
    if network.mesh is None:
        return _run(network, params, *args, method=method)
    images = len(jax.tree.leaves(args)[0])
    whole = shard_batch(network.mesh, _run(network, params, *shard_batch(network.mesh, args), method=method))
    return _first_rows(whole, images) if images % network.devices else whole


def condition(network: Network, params: Params, *args: Any) -> Any:
    """A network's `condition` for a lane.

    Args:
        args: arrays `[halves, B, ...]`: two halves where guidance has them, the unconditional one first, otherwise one.
    Returns:
        the condition, `[halves, B, ...]` too; on a mesh, B is what an uneven batch is filled up to.
    """
    args = place_halves(network, args)
    return place_halves(network, _run(network, params, *args, method="condition", halves=True))


def place_halves(network: Network, tree: Any) -> Any:
    """Arrays `[halves, B, ...]` where a network wants them.

    What a program over a mesh gives is there already; a rehearsal's zeros are not, and the next program depends on it.
    """
    return tree if network.mesh is None else shard_batch(network.mesh, tree, 1, halves=True, pictures=False)


@program(static_argnames=("network", "method", "halves"))
def _run(network: Network, params: Params, *args: Any, method: str, halves: bool = False) -> Any:
    axis, widest = int(halves), max(jax.tree.leaves(args), key=lambda leaf: leaf.shape[0])

    def local(params: Params, *args: Any) -> Any:
        with _precision(params):
            output = getattr(network.bind(params), method)(*(_flat(args) if halves else args))
        if not halves:
            return output
        count = max(leaf.shape[0] for leaf in jax.tree.leaves(args))
        return jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), output)

    each, out = (batch_specs(network.mesh, tree, axis, halves) for tree in (list(args), widest))
    return sharded(network.mesh, local, (REPLICATED, *each), out)(params, *args)


def _flat(tree: Any) -> Any:
    """`[halves, B, ...]` as `[halves * B, ...]`, what a network knows."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)


@functools.partial(jax.jit, static_argnames="images")
def _first_rows(tree: Any, images: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[:images], tree)


def step(row: Table, state: jax.Array, output: jax.Array, variance: jax.Array, noise: jax.Array) -> jax.Array:
    """One step of any solver.

    Args:
        row: one row of a table.
        state: float32 `[SLOTS, B, ...]`, the sample first.
        output: what the network predicts, `[B, ...]`.
        variance: the network's second half, `[B, ...]`, or zeros.
        noise: standard normal, `[B, ...]`.
    Returns:
        the next state.
    """
    sample = state[0]
    x0 = row.x0_from[0] * sample + row.x0_from[1] * output
    x0 = jax.lax.cond(row.threshold[0] > 0, dynamic_threshold, lambda x, _: jnp.clip(x, -row.clip, row.clip), x0, row)
    eps = row.eps_from[0] * sample + row.eps_from[1] * x0 + row.eps_from[2] * output
    low, high = row.log_variance[0], row.log_variance[1]
    share = (variance + 1) / 2
    spread = jnp.where(
        row.variance_is_output > 0, jnp.sqrt(jnp.maximum(variance, 0)), jnp.exp((share * high + (1 - share) * low) / 2)
    )
    given = jnp.concatenate([state, jnp.stack([x0, eps, spread * noise])])  # [SLOTS + 3, B, ...]
    return jnp.einsum("ij,j...->i...", row.matrix, given, precision="highest")


def dynamic_threshold(x0: jax.Array, row: Table) -> jax.Array:
    """Saharia et al. 2022 (arXiv 2205.11487), section 2.3: per image, clip to a quantile of |x0| and divide by it."""
    _, quantile, largest = row.threshold
    axes = tuple(range(1, x0.ndim))
    bound = jnp.quantile(jnp.abs(x0), quantile, axis=axes, keepdims=True)
    bound = jnp.clip(bound, 1.0, largest)
    return jnp.clip(x0, -bound, bound) / bound


def guided(output: jax.Array, channels: int, scale: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) in float32.

    Args:
        output: `[2B, ..., c]`, the unconditional rows first; `[B, ..., c]` where `scale` is None.
        channels: of the sample; further ones are the variance, which guidance does not touch.
    Returns:
        prediction and variance `[B, ..., channels]`; the variance is zeros where the network gives none.
    """
    output = output.astype(jnp.float32)
    prediction, variance = output[..., :channels], output[..., channels:]
    if scale is not None:
        without, given = jnp.split(prediction, 2)
        prediction = without + scale * (given - without)
        variance = jnp.split(variance, 2)[1]
    return prediction, variance if variance.shape[-1] else jnp.zeros_like(prediction)


class Blend(NamedTuple):
    """Holds a part of the sample to a known picture (inpainting), as noisy as the sample is after each row."""

    picture: jax.Array  # [B, h, w, C]
    noise: jax.Array  # [B, h, w, C], the same at every row
    keep: jax.Array  # [B, h, w, 1], 1 where the picture is held
    levels: jax.Array  # [ROWS, 2] how much picture and how much noise there is after each row

    def __call__(self, row: jax.Array, sample: jax.Array) -> jax.Array:
        """The sample `[B, h, w, C]` after a row, with its known part put back."""
        signal, sigma = self.levels[row]
        return self.keep * (signal * self.picture + sigma * self.noise) + (1 - self.keep) * sample

    def map(self, function: Callable[[Any, int | None], Any]) -> Blend:
        """A function of each array and its axis of images, None where it has none."""
        picture, noise, keep = (function(array, 0) for array in self[:3])
        return Blend(picture, noise, keep, function(self.levels, None))


class Lane(NamedTuple):
    """What one batch is denoised under."""

    condition: Any  # for `module(sample, timestep, condition)`, arrays [halves, B, ...], see `condition`
    blend: Blend | None = None

    def map(self, function: Callable[..., Any]) -> Lane:
        """A function of each array and its axis of images, None where it has none, and whether halves come first."""
        held = None if self.blend is None else self.blend.map(functools.partial(function, halves=False))
        return Lane(function(self.condition, 1, halves=True), held)


@program(static_argnames="network", donate_argnames="state")
def denoise(
    network: Network,
    params: Params,
    lane: Lane,
    table: Table,
    state: jax.Array,
    noise: Noise,
    scale: jax.Array | None,
    lo: jax.Array,
    hi: jax.Array,
) -> jax.Array:
    """Rows lo .. hi - 1 of a table.

    Args:
        network, params: what predicts; `module(sample, timestep, condition)`.
        lane: its condition is of two halves, the unconditional one first, where `scale` is given; of one where it is
            None.
        table: float32, `[ROWS, ...]`.
        state: float32 `[SLOTS, B, ...]`; donated.
        noise: one of `kandinsky_jax.noise`.
        scale: of guidance, or None for none: then half the work, in a program of its own.
        lo, hi: int; arguments, not constants, of the compiled program.
    Returns:
        the state after row hi - 1.
    """
    mesh = network.mesh
    whole = 1 if scale is None else 2  # halves

    def local(params: Params, lane: Lane, table: Table, state: jax.Array, noise: Noise, *scalars: Any) -> jax.Array:
        scale, lo, hi = scalars
        module, here = network.bind(params), jax.tree.leaves(lane.condition)[0].shape[0]
        condition = _flat(lane.condition)

        def body(i: jax.Array, state: jax.Array) -> jax.Array:
            row = jax.tree.map(lambda column: column[i], table)
            sample = state[0] * row.input_scale
            rows = jnp.concatenate([sample] * here)
            output = module(rows, jnp.broadcast_to(row.timestep, rows.shape[:1]), condition)
            if here < whole:
                output = jax.lax.all_gather(output, GUIDANCE_AXIS, tiled=True)
            prediction, variance = guided(output, sample.shape[-1], scale)
            state = step(row, state, prediction, variance, noise(i, sample.shape))
            return state if lane.blend is None else state.at[0].set(lane.blend(i, state[0]))

        with _precision(params):
            return jax.lax.fori_loop(lo, hi, body, state)

    divided, states = functools.partial(batch_specs, mesh), batch_specs(mesh, state, 1)
    each = (REPLICATED, lane.map(divided), REPLICATED, states, noise.map(divided), *[REPLICATED] * 3)
    return sharded(mesh, local, each, states)(params, lane, table, state, noise, scale, lo, hi)


SLICE_SECONDS = 0.1  # how long the host lets the device run before it looks up: progress, Ctrl-C

# After each slice: (rows done, one sample [B, ...] per lane) -> the samples to go on with, or None for the same.
AfterSlice = Callable[[int, list[jax.Array]], list[jax.Array] | None]


def sample(
    network: Network,
    params: Params,
    inputs: Callable[[], tuple[Sequence[Lane], float | None]],
    schedule: Schedule,
    latents: Sequence[jax.Array],
    source: Source,
    *,
    interval: tuple[int, int] | None = None,
    after: AfterSlice | None = None,
    every_step: bool = False,
) -> list[jax.Array]:
    """Run a whole schedule over one or more lanes, batches of the same shape that share one compiled program.

    Args:
        inputs: gives the lanes and the scale of guidance, None for none; asked again before every slice, so that
            `after` can change them. Without guidance, a lane's unconditional half is not looked at.
        latents: each lane's first sample, float32 `[B, ...]`, already scaled.
        source: the noise.
        interval: the first row with guidance and the first without it again (Kynkaanniemi et al. 2024, arXiv
            2404.07724); the others run on the conditional rows alone. None is all rows.
        after: called after each slice.
        every_step: slices of one step, for callbacks; otherwise as many steps as take about `SLICE_SECONDS`.
    Returns:
        each lane's last sample.
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
            under = [_conditional(lane) if _guided(lane) else lane for lane in under]
        noises: list[Any] = [*source.steps(done, hi - done, schedule.draws_noise, shape, len(states))]
        if mesh is not None:
            under = [lane.map(functools.partial(shard_batch, mesh, pictures=False)) for lane in under]
            noises = [noise.map(functools.partial(shard_batch, mesh)) for noise in noises]
        states = [
            denoise(network, params, lane, table, state, noise, guidance, np.int32(done), np.int32(hi))
            for lane, state, noise in zip(under, states, noises, strict=True)
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


@jax.jit
def _first_state(sample: jax.Array) -> jax.Array:
    return jnp.zeros((SLOTS, *sample.shape), jnp.float32).at[0].set(sample)


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


def _guided(lane: Lane) -> bool:
    """Whether a lane has both halves of guidance."""
    return len(jax.tree.leaves(lane.condition)[0]) == 2


@jax.jit
def _conditional(lane: Lane) -> Lane:
    """A lane without its unconditional half."""
    return lane._replace(condition=jax.tree.map(lambda x: x[1:], lane.condition))


@functools.partial(jax.jit, static_argnames="images")
def _sample_of(state: jax.Array, images: int) -> jax.Array:
    return state[0, :images]


@jax.jit
def _with_sample(state: jax.Array, sample: jax.Array) -> jax.Array:
    return state.at[0].set(sample)
