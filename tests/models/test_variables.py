"""The walk over a network finds what Flax finds, and a changed network is split anew."""

from __future__ import annotations

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kandinsky_jax import models
from kandinsky_jax.checkpoint import flat_params, hub, load_network, set_params
from kandinsky_jax.diffusion import Network
from kandinsky_jax.models import with_attention
from kandinsky_jax.models.layers import abstract
from kandinsky_jax.models.structure import structure
from tests.conftest import SHAPES_MODEL, official_config

NETWORKS = {
    "unet": (models.UNet2DConditionModel, hub.CONTROLNET),
    "movq": (models.VQModel, hub.DECODER),
    "prior": (models.PriorTransformer, hub.PRIOR),
    "text_encoder": (models.CLIPTextModelWithProjection, hub.PRIOR),
    "image_encoder": (models.CLIPVisionModelWithProjection, hub.PRIOR),
}


def load(name: str) -> nnx.Module:
    cls, repository = NETWORKS[name]
    return load_network(cls, SHAPES_MODEL / repository / name)


def assert_split_as_by_flax(module: nnx.Module) -> Network:
    network, params = Network.split(module)
    graphdef, state = nnx.split(module)
    assert network.graphdef == graphdef
    expected = nnx.to_pure_dict(state)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    assert all(map(lambda x, y: x is y, jax.tree.leaves(params), jax.tree.leaves(expected)))
    return network


@pytest.mark.parametrize("name", NETWORKS)
def test_the_walk_finds_what_flax_finds(name):
    module = load(name)
    found = structure(module)
    expected = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(module))}
    assert found.variables.keys() == expected
    assert found.plain, "else Flax looks at it at every call"
    assert assert_split_as_by_flax(module) is assert_split_as_by_flax(module)


def test_parameters_come_in_the_order_of_flax():
    """Digests of weights depend on it; the official prior has more than ten blocks."""
    module = abstract(
        models.PriorTransformer, models.PriorTransformer.CONFIG.from_dict(official_config(hub.PRIOR, "prior"))
    )
    expected = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param))]
    assert list(flat_params(module)) == expected


def test_new_arrays_are_the_parameters_of_the_same_network():
    module = load("prior")
    before = Network.split(module)[0]
    set_params(module, {name: x + 1 for name, x in flat_params(module).items()})
    assert assert_split_as_by_flax(module) is before


def replace_a_block(module):
    module.mid_block.resnets[0] = load("unet").mid_block.resnets[1]
    module.mid_block.resnets[0].scale_of_mine = 2.0


def add_a_parameter(module):
    module.mid_block.extra = nnx.Param(jnp.zeros(3))


def remove_a_parameter(module):
    module.conv_in.bias = None


def add_an_array(module):
    module.mid_block.table = jnp.zeros(3)


def tie_two_layers(module):
    module.mid_block.resnets[1].conv1.kernel = module.mid_block.resnets[0].conv1.kernel


def add_a_node_of_another_kind(module):
    module.mid_block.mine = nnx.Dict(table=nnx.Param(jnp.zeros(3)))


def change_the_type_of_a_variable(module):
    module.conv_in.bias = nnx.BatchStat(module.conv_in.bias.get_value())


def change_a_constant(module):
    module.conv_norm_out.epsilon = 1e-3


CHANGES = [
    replace_a_block,
    add_a_parameter,
    remove_a_parameter,
    add_an_array,
    tie_two_layers,
    add_a_node_of_another_kind,
    change_the_type_of_a_variable,
    change_a_constant,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_network_is_another(change):
    module = load("unet")
    before = assert_split_as_by_flax(module)
    change(module)
    assert assert_split_as_by_flax(module) != before


def test_layers_that_were_tied_part_again():
    module = load("unet")
    first, second = (module.mid_block.resnets[i].conv1 for i in range(2))
    own = second.kernel
    second.kernel = first.kernel
    assert_split_as_by_flax(module)
    set_params(module, {name: x + 1 for name, x in flat_params(module).items()})
    np.testing.assert_array_equal(second.kernel[...], first.kernel[...])
    second.kernel = own
    assert_split_as_by_flax(module)


def test_a_copy_with_another_attention_is_another_network():
    module = load("unet")
    before = assert_split_as_by_flax(module)
    assert assert_split_as_by_flax(with_attention(module, lambda name, q, k, v, *rest: v)) != before


def test_a_block_that_was_replaced_is_not_kept():
    module = load("unet")
    Network.split(module)
    gone = weakref.ref(module.mid_block)
    module.mid_block = load("unet").mid_block
    gc.collect()
    assert gone() is None


def test_what_was_split_is_not_kept():
    module = load("text_encoder")
    module.mine = module.eval  # refers to the network itself
    Network.split(module)
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


def test_references_and_hooks_are_read_as_by_flax():
    module = load("unet")
    network, params = Network.split(module)
    kernel, bias = module.conv_in.kernel, module.conv_in.bias
    kernel.set_raw_value(jax.new_ref(kernel.get_value() + 1))
    bias.set_metadata("on_get_value", lambda _, array: array + 2)
    again, found = Network.split(module)
    assert again is network, "else Flax looks at it at every call"
    np.testing.assert_array_equal(found["conv_in"]["kernel"], params["conv_in"]["kernel"] + 1)
    np.testing.assert_array_equal(found["conv_in"]["bias"], params["conv_in"]["bias"] + 2)
