"""A `torch.Generator` gives the same numbers as in diffusers, or is refused."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from kandinsky_jax import TorchGenerator
from kandinsky_jax.diffusion.rng import DECODER_STREAM, PRIOR_STREAM, from_torch, noise_source


def first(generator, images: int = 1) -> np.ndarray:
    return np.asarray(noise_source(generator, images, DECODER_STREAM).initial((images, 32))[0])


@pytest.mark.parametrize("seed", [0, 43, 2**32 + 5, -1])
def test_a_fresh_one_is_the_stream_of_its_seed(seed):
    expected = torch.randn(1, 32, generator=torch.Generator().manual_seed(seed)).numpy()
    np.testing.assert_allclose(first(torch.Generator("cpu").manual_seed(seed)), expected, atol=1e-6)


def test_one_that_was_never_seeded_has_the_default_seed():
    np.testing.assert_allclose(first(torch.Generator()), torch.randn(1, 32, generator=torch.Generator()), atol=1e-6)


def test_it_goes_on_from_call_to_call():
    """As from the prior to the decoder in diffusers; seeded again, it starts again."""
    generator, reference = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    for use in (PRIOR_STREAM, DECODER_STREAM):
        [ours] = noise_source(generator, 2, use).initial((2, 32))
        np.testing.assert_allclose(ours, torch.randn(2, 32, generator=reference), atol=1e-6)
    generator.manual_seed(7)
    np.testing.assert_allclose(first(generator), first(TorchGenerator(7)))


def test_one_for_each_image():
    found = first([torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)], 2)
    assert np.array_equal(found, first([TorchGenerator(1), TorchGenerator(2)], 2))


def test_a_used_one_is_refused():
    used = torch.Generator().manual_seed(3)
    torch.randn(1, generator=used)
    with pytest.raises(
        ValueError, match=r"has been used since manual_seed\(3\); give a fresh one, or .*TorchGenerator\(3"
    ):
        from_torch(used)
    ours_and_theirs = torch.Generator().manual_seed(3)
    first(ours_and_theirs)
    torch.randn(1, generator=ours_and_theirs)
    with pytest.raises(ValueError, match="has been used"):
        first([ours_and_theirs, ours_and_theirs], 2)


@pytest.mark.parametrize(
    "generator", [np.random.default_rng(0), np.random.RandomState(0), random.Random(0)], ids=lambda g: type(g).__name__
)
def test_generators_of_other_libraries_are_refused(generator):
    with pytest.raises(TypeError, match=r"makes no images here; give a seed, such as int\(rng.integers"):
        noise_source(generator, 1, PRIOR_STREAM)
