"""Conditions are nested as blocks are: each block makes and takes its own part."""

from __future__ import annotations

import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from kandinsky_jax import PriorTransformer, UNet2DConditionModel
from kandinsky_jax.checkpoint import hub
from tests.conftest import SHAPES_MODEL, nchw, nhwc, worst

UNET, PRIOR = SHAPES_MODEL / hub.DECODER / "unet", SHAPES_MODEL / hub.PRIOR / "prior"


@pytest.fixture(scope="module")
def inputs():
    """Noisy latents `[2, 8, 8, 4]`, timesteps and image embeddings, for ours and for the reference."""
    rng = np.random.default_rng(0)
    sample, embeds = rng.normal(size=(2, 8, 8, 4)), rng.normal(size=(2, 64))
    ours = (jnp.asarray(sample, jnp.float32), jnp.array([700, 30]), jnp.asarray(embeds, jnp.float32))
    theirs = (torch.tensor(nchw(sample)), torch.tensor([700, 30]), torch.tensor(embeds, dtype=torch.float32))
    return ours, theirs


def evaluate(unet, sample, timestep, embeds):
    network, state = nnx.split(unet)

    @jax.jit
    def run(state, sample, timestep, embeds):
        module = nnx.merge(network, state)
        return module(sample, timestep, module.condition(embeds))

    return run(state, sample, timestep, embeds)


def evaluate_reference(unet, sample, timestep, embeds):
    with torch.no_grad():
        out = unet(sample, timestep, encoder_hidden_states=None, added_cond_kwargs={"image_embeds": embeds})
    return nhwc(out.sample)


class NoAttention(nnx.Module):
    """In an attention's place: it has no part of the condition, and changes nothing."""

    def condition(self, tokens):
        return ()

    def __call__(self, x, condition):
        assert condition == ()
        return x


class ReferenceWithoutAttention(torch.nn.Module):
    def forward(self, hidden_states, **_):
        return hidden_states


@pytest.mark.slow
@pytest.mark.parametrize("place", [("down_blocks", 1), ("up_blocks", 0)])
def test_a_replaced_attention_shifts_nothing_for_later_ones(place, inputs):
    blocks, index = place
    ours, theirs = (
        UNet2DConditionModel.from_pretrained(UNET, dtype="float32"),
        diffusers.UNet2DConditionModel.from_pretrained(UNET),
    )
    whole = evaluate(ours, *inputs[0])
    getattr(ours, blocks)[index].attentions[0] = NoAttention()
    getattr(theirs, blocks)[index].attentions[0] = ReferenceWithoutAttention()
    found = evaluate(ours, *inputs[0])
    assert worst(found, evaluate_reference(theirs, *inputs[1])) < 1e-4
    assert np.abs(found - whole).max() > 1e-3


class OwnBlock(nnx.Module):
    """In the middle block's place, with another kind of condition: it adds the mean of the tokens, projected."""

    def __init__(self, channels, width, rngs):
        self.proj = nnx.Linear(channels, width, rngs=rngs)

    def condition(self, tokens):
        return {"shift": self.proj(tokens.mean(1))}

    def __call__(self, x, temb, condition):
        return x + condition["shift"][:, None, None]


@pytest.mark.slow
def test_a_replaced_block_has_a_condition_of_its_own(inputs):
    unet = UNet2DConditionModel.from_pretrained(UNET, dtype="float32")
    before = unet.condition(inputs[0][2])
    unet.mid_block = OwnBlock(unet.config.cross_attention_dim, unet.config.block_out_channels[-1], nnx.Rngs(0))
    after = unet.condition(inputs[0][2])
    assert set(after.mid_block) == {"shift"}
    jax.tree.map(np.testing.assert_array_equal, before.up_blocks, after.up_blocks)
    assert np.isfinite(evaluate(unet, *inputs[0])).all()


@pytest.fixture(scope="module")
def networks():
    """A UNet and a prior."""
    return (
        UNet2DConditionModel.from_pretrained(UNET, dtype="float32"),
        PriorTransformer.from_pretrained(PRIOR, dtype="float32"),
    )


def text_of(prior):
    """What the prior's `condition` takes."""
    config = prior.config
    states = jnp.ones((2, config.num_embeddings, config.embedding_dim))
    return jnp.ones((2, config.embedding_dim)), states, jnp.ones((2, config.num_embeddings), bool)


def test_the_condition_is_nested_as_the_blocks_are(networks, inputs):
    unet, prior = networks
    condition = jax.eval_shape(unet.condition, inputs[0][2])
    for blocks in ("down_blocks", "up_blocks"):
        parts = getattr(condition, blocks)
        assert [len(part.attentions) for part in parts] == [len(block.attentions) for block in getattr(unet, blocks)]
    heads = unet.config.block_out_channels[-1] // unet.config.attention_head_dim
    key, value = condition.mid_block.attentions[0]
    assert key.shape == value.shape == (2, 32, heads, unet.config.attention_head_dim)
    text = jax.eval_shape(prior.condition, *text_of(prior))
    assert len(text.transformer_blocks) == prior.config.num_layers


def test_one_timestep_serves_the_whole_batch(networks, inputs):
    unet, prior = networks
    sample, _, embeds = inputs[0]
    noisy = jnp.ones((2, prior.config.embedding_dim))

    @jax.jit
    def outputs(one, each):
        condition, text = unet.condition(embeds), prior.condition(*text_of(prior))
        return [(unet(sample, t, condition), prior(noisy, t, text)) for t in (one, each, 30)]

    first, *others = outputs(jnp.float32(30), jnp.array([30, 30]))
    for other in others:
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), first, other)


def test_arguments_that_do_not_fit_are_said(networks, inputs):
    unet, prior = networks
    sample, timestep, embeds = inputs[0]
    pooled, states, mask = text_of(prior)
    noisy = jnp.ones((2, prior.config.embedding_dim))
    condition = jax.eval_shape(unet.condition, embeds)
    text = jax.eval_shape(prior.condition, pooled, states, mask)

    def refused(function, *args, message, error=ValueError, **kwargs):
        with pytest.raises(error, match=message):
            jax.eval_shape(function, *args, **kwargs)

    refused(
        unet, sample, jnp.ones(3), condition, message=r"timestep has the shape \[3\]; needed is one number, or \[2\]"
    )
    refused(unet, sample, timestep, embeds, error=TypeError, message=r"what unet.condition\(image_embeds\) returns")
    refused(
        unet, sample[:1], timestep[:1], condition, message="condition is of a batch of 2, the sample of a batch of 1"
    )
    refused(unet.condition, embeds[:, :3], message=r"image_embeds has the shape \[2, 3\]; needed is \[B, 64\]")
    refused(
        unet.condition, embeds, channels=jnp.ones((3, 8, 8, 2)), message="is of a batch of 3; needed is 2, or a div"
    )
    refused(
        unet.condition, embeds, channels=jnp.ones((2, 8, 8, 5)), message="channels has 5 of them, but this UNet tak"
    )
    refused(unet.condition, embeds, jnp.ones((2, 64, 64, 3)), message="hint is given, but this UNet takes none")
    refused(prior, noisy, timestep, condition, error=TypeError, message=r"what prior.condition\(...\) returns")
    refused(prior, jnp.ones((3, noisy.shape[1])), 5, text, message="condition is of a batch of 2, the sample of .* 3")
    refused(prior, noisy[:, :3], timestep, text, message=r"hidden_states has the shape \[2, 3\]; needed is \[B, ")
    refused(prior.condition, pooled[:, :3], states, mask, message=r"proj_embedding has the shape \[2, 3\]")
    refused(prior.condition, pooled, states[..., :3], mask, message="encoder_hidden_states has the shape")
    more, all_visible = jnp.concatenate([states, states], 1), jnp.concatenate([mask, mask], 1)
    refused(prior.condition, pooled, more, all_visible, message="has 154 tokens; needed are at most 77")


def test_a_condition_of_one_image_serves_all_where_its_blocks_can(networks):
    prior = networks[1]
    pooled, states, mask = text_of(prior)
    noisy = jnp.linspace(-1, 1, 2 * prior.config.embedding_dim).reshape(2, -1)
    one = prior.condition(pooled[:1], states[:1], mask[:1])
    each = prior.condition(pooled, states, mask)
    np.testing.assert_allclose(prior(noisy, 5, one), prior(noisy, 5, each), atol=1e-5)
    of_integers = prior.condition(pooled, states, np.asarray(mask, np.int64))  # as a tokenizer gives them
    jax.tree.map(np.testing.assert_array_equal, of_integers, each)
