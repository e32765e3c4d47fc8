"""Gradients through a whole sample of a trained UNet, beside torch's through diffusers' UNet and scheduler."""

from __future__ import annotations

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util

import kandinsky_jax
from kandinsky_jax import diffusion, lora
from kandinsky_jax.checkpoint import tensor_names
from tests.conftest import note

pytestmark = pytest.mark.slow  # gradients of the whole UNet compile for ten seconds each

STEPS, SCALE, SHAPE = 5, 3.0, (1, 8, 8, 4)
WEIGHT = "up_blocks.0.attentions.0.to_q.weight"
SCHEDULERS = {
    "DDIM": ("DDIMScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
}
BOUND = 1e-3  # of a gradient's norm


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def given(ours):
    """First noise, image embedding and negative one, and what the last latents are weighed by."""
    embeds, negative = ours["KandinskyV22PriorPipeline"]("red circle", generator=0, output_type="np", return_dict=False)
    return normal(0, *SHAPE), np.array(embeds), np.array(negative), normal(1, *SHAPE)


def with_weight(params, weight: jax.Array):
    flat = lora.flat(params) | {WEIGHT: weight}
    known = {".".join(map(str, path)): path for path in traverse_util.flatten_dict(params)}
    return traverse_util.unflatten_dict({known[name]: leaf for name, leaf in flat.items()})


def our_loss(unet, schedule, negative, weights, rng=None):
    """A scalar of the last latents as a function of noise, embedding, one weight and the guidance scale."""
    network, params = diffusion.Network.split(unet)

    def loss(noise, embeds, weight, scale):
        module = network.bind(with_weight(params, weight))
        with diffusion.matmul_precision(params):
            cond, uncond = module.condition(embeds), module.condition(negative)
        guider = diffusion.ClassifierFreeGuidance(scale)
        latents = diffusion.sample(module, noise, cond, uncond, schedule, guider=guider, rng=rng)
        return (latents * weights).sum()

    return loss, lora.flat(params)[WEIGHT]


def their_loss(unet, scheduler, first, embeds, negative, weights, scale=SCALE) -> torch.Tensor:
    """The same scalar through diffusers' loop; `first` is NCHW, and torch may want gradients to any tensor."""
    scheduler.set_timesteps(STEPS)
    latents = first * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        both = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
        condition = {"image_embeds": torch.cat([torch.tensor(negative), embeds])}
        output = unet(both, timestep, encoder_hidden_states=None, added_cond_kwargs=condition, return_dict=False)[0]
        uncond, cond = output[:, :4].chunk(2)
        latents = scheduler.step(uncond + scale * (cond - uncond), timestep, latents, return_dict=False)[0]
    return (latents * torch.tensor(weights.transpose(0, 3, 1, 2))).sum()


def their_gradients(unet, scheduler, noise, embeds, negative, weights):
    """Loss and gradients by torch's autograd, NHWC."""
    unet.requires_grad_(False)
    weight = unet.get_parameter(WEIGHT).requires_grad_(True)
    first, given, scale = (
        torch.tensor(x, requires_grad=True) for x in (noise.transpose(0, 3, 1, 2), embeds, np.float32(SCALE))
    )
    loss = their_loss(unet, scheduler, first, given, negative, weights, scale)
    found = [x.numpy() for x in torch.autograd.grad(loss, [first, given, weight, scale])]
    weight.requires_grad_(False)
    return loss.item(), [found[0].transpose(0, 2, 3, 1), *found[1:]]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_gradients_are_those_of_autograd_through_the_reference(ours, theirs, given, name):
    """To the first noise, the image embedding, a weight of the UNet and the guidance scale."""
    noise, embeds, negative, weights = given
    cls, options = SCHEDULERS[name]
    pipe, reference = ours["KandinskyV22Pipeline"], theirs["KandinskyV22Pipeline"]
    schedule = getattr(kandinsky_jax, cls).from_config(pipe.scheduler.config, **options).schedule(STEPS)
    # With a learned variance, diffusers' DPM-Solver++ drops all channels but three.
    scheduler = getattr(diffusers, cls).from_config(reference.scheduler.config, variance_type=None, **options)
    loss, weight = our_loss(pipe.unet, schedule, negative, weights)
    value, found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(noise, embeds, weight, SCALE)
    expected_value, expected = their_gradients(reference.unet, scheduler, noise, embeds, negative, weights)
    assert value == pytest.approx(expected_value, rel=1e-4)
    for what, own, other in zip(("noise", "embedding", "weight", "scale"), found, expected, strict=True):
        assert own.shape == other.shape
        error = np.linalg.norm(np.asarray(own) - other) / np.linalg.norm(other)
        assert note(error, f"{name}, gradient to the {what}, relative") <= BOUND


def test_forward_mode_is_the_product_with_the_gradients(ours, given):
    noise, embeds, negative, weights = given
    unet, config = ours["KandinskyV22Pipeline"].unet, ours["KandinskyV22Pipeline"].scheduler.config
    schedule = kandinsky_jax.DDIMScheduler.from_config(config).schedule(2)
    loss, weight = our_loss(unet, schedule, negative, weights)
    at = (jnp.asarray(noise), jnp.asarray(embeds), weight, jnp.float32(SCALE))
    direction = tuple(jnp.asarray(normal(i, *x.shape)) * jnp.sqrt(jnp.mean(x**2)) for i, x in enumerate(at))
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*at)
    _, slope = jax.jit(lambda at, direction: jax.jvp(loss, at, direction))(at, direction)
    expected = sum(float(jnp.vdot(g, d)) for g, d in zip(gradients, direction, strict=True))
    assert float(slope) == pytest.approx(expected, rel=1e-3)


def test_gradients_to_lora_are_those_to_the_weight_it_changes(ours, given):
    """d/dB = scale * (d/dW) A^T and d/dA = scale * B^T (d/dW): LoRA adds scale * B A to W."""
    noise, embeds, negative, weights = given
    unet, config = ours["KandinskyV22Pipeline"].unet, ours["KandinskyV22Pipeline"].scheduler.config
    schedule = kandinsky_jax.DDIMScheduler.from_config(config).schedule(2)
    network, params = diffusion.Network.split(unet)
    layer, scale = WEIGHT.removesuffix(".weight"), 0.5
    out, inner = lora.flat(params)[WEIGHT].shape
    changes = {layer: {"A": jnp.asarray(normal(2, 4, inner)), "B": jnp.asarray(0.01 * normal(3, out, 4))}}

    def loss_of_lora(changes):
        module = network.bind(lora.merged(params, changes, scale))
        cond, uncond = module.condition(embeds), module.condition(negative)
        return (diffusion.sample(module, noise, cond, uncond, schedule) * weights).sum()

    found = jax.jit(jax.grad(loss_of_lora))(changes)[layer]
    merged = lora.flat(lora.merged(params, changes, scale))[WEIGHT]

    def loss_of_weight(weight):
        module = network.bind(with_weight(params, weight))
        cond, uncond = module.condition(embeds), module.condition(negative)
        return (diffusion.sample(module, noise, cond, uncond, schedule) * weights).sum()

    to_weight = jax.jit(jax.grad(loss_of_weight))(merged)
    expected = {"A": scale * changes[layer]["B"].T @ to_weight, "B": scale * to_weight @ changes[layer]["A"].T}
    for part in ("A", "B"):
        error = jnp.linalg.norm(found[part] - expected[part]) / jnp.linalg.norm(expected[part])
        assert note(error, f"gradient to LoRA's {part}, relative") <= BOUND


def test_gradients_to_all_weights_and_to_lora_are_those_of_autograd(ours, theirs, given):
    """LoRA on every attention at once; in torch B @ A is added to the weights by hand."""
    noise, embeds, negative, weights = given
    pipe, reference = ours["KandinskyV22Pipeline"], theirs["KandinskyV22Pipeline"]
    schedule = kandinsky_jax.DDIMScheduler.from_config(pipe.scheduler.config).schedule(STEPS)
    scheduler = diffusers.DDIMScheduler.from_config(reference.scheduler.config)
    network, params = diffusion.Network.split(pipe.unet)
    scale = 0.5
    changes = changed_attentions(params)

    def loss(params, changes):
        module = network.bind(lora.merged(params, changes, scale))
        with diffusion.matmul_precision(params):
            cond, uncond = module.condition(embeds), module.condition(negative)
        guider = diffusion.ClassifierFreeGuidance(SCALE)
        return (diffusion.sample(module, noise, cond, uncond, schedule, guider=guider) * weights).sum()

    value, (to_params, to_changes) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, changes)

    leaves = {name: x.detach().clone().requires_grad_() for name, x in reference.unet.named_parameters()}
    parts = {
        (layer, part): torch.tensor(np.array(x), requires_grad=True)
        for layer, pair in changes.items()
        for part, x in pair.items()
    }
    added = {f"{layer}.weight": scale * parts[layer, "B"] @ parts[layer, "A"] for layer in changes}
    merged = {name: leaf + added.get(name, 0) for name, leaf in leaves.items()}

    def unet(*arguments, **named):
        return torch.func.functional_call(reference.unet, merged, arguments, named)

    first = torch.tensor(noise.transpose(0, 3, 1, 2))
    expected = their_loss(unet, scheduler, first, torch.tensor(embeds), negative, weights)
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=1e-4)

    own = {tensor_names.torch_name(name): (name, leaf) for name, leaf in lora.flat(to_params).items()}
    assert own.keys() == leaves.keys()
    as_torch = {name: tensor_names.to_torch(path, np.asarray(leaf)) for name, (path, leaf) in own.items()}
    whole = np.sqrt(sum(float((leaf.grad**2).sum()) for leaf in leaves.values()))
    for name, leaf in leaves.items():
        assert np.isfinite(as_torch[name]).all()
        difference = np.linalg.norm(as_torch[name] - leaf.grad.numpy())
        # A bias before a norm has no gradient but rounding: the bound is also relative to the gradient of all weights.
        if np.linalg.norm(leaf.grad) < 1e-6 * whole:
            assert difference < 1e-6 * whole, name
        else:
            assert note(difference / np.linalg.norm(leaf.grad), "gradient to one of all weights, relative") <= BOUND, (
                name
            )
    for (layer, part), leaf in parts.items():
        found = np.asarray(to_changes[layer][part])
        error = np.linalg.norm(found - leaf.grad.numpy()) / np.linalg.norm(leaf.grad)
        assert note(error, f"gradient to LoRA's {part} of each layer beside torch's, relative") <= BOUND, layer


def changed_attentions(params, seed: int = 4) -> lora.Lora:
    """Changes of every attention, none of them zero."""
    changes = lora.init(params, lora.LoraConfig(), jax.random.key(seed))
    return {
        layer: {"A": pair["A"], "B": jnp.asarray(0.02 * normal(seed + i, *pair["B"].shape))}
        for i, (layer, pair) in enumerate(changes.items())
    }


def test_vmap_of_gradients_is_one_of_each(ours, given):
    """Over noise, embedding, LoRA's changes and guidance scale together; forward mode's is in test_solver_step.py."""
    noise, embeds, negative, weights = given
    unet, config = ours["KandinskyV22Pipeline"].unet, ours["KandinskyV22Pipeline"].scheduler.config
    schedule = kandinsky_jax.DDIMScheduler.from_config(config).schedule(2)
    network, params = diffusion.Network.split(unet)

    def loss(noise, embeds, changes, scale):
        module = network.bind(lora.merged(params, changes))
        cond, uncond = module.condition(embeds), module.condition(negative)
        guider = diffusion.ClassifierFreeGuidance(scale)
        return (diffusion.sample(module, noise, cond, uncond, schedule, guider=guider) * weights).sum()

    def slopes(at):
        return jax.grad(lambda at: loss(*at))(at)

    examples = [
        (jnp.asarray(noise), jnp.asarray(embeds), changed_attentions(params), jnp.float32(1.5)),
        (jnp.asarray(normal(5, *SHAPE)), jnp.asarray(0.5 * embeds), changed_attentions(params, 90), jnp.float32(4.0)),
    ]
    one = jax.jit(slopes)
    found = jax.jit(jax.vmap(slopes))(jax.tree.map(lambda *x: jnp.stack(x), *examples))
    singles = jax.tree.map(lambda *x: np.stack(x), *map(one, examples))
    for own, other in zip(jax.tree.leaves(found), jax.tree.leaves(singles), strict=True):
        for i in range(len(examples)):
            error = np.linalg.norm(own[i] - other[i]) / np.linalg.norm(other[i])
            assert note(error, "vmap of gradients beside single calls, relative") <= BOUND


def test_vmap_over_noise_conditions_and_parameters_is_one_sample_each(ours, given):
    noise, embeds, negative, _ = given
    unet, config = ours["KandinskyV22Pipeline"].unet, ours["KandinskyV22Pipeline"].scheduler.config
    schedule = kandinsky_jax.DDIMScheduler.from_config(config).schedule(2)
    network, params = diffusion.Network.split(unet)
    weight = lora.flat(params)[WEIGHT]

    def sample(noise, embeds, weight, scale):
        module = network.bind(with_weight(params, weight))
        cond, uncond = module.condition(embeds), module.condition(negative)
        guider = diffusion.ClassifierFreeGuidance(scale)
        return diffusion.sample(module, noise, cond, uncond, schedule, guider=guider)

    several = (
        jnp.stack([noise, normal(5, *SHAPE)]),
        jnp.stack([embeds, negative]),
        jnp.stack([weight, 1.1 * weight]),
        jnp.array([1.5, 4.0]),
    )
    one = jax.jit(sample)
    found = jax.jit(jax.vmap(sample))(*several)
    for i in range(2):
        expected = one(*(x[i] for x in several))
        assert np.abs(found[i] - expected).max() <= 1e-4 * np.abs(expected).max()
