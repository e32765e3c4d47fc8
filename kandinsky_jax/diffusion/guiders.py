"""Guiders by name, beside the plain ones of `kandinsky_jax.diffusion.guidance`.

Each is a small immutable pytree of its numbers, so that one program serves every scale, and gradients and `vmap` go
through them. `docs/guiders.md` says what each is for and what it costs.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kandinsky_jax.common.types import Array, Bool, Float, PyTree
from kandinsky_jax.diffusion.guidance import (
    ClassifierFreeGuidance,
    CondUncondGuider,
    DifferentiatingGuider,
    Evaluation,
    NoGuidance,
    split_output,
)
from kandinsky_jax.diffusion.solver import (
    Prediction,
    SolverCoefficients,
    output_for_x0,
    per_image,
    predict_x0,
    prediction_from_output,
)
from kandinsky_jax.models.attention import attend
from kandinsky_jax.schedulers.table import STATE_SLOTS, Schedule

STATIC: Mapping[str, Any] = {"static": True}  # metadata of a field that is no number


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RescaledGuidance(CondUncondGuider):
    """Classifier-free guidance whose output keeps the spread of the conditional one.

    Source: Lin et al. 2023 (arXiv 2305.08891), equations 15 and 16. Reference: diffusers' `rescale_noise_cfg`.

    Args:
        scale: of classifier-free guidance, `[]` or `[B]`.
        rescale: the paper's phi, 0 (none) to 1; the share of the rescaled output.
    """

    scale: float | jax.Array = 4.0
    rescale: float | jax.Array = 0.7

    def guide(self, uncond: Float[Array, "B *s C"], cond: Float[Array, "B *s C"]) -> jax.Array:
        guided = ClassifierFreeGuidance(self.scale).guide(uncond, cond)
        axes = tuple(range(1, cond.ndim))
        spread, wanted = (jnp.var(x, axis=axes, keepdims=True) for x in (guided, cond))
        some = spread > 0
        factor = jnp.where(some, _root(wanted / jnp.where(some, spread, 1)), 1)
        share = per_image(self.rescale, cond.ndim)
        return guided * (share * factor + 1 - share)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptiveProjectedGuidance(CondUncondGuider):
    """APG: guidance without the part that only makes the conditional prediction larger, which oversaturates.

    It works on predictions of x0. Source: Sadat et al. 2024 (arXiv 2410.02416), algorithm 1. Reference: diffusers'
    `AdaptiveProjectedGuidance`, given predictions of x0.

    Args:
        scale: of guidance, as in classifier-free guidance; `[]` or `[B]`.
        eta: the share that is kept of the part parallel to the conditional prediction; 1 keeps all of it.
        momentum: of the difference between steps; negative ones push away from earlier steps; 0 is none.
        norm_threshold: the largest length of the difference, over all numbers of an example; infinite for none.
    """

    scale: float | jax.Array = 4.0
    eta: float | jax.Array = 0.0
    momentum: float | jax.Array = -0.5
    norm_threshold: float | jax.Array = 15.0

    def init(self, sample: Float[Array, "B *s C"]) -> Float[Array, "B *s C"]:
        """Make the first running difference."""
        return jnp.zeros_like(sample)

    def combine(
        self,
        outputs: Sequence[jax.Array],
        sample: Float[Array, "B *s C"],
        coefficients: SolverCoefficients,
        state: Float[Array, "B *s C"],
    ) -> tuple[Prediction, jax.Array]:
        (uncond, _), (cond, variance) = (split_output(output, sample.shape[-1]) for output in outputs)
        x0_uncond, x0_cond = (predict_x0(coefficients, sample, output) for output in (uncond, cond))
        difference = x0_cond - x0_uncond + per_image(self.momentum, sample.ndim) * state
        length = _length(difference)
        some = length > 0
        shrink = jnp.minimum(1, per_image(self.norm_threshold, sample.ndim) / jnp.where(some, length, 1))
        parallel, orthogonal = project(difference * shrink, x0_cond)
        update = orthogonal + per_image(self.eta, sample.ndim) * parallel
        x0 = x0_cond + (per_image(self.scale, sample.ndim) - 1) * update
        return prediction_from_output(
            coefficients, sample, _output(coefficients, sample, x0, cond), variance
        ), difference


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CFGPlusPlus(CondUncondGuider):
    """CFG++: a step goes to the guided x0, and on from there with the unconditional noise.

    Source: Chung et al. 2024 (arXiv 2406.08070), algorithm 2. For DDIM that is x' = signal' * x0 + noise' * eps, x0
    guided and eps unconditional. Written as a sample moved by signal * (x0 guided - x0 unconditional), it serves every
    solver whose steps keep nothing.

    Args:
        scale: the paper's lambda, 0 (unconditional) to 1; about a twelfth of a scale of classifier-free guidance.
            `[]` or `[B]`.
    """

    scale: float | jax.Array = 0.6

    @property
    def uses_uncond(self) -> bool:
        return True

    def combine(
        self,
        outputs: Sequence[jax.Array],
        sample: Float[Array, "B *s C"],
        coefficients: SolverCoefficients,
        state: None,
    ) -> tuple[Prediction, None]:
        (uncond, _), (cond, variance) = (split_output(output, sample.shape[-1]) for output in outputs)
        x0_uncond, x0_cond = (predict_x0(coefficients, sample, output) for output in (uncond, cond))
        shift = per_image(self.scale, sample.ndim) * (x0_cond - x0_uncond)
        moved = sample + per_image(coefficients.levels[..., 0], sample.ndim) * shift
        output = _output(coefficients, moved, x0_uncond + shift, uncond)
        prediction = prediction_from_output(coefficients, moved, output, variance)
        # What the step would make of the moved sample beside the sample as it is.
        kept = per_image(coefficients.matrix[..., 0, 0], sample.ndim)
        return prediction._replace(correction=kept * (moved - sample)), None

    def check_schedule(self, schedule: Schedule) -> None:
        """Raise ValueError for a solver that keeps earlier samples or predictions."""
        if schedule.table.matrix[:, 0, 1:STATE_SLOTS].any():
            raise ValueError(
                "the guider cfg++ is for solvers whose steps keep nothing: ddim, ddpm, euler, euler-a, lcm and tcd; "
                "this one keeps earlier predictions. Give another scheduler, or another guider"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Autoguidance(CondUncondGuider):
    """Guidance away from a weaker model of the same condition: an earlier checkpoint, or a smaller one.

    weak + scale * (good - weak), both conditional. Source: Karras et al. 2024 (arXiv 2406.02507), equation 5.

    Args:
        scale: 1 is the good model alone; `[]` or `[B]`.
        model: the weak model, such as a bound UNet.
        condition: of the weak model, such as `weak_unet.condition(embeds)`. Pipelines make it themselves.
    """

    scale: float | jax.Array = 2.0
    model: Any = dataclasses.field(default=None, metadata=STATIC)
    condition: PyTree = None

    @property
    def is_on(self) -> bool:
        return bool(np.any(np.asarray(self.scale) > 1))

    @property
    def uses_uncond(self) -> bool:
        return False

    def evaluations(self, cond: PyTree, uncond: PyTree) -> Sequence[Evaluation]:
        if self.model is None or self.condition is None:
            raise ValueError(
                "autoguidance needs a weaker model and its condition: Autoguidance(2.0, weak, weak.condition(embeds))"
            )
        return [Evaluation(self.condition, model=self.model), Evaluation(cond)]

    def guide(self, uncond: Float[Array, "B *s C"], cond: Float[Array, "B *s C"]) -> jax.Array:
        return ClassifierFreeGuidance(self.scale).guide(uncond, cond)  # the weak model in the place of uncond


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerturbedAttentionGuidance(CondUncondGuider):
    """PAG: guidance away from an evaluation in which each place attends to itself and the condition alone.

    uncond + scale * (cond - uncond) + perturbed_scale * (cond - perturbed). Source: Ahn et al. 2024 (arXiv 2403.17377),
    equation 15 and section 5.1. Reference: diffusers' `PerturbedAttentionGuidance` and, since the networks here attend
    to the condition and to themselves in one softmax, its `PAGJointAttnProcessor2_0`.

    Args:
        scale: of classifier-free guidance, `[]` or `[B]`. Where the loop has no uncond, there is none.
        perturbed_scale: `[]` or `[B]`.
        layers: regular expression that the names of the perturbed attention layers match, see
            `kandinsky_jax.models.with_attention`; None is the UNet's middle block, or the prior's middle layer.
    """

    scale: float | jax.Array = 4.0
    perturbed_scale: float | jax.Array = 3.0
    layers: str | None = dataclasses.field(default=None, metadata=STATIC)

    @property
    def is_on(self) -> bool:
        return self.uses_uncond or bool(np.any(np.asarray(self.perturbed_scale) != 0))

    def evaluations(self, cond: PyTree, uncond: PyTree) -> Sequence[Evaluation]:
        perturbed = Evaluation(cond, options={"attention": perturbed_attention(self.layers or MIDDLE_BLOCK)})
        plain = [Evaluation(cond)] if uncond is None else [Evaluation(uncond), Evaluation(cond)]
        return [*plain, perturbed]

    def combine(
        self,
        outputs: Sequence[jax.Array],
        sample: Float[Array, "B *s C"],
        coefficients: SolverCoefficients,
        state: None,
    ) -> tuple[Prediction, None]:
        *uncond, (cond, variance), (perturbed, _) = (split_output(output, sample.shape[-1]) for output in outputs)
        guided = ClassifierFreeGuidance(self.scale).guide(uncond[0][0], cond) if uncond else cond
        guided = guided + per_image(self.perturbed_scale, sample.ndim) * (cond - perturbed)
        return prediction_from_output(coefficients, sample, guided, variance), None


MIDDLE_BLOCK = r"mid_block\..*"  # attention layers of the UNet


@functools.cache  # the same function for the same layers: a program is compiled for each
def perturbed_attention(layers: str) -> Any:
    """Return an attention function in which each place attends to itself and the condition.

    Args:
        layers: regular expression that the names of these layers match; the others attend as ever.
    """
    pattern = re.compile(layers)

    def attention(
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S N H"],
        value: Float[Array, "B S N H"],
        mask: Bool[Array, "..."] | None,
        *,
        name: str,
    ) -> Float[Array, "B T N*H"]:
        if not pattern.fullmatch(name):
            return attend(query, key, value, mask)
        own, others = query.shape[1], key.shape[1] - query.shape[1]  # keys of the condition come first
        itself = jnp.concatenate([jnp.ones((own, others), bool), jnp.eye(own, dtype=bool)], axis=1)[None, None]
        return attend(query, key, value, itself if mask is None else itself & mask)

    return attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IntervalGuidance:
    """Another guider within an interval of timesteps, and the conditional prediction outside of it.

    For `sample`, which evaluates all that the guider asks for at every step. Pipelines have `guidance_interval` for it,
    with any guider, and save the evaluations. Source: Kynkaanniemi et al. 2024 (arXiv 2404.07724).

    Args:
        guider: one that evaluates the sampler's own model under cond, as all here do.
        low, high: guidance is on where low <= timestep < high; timesteps as the network gets them.
    """

    guider: Any
    low: float | jax.Array = 0.0
    high: float | jax.Array = np.inf

    def init(self, sample: Float[Array, "B *s C"]) -> PyTree:
        return self.guider.init(sample)

    @property
    def is_on(self) -> bool:
        return self.guider.is_on

    @property
    def uses_uncond(self) -> bool:
        return self.guider.uses_uncond

    def check_schedule(self, schedule: Schedule) -> None:
        """Raise ValueError for a schedule that the guider cannot serve."""
        if hasattr(self.guider, "check_schedule"):
            self.guider.check_schedule(schedule)

    def evaluations(self, cond: PyTree, uncond: PyTree) -> Sequence[Evaluation]:
        if isinstance(self.guider, DifferentiatingGuider):
            raise TypeError(
                f"{type(self.guider).__name__} differentiates, which an interval does not know; give it the "
                "IntervalGuidance as its own guider"
            )
        wanted = self.guider.evaluations(cond, uncond)
        if not any(one.condition is cond and one.is_plain for one in wanted):
            raise ValueError(
                f"{type(self.guider).__name__} does not evaluate the model under cond, as an interval needs"
            )
        return [Evaluation(cond), *wanted]  # evaluated once, see `batch_evaluations`

    def combine(
        self,
        outputs: Sequence[jax.Array],
        sample: Float[Array, "B *s C"],
        coefficients: SolverCoefficients,
        state: PyTree,
    ) -> tuple[Prediction, PyTree]:
        alone, _ = NoGuidance().combine(outputs[:1], sample, coefficients, None)
        guided, following = self.guider.combine(outputs[1:], sample, coefficients, state)
        timestep = coefficients.timestep
        inside = (self.low <= timestep) & (timestep < self.high)

        def choose(guided: jax.Array, other: jax.Array) -> jax.Array:
            return jnp.where(per_image(inside, guided.ndim), guided, other)

        if guided.correction is not None:
            alone = alone._replace(correction=jnp.zeros_like(sample))
        return jax.tree.map(choose, guided, alone), jax.tree.map(choose, following, state)


def project(vector: Float[Array, "B *s"], onto: Float[Array, "B *s"]) -> tuple[jax.Array, jax.Array]:
    """Split each example into the parts parallel and orthogonal to another one.

    Args:
        vector, onto: `[B, ...]`.
    Returns:
        both parts, `[B, ...]`; all is orthogonal where `onto` is zero.
    """
    axes = tuple(range(1, vector.ndim))
    squared = jnp.sum(onto**2, axis=axes, keepdims=True)
    some = squared > 0
    along = jnp.sum(vector * onto, axis=axes, keepdims=True) / jnp.where(some, squared, 1)
    parallel = jnp.where(some, along, 0) * onto
    return parallel, vector - parallel


def _output(coefficients: SolverCoefficients, sample: jax.Array, x0: jax.Array, fallback: jax.Array) -> jax.Array:
    """Return the output that predicts an x0, or another one where an output says nothing of x0."""
    says = per_image(coefficients.x0_from[..., 1] != 0, sample.ndim)
    return jnp.where(says, output_for_x0(coefficients, sample, x0), fallback)


def _length(difference: jax.Array) -> jax.Array:
    """Return the Euclidean length of each example, `[B, 1, ...]`, with finite gradients at zero."""
    squared = jnp.sum(difference**2, axis=tuple(range(1, difference.ndim)), keepdims=True)
    return _root(squared)


def _root(squared: jax.Array) -> jax.Array:
    some = squared > 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, squared, 1)), 0)
