"""A decoder as a differentiable function, and LoRA trained through it."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kandinsky_jax as kj
from kandinsky_jax import diffusion, lora, rewards
from kandinsky_jax.rewards.sampler import trimmed
from kandinsky_jax.rewards.training import as_pytree
from kandinsky_jax.schedulers import DDIMScheduler, DPMSolverMultistepScheduler
from tests.conftest import note
from tests.rewards import small

CONFIG = rewards.DraftConfig(updates=12, batch_size=4, gradient_steps=2, learning_rate=3e-2, weight_decay=0.0)


@pytest.fixture(scope="module")
def sampler():
    return small.sampler()


@pytest.mark.slow
@pytest.mark.parametrize("stochastic", [False, True])
def test_a_sampler_generates_what_the_pipeline_does(shapes_pipe, stochastic):
    scheduler = DDIMScheduler.from_config(shapes_pipe.scheduler.config, eta=float(stochastic))
    embeds = shapes_pipe.prior_pipe(["a red circle", "a star"], generator=0, return_dict=False)[0]
    before = shapes_pipe.scheduler
    shapes_pipe.scheduler = scheduler
    try:
        expected = shapes_pipe.decoder_pipe(
            embeds,
            shapes_pipe.prior_pipe.get_zero_embed(2),
            guidance_scale=3.0,
            num_inference_steps=3,
            height=64,
            width=64,
            generator=5,
            output_type="np",
        ).images
    finally:
        shapes_pipe.scheduler = before
    guider = diffusion.ClassifierFreeGuidance(3.0)
    sampler = rewards.DecoderSampler.from_pipeline(
        shapes_pipe, scheduler.schedule(3), guider=guider, height=64, width=64
    )
    found = sampler.generate(embeds, seed=5, batch_size=2, quiet=True)
    assert note(np.abs(found - expected).max(), "difference of pixels") < 1e-3


def test_slots_that_a_solver_does_not_use_are_left_out():
    for scheduler, slots in ((DDIMScheduler(), 1), (DPMSolverMultistepScheduler(solver_order=2), 3)):
        coefficients = diffusion.solver_coefficients(scheduler.schedule(6))
        short = trimmed(coefficients)
        assert short.matrix.shape == (6, slots, slots + 3)
        state, noise = jax.random.normal(jax.random.key(0), (6, 2, 4)), jnp.ones((2, 4))
        prediction = diffusion.Prediction(*jax.random.normal(jax.random.key(1), (2, 2, 4)))
        for i in range(6):
            long, own = (jax.tree.map(lambda x: x[i], table) for table in (coefficients, short))  # noqa: B023
            whole = diffusion.solver_step(long, state, prediction, noise)[:slots]
            np.testing.assert_allclose(diffusion.solver_step(own, state[:slots], prediction, noise), whole, rtol=1e-6)


def test_a_batch_is_filled_up_and_no_picture_depends_on_it(sampler):
    embeds = small.embeds(3)
    together = sampler.generate(embeds, batch_size=2, quiet=True)
    assert together.shape == (3, small.SIDE, small.SIDE, 3)
    assert together.dtype == np.float32
    assert 0 <= together.min() < together.max() <= 1
    np.testing.assert_allclose(sampler.generate(embeds[:2], batch_size=2, quiet=True), together[:2], atol=1e-5)


def test_sizes_that_movq_cannot_decode():
    with pytest.raises(ValueError, match="height=9 and width=8 must be multiples of 2"):
        rewards.DecoderSampler.from_pipeline(small.pipeline(), DDIMScheduler().schedule(2), height=9, width=8)


def test_a_stochastic_solver_needs_randomness(sampler):
    with pytest.raises(ValueError, match="adds noise at its steps; give rng"):
        sampler.latents(sampler.noise(0, 2), small.embeds(2))


@pytest.fixture(scope="module")
def trained(sampler, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "draft.jsonl"
    return rewards.train_draft(sampler, small.embeds(4), small.redness, CONFIG, log=log, quiet=True), log


def test_a_reward_rises_where_nothing_else_does(sampler, trained):
    """The same noise before and after; the sampler itself stays as it was."""
    result, log = trained
    embeds = small.embeds(4)
    before, after = (s.generate(embeds, quiet=True) for s in (sampler, sampler.with_lora(result.changes)))
    assert small.redness(after, None).mean() > small.redness(before, None).mean() + 0.3
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert rows == result.history
    assert [row["update"] for row in rows] == list(range(CONFIG.updates))
    assert {row["gradient_steps"] for row in rows} == {2.0}
    assert all(np.isfinite(list(row.values())).all() for row in rows)


def test_the_file_is_one_that_load_lora_weights_reads(sampler, trained, tmp_path):
    result, _ = trained
    path = result.save(tmp_path)
    assert path.name == lora.FILE
    networks = {"unet": kj.checkpoint.lora_files.layers_of(lora.flat(sampler.params["unet"]))}
    [found], _ = kj.checkpoint.lora_files.read(kj.checkpoint.lora_files.open_file(path), networks)[0].values(), None
    for name, pair in result.changes.items():
        np.testing.assert_allclose(found[name].delta(), lora.layer_delta(pair, 1.0), atol=1e-6)


@pytest.mark.slow
def test_the_gradient_of_the_changes_is_a_difference(sampler):
    """Along the gradient itself, of the truncated loss: its first steps have the LoRA as it was."""
    embeds, keys = small.embeds(4), jax.random.split(jax.random.key(1), 4)
    config = lora.LoraConfig(rank=2)
    changes = lora.init(sampler.params["unet"], config, jax.random.key(0))
    changes = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), changes)

    def loss(changes, gradient_steps):
        changed = sampler.with_lora(changes, config.scale)
        images = changed(changed.noise(keys, 4), embeds, keys, gradient_steps)
        return small.redness(images, None).mean()

    last, split = 1, sampler.steps - 1

    def late(changes, other):
        """The LoRA `other` in the first steps."""
        rows = lambda part: jax.tree.map(lambda x: x[part], sampler.coefficients)  # noqa: E731
        first = dataclasses.replace(sampler.with_lora(other), coefficients=rows(slice(split)))
        second = dataclasses.replace(sampler.with_lora(changes), coefficients=rows(slice(split, None)))
        noise = diffusion.noise_source(keys, 4, diffusion.DECODER_STREAM)
        [rng] = noise.steps(0, 3, np.ones(3, bool), (4, *sampler.latent_shape))
        latents = first.latents(sampler.noise(keys, 4), embeds, rng)
        return small.redness(second(latents, embeds, lambda i, shape: rng(i + split, shape)), None).mean()

    for steps, function in ((None, lambda x: loss(x, None)), (last, lambda x: late(x, changes))):
        gradient = jax.jit(jax.grad(loss), static_argnums=1)(changes, steps)
        norm = float(jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(gradient))))
        step = 0.02 / norm
        value = jax.jit(function)
        ends = [value(jax.tree.map(lambda x, g: x + sign * step * g, changes, gradient)) for sign in (1, -1)]  # noqa: B023
        slope = float(ends[0] - ends[1]) / (2 * step * norm)
        assert note(abs(slope / norm - 1), f"of the gradient's norm, {steps} steps") < 0.02


@pytest.mark.slow
def test_alignprop_draws_the_number_of_steps(sampler):
    config = dataclasses.replace(CONFIG, gradient_steps=(1, 9), updates=8)
    history = rewards.train_draft(sampler, small.embeds(4), small.redness, config, quiet=True).history
    assert {row["gradient_steps"] for row in history} == {1.0, 2.0, 3.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_steps": 0}, "gradient_steps must be a whole number of at least 1, a pair"),
        ({"gradient_steps": (3, 2)}, "gradient_steps must be"),
        ({"gradient_steps": 1.0}, "gradient_steps must be"),
        ({"gradient_steps": (1.5, 2.5)}, "gradient_steps must be"),
        ({"updates": 0, "learning_rate": -1.0}, "updates must be .*; learning_rate must be"),
    ],
)
def test_settings_that_are_not_valid(options, message):
    with pytest.raises(ValueError, match=message):
        rewards.DraftConfig(**options)


def test_a_reward_of_another_shape_and_a_guider_by_name(sampler):
    with pytest.raises(ValueError, match=r"the reward returned the shape \[\]; needed is \[4\], one a picture"):
        rewards.train_draft(sampler, small.embeds(4), lambda images, prompts: images.mean(), CONFIG, quiet=True)
    with pytest.raises(TypeError, match=r"guider must be an object here: diffusion\.guider_named"):
        small.sampler(guider="apg")


def test_embeddings_of_another_shape(sampler):
    with pytest.raises(ValueError, match=r"embeds have the shape \[12\]; needed are"):
        rewards.train_draft(sampler, jnp.zeros(12), small.redness, CONFIG)


def test_a_reward_with_arrays_is_an_argument_and_not_a_constant(sampler):
    reward = rewards.ClipSimilarity(sampler.movq, sampler.params["movq"], jnp.ones((1, 4)), None)
    assert as_pytree(reward) is reward
    assert jax.tree.leaves(as_pytree(small.redness)) == []
