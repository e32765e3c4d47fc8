"""MoVQ decodes a large batch in groups on GPUs, for memory, and all at once elsewhere."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from kandinsky_jax import load_network
from kandinsky_jax.checkpoint import hub
from kandinsky_jax.diffusion import Network
from kandinsky_jax.diffusion.calls import call
from kandinsky_jax.models import VQModel, movq
from tests.conftest import SHAPES_MODEL


@pytest.mark.parametrize(("batch", "most", "size"), [(16, 4, 4), (6, 4, 3), (7, 4, 1), (3, 4, 3), (5, 1, 1)])
def test_groups_divide_the_batch(batch, most, size):
    assert movq.group_size(batch, most) == size


def test_groups_keep_the_order_of_the_batch():
    batch = np.arange(12.0).reshape(6, 2)
    assert np.array_equal(
        movq.in_groups(lambda x: x * 2 + x.mean(axis=1, keepdims=True), 2, batch)[:, 0], batch[:, 0] * 3 + 0.5
    )


@pytest.mark.slow
def test_pictures_in_groups_are_those_of_one_batch(monkeypatch):
    monkeypatch.setattr(movq, "GROUP_PIXELS", 2 * 16 * 16)
    network, params = Network.split(load_network(VQModel, SHAPES_MODEL / hub.DECODER / "movq", "float32"))
    side = 16 // network.bind(params).config.scale_factor
    latents = np.random.default_rng(0).standard_normal((4, side, side, 4)).astype(np.float32)

    def decode(latents):
        return network.bind(params).decode_in_groups(latents)

    program = jax.jit(decode).trace(latents)
    assert "stablehlo.while" in program.lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.while" not in program.lower(lowering_platforms=("cpu",)).as_text()
    whole = call(network, params, latents, method="decode")
    by_twos = jax.jit(lambda x: movq.in_groups(network.bind(params).decode, 2, x))(latents)
    assert np.allclose(whole, by_twos, atol=1e-4)
