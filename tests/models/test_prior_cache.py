"""Caches of the prior: keys and values of the prefix that no step changes, and those of the empty prompt."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kandinsky_jax import KandinskyV22PriorPipeline
from kandinsky_jax.models import prior
from kandinsky_jax.models.attention import attend, attend_after
from tests.conftest import SHAPES_MODEL

PROMPTS = ["a red circle on a blue background", "yellow ring, black background"]
CALL = {"num_inference_steps": 3, "generator": 0, "output_type": "np"}


def test_attention_to_kept_keys_is_attention():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 9, 4, 8)), jnp.float32) for _ in range(3))
    visible = jnp.asarray(rng.random((2, 1, 3, 9)) < 0.7).at[..., -3:].set(jnp.tril(jnp.ones((3, 3), bool)))
    past = tuple(x[:, :6].swapaxes(1, 2) for x in (k, v))
    found = attend_after(q[:, 6:], past, k[:, 6:], v[:, 6:], visible)
    np.testing.assert_allclose(found, attend(q[:, 6:], k, v, visible), atol=1e-6)


@pytest.mark.parametrize(("longest", "rows_left_out"), [(24, 53), (25, 0), (77, 0)])
def test_short_texts_without_their_padding(shapes_pipe, monkeypatch, longest, rows_left_out):
    monkeypatch.setattr(prior, "WIDE", 0)
    network = shapes_pipe.prior_prior
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((2, 77, network.config.embedding_dim)), jnp.float32)
    pooled = jnp.asarray(rng.standard_normal((2, network.config.embedding_dim)), jnp.float32)
    mask = jnp.arange(77) < jnp.asarray([[5], [longest]])
    whole = network.condition(pooled, hidden, mask)
    found = jax.jit(network.condition_of_texts)(pooled, hidden, mask)
    np.testing.assert_array_equal(found.visible, whole.visible)
    visible = np.asarray(whole.visible)
    for ours, theirs in zip(jax.tree.leaves(found[0]), jax.tree.leaves(whole[0]), strict=True):
        ours, theirs = (np.asarray(x).transpose(0, 2, 1, 3) for x in (ours, theirs))  # [B, T + 1, heads, head_dim]
        np.testing.assert_allclose(ours[visible], theirs[visible], atol=2e-5 * theirs.std())
        assert (ours == 0).all((2, 3)).sum() == 2 * rows_left_out
    noisy = jnp.asarray(rng.standard_normal(pooled.shape), jnp.float32)
    ours, theirs = (network(noisy, 500, given) for given in (found, whole))
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.std(theirs))


def test_small_priors_have_one_way(shapes_pipe):
    network = shapes_pipe.prior_prior
    arrays = [jnp.zeros((1, *shape, network.config.embedding_dim)) for shape in ((), (77,))]
    texts = [
        str(jax.make_jaxpr(function)(*arrays, jnp.ones((1, 77), bool)))
        for function in (network.condition_of_texts, network.condition)
    ]
    assert texts[0].count("cond[") == texts[1].count("cond[")


@pytest.fixture
def pipe(shapes_pipe):
    fresh = KandinskyV22PriorPipeline.from_pipe(shapes_pipe)
    fresh.set_progress_bar_config(disable=True)
    return fresh


def test_the_kept_empty_prompt_is_the_computed_one(pipe):
    first = pipe(PROMPTS, **CALL)
    assert "condition" in pipe._constants
    again = pipe(PROMPTS, **CALL)
    np.testing.assert_array_equal(first.image_embeds, again.image_embeds)


def test_it_does_not_show_which_batch_came_before(pipe, shapes_pipe):
    pipe(PROMPTS[0], **CALL)
    kept = pipe(PROMPTS, **CALL).image_embeds
    other = KandinskyV22PriorPipeline.from_pipe(shapes_pipe)
    other.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(kept, other(PROMPTS, **CALL).image_embeds)


@pytest.mark.parametrize("part", ["text_encoder", "prior"])
def test_other_weights_have_their_own(pipe, shapes_pipe, part):
    pipe(PROMPTS[0], **CALL)
    before = pipe._constants["condition"][-1]
    setattr(pipe, part, getattr(KandinskyV22PriorPipeline.from_pretrained(SHAPES_MODEL, dtype="float32"), part))
    pipe(PROMPTS[0], **CALL)
    assert pipe._constants["condition"][-1] is not before


def test_a_callback_can_put_something_else_in_its_place(pipe):
    plain = pipe(PROMPTS[0], **CALL).image_embeds

    def change(pipe, step, timestep, tensors):
        rows = {name: np.array(tensor) for name, tensor in tensors.items()}
        for tensor in rows.values():
            tensor[0] = tensor[1]  # the prompt in the place of the empty one: guidance has nothing to add
        return rows

    names = ["prompt_embeds", "text_encoder_hidden_states", "text_mask"]
    changed = pipe(
        PROMPTS[0], callback_on_step_end=change, callback_on_step_end_tensor_inputs=names, **CALL
    ).image_embeds
    assert np.abs(changed - plain).max() > 1e-3
