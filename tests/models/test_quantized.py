"""Quantized layers: sums of integers, and a TPU's program that really holds them; configurations of others refused."""

from __future__ import annotations

import dataclasses
import json
import re
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from kandinsky_jax import ConfigError, PriorTransformer, UNet2DConditionModel, VQModel
from kandinsky_jax.diffusion import Network
from kandinsky_jax.models.convolution import upsample_nearest
from kandinsky_jax.models.layers import abstract, conv, dtype_of, linear
from kandinsky_jax.models.quantization_config import DTYPES, QuantizationConfig
from kandinsky_jax.models.quantized import (
    QuantizedConv,
    QuantizedLinear,
    dequantize_weight,
    input_scale,
    layers_to_ignore,
    quantize_weight,
    quantized_layers,
)
from tests.conftest import SHAPES_MODEL

STATIC, DYNAMIC = QuantizationConfig(), QuantizationConfig(dynamic=True)
KINDS = ("decoder", "decoder-inpaint", "controlnet-depth")


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def numpy_inputs(x: np.ndarray, layer, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The integers that stand for an input, less the zero point, and their scale."""
    if layer.input_scale is None:
        scale, zero = np.abs(x).max(axes, keepdims=True) / np.float32(127), 0
    else:
        scale = np.asarray(layer.input_scale[...]).reshape((1,) * x.ndim)
        zero = int(layer.input_zero_point[...][0])
    integers = np.clip(np.round(x * (np.float32(1) / scale)) + zero, -128, 127).astype(np.int64)
    return integers - zero, scale


def set_input(layer, low: float, high: float, config: QuantizationConfig) -> None:
    """Set what calibration finds."""
    if layer.input_scale is not None:
        width, zero = input_scale(low, high, config)
        layer.input_scale.set_value(jnp.full(1, width, jnp.float32))
        if layer.input_zero_point is not None:
            layer.input_zero_point.set_value(jnp.full(1, zero, jnp.int8))


@pytest.mark.parametrize("config", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_a_linear_layer_sums_integers(config):
    full = linear(40, 24, nnx.Rngs(0))
    full.bias.set_value(random(24))
    layer = QuantizedLinear(full, config)
    set_input(layer, -0.5, 2.5, config)  # cuts off what is beyond
    x = random(5, 7, 40, seed=1)
    integers, scale = numpy_inputs(np.asarray(x), layer, (2,))
    assert layer.weight.dtype == jnp.int8
    sums = integers @ np.asarray(layer.weight[...], np.int64).T
    expected = sums * scale * np.asarray(layer.weight_scale[...])[:, 0] + np.asarray(full.bias[...])
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)
    if config is DYNAMIC:
        assert np.abs(layer(x) - full(x)).max() < 0.03 * np.asarray(full(x)).std()


@pytest.mark.parametrize("config", [STATIC, DYNAMIC], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "options", [{}, {"kernel": 1}, {"stride": 2, "padding": ((0, 1), (0, 1))}, {"bias": False}], ids=str
)
def test_a_convolution_sums_integers(options, config):
    full = conv(16, 24, nnx.Rngs(0), **options)
    layer = QuantizedConv(full, config)
    set_input(layer, -0.5, 2.5, config)
    x = random(2, 8, 6, 16, seed=1)
    integers, scale = numpy_inputs(np.asarray(x), layer, (1, 2, 3))
    plain = conv(16, 24, nnx.Rngs(0), **options | {"bias": False})
    plain.kernel.set_value(layer.kernel[...].astype(jnp.float32))
    sums = np.asarray(plain(jnp.asarray(integers, jnp.float32)))  # exact: at most 9 * 16 * 255 * 127 < 2^24
    expected = sums * scale * np.asarray(layer.weight_scale[...]).reshape(-1)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(layer(x, doubled=True), layer(upsample_nearest(x)))
    if config is DYNAMIC:
        assert np.abs(layer(x) - full(x)).max() < 0.1 * np.asarray(full(x)).std()


def test_bfloat16_goes_in_and_comes_out():
    layer = QuantizedLinear(linear(40, 24, nnx.Rngs(0)), DYNAMIC)
    assert layer(random(3, 40).astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert layer.weight_scale.dtype == jnp.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_input_of_zeros_is_no_nan(dtype):
    layer = QuantizedConv(conv(8, 8, nnx.Rngs(0)), QuantizationConfig(dtype, dynamic=True))
    assert np.array_equal(layer(jnp.zeros((1, 4, 4, 8))), np.zeros((1, 4, 4, 8)))


@pytest.mark.parametrize("config", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_a_picture_is_the_same_in_any_batch(config):
    layer = QuantizedConv(conv(8, 8, nnx.Rngs(0)), config)
    x = random(4, 4, 4, 8) * jnp.arange(1, 5)[:, None, None, None]
    assert np.array_equal(layer(x)[2:3], layer(x[2:3]))


def test_float8_rounds_as_its_dtype_does():
    full = linear(40, 24, nnx.Rngs(0), bias=False)
    layer = QuantizedLinear(full, QuantizationConfig("float8_e4m3fn"))
    set_input(layer, -1.0, 4.48, QuantizationConfig("float8_e4m3fn"))
    assert layer.input_zero_point is None
    x = random(5, 40, seed=1)
    rounded = np.clip(np.asarray(x) * np.float32(1 / np.float32(0.01)), -448, 448).astype(ml_dtypes.float8_e4m3fn)
    weight = np.asarray(layer.weight[...])
    assert weight.dtype == ml_dtypes.float8_e4m3fn
    expected = rounded.astype(np.float32) @ dequantize_weight(weight, np.asarray(layer.weight_scale[...]), 0).T * 0.01
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(layer(x) - full(x)).max() < 0.3 * np.asarray(full(x)).std()


@pytest.mark.parametrize("outputs", [0, 3])
def test_a_weight_is_rounded_by_half_a_step_at_most(outputs):
    weight = random(3, 3, 8, 8) * jnp.arange(1, 9)
    value, scale, each = quantize_weight(weight, "int8", outputs)
    back = dequantize_weight(np.asarray(value), np.asarray(scale), outputs)
    steps = np.asarray(scale).reshape([-1 if axis == outputs else 1 for axis in range(4)])
    assert (np.abs(back - weight) / steps).max() <= 0.5 + 1e-4
    assert scale.shape == (weight.shape[outputs], 1, 1, 1)
    others = tuple(axis for axis in range(4) if axis != outputs)
    assert np.array_equal(each, np.asarray(value, np.int64).sum(others))


@pytest.mark.parametrize("config", [STATIC, QuantizationConfig("float8_e4m3fn")], ids=["int8", "float8"])
def test_a_range_is_held_with_zero_in_it(config):
    bounds = (-128, 127) if config is STATIC else (-448, 448)
    for low, high in ((-0.28, 5.0), (-3.0, 3.0), (1.0, 2.0), (-2.0, -1.0), (0.0, 1e-3)):
        scale, zero = input_scale(low, high, config)
        for end in (low, high, 0.0):
            assert bounds[0] - 1 <= round(end / scale) + zero <= bounds[1] + 1
        assert (max(high, 0) - min(low, 0)) / scale > 250
    assert input_scale(0.0, 0.0, config) == input_scale(0.0, np.inf, config) == (1.0, 0)


# Networks ---------------------------------------------------------------------------------------------------------


def described(cls, folder: str, config: QuantizationConfig | None = STATIC):
    """A network of the model of shapes without arrays, quantized by the rule of its class."""
    path = SHAPES_MODEL / f"kandinsky-2-2-{folder}" / "config.json"
    full = abstract(cls, cls.CONFIG.from_dict(json.loads(path.read_text())))
    if config is None:
        return full
    config = dataclasses.replace(config, ignore=layers_to_ignore(full))
    return abstract(cls, dataclasses.replace(full.config, quantization_config=config))


def calls_of(folder: str):
    """A described network, a call of all its quantized layers, and the shapes of the call's arguments."""
    shape = jax.ShapeDtypeStruct
    if folder.endswith("movq"):
        return described(VQModel, folder), lambda movq, x: movq.decode(x), (shape((1, 8, 8, 4), jnp.float32),)
    if folder.endswith("prior"):
        network = described(PriorTransformer, folder)
        config = network.config
        texts = (config.embedding_dim, (config.num_embeddings, config.embedding_dim), (config.num_embeddings,))
        condition = condition_of(network, *(shape((1, *np.atleast_1d(part)), jnp.float32) for part in texts))
        sample = shape((1, config.embedding_dim), jnp.float32)
        return network, lambda prior, *args: prior(*args), (sample, shape((), jnp.int32), condition)
    network = described(UNet2DConditionModel, folder)
    extra = network.config.in_channels - 4
    given = [shape((1, network.config.encoder_hid_dim), jnp.float32)]
    if network.config.takes_hint:
        given += [shape((1, 64, 64, 3), jnp.float32)]
    elif extra:
        given += [None, shape((1, 8, 8, extra), jnp.float32)]

    def whole(unet, sample, timestep, *given):
        return unet(sample, timestep, unet.condition(*given))

    return network, whole, (shape((1, 8, 8, 4), jnp.float32), shape((), jnp.int32), *given)


def condition_of(network, *arguments):
    structure, params = Network.split(network)
    return jax.eval_shape(lambda params, *args: structure.bind(params).condition(*args), params, *arguments)


@pytest.mark.parametrize("folder", [*(f"{kind}/unet" for kind in KINDS), "prior/prior", "decoder/movq"])
def test_a_tpu_program_holds_a_product_of_integers_for_each_layer(folder):
    network, function, arguments = calls_of(folder)
    structure, params = Network.split(network)

    def run(params, *args):
        return function(structure.bind(params), *args)

    with jax.default_matmul_precision("highest"):  # as around networks in float32
        text = jax.jit(run).trace(params, *arguments).lower(lowering_platforms=("tpu",)).as_text()
    found = {}
    for kind in ("convolution", "dot_general"):
        lines = re.findall(rf"stablehlo\.{kind}.*", text)
        found[kind] = [line for line in lines if "xi8>" in line]
        assert all(re.search(r"xi8>.*xi8>.*-> tensor<[^>]*xi32>", line) for line in found[kind])
        assert not any("HIGHEST" in line for line in found[kind])
    layers = [layer for _, layer in quantized_layers(network)]
    assert len(found["convolution"]) == sum(isinstance(layer, QuantizedConv) for layer in layers) > 0 or (
        folder == "prior/prior" and not found["convolution"]
    )
    assert len(found["dot_general"]) == sum(isinstance(layer, QuantizedLinear) for layer in layers) > 0


def test_the_dtype_of_a_network_is_that_of_what_is_not_quantized():
    network = described(UNet2DConditionModel, "decoder/unet")
    assert dtype_of(network) == network.dtype == jnp.float32


def test_layers_by_rule():
    unet = described(UNet2DConditionModel, "decoder/unet")
    names = dict(quantized_layers(unet))
    assert "down_blocks.0.resnets.0.conv1" in names
    assert not {"conv_in", "conv_out", "time_embedding.linear_1", "add_embedding.image_proj"} & names.keys()
    assert not any(name.startswith("encoder_hid_proj") for name in names)
    movq = dict(quantized_layers(described(VQModel, "decoder/movq")))
    assert all(name.startswith("decoder.") for name in movq)
    assert not any("conv_y" in name or "conv_b" in name or "conv_in" in name for name in movq)
    prior = dict(quantized_layers(described(PriorTransformer, "prior/prior")))
    assert all(name.startswith("transformer_blocks.") for name in prior)


# Configurations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_configuration_comes_back_from_its_file(dtype, dynamic):
    config = QuantizationConfig(dtype, dynamic, ("conv_in", "conv_out"))
    assert QuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_what_is_off_may_stand_beside_it():
    raw = STATIC.to_dict() | {"kv_cache_scheme": None, "sparsity_config": {}, "quantization_status": "frozen"}
    raw["config_groups"]["group_0"] |= {"output_activations": None}
    raw["config_groups"]["group_0"]["weights"] |= {"group_size": None, "observer": "minmax"}
    assert QuantizationConfig.from_dict(raw) == STATIC


def changed(path: str, value: object) -> dict:
    raw = json.loads(json.dumps(STATIC.to_dict()))
    *parents, last = path.split("/")
    part = raw
    for name in parents:
        part = part[name]
    part[last] = value
    return raw


GROUP = "config_groups/group_0"


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (changed("quant_method", "gptq"), r"quant_method='gptq' is not supported, only 'compressed-tensors'"),
        (changed(f"{GROUP}/weights/num_bits", 4), r"weights\.num_bits=4 is not supported, only 8"),
        (changed(f"{GROUP}/weights/num_bits", 8.0), r"num_bits=8\.0 is not supported"),
        (changed(f"{GROUP}/weights/strategy", "group"), r"weights\.strategy='group' is not supported"),
        (changed(f"{GROUP}/weights/symmetric", False), r"symmetric=False is not supported, only True"),
        (changed(f"{GROUP}/input_activations/symmetric", True), r"input_activations\.symmetric=True is not supported"),
        (changed(f"{GROUP}/input_activations", None), "input_activations must be an object, got None"),
        (changed(f"{GROUP}/targets", ["Linear"]), "targets="),
        (changed(f"{GROUP}/output_activations", {"num_bits": 8}), r"output_activations=.* is not supported"),
        (changed("config_groups/group_1", {"targets": []}), r"group_1=.* is not supported"),
        (changed("ignore", "conv_in"), "ignore must be a list of layers' names, got 'conv_in'"),
        (changed("ignore", [1]), "ignore must be a list"),
        ([], "quantization_config must be an object"),
        ("int8", "quantization_config must be an object"),
    ],
    ids=range(14),
)
def test_another_scheme_is_refused_in_a_sentence(raw, says):
    full = described(PriorTransformer, "prior/prior", None).config.to_dict()
    with pytest.raises(ConfigError, match=rf"^FILE describes a PriorTransformer .*{says}"):
        PriorTransformer.CONFIG.from_dict(full | {"quantization_config": raw}, "FILE")


def test_layers_that_are_not_there_are_named():
    config = described(PriorTransformer, "prior/prior", None).config
    wrong = dataclasses.replace(config, quantization_config=QuantizationConfig(ignore=("nothing",)))
    with pytest.raises(ConfigError, match="ignore names no layers of the network: nothing"):
        abstract(PriorTransformer, wrong)


def test_without_qwix_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ImportError, match=r"need qwix .*: pip install 'kandinsky-jax\[quantize\]'"):
        described(PriorTransformer, "prior/prior")
    described(PriorTransformer, "prior/prior", None)


def test_a_configuration_without_it_is_written_as_before():
    config = described(PriorTransformer, "prior/prior", None).config
    assert "quantization_config" not in config.to_dict()
