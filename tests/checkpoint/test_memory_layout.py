"""Convolution kernels in cuDNN's memory layout, as on GPUs: the same arrays in another order in memory."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from kandinsky_jax import KandinskyV22Pipeline, load_network, make_mesh, save_network
from kandinsky_jax.checkpoint import flat_params, hub, move_network
from kandinsky_jax.diffusion import Network
from kandinsky_jax.diffusion.calls import call
from kandinsky_jax.models import UNet2DConditionModel, VQModel
from kandinsky_jax.parallel import sharding
from tests.conftest import SHAPES_MODEL
from tests.pipelines.test_compile import compilations

DECODER = SHAPES_MODEL / hub.DECODER


@pytest.fixture
def as_on_gpus(monkeypatch):
    monkeypatch.setattr(sharding, "KERNEL_PLATFORMS", frozenset({"cpu"}))


def in_order(module) -> bool:
    """Whether a network's kernels, and no other parameters, have the order of GPUs; all are bound to the device."""
    params = flat_params(module)
    turned = {name for name, x in params.items() if x.format.layout.major_to_minor == (3, 0, 1, 2)}
    assert all(x.committed for x in params.values())
    return turned == {name for name, x in params.items() if x.ndim == 4}


def test_only_on_gpus():
    cpu = SingleDeviceSharding(jax.devices()[0])
    assert sharding.in_memory(cpu, (3, 3, 4, 8)) is cpu
    assert sharding.in_memory(None, (3, 3, 4, 8)) is None


@pytest.mark.slow
def test_networks_keep_their_numbers(as_on_gpus, monkeypatch, tmp_path):
    """Read from safetensors and from Orbax, cast, and moved to a mesh and back."""
    unet = load_network(UNet2DConditionModel, DECODER / "unet", "float32")
    before = {name: np.asarray(x) for name, x in flat_params(unet).items()}
    assert in_order(unet)
    move_network(unet, make_mesh(devices=jax.devices()[:1]))
    assert in_order(unet)
    move_network(unet, None)
    assert in_order(unet)
    save_network(unet, tmp_path / "unet", layout="orbax")
    restored = load_network(UNet2DConditionModel, tmp_path / "unet")
    assert in_order(restored)
    assert in_order(restored.to("float32"))
    monkeypatch.undo()
    plain = load_network(UNet2DConditionModel, DECODER / "unet", "float32")
    for module in (unet, restored, plain):
        assert all(np.array_equal(x, before[name]) for name, x in flat_params(module).items())


def test_lora_keeps_the_order(as_on_gpus):
    pipe = KandinskyV22Pipeline.from_pretrained(DECODER, dtype="float32")
    name = "down_blocks.0.resnets.0.conv1"
    before = np.asarray(flat_params(pipe.unet)[f"{name}.kernel"])
    rng = np.random.default_rng(0)
    down = rng.standard_normal((2, before.shape[2], 3, 3)).astype(np.float32)
    up = rng.standard_normal((before.shape[3], 2, 1, 1)).astype(np.float32)
    pipe.load_lora_weights({f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up})
    added = np.einsum("rihw,or->hwio", down, up[:, :, 0, 0])
    assert np.allclose(flat_params(pipe.unet)[f"{name}.kernel"], before + added, atol=1e-5)
    assert in_order(pipe.unet)
    pipe.unload_lora_weights()
    assert np.array_equal(flat_params(pipe.unet)[f"{name}.kernel"], before)
    assert in_order(pipe.unet)


@pytest.mark.slow
def test_pictures_are_the_same_and_compiled_once(as_on_gpus, monkeypatch):
    latents = np.random.default_rng(0).standard_normal((1, 4, 4, 4)).astype(np.float32)
    turned = Network.split(load_network(VQModel, DECODER / "movq", "float32"))
    monkeypatch.undo()
    plain = Network.split(load_network(VQModel, DECODER / "movq", "float32"))
    first = call(*turned, latents, method="decode")
    with compilations() as events:
        call(*turned, latents, method="decode")
    assert not events
    assert np.allclose(first, call(*plain, latents, method="decode"), atol=1e-5)
