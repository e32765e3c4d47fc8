"""Attention functions of one's own, and captured hidden states and attention maps, beside the reference's hooks."""

from __future__ import annotations

import re

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from kandinsky_jax import CLIPVisionModelWithProjection, PriorTransformer, UNet2DConditionModel, diffusion
from kandinsky_jax.checkpoint import hub
from kandinsky_jax.models import attend, attention_weights, capture, with_attention
from kandinsky_jax.schedulers import DDIMScheduler
from tests.conftest import SHAPES_MODEL, nchw, nhwc, worst

UNET, PRIOR = SHAPES_MODEL / hub.DECODER / "unet", SHAPES_MODEL / hub.PRIOR / "prior"
VISION = SHAPES_MODEL / hub.PRIOR / "image_encoder"
PERTURBED = "up_blocks.0.attentions.1"


@pytest.fixture(scope="module")
def unet():
    return UNet2DConditionModel.from_pretrained(UNET, dtype="float32")


@pytest.fixture(scope="module")
def prior():
    return PriorTransformer.from_pretrained(PRIOR, dtype="float32")


@pytest.fixture
def their_unet():
    return diffusers.UNet2DConditionModel.from_pretrained(UNET)


@pytest.fixture(scope="module")
def arrays():
    """Noisy latents `[2, 8, 8, 4]`, timesteps, image embeddings."""
    rng = np.random.default_rng(0)
    sample, embeds = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 8, 8, 4), (2, 64)))
    return sample, np.array([700, 30]), embeds


@pytest.fixture(scope="module")
def text(prior):
    """What the prior's `condition` takes."""
    config, rng = prior.config, np.random.default_rng(1)
    pooled, hidden = rng.normal(size=(2, config.embedding_dim)), rng.normal(size=(2, 7, config.embedding_dim))
    return jnp.asarray(pooled, jnp.float32), jnp.asarray(hidden, jnp.float32), jnp.arange(7) < jnp.array([[7], [4]])


def evaluate_reference(unet, sample, timestep, embeds):
    embeds = torch.tensor(embeds)
    with torch.no_grad():
        out = unet(torch.tensor(nchw(sample)), torch.tensor(timestep), None, added_cond_kwargs={"image_embeds": embeds})
    return nhwc(out.sample)


def identity(query, key, value, mask, *, name):
    """Perturbed-attention guidance's: in one block, each pixel attends to itself alone."""
    if name != PERTURBED:
        return attend(query, key, value, mask)
    return value[:, -query.shape[1] :].reshape(*query.shape[:2], -1)


class ReferenceIdentity:
    """`identity` as a processor of the reference's attentions."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        batch, channels, *sides = hidden_states.shape
        hidden = attn.group_norm(hidden_states.reshape(batch, channels, -1)).transpose(1, 2)
        out = attn.to_out[0](attn.to_v(hidden))
        return hidden_states + out.transpose(1, 2).reshape(batch, channels, *sides)


@pytest.mark.slow
def test_an_attention_function_in_a_chosen_block_beside_the_reference(unet, their_unet, arrays):
    sample, timestep, embeds = arrays

    @jax.jit
    def both(sample, embeds):
        condition = unet.condition(embeds)
        return unet(sample, timestep, condition), unet(sample, timestep, condition, attention=identity)

    ordinary, perturbed = both(sample, embeds)
    their_unet.get_submodule(PERTURBED).set_processor(ReferenceIdentity())
    assert worst(perturbed, evaluate_reference(their_unet, *arrays)) < 1e-4
    assert np.abs(perturbed - ordinary).max() > 1e-3


def test_the_function_is_called_once_by_each_attention_with_its_name(unet, prior, arrays, text):
    calls = []

    def listed(query, key, value, mask, *, name):
        calls.append((name, query.shape, key.shape, mask is None))
        return attend(query, key, value, mask)

    sample, timestep, embeds = arrays
    jax.eval_shape(lambda: unet(sample, timestep, unet.condition(embeds), attention=listed))
    names = [name for name, *_ in calls]
    assert names[0] == "down_blocks.1.attentions.0"
    assert len(set(names)) == len(names) == sum(len(b.attentions) for b in (*unet.down_blocks, *unet.up_blocks)) + 1
    assert all(key[1] == 32 + query[1] and plain for _, query, key, plain in calls)

    calls.clear()
    embed = jnp.zeros((2, prior.config.embedding_dim))
    jax.eval_shape(lambda: prior(embed, timestep, prior.condition(*text, attention=listed), attention=listed))
    blocks = [f"transformer_blocks.{i}.attn1" for i in range(prior.config.num_layers)]
    assert [name for name, *_ in calls] == 2 * blocks
    assert [query[1] for _, query, *_ in calls] == [8] * len(blocks) + [3] * len(blocks)
    assert [key[1] for _, _, key, _ in calls] == [8] * len(blocks) + [11] * len(blocks)
    assert not any(plain for *_, plain in calls)


@pytest.mark.slow
def test_the_priors_ordinary_attention_by_a_function(prior, text):
    embed, timestep = jnp.ones((2, prior.config.embedding_dim)), jnp.array([700, 30])

    def ordinary(query, key, value, mask, *, name):
        return attend(query, key, value, mask)

    @jax.jit
    def both():
        by_function = prior(embed, timestep, prior.condition(*text, attention=ordinary), attention=ordinary)
        return prior(embed, timestep, prior.condition(*text)), by_function

    expected, found = both()
    assert worst(found, expected) < 1e-5


class PerturbedAttentionGuidance:
    """Ahn et al. 2024 (arXiv 2403.17377): away from what the network predicts with perturbed attention."""

    def init(self, sample):
        return None

    def evaluations(self, cond, uncond):
        return [diffusion.Evaluation(cond), diffusion.Evaluation(cond, options={"attention": identity})]

    def combine(self, outputs, sample, coefficients, state):
        good, bad = (diffusion.split_output(output, sample.shape[-1])[0] for output in outputs)
        return diffusion.prediction_from_output(coefficients, sample, good + 2.0 * (good - bad)), state


@pytest.mark.slow
def test_a_guider_evaluates_with_ordinary_and_with_other_attention(unet, arrays):
    sample, _, embeds = arrays
    schedule = DDIMScheduler(clip_sample=False).schedule(2)

    @jax.jit
    def both(noise, embeds):
        condition = unet.condition(embeds)
        found = diffusion.sample(unet, noise, condition, None, schedule, guider=PerturbedAttentionGuidance())
        perturbed, state = with_attention(unet, identity), diffusion.initial_state(noise)
        coefficients = diffusion.solver_coefficients(schedule)
        for i, t in enumerate(schedule.timesteps):
            row, timestep = jax.tree.map(lambda x, i=i: x[i], coefficients), jnp.full(2, t)
            good, bad = (network(state[0], timestep, condition)[..., :4] for network in (unet, perturbed))
            prediction = diffusion.prediction_from_output(row, state[0], good + 2.0 * (good - bad))
            state = diffusion.solver_step(row, state, prediction, jnp.zeros_like(noise))
        return found, state[0]

    found, expected = both(jnp.asarray(sample), embeds)
    assert worst(found, expected) < 5e-5


@pytest.fixture(scope="module")
def captured(unet, arrays):
    """Output, captured values, and the ordinary output, of one program."""
    sample, timestep, embeds = arrays

    @jax.jit
    def run(sample, embeds):
        condition = unet.condition(embeds)
        return *capture(unet, ".*")(sample, timestep, condition), unet(sample, timestep, condition)

    return run(sample, embeds)


def test_hidden_states_of_all_blocks_are_the_references(captured, their_unet, arrays):
    output, found, ordinary = captured
    assert worst(output, ordinary) < 1e-6
    theirs = {}
    names = [name for name in found if name.rpartition(".")[0].endswith(("attentions", "resnets", "up_blocks"))]
    for name in (*names, "mid_block", "conv_in"):
        module = their_unet.get_submodule(name)
        module.register_forward_hook(lambda _, __, output, name=name: theirs.__setitem__(name, output))
    evaluate_reference(their_unet, *arrays)
    assert len(theirs) > 20
    for name, expected in theirs.items():
        assert worst(found[name], nhwc(expected)) < 1e-4, name
    assert [x.shape for x in found["down_blocks.0"]] == [(2, 8, 8, 64), (2, 4, 4, 64)]


class ReferenceWeights:
    """The reference's processor of added keys and values, up to the weights."""

    def __init__(self):
        self.weights = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        batch, channels = hidden_states.shape[:2]
        hidden = attn.group_norm(hidden_states.reshape(batch, channels, -1)).transpose(1, 2)
        key = torch.cat([attn.add_k_proj(encoder_hidden_states), attn.to_k(hidden)], dim=1)
        query, key = (attn.head_to_batch_dim(x, out_dim=4) for x in (attn.to_q(hidden), key))
        self.weights = (query @ key.transpose(2, 3) * attn.scale).softmax(dim=-1)
        return diffusers.models.attention_processor.AttnAddedKVProcessor()(attn, hidden_states, encoder_hidden_states)


def test_attention_maps_are_the_references(captured, their_unet, arrays):
    _, found, _ = captured
    processors = {name: ReferenceWeights() for name in their_unet.attn_processors}
    their_unet.set_attn_processor(dict(processors))
    evaluate_reference(their_unet, *arrays)
    assert {f"{name.removesuffix('.processor')}.weights" for name in processors} == {
        name for name in found if name.endswith(".weights")
    }
    for name, processor in processors.items():
        weights = found[f"{name.removesuffix('.processor')}.weights"]
        assert worst(weights, processor.weights.numpy()) < 1e-4, name
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)


@pytest.mark.slow
def test_gradients_go_through_captured_values_and_out_of_a_scan(unet, arrays):
    sample, timestep, embeds = arrays
    name = "mid_block.attentions.0.weights"

    def attention_to_the_embedding(embeds):
        """The mean weight of the image tokens, summed over two timesteps in a scan."""
        condition = unet.condition(embeds)

        def body(total, timestep):
            _, captured = capture(unet, name)(sample, jnp.full(2, timestep), condition)
            return total + captured[name][..., :32].sum(-1).mean(), None

        return jax.lax.scan(body, jnp.zeros(()), timestep)[0]

    value, gradient = jax.jit(jax.value_and_grad(attention_to_the_embedding))(jnp.asarray(embeds))
    assert 0 < value < 2
    step = 0.01 * gradient / jnp.linalg.norm(gradient)
    change = jax.jit(attention_to_the_embedding)(embeds + step) - value
    assert change == pytest.approx(0.01 * float(jnp.linalg.norm(gradient)), rel=0.05)


@pytest.mark.slow
def test_the_priors_states_and_a_towers(prior, text):
    embed, timestep = jnp.ones((2, prior.config.embedding_dim)), jnp.array([700, 30])
    _, of_text = jax.eval_shape(lambda: capture(prior.condition, r"transformer_blocks\.0\.attn1\.weights")(*text))
    assert of_text["transformer_blocks.0.attn1.weights"].shape[2:] == (8, 8)

    @jax.jit
    def run(condition):
        return capture(prior, r"transformer_blocks\.1(\.attn1\.weights)?")(embed, timestep, condition)

    _, found = run(jax.jit(prior.condition)(*text))
    weights = found["transformer_blocks.1.attn1.weights"]
    assert found["transformer_blocks.1"].shape[:2] == (2, 3)
    assert weights.shape[2:] == (3, 11)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert (weights[1, :, :, 4:7] == 0).all()  # padding is masked
    assert (weights[:, :, 0, -2:] == 0).all()  # and the causal mask holds

    tower = CLIPVisionModelWithProjection.from_pretrained(VISION, dtype="float32")
    pixels = jnp.zeros((1, tower.config.image_size, tower.config.image_size, 3))
    _, found = jax.eval_shape(lambda: capture(tower, r".*layers\.0\.self_attn\.weights")(pixels))
    assert list(found) == ["vision_model.encoder.layers.0.self_attn.weights"]


def test_movqs_attention(shapes_pipe):
    movq, latents, called = shapes_pipe.movq, jnp.zeros((1, 8, 8, 4)), []
    _, found = jax.eval_shape(lambda: capture(movq.decode, r"decoder\.mid_block\.attentions\.0(\.weights)?")(latents))
    weights = found["decoder.mid_block.attentions.0.weights"]
    assert weights.shape[-2:] == (64, 64)  # of all places to all places
    assert found["decoder.mid_block.attentions.0"].shape[:3] == (1, 8, 8)

    def watched(query, key, value, mask, *, name):
        called.append(name)
        return attend(query, key, value, mask)

    jax.eval_shape(with_attention(movq, watched).decode, latents)
    assert "decoder.mid_block.attentions.0" in called
    assert all(name.startswith("decoder.") for name in called)


@pytest.mark.slow
def test_an_ordinary_call_compiles_to_the_same_program_after_both(unet, arrays):
    sample, timestep, embeds = arrays

    def program():
        return str(jax.make_jaxpr(lambda x, e: unet(x, timestep, unet.condition(e)))(sample, embeds))

    before, structure = program(), diffusion.Network.split(unet)[0]
    jax.eval_shape(lambda: capture(unet, ".*")(sample, timestep, unet.condition(embeds), attention=identity))
    assert program() == before
    assert diffusion.Network.split(unet)[0] == structure
    assert diffusion.Network.split(with_attention(unet, identity))[0] != structure
    twice = [diffusion.Network.split(with_attention(unet, identity))[0] for _ in range(2)]
    assert twice[0] == twice[1]
    assert hash(twice[0]) == hash(twice[1])


def test_weights_are_those_of_attention():
    rng = np.random.default_rng(2)
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, 3, 8)), jnp.float32) for n in (5, 7, 7))
    mask = jnp.arange(7) < 4
    for visible in (None, mask):
        out = jnp.einsum("bnts,bsnh->btnh", attention_weights(q, k, visible), v).reshape(2, 5, -1)
        np.testing.assert_allclose(out, attend(q, k, v, visible), atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 8, 8), (8, 8, 3), (7, 9, 4)])
def test_a_sample_of_another_shape_is_refused_in_one_sentence(unet, arrays, shape):
    _, timestep, embeds = arrays
    with pytest.raises(ValueError, match=r"needed is \[B, h, w, 4\], channels last, h and w multiples of 4"):
        jax.eval_shape(lambda: unet(jnp.zeros((len(timestep), *shape)), timestep, unet.condition(embeds)))


def test_an_attention_function_of_another_kind_is_said(unet, arrays):
    sample, timestep, embeds = arrays
    condition = unet.condition(embeds)
    with pytest.raises(ValueError, match=r"in down_blocks.1.attentions.0; needed is \[B, T, heads \* head_dim\]"):
        jax.eval_shape(lambda: with_attention(unet, lambda q, k, v, mask, *, name: q)(sample, timestep, condition))
    with pytest.raises(TypeError, match=r"function must be a function such as .*, got 'flash'"):
        with_attention(unet, "flash")
    plain = with_attention(with_attention(unet, identity), None)
    np.testing.assert_array_equal(plain(sample, timestep, condition), unet(sample, timestep, condition))


def test_what_cannot_be_captured_is_said(unet, arrays):
    sample, timestep, embeds = arrays
    with pytest.raises(ValueError, match=r"'down_block' matches no module that is called; names are such as"):
        jax.eval_shape(lambda: capture(unet, "down_block")(sample, timestep, unet.condition(embeds)))
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression: missing \)"):
        capture(unet, "(")
    with pytest.raises(TypeError, match=r"names must be one regular expression, such as .*, got \['mid_block'\]"):
        capture(unet, ["mid_block"])
    compiled = capture(unet, re.compile("mid_block"))
    assert list(jax.eval_shape(lambda: compiled(sample, timestep, unet.condition(embeds)))[1]) == ["mid_block"]
    with pytest.raises(TypeError, match="capture takes a network or a method of one"):
        capture(jnp.sin, ".*")
