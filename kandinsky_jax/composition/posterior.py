"""Diffusion posterior sampling (DPS): samples that agree with a measurement."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from kandinsky_jax.common.types import Array, Float, PyTree
from kandinsky_jax.composition.operators import Operator
from kandinsky_jax.diffusion import (
    ClassifierFreeGuidance,
    DifferentiatingGuider,
    Evaluation,
    Guider,
    Prediction,
    Schedule,
    SolverCoefficients,
    per_image,
)

_CFG = ClassifierFreeGuidance()


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["measurement", "scale", "guider"], meta_fields=["operator"]
)
@dataclasses.dataclass(frozen=True)
class PosteriorSampling:
    """A guider that pulls each step's sample towards a measurement y of the picture.

    After the solver's step it subtracts `scale * d||y - A(x0(x_t))|| / dx_t`: the gradient, through the network, of the
    distance between y and what A measures of the predicted clean sample. One norm for each image.

    Source: Chung et al. 2022 (arXiv 2209.14687), algorithm 1. Its step size is zeta' divided by the residual's norm,
    for the gradient of the squared norm; that is the gradient of the norm itself, as here and in the authors' program,
    with scale = 2 zeta'. For latents A includes the decoder, the plain extension with which Rout et al. 2023
    (arXiv 2307.00619) begin; their further terms are not here.

    Args:
        operator: A, of latents `[B, h, w, C]`; see `of_decoded` for one of pixels. It has no gradient here.
        measurement: y `[B, ...]`, of the shape that the operator returns.
        scale: step size, `[]` or one per image `[B]`; 0 is the guider alone.
        guider: makes the prediction of x0 from the network's evaluations. May not be differentiating itself.
    """

    operator: Operator
    measurement: jax.Array
    scale: float | jax.Array = 1.0
    guider: Guider = _CFG

    def init(self, sample: jax.Array) -> PyTree:
        return self.guider.init(sample)

    def evaluations(self, cond: PyTree, uncond: PyTree) -> Sequence[Evaluation]:
        if isinstance(self.guider, DifferentiatingGuider):
            raise TypeError(
                f"guider is a {type(self.guider).__name__}, which differentiates itself; give one such as "
                "ClassifierFreeGuidance, and join two measurements in one operator"
            )
        return self.guider.evaluations(cond, uncond)

    def combine(
        self, outputs: Sequence[jax.Array], sample: jax.Array, coefficients: SolverCoefficients, state: PyTree
    ) -> tuple[Prediction, PyTree]:
        """Combine the evaluations as the inner guider does, without the measurement."""
        return self.guider.combine(outputs, sample, coefficients, state)

    def predict(
        self,
        evaluate: Callable[[jax.Array], Sequence[jax.Array]],
        sample: Float[Array, "B *s C"],
        coefficients: SolverCoefficients,
        state: PyTree,
    ) -> tuple[Prediction, PyTree]:
        """Predict as the inner guider does, with the correction towards the measurement."""

        def distance(sample: jax.Array) -> tuple[jax.Array, tuple[Prediction, PyTree]]:
            prediction, following = self.combine(evaluate(sample), sample, coefficients, state)
            distances = measurement_distance(self.operator, self.measurement, prediction.x0)
            return distances.sum(), (prediction, following)  # images do not depend on each other

        gradient, (prediction, following) = jax.grad(distance, has_aux=True)(sample)
        correction = -per_image(self.scale, sample.ndim) * gradient
        if prediction.correction is not None:
            correction = correction + prediction.correction
        return prediction._replace(correction=correction), following

    def check_schedule(self, schedule: Schedule) -> None:
        """Raise ValueError for a schedule that the inner guider cannot serve."""
        if hasattr(self.guider, "check_schedule"):
            self.guider.check_schedule(schedule)


def measurement_distance(operator: Operator, measurement: jax.Array, x0: Float[Array, "B *s"]) -> Float[Array, "B"]:
    """Compute ||y - A(x0)|| for each image; its gradient is 0 where the two agree.

    Args:
        operator: A.
        measurement: y `[B, ...]`.
        x0: `[B, ...]`.
    Returns:
        `[B]`.
    Raises:
        ValueError: where y is not of the shape of A(x0).
    """
    measured = operator(x0)
    if measured.shape != jnp.shape(measurement):
        raise ValueError(
            f"measurement has the shape {list(jnp.shape(measurement))}; needed is that of what the operator returns, "
            f"{list(measured.shape)}"
        )
    squares = jnp.sum((measurement - measured).reshape(len(x0), -1) ** 2, axis=1)
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)
