"""Guiders: which evaluations share a call, and what becomes of them."""

from __future__ import annotations

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from kandinsky_jax import diffusion
from kandinsky_jax.schedulers import DDIMScheduler
from tests.diffusion.toy import assert_close, inputs, network, row, with_variance

SCHEDULE = DDIMScheduler(clip_sample=False).schedule(5)


class Counting:
    """The network, and the batch sizes and options of its calls."""

    def __init__(self, function=network):
        self.function, self.calls = function, []

    def __call__(self, sample, timestep, condition, **options):
        self.calls.append((len(sample), options))
        return self.function(sample, timestep, condition)


def predicted(model, guider, sample, cond, uncond, index=2, **others):
    calls = diffusion.batch_evaluations(guider.evaluations(cond, uncond))
    return diffusion.predict(model, guider, calls, row(SCHEDULE, index), sample, **others)


def test_classifier_free_guidance_is_one_call_of_both_conditions():
    sample, cond, uncond = inputs()
    model = Counting(with_variance)
    prediction, _, _ = predicted(model, diffusion.ClassifierFreeGuidance(3.0), sample, cond, uncond)
    assert model.calls == [(2 * len(sample), {})]
    own, timestep = row(SCHEDULE, 2), jnp.full(2, SCHEDULE.timesteps[2])
    of_cond, of_uncond = (with_variance(sample, timestep, x) for x in (cond, uncond))
    output = of_uncond[..., :3] + 3.0 * (of_cond[..., :3] - of_uncond[..., :3])
    expected = diffusion.prediction_from_output(own, sample, output, of_cond[..., 3:])
    jax.tree.map(lambda a, b: assert_close(a, b), prediction, expected)


def test_without_guidance_the_conditional_alone_is_evaluated():
    sample, cond, _ = inputs()
    model = Counting()
    prediction, _, _ = predicted(model, diffusion.NoGuidance(), sample, cond, None)
    assert model.calls == [(len(sample), {})]
    assert prediction.variance is None
    alone = predicted(network, diffusion.ClassifierFreeGuidance(1.0), sample, cond, jnp.zeros_like(cond))[0]
    assert_close(prediction.x0, alone.x0)


def test_scales_per_image_are_each_images_own():
    sample, cond, uncond = inputs()
    both = predicted(network, diffusion.ClassifierFreeGuidance(jnp.array([2.0, 5.0])), sample, cond, uncond)[0]
    for i, scale in enumerate((2.0, 5.0)):
        one = predicted(network, diffusion.ClassifierFreeGuidance(scale), sample, cond, uncond)[0]
        assert_close(both.x0[i], one.x0[i])


class Everything(NamedTuple):
    """Four evaluations: two that share a call, one with an option, one with another model; and a momentum."""

    weak: Counting
    option: object

    def init(self, sample):
        return jnp.zeros_like(sample)

    def evaluations(self, cond, uncond):
        return [
            diffusion.Evaluation(cond),
            diffusion.Evaluation(cond, options={"attention": self.option}),
            diffusion.Evaluation(uncond),
            diffusion.Evaluation(cond, model=self.weak),
        ]

    def combine(self, outputs, sample, coefficients, state):
        good, perturbed, uncond, weak = (diffusion.split_output(x, sample.shape[-1])[0] for x in outputs)
        state = 0.5 * state + (good - perturbed) + (good - uncond) + (good - weak)
        return diffusion.prediction_from_output(coefficients, sample, good + state), state


def test_an_own_guider_names_models_and_options_and_carries_a_state():
    noise, cond, uncond = inputs()
    option = object()
    model = Counting()
    weak = Counting(lambda sample, timestep, condition: 0.9 * network(sample, timestep, condition))
    guider = Everything(weak, option)
    latents = diffusion.sample(model, noise, cond, uncond, SCHEDULE, guider=guider)
    assert set(map(str, model.calls)) == set(map(str, [(4, {}), (2, {"attention": option})]))
    assert {calls for calls, _ in weak.calls} == {2}

    state, momentum = diffusion.initial_state(noise), jnp.zeros_like(noise)
    for i, t in enumerate(SCHEDULE.timesteps):
        own, timestep = row(SCHEDULE, i), jnp.full(2, t)
        given, without = network(state[0], timestep, cond), network(state[0], timestep, uncond)
        momentum = 0.5 * momentum + (given - without) + 0.1 * given
        prediction = diffusion.prediction_from_output(own, state[0], given + momentum)
        state = diffusion.solver_step(own, state, prediction, jnp.zeros_like(noise))
    assert_close(latents, state[0])


class ConditionalWithOptions(NamedTuple):
    """The conditional prediction, by a call with an option of its own."""

    def init(self, sample):
        return None

    def evaluations(self, cond, uncond):
        return [diffusion.Evaluation(cond, options={"factor": 2.0})]

    def combine(self, outputs, sample, coefficients, state):
        return diffusion.NoGuidance().combine(outputs, sample, coefficients, state)


def test_an_evaluation_with_options_runs_without_the_feature_cache():
    sample, cond, uncond = inputs()

    def model(sample, timestep, condition, factor=1.0, cache=None):
        output = factor * network(sample, timestep, condition)
        return output if cache is None else (output, cache + 1)

    guider = ConditionalWithOptions()
    alone, _, _ = predicted(model, guider, sample, cond, uncond)
    beside, _, cache = predicted(model, guider, sample, cond, uncond, cache=jnp.zeros(()))
    assert_close(beside.x0, alone.x0)
    assert cache == 0


def test_vmap_over_scales_is_one_sample_each():
    noise, cond, uncond = inputs()

    def at(scale):
        guider = diffusion.ClassifierFreeGuidance(scale)
        return diffusion.sample(network, noise, cond, uncond, SCHEDULE, guider=guider)

    scales = jnp.array([1.0, 2.5, 4.0])
    assert_close(jax.vmap(at)(scales), jnp.stack([at(s) for s in scales]))


def test_what_does_not_fit_is_said():
    noise, cond, uncond = inputs()
    with pytest.raises(ValueError, match="needs uncond"):
        diffusion.sample(network, noise, cond, None, SCHEDULE)
    with pytest.raises(ValueError, match="differ in structure"):
        diffusion.sample(network, noise, {"a": cond}, {"b": uncond}, SCHEDULE)
    with pytest.raises(ValueError, match=re.escape("has a batch of 2, cond an array of shape [1, 3]")):
        diffusion.sample(network, noise, cond[:1], uncond, SCHEDULE)


class Returns(diffusion.NoGuidance):
    """A guider with a state of one number, whose `combine` returns what the test wants."""

    def init(self, sample):
        return jnp.zeros(())

    def combine(self, outputs, sample, coefficients, state):
        prediction, _ = super().combine(outputs, sample, coefficients, None)
        return self.result(prediction, state)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda prediction, state: prediction, "Own.combine must return a Prediction and the next state, returned"),
        (lambda prediction, state: prediction.x0, "Own.combine must return a Prediction and the next state"),
        (lambda prediction, state: (prediction.x0, state), "Own.combine must return a Prediction and the next state"),
        (
            lambda prediction, state: (prediction, (state, state)),
            "a state of the structure of the one before",
        ),
        (
            lambda prediction, state: (prediction, state[None]),
            r"the shapes of the one before; state had \[\], returned is \[1\]",
        ),
        (
            lambda prediction, state: (prediction._replace(eps=state), state),
            r"returned eps of shape \[\]; split_output",
        ),
    ],
)
def test_what_a_guider_returns_wrongly_is_said(result, message):
    guider = type("Own", (Returns,), {"result": staticmethod(result)})()
    schedule = DDIMScheduler().schedule(3)
    noise, cond, _ = inputs()
    with pytest.raises(TypeError, match=message):
        diffusion.sample(network, noise, cond, None, schedule, guider=guider)


def test_an_output_that_does_not_fit_is_said():
    noise, cond, uncond = inputs()
    doubled = jnp.concatenate([noise, noise], -1)
    with pytest.raises(ValueError, match=r"has the shape \[2, 4, 4, 6\], the sample \[2, 4, 4, 3\]; .*split_output"):
        diffusion.prediction_from_output(row(SCHEDULE, 0), noise, doubled)
    guider = diffusion.ClassifierFreeGuidance(jnp.ones(3))
    with pytest.raises(
        ValueError, match=r"output has the shape \[3, .* a guidance scale for each image or one for all"
    ):
        diffusion.sample(network, noise[:1], cond[:1], uncond[:1], SCHEDULE, guider=guider)


@pytest.mark.parametrize(
    ("evaluations", "error", "message"),
    [
        ([{"a": 1}], TypeError, r"must be a list of Evaluation, such as .*, got \[\{'a': 1\}\]"),
        (jnp.zeros((2, 3)), TypeError, r"must be a list of Evaluation, such as .*, got Array\("),
        ([jnp.zeros((2, 3))], TypeError, "must be a list of Evaluation"),
        ([], ValueError, "needed is at least one Evaluation"),
    ],
)
def test_evaluations_of_another_kind_are_said(evaluations, error, message):
    with pytest.raises(error, match=message):
        diffusion.batch_evaluations(evaluations)


def test_an_embedding_in_the_place_of_a_condition_is_said(shapes_pipe):
    unet, noise = shapes_pipe.unet, jnp.zeros((1, 8, 8, 4))
    embeds = jnp.zeros((1, unet.config.encoder_hid_dim))
    with pytest.raises(TypeError, match=r"cond is an array; give what the network makes of it, such as unet.condition"):
        diffusion.sample(unet, noise, embeds, embeds, DDIMScheduler().schedule(3))


@jax.tree_util.register_pytree_node_class
class Momentum:
    """A state of one's own, which wants an array."""

    def __init__(self, value):
        assert hasattr(value, "dtype")
        self.value = value

    def tree_flatten(self):
        return [self.value], None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        made = object.__new__(cls)
        [made.value] = leaves
        return made


class WithMomentum(diffusion.NoGuidance):
    def init(self, sample):
        return {"of x0": Momentum(jnp.zeros_like(sample)), "count": 0}

    def combine(self, outputs, sample, coefficients, state):
        prediction, _ = super().combine(outputs, sample, coefficients, None)
        mean = Momentum(0.9 * state["of x0"].value + 0.1 * prediction.x0)
        return prediction, {"of x0": mean, "count": state["count"] + 1}


def test_a_state_may_have_classes_of_its_own():
    noise, cond, _ = inputs()
    found = diffusion.sample(network, noise, cond, None, SCHEDULE, guider=WithMomentum())
    assert_close(found, diffusion.sample(network, noise, cond, None, SCHEDULE, guider=diffusion.NoGuidance()))
