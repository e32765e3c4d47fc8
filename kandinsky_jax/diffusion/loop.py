"""The denoising loop, twice: `sample` for gradients, `denoise` with dynamic bounds; both take the same step.

`sample` is a `lax.scan` over a whole schedule with rematerialisation: `jit`, `vmap`, `grad` and `jvp` go through it, to
the noise, the conditions, the parameters and the guider's numbers. `denoise` is a `lax.fori_loop` whose bounds are
arguments of the compiled program, so that one program serves every number of steps; it has no reverse mode.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from kandinsky_jax.common.errors import quote
from kandinsky_jax.common.types import Array, Float, PyTree
from kandinsky_jax.diffusion.guidance import ClassifierFreeGuidance, Guider, Model, batch_evaluations, predict
from kandinsky_jax.diffusion.network import model_precision
from kandinsky_jax.diffusion.rng import DECODER_STREAM, GivenNoise, noise_source
from kandinsky_jax.diffusion.solver import (
    STATE_SLOTS,
    Prediction,
    SolverCoefficients,
    initial_state,
    solver_coefficients,
    solver_step,
)
from kandinsky_jax.schedulers.table import Schedule

_CFG = ClassifierFreeGuidance()


class Step(Protocol):
    """A solver's step, such as `solver_step`.

    The state's slots are samples: the first is what the network sees next, the others are the step's own memory, zeros
    before the first step (a multistep solver keeps earlier predictions there). A step that keeps nothing returns
    `state.at[0].set(sample)`.
    """

    def __call__(
        self, coefficients: SolverCoefficients, state: jax.Array, prediction: Prediction, noise: jax.Array, /
    ) -> jax.Array:
        """Do a step.

        Args:
            coefficients: the step's row of the schedule, or one per image; see `SolverCoefficients`.
            state: `[slots, B, ..., C]`, float32 (float64 where the first sample is).
            prediction: of the state's first slot, from the guider.
            noise: standard normal, `[B, ..., C]`; zeros where the loop has no noise.
        Returns:
            the next state, of the shape of the one before.
        """


class StepNoise(Protocol):
    """The noise of each step; `KeyNoise` and `GivenNoise` are such functions."""

    def __call__(self, index: jax.Array, shape: tuple[int, ...], /) -> jax.Array:
        """Return standard normal numbers of shape `[B, ..., C]` for the step of an index, int `[]`."""


class AfterStep(Protocol):
    """Changes the sample after each step; inpainting puts the known part back with it."""

    def __call__(self, index: jax.Array, sample: jax.Array, /) -> jax.Array:
        """Return the sample to go on with from that after the step of an index, float32 `[B, ..., C]`."""


class LoopState(NamedTuple):
    """What the loop carries from step to step."""

    solver: jax.Array  # [slots, B, ..., C], the sample first
    guider: PyTree = None
    cache: PyTree = None  # a feature cache of the network, see `predict`


# The loop's body: (index of the step, its coefficients, state) -> next state.
Advance: TypeAlias = Callable[[jax.Array, SolverCoefficients, LoopState], LoopState]


def initial_loop_state(
    noise: Float[Array, "B *s C"], guider: Guider, cache: PyTree = None, slots: int = STATE_SLOTS
) -> LoopState:
    """Make the state before the first step.

    Args:
        noise: the first sample `[B, ..., C]`, scaled by the schedule's `init_noise_sigma`.
        guider: whose `init` is called.
        cache: the feature cache before the first step, if any.
        slots: of the solver's state.
    """
    return LoopState(initial_state(noise, slots), guider.init(noise), cache)


def _advance(
    model: Model,
    cond: PyTree,
    uncond: PyTree,
    guider: Guider,
    step: Step,
    step_noise: StepNoise | None,
    after_step: AfterStep | None,
) -> Advance:
    """The loop's body, which `denoise` and `sample` share."""
    calls = batch_evaluations(guider.evaluations(cond, uncond))

    def advance(index: jax.Array, coefficients: SolverCoefficients, loop: LoopState) -> LoopState:
        sample = loop.solver[0]
        prediction, guider_state, cache = predict(model, guider, calls, coefficients, sample, loop.guider, loop.cache)
        noise = jnp.zeros_like(sample) if step_noise is None else step_noise(index, sample.shape)
        _check_same("step_noise", "noise", noise, sample)
        solver = step(coefficients, loop.solver, prediction, noise.astype(sample.dtype))
        _check_same("step", "next state", solver, loop.solver)
        if after_step is not None:
            changed = after_step(index, solver[0])
            _check_same("after_step", "next sample", changed, sample)
            solver = jnp.asarray(solver).at[0].set(changed)
        return LoopState(solver, guider_state, cache)

    return advance


def _check_same(function: str, what: str, returned: object, before: jax.Array) -> None:
    if not isinstance(returned, jax.Array | np.ndarray) or returned.shape != before.shape:
        now = f"one of shape {list(returned.shape)}" if hasattr(returned, "shape") else type(returned).__name__
        raise TypeError(f"{function} must return the {what}, of shape {list(before.shape)}; returned is {now}")


def denoise(
    model: Model,
    loop: LoopState,
    cond: PyTree,
    uncond: PyTree,
    coefficients: SolverCoefficients,
    first: jax.Array | int,
    last: jax.Array | int,
    *,
    guider: Guider,
    step_noise: StepNoise | None = None,
    step: Step = solver_step,
    after_step: AfterStep | None = None,
) -> LoopState:
    """Do the steps first .. last - 1 with dynamic bounds: the pipelines' loop.

    Args:
        model, cond, uncond, guider, step, after_step: as in `sample`.
        loop: from `initial_loop_state`, or of an earlier call.
        coefficients: fields `[N, ...]` or, with a row per image, `[N, B, ...]`; rows from `last` on are not looked at,
            so a padded table serves every number of steps.
        first, last: int, may be arrays; no part of the compiled program.
        step_noise: the noise of each step, None for none.
    Returns:
        the state after step last - 1. There is no reverse-mode gradient where a bound is traced; `sample` has one.
    """
    if isinstance(coefficients, Schedule):
        raise TypeError("coefficients is a Schedule; give solver_coefficients(schedule), or its table as JAX arrays")
    _check_guider(guider)
    rows = _rows(coefficients)
    if all(isinstance(bound, int | np.integer) for bound in (first, last)) and not 0 <= first <= last <= rows:
        raise ValueError(f"first={first} and last={last} are no steps of {rows} rows of coefficients")
    advance = _advance(model, cond, uncond, guider, step, step_noise, after_step)

    def body(index: jax.Array, loop: LoopState) -> LoopState:
        return advance(index, jax.tree.map(lambda column: column[index], coefficients), loop)

    return jax.lax.fori_loop(first, last, body, loop)


def sample(
    model: Model,
    noise: Float[Array, "B *s C"],
    cond: PyTree,
    uncond: PyTree,
    schedule: Schedule | SolverCoefficients,
    *,
    guider: Guider = _CFG,
    rng: int | jax.Array | StepNoise | None = None,
    step: Step = solver_step,
    after_step: AfterStep | None = None,
    cache: PyTree = None,
    segment: int = 1,
    gradient_steps: int | jax.Array | None = None,
) -> Float[Array, "B *s C"]:
    """Sample by a whole schedule; differentiable, and fit for `jit`, `vmap`, `grad` and `jvp`.

    Args:
        model: `model(sample [N, ..., C], timestep [N], condition) -> output [N, ..., C or 2C]`, such as a UNet that
            `Network.bind` gives. A float32 module computes with `matmul_precision`; around other functions, and around
            `condition` or `decode`, that is the caller's to do.
        noise: the first sample `[B, ..., C]`: standard normal times the schedule's `init_noise_sigma`.
        cond, uncond: what the model takes as condition, such as `unet.condition(embeds)`: pytrees of arrays
            `[B, ...]`. `uncond` may be None where the guider does not use it.
        schedule: from a scheduler, or coefficients `[N, ...]` as JAX arrays (see `solver_coefficients`), which may be
            traced; `[N, B, ...]` has rows per image. Whatever else `step` and the guider understand will do, a
            NamedTuple of arrays with at least the fields that `predict` and `prediction_from_output` read.
        guider: how evaluations become a prediction.
        rng: the noise of stochastic solvers. A seed or a `jax.random.key`: that of the decoder's pipelines for the
            same `generator`, image by image. Or a function, see `StepNoise`; that of the prior's pipelines is from
            `noise_source(..., PRIOR_STREAM).steps`. None for deterministic solvers: a step then gets zeros as noise.
        step: see `Step`; slot 0 of the state is the sample.
        after_step: changes the sample after each step.
        cache: the network's feature cache before the first step, see `predict`.
        segment: steps between two states that reverse mode keeps of the whole loop; see below.
        gradient_steps: differentiate the last K evaluations alone: what they get from those before is a constant, as in
            DRaFT-K (Clark et al. 2023, arXiv 2309.17400). An int, with which reverse mode does the K evaluations only,
            or an int array `[]`, which may be traced, with which it does all of them. None differentiates all.
    Returns:
        the last sample `[B, ..., C]`, float32 (float64 for float64 noise).
    Raises:
        ValueError: where a stochastic schedule has no `rng`, or the conditions, segment or gradient_steps do not fit.

    Reverse mode keeps no activations of the network but recomputes each step's. With `segment=1` it keeps the state of
    every step and evaluates the network twice. With S steps to a segment it keeps `N / S + S` states and evaluates
    three times; the square root of N keeps fewest. That pays where a state is large, as with a feature cache: without
    one it is a few times the sample, thousands of times less than a network's activations. Where S does not divide N,
    segments are evened out, and up to one step for each is evaluated in vain.
    """
    if noise.ndim < 1 or not len(noise):
        raise ValueError(f"noise has the shape {noise.shape}; needed is [B, ..., C] with at least one image")
    coefficients = _checked(schedule, rng)
    _check_conditions(model, len(noise), cond, uncond)
    _check_guider(guider)
    if isinstance(schedule, Schedule) and hasattr(guider, "check_schedule"):
        guider.check_schedule(schedule)
    if not callable(step):
        raise TypeError(f"step must be a function such as solver_step, got {quote(step)}")
    steps = _rows(coefficients)
    if isinstance(segment, bool) or not isinstance(segment, int) or segment < 1:
        raise ValueError(f"segment must be an integer of at least 1, got {segment!r}")
    advance = _advance(model, cond, uncond, guider, step, _step_noise(rng, noise.shape, steps), after_step)
    matrix = getattr(coefficients, "matrix", None)
    loop = initial_loop_state(noise, guider, cache, STATE_SLOTS if matrix is None else matrix.shape[-2])
    rows, constant = (jnp.arange(steps), coefficients), 0
    if isinstance(gradient_steps, jax.Array):
        advance = _with_gradient_from(advance, steps - gradient_steps)
    elif gradient_steps is not None:
        if isinstance(gradient_steps, bool) or not isinstance(gradient_steps, int) or gradient_steps < 1:
            raise ValueError(f"gradient_steps must be an integer of at least 1, got {quote(gradient_steps)}")
        constant = max(0, steps - gradient_steps)
    with model_precision(model):
        if constant:
            before = jax.tree.map(lambda column: column[:constant], rows)
            loop = jax.lax.stop_gradient(_scan(advance, before, loop, constant, min(segment, constant)))
            rows, steps = jax.tree.map(lambda column: column[constant:], rows), steps - constant
        return _scan(advance, rows, loop, steps, min(segment, steps)).solver[0]


def _with_gradient_from(advance: Advance, first: jax.Array) -> Advance:
    """The loop's body, whose results before the step `first` are constants."""

    def truncated(index: jax.Array, coefficients: SolverCoefficients, loop: LoopState) -> LoopState:
        done = advance(index, coefficients, loop)
        return _chosen(index >= first, done, jax.lax.stop_gradient(done))

    return truncated


def _scan(
    advance: Advance,
    rows: tuple[jax.Array, SolverCoefficients],
    loop: LoopState,
    steps: int,
    segment: int,
) -> LoopState:
    remat = functools.partial(jax.checkpoint, prevent_cse=False)  # within a scan nothing is merged

    @remat
    def one(loop: LoopState, row: tuple[jax.Array, SolverCoefficients]) -> tuple[LoopState, None]:
        return advance(*row, loop), None

    if segment == 1:
        return jax.lax.scan(one, loop, rows)[0]
    # Segments of equal length, filled up with steps whose result is dropped: a shorter one would compile the network
    # twice, and a `cond` would copy the network's parameters for reverse mode. They repeat the first step, so that what
    # is dropped is finite.
    segments = -(-steps // segment)
    segment = -(-steps // segments)
    first = loop

    @remat
    def one_if(loop: LoopState, row: tuple[jax.Array, tuple[jax.Array, SolverCoefficients]]) -> tuple[LoopState, None]:
        wanted, own = row
        done = advance(*own, _chosen(wanted, loop, first))
        return _chosen(wanted, done, loop), None

    index = jnp.arange(segments * segment)
    filled = jax.tree.map(lambda x: x[jnp.where(index < steps, index, 0)], rows)
    body, filled = (one, filled) if len(index) == steps else (one_if, (index < steps, filled))
    nested = jax.tree.map(lambda x: x.reshape(segments, segment, *x.shape[1:]), filled)
    return jax.lax.scan(remat(lambda loop, part: jax.lax.scan(body, loop, part)), loop, nested)[0]


def _chosen(condition: jax.Array, this: LoopState, other: LoopState) -> LoopState:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), this, other)


def _rows(coefficients: SolverCoefficients) -> int:
    """The rows that all coefficients have."""
    rows = {len(column) for column in jax.tree.leaves(coefficients)}
    if len(rows) != 1 or rows == {0}:
        raise ValueError(f"the coefficients have {sorted(rows)} rows; needed is at least one, the same number in each")
    return rows.pop()


def _checked(schedule: Schedule | SolverCoefficients, rng: int | jax.Array | StepNoise | None) -> SolverCoefficients:
    if isinstance(schedule, tuple):  # coefficients, the solvers' or others
        return schedule
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"schedule must be what scheduler.schedule(steps) returns, or coefficients, got {type(schedule).__name__}"
        )
    if rng is None and schedule.draws_noise.any():
        raise ValueError("this schedule adds noise at its steps; give rng=jax.random.key(seed), or a function")
    return solver_coefficients(schedule)


def _check_conditions(model: Model, images: int, *conditions: PyTree) -> None:
    for name, condition in zip(("cond", "uncond"), conditions, strict=True):
        if isinstance(condition, jax.Array | np.ndarray) and hasattr(model, "condition"):
            raise TypeError(f"{name} is an array; give what the network makes of it, such as unet.condition(embeds)")
        if wrong := {leaf.shape for leaf in jax.tree.leaves(condition) if leaf.shape[:1] != (images,)}:
            raise ValueError(
                f"noise [B, ..., C] has a batch of {images}, {name} an array of shape {list(min(wrong))}; needed is "
                f"[{images}, ...]"
            )


def _check_guider(guider: Guider) -> None:
    missing = [name for name in ("init", "evaluations", "combine") if not hasattr(guider, name)]
    if isinstance(guider, type) or missing:
        without = f" without {', '.join(missing)}" if missing else ""
        raise TypeError(
            "guider must be an object with the methods of `Guider`, such as ClassifierFreeGuidance(4.0), got "
            f"{quote(guider)}{without}"
        )


def _step_noise(rng: int | jax.Array | StepNoise | None, shape: tuple[int, ...], steps: int) -> StepNoise | None:
    if isinstance(rng, GivenNoise) and isinstance(rng.first, int) and (rng.first or len(rng.values) < steps):
        raise ValueError(
            f"rng is GivenNoise of {len(rng.values)} steps from {rng.first} on; needed are {steps} steps from 0 on"
        )
    if rng is None or callable(rng):
        return rng
    if not isinstance(rng, int | jax.Array):
        raise TypeError(
            f"rng must be a seed, a jax.random.key or a function (index, shape) -> noise, got {type(rng).__name__}; "
            "numbers made before are GivenNoise(values, first=0)"
        )
    [noise] = noise_source(rng, shape[0], DECODER_STREAM).steps(0, steps, np.ones(steps, bool), shape)
    return noise
