"""Guiders: which evaluations of the network a step needs, and how they become one prediction.

A guider names its evaluations once, before the loop, so that their conditions are joined once; those that share the
model are done in one batched call at every step. What it returns is a prediction of x0 and eps, see
`kandinsky_jax.diffusion.solver`. An own guider is a class with the three methods of `Guider`; a NamedTuple or another
pytree of its numbers makes it fit for `jit`, `vmap` and `grad`, and for pipelines. Those by other papers are in
`kandinsky_jax.diffusion.guiders`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from kandinsky_jax.common.errors import shorten
from kandinsky_jax.common.types import Array, Float, PyTree
from kandinsky_jax.diffusion.solver import Prediction, SolverCoefficients, per_image, prediction_from_output

# model(sample [N, ...], timestep [N], condition, **options) -> output [N, ..., C or 2C]. A bound UNet or prior is one.
Model: TypeAlias = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """One evaluation of a network that a guider wants at every step.

    Args:
        condition: what `model` takes as its third argument; a pytree of arrays `[B, ...]`.
        model: another model than the sampler's: other parameters (autoguidance), or a function around it.
        options: keyword arguments of the model in this evaluation only, such as another attention function.
    """

    condition: PyTree
    model: Model | None = None
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether it is one of the sampler's own model without options."""
        return self.model is None and not self.options

    def shares_call(self, other: Evaluation) -> bool:
        """Whether the two can be done in one batched call: the same model and the very same options."""
        mine, others = self.options, other.options
        return (
            self.model is other.model
            and mine.keys() == others.keys()
            and all(value is others[name] for name, value in mine.items())
        )


class Guider(Protocol):
    """Turns one or more evaluations of the network into one prediction.

    Pipelines also look at what a guider may have besides:

    - `is_on` (bool): where it is False, the conditional prediction alone is evaluated;
    - `uses_uncond` (bool): where it is False, `evaluations` gets None as uncond, and no negative embedding is needed;
    - `scale`: what callbacks know as guidance_scale;
    - `check_schedule(schedule)`: raises ValueError for a schedule that it cannot serve.
    """

    def init(self, sample: jax.Array) -> PyTree:
        """Make the state that the loop carries from step to step (a momentum, a counter).

        Args:
            sample: the first sample, `[B, ...]`.
        Returns:
            a pytree whose shapes and dtypes stay; None for none.
        """

    def evaluations(self, cond: PyTree, uncond: PyTree) -> Sequence[Evaluation]:
        """Name the evaluations of each step; asked once, before the loop.

        Args:
            cond, uncond: conditions of the batch, pytrees of arrays `[B, ...]`; `uncond` may be None.
        """

    def combine(
        self, outputs: Sequence[jax.Array], sample: jax.Array, coefficients: SolverCoefficients, state: PyTree
    ) -> tuple[Prediction, PyTree]:
        """Combine the evaluations of one step.

        Args:
            outputs: the network's, one `[B, ..., C or 2C]` per evaluation, float32 (float64 stays); see `split_output`.
            sample: `[B, ..., C]`, float32, before `input_scale`.
            coefficients: the step's row, or one per image.
            state: from `init` or the step before.
        Returns:
            the prediction, as `prediction_from_output` gives it, and the next state.
        """


@runtime_checkable
class DifferentiatingGuider(Guider, Protocol):
    """A guider that runs the evaluations itself, so that it can differentiate through the network.

    Where a guider has this method, the loop calls it in the place of `combine`.
    """

    def predict(
        self,
        evaluate: Callable[[jax.Array], Sequence[jax.Array]],
        sample: jax.Array,
        coefficients: SolverCoefficients,
        state: PyTree,
    ) -> tuple[Prediction, PyTree]:
        """Predict one step.

        Args:
            evaluate: `evaluate(sample)` runs the guider's evaluations on a sample `[B, ..., C]`, before `input_scale`,
                and returns what `combine` gets as outputs.
            sample, coefficients, state: as in `combine`.
        Returns:
            as `combine`.
        """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoGuidance:
    """The conditional prediction alone: one evaluation per step, and no unconditional condition is needed."""

    @property
    def is_on(self) -> bool:
        return False

    @property
    def uses_uncond(self) -> bool:
        return False

    def init(self, sample: jax.Array) -> None:
        return None

    def evaluations(self, cond: PyTree, uncond: PyTree) -> Sequence[Evaluation]:
        return [Evaluation(cond)]

    def combine(
        self,
        outputs: Sequence[jax.Array],
        sample: Float[Array, "B *s C"],
        coefficients: SolverCoefficients,
        state: None,
    ) -> tuple[Prediction, None]:
        output, variance = split_output(outputs[0], sample.shape[-1])
        return prediction_from_output(coefficients, sample, output, variance), None


class CondUncondGuider:
    """Base of guiders that evaluate uncond and cond in one call, and keep no state.

    A subclass, a dataclass registered as a pytree, has a `scale` that is 1 for no guidance, and `guide`.
    """

    scale: float | jax.Array

    @property
    def is_on(self) -> bool:
        return self.uses_uncond

    @property
    def uses_uncond(self) -> bool:
        return bool(np.any(np.asarray(self.scale) > 1))

    def init(self, sample: jax.Array) -> PyTree:
        return None

    def evaluations(self, cond: PyTree, uncond: PyTree) -> Sequence[Evaluation]:
        if uncond is None:
            raise ValueError(
                f"{type(self).__name__} needs uncond, the unconditional condition; or use NoGuidance() instead"
            )
        return [Evaluation(uncond), Evaluation(cond)]

    def guide(self, uncond: Float[Array, "B *s C"], cond: Float[Array, "B *s C"]) -> jax.Array:
        """Combine the two outputs of a network, without the learned variance."""
        raise NotImplementedError

    def combine(
        self,
        outputs: Sequence[jax.Array],
        sample: Float[Array, "B *s C"],
        coefficients: SolverCoefficients,
        state: PyTree,
    ) -> tuple[Prediction, PyTree]:
        (uncond, _), (cond, variance) = (split_output(output, sample.shape[-1]) for output in outputs)
        return prediction_from_output(coefficients, sample, self.guide(uncond, cond), variance), state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassifierFreeGuidance(CondUncondGuider):
    """uncond + scale * (cond - uncond); the variance, if the network gives one, is the conditional one.

    Source: Ho & Salimans 2022 (arXiv 2207.12598), in diffusers' parametrisation: 1 is no guidance.

    Args:
        scale: `[]`, or one per image `[B]`.
    """

    scale: float | jax.Array = 4.0

    def guide(self, uncond: Float[Array, "B *s C"], cond: Float[Array, "B *s C"]) -> jax.Array:
        return uncond + per_image(self.scale, cond.ndim) * (cond - uncond)


def split_output(output: Float[Array, "B *s D"], channels: int) -> tuple[jax.Array, jax.Array | None]:
    """Split a network's output into prediction and learned variance, in float32 (float64 stays).

    Args:
        output: `[B, ..., C or 2C]`.
        channels: C, those of the sample.
    Returns:
        the prediction `[B, ..., C]`; the variance `[B, ..., C]`, or None where the network gives none.
    """
    output = output.astype(jnp.promote_types(output.dtype, jnp.float32))
    return output[..., :channels], output[..., channels:] if output.shape[-1] > channels else None


class NetworkCall(NamedTuple):
    """Evaluations that are done in one call of a network; from `batch_evaluations`."""

    evaluation: Evaluation  # whose condition is that of all members, one after the other, [members * B, ...]
    members: tuple[tuple[int, ...], ...]  # of each member, its places in the guider's sequence


def batch_evaluations(evaluations: Sequence[Evaluation]) -> tuple[NetworkCall, ...]:
    """Join the conditions of evaluations that share a call; done once, before a loop.

    What is asked for twice, with the very same condition, is evaluated once.

    Raises:
        TypeError: for anything but a sequence of `Evaluation`.
        ValueError: where there is none, or conditions that share a call differ in structure.
    """
    if not isinstance(evaluations, Sequence) or not all(isinstance(item, Evaluation) for item in evaluations):
        raise TypeError(
            "a guider's evaluations must be a list of Evaluation, such as [Evaluation(uncond), Evaluation(cond)], got "
            f"{shorten(evaluations, 80)}"
        )
    if not evaluations:
        raise ValueError("a guider's evaluations are an empty list; needed is at least one Evaluation")
    groups: list[list[list[int]]] = []  # calls, their members, and the places of each
    for i, evaluation in enumerate(evaluations):
        group = next((group for group in groups if evaluations[group[0][0]].shares_call(evaluation)), None)
        if group is None:
            groups.append([[i]])
            continue
        same = next((member for member in group if evaluations[member[0]].condition is evaluation.condition), None)
        if same is None:
            group.append([i])
        else:
            same.append(i)
    return tuple(
        NetworkCall(_joined([evaluations[member[0]] for member in group]), tuple(map(tuple, group))) for group in groups
    )


def _joined(evaluations: Sequence[Evaluation]) -> Evaluation:
    first, conditions = evaluations[0], [evaluation.condition for evaluation in evaluations]
    if len({jax.tree.structure(condition) for condition in conditions}) > 1:
        raise ValueError(
            "the conditions of one step's evaluations differ in structure, such as one with a hint and one without; "
            "make them by the same arguments, or give the evaluations models of their own"
        )
    if len(conditions) == 1:
        return first
    return dataclasses.replace(first, condition=jax.tree.map(lambda *x: jnp.concatenate(x), *conditions))


def predict(
    model: Model,
    guider: Guider,
    calls: Sequence[NetworkCall],
    coefficients: SolverCoefficients,
    sample: Float[Array, "B *s C"],
    state: PyTree = None,
    cache: PyTree = None,
) -> tuple[Prediction, PyTree, PyTree]:
    """Do one guided prediction.

    Args:
        model: `model(sample, timestep, condition)`, for evaluations that name no other.
        guider: combines the evaluations.
        calls: `batch_evaluations(guider.evaluations(cond, uncond))`.
        coefficients: one row of a schedule's, or one per image.
        sample: `[B, ..., C]`, float32.
        state: the guider's.
        cache: a feature cache, any pytree. With one, the sampler's model is called as
            `model(sample, timestep, condition, cache=cache)` and returns `(output, cache)`; evaluations with a model
            or options of their own run without.
    Returns:
        the prediction, the guider's next state and the next cache.
    """
    if not isinstance(guider, DifferentiatingGuider):
        outputs, cache = _evaluate(model, calls, coefficients, sample, cache)
        combined = guider.combine(outputs, sample, coefficients, state)
        _check_combined(f"{type(guider).__name__}.combine", combined, sample, state)
        return *combined, cache
    if cache is not None:
        raise ValueError(f"{type(guider).__name__} differentiates through the network, which must be without a cache")

    def evaluate(sample: jax.Array) -> list[jax.Array]:
        return _evaluate(model, calls, coefficients, sample, None)[0]

    combined = guider.predict(evaluate, sample, coefficients, state)
    _check_combined(f"{type(guider).__name__}.predict", combined, sample, state)
    return *combined, cache


def _evaluate(
    model: Model, calls: Sequence[NetworkCall], coefficients: SolverCoefficients, sample: jax.Array, cache: PyTree
) -> tuple[list[jax.Array], PyTree]:
    """Run the evaluations of a step; return their outputs in the guider's order, and the next cache."""
    scaled = sample * per_image(coefficients.input_scale, sample.ndim)
    outputs: dict[int, jax.Array] = {}
    for evaluation, members in calls:
        batch = jnp.concatenate([scaled] * len(members))
        timestep = jnp.broadcast_to(coefficients.timestep, sample.shape[:1])
        timestep = jnp.concatenate([timestep] * len(members))
        function, options = evaluation.model or model, dict(evaluation.options)
        if cache is None or not evaluation.is_plain:
            output = function(batch, timestep, evaluation.condition, **options)
        else:
            output, cache = function(batch, timestep, evaluation.condition, cache=cache)
        if not isinstance(output, jax.Array | np.ndarray):
            raise TypeError(
                f"the model returned a {type(output).__name__}, needed is an array; what it computes besides leaves "
                "the loop by a cache, see predict"
            )
        output = output.astype(jnp.promote_types(output.dtype, jnp.float32))  # once, before the evaluations part
        for places, part in zip(members, jnp.split(output, len(members)), strict=True):
            outputs |= dict.fromkeys(places, part)
    return [outputs[i] for i in range(len(outputs))], cache


def _check_combined(name: str, combined: PyTree, sample: jax.Array, state: PyTree) -> None:
    """Raise TypeError for what no guider may return."""
    pair = isinstance(combined, tuple) and not isinstance(combined, Prediction) and len(combined) == 2
    if not pair or isinstance(combined[0], jax.Array):
        raise TypeError(f"{name} must return a Prediction and the next state, returned {shorten(combined, 80)}")
    prediction, following = combined
    for field in ("x0", "eps", "correction"):
        value = getattr(prediction, field, sample)  # a step of one's own may take other fields
        shape = sample.shape if field == "correction" and value is None else jnp.shape(value)
        if shape != sample.shape:
            raise TypeError(
                f"{name} must return a Prediction of the sample's shape {list(sample.shape)}, returned {field} of "
                f"shape {list(shape)}; split_output takes a network's output apart"
            )
    before, now = jax.tree.structure(state), jax.tree.structure(following)
    if len({before, now}) > 1:
        raise TypeError(
            f"{name} must return a state of the structure of the one before, {shorten(str(before), 80)}; returned is "
            f"{shorten(str(now), 80)}"
        )
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(following), strict=True):
        if jnp.shape(old) != jnp.shape(new):
            raise TypeError(
                f"{name} must return a state of the shapes of the one before; state{jax.tree_util.keystr(path)} had "
                f"{list(jnp.shape(old))}, returned is {list(jnp.shape(new))}"
            )
