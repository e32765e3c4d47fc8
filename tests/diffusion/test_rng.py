"""Noise: `TorchGenerator` compared with torch, and the guarantees of `generator` for each image."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from kandinsky_jax.diffusion.rng import DECODER_STREAM, PRIOR_STREAM, TorchGenerator, noise_source

SHAPE = (5, 3, 4)  # of one picture, NHWC
STEPS = 4


draw = jax.jit(lambda noise, step, shape: noise(step, shape), static_argnums=2)


def noises(
    generator, images: int, use: int = DECODER_STREAM, batches: int = 1, uses_noise=(True,) * STEPS
) -> np.ndarray:
    """All noise of a job: `[batches, 1 + STEPS, images, *SHAPE]`, the first latents and then each step."""
    source = noise_source(generator, images, use)
    shape = (images, *SHAPE)
    first = source.initial(shape, batches)
    steps = source.steps(0, STEPS, np.array(uses_noise), shape, batches)
    rows = [[x, *(draw(noise, i, shape) for i in range(STEPS))] for x, noise in zip(first, steps, strict=True)]
    return np.array(rows)


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**32 + 5, 2**63 + 11])
@pytest.mark.parametrize(
    "shapes",
    [
        [(1,), (3,), (3, 5), (2, 1)],  # below 16: one by one, an odd one left over for the next draw
        [(16,), (2, 4, 8, 8)],
        [(17,), (3, 7, 5), (31,)],  # the last 16 drawn afresh
        [(5,), (16,), (2,), (33,), (1,), (1, 1280), (7,)],  # the one left over outlives a long draw
    ],
    ids=["short", "whole blocks", "tails", "mixed"],
)
def test_torch_generator_is_torch(seed, shapes):
    ours, theirs = TorchGenerator(seed), torch.Generator("cpu").manual_seed(seed)
    for shape in shapes:
        got = ours.randn(*shape)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, torch.randn(shape, generator=theirs), rtol=0, atol=5e-7)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, None, "7"])
def test_torch_generator_wants_a_seed(seed):
    with pytest.raises(ValueError, match=r"seed must be an integer from 0 to 2\*\*64 - 1"):
        TorchGenerator(seed)


@pytest.mark.parametrize("batches", [1, 2])
def test_one_torch_generator_gives_the_noise_of_diffusers(batches):
    uses_noise = (True, False, True, True)
    got = noises(TorchGenerator(7), 3, batches=batches, uses_noise=uses_noise)
    theirs, (h, w, c) = torch.Generator("cpu").manual_seed(7), SHAPE
    for i, used in enumerate((True, *uses_noise)):  # a step without noise leaves the stream alone
        if used:
            rows = randn_tensor((batches * 3, c, h, w), generator=theirs).numpy().transpose(0, 2, 3, 1)
            np.testing.assert_allclose(got[:, i], rows.reshape(batches, 3, *SHAPE), rtol=0, atol=5e-7)


def test_listed_torch_generators_give_the_noise_of_diffusers():
    got = noises([TorchGenerator(seed) for seed in (7, 8)], 2)[0]
    theirs, (h, w, c) = [torch.Generator("cpu").manual_seed(seed) for seed in (7, 8)], SHAPE
    for row in got:
        expected = randn_tensor((2, c, h, w), generator=theirs).numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(row, expected, rtol=0, atol=5e-7)


def test_torch_generator_goes_on_from_call_to_call():
    generator, theirs = TorchGenerator(7), torch.Generator("cpu").manual_seed(7)
    for use in (PRIOR_STREAM, DECODER_STREAM):
        got = np.asarray(noise_source(generator, 2, use).initial((2, 6))[0])
        np.testing.assert_allclose(got, torch.randn((2, 6), generator=theirs), rtol=0, atol=5e-7)


def test_an_image_is_the_same_in_any_batch():
    one, three, five = (noises(7, images, batches=2) for images in (1, 3, 5))
    np.testing.assert_array_equal(five[:, :, :1], one)
    np.testing.assert_array_equal(five[:, :, :3], three)


@pytest.mark.parametrize("make", [int, TorchGenerator, lambda seed: [TorchGenerator(seed), TorchGenerator(9)]])
def test_slices_of_steps_do_not_change_the_noise(make):
    uses_noise, shape = np.array([True, False, False, True]), (2, *SHAPE)
    source = noise_source(make(7), 2, DECODER_STREAM)
    source.initial(shape)
    whole = noises(make(7), 2, uses_noise=uses_noise)[0, 1:]
    for first, count in ((0, 1), (1, 2), (3, 1)):
        [noise] = source.steps(first, count, uses_noise, shape)
        for i in range(first, first + count):
            np.testing.assert_array_equal(draw(noise, i, shape), whole[i])


def test_no_two_steps_share_noise():
    """Images, steps, batches and the two uses of one seed: all different, and standard normal."""
    draws = np.concatenate([noises(7, 3, use, batches=2).reshape(-1, *SHAPE) for use in (PRIOR_STREAM, DECODER_STREAM)])
    assert len(np.unique(draws.reshape(len(draws), -1)[:, 0])) == len(draws) == 2 * 2 * (1 + STEPS) * 3
    assert abs(draws.mean()) < 0.05
    assert abs(draws.std() - 1) < 0.05


def test_seeds_and_keys_are_the_same_thing():
    expected = noises(7, 3)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(7), i))(jnp.arange(3))
    for same in (np.int64(7), jax.random.key(7), jax.random.PRNGKey(7), keys):
        np.testing.assert_array_equal(noises(same, 3), expected)
    for other in (8, 2**32 + 7):
        assert (noises(other, 3) != expected).all()


def test_a_list_gives_each_image_as_the_first_of_its_own_job():
    together = noises([7, jax.random.key(11), 7], 3)
    for image, seed in enumerate((7, 11, 7)):
        np.testing.assert_array_equal(together[:, :, image : image + 1], noises(seed, 1))


def test_no_generator_is_a_fresh_seed():
    assert (noises(None, 1) != noises(None, 1)).all()


@pytest.mark.parametrize(
    ("generator", "error", "message"),
    [
        (True, TypeError, "must be an int, .* got bool"),
        (1.5, TypeError, "must be an int, .* got float"),
        ("7", TypeError, "must be an int, .* got str"),
        (-1, ValueError, "generator=-1 is not a seed"),
        (2**63, ValueError, f"generator={2**63} is not a seed"),
        ([1, -2], ValueError, "generator=-2 is not a seed"),
        ([1, 2, 3], ValueError, "lists 3 items for 2 images"),
        ([1, True], TypeError, "a list of such, or None, got bool"),
        ([1, TorchGenerator(1)], TypeError, "or None, got TorchGenerator"),
        (jnp.array(7.0), TypeError, "array of float32"),
        (jnp.array(7), TypeError, "array of int32"),
        (jax.random.split(jax.random.key(0), 3), ValueError, r"keys of shape \(3,\), needed is one key or \(2,\)"),
    ],
)
def test_bad_generators(generator, error, message):
    with pytest.raises(error, match=message):
        noise_source(generator, 2, DECODER_STREAM)


def test_what_a_noise_source_does_not_take():
    for generator in (0, TorchGenerator(0), [TorchGenerator(0), TorchGenerator(1)]):
        with pytest.raises(ValueError, match=r"shape is \[3, 8\]; needed is \[2, ...\]"):
            noise_source(generator, 2, DECODER_STREAM).initial((3, 8))
        assert noise_source(generator, 2, DECODER_STREAM).initial([2, 8])[0].shape == (2, 8)
    with pytest.raises(ValueError, match=r"use must be PRIOR_STREAM or DECODER_STREAM .*, got 'decoder'"):
        noise_source(0, 2, "decoder")
