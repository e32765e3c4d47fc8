"""Each network compared with its PyTorch twin, on small random models that pass through the converter.

The twin is saved by its own library and loaded by ours, so that names, layouts and configurations are under test
too. Sizes are odd on purpose: official shapes hide a mixed-up pair of axes or a width taken from the wrong block.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from kandinsky_jax.checkpoint import flat_params, load_network, save_network
from kandinsky_jax.diffusion import Network
from kandinsky_jax.diffusion.calls import call
from kandinsky_jax.models import NETWORKS
from tests.conftest import nchw, nhwc, worst

BOUND = 1e-4

TEXT = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 3, "intermediate_size": 40}
TEXTS = {
    "gelu, legacy end token": {"hidden_act": "gelu", "eos_token_id": 2, "projection_dim": 20, "vocab_size": 50},
    "quick_gelu, end token pads": {"hidden_act": "quick_gelu", "eos_token_id": 7, "pad_token_id": 7, "vocab_size": 11},
    "one wide head": {"num_attention_heads": 1, "num_hidden_layers": 1, "eos_token_id": 0, "layer_norm_eps": 1e-3},
}
VISION = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 3, "intermediate_size": 40}
VISIONS = {
    "gelu": {"hidden_act": "gelu", "image_size": 20, "patch_size": 4, "projection_dim": 16},
    "quick_gelu, cut edge": {"image_size": 22, "patch_size": 5, "num_hidden_layers": 1, "projection_dim": 28},
    "one patch": {"image_size": 8, "patch_size": 8, "num_attention_heads": 2, "layer_norm_eps": 1e-3},
}
PRIOR = {"num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 3, "embedding_dim": 20, "num_embeddings": 9}
PRIORS = {
    "default widths": {},
    "own widths": {"time_embed_dim": 28, "embedding_proj_dim": 12, "clip_embed_dim": 32, "num_layers": 1},
    "wide heads": {"num_attention_heads": 2, "attention_head_dim": 16, "num_embeddings": 4, "clip_embed_dim": 20},
}
RES, CROSS = (
    ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
    ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D"),
)
UNETS = {
    "2 blocks of 3 layers": {
        "kinds": (CROSS, RES),
        "block_out_channels": (16, 24),
        "layers_per_block": 3,
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "time_embedding_dim": 28,
        "norm_eps": 1e-3,
    },
    "3 blocks, 9 channels": {
        "kinds": (RES, CROSS, CROSS),
        "block_out_channels": (32, 48, 16),
        "layers_per_block": 1,
        "norm_num_groups": 16,
        "attention_head_dim": 16,
        "in_channels": 9,
    },
    "4 blocks": {
        "kinds": (RES, CROSS, RES, CROSS),
        "block_out_channels": (8, 16, 24, 40),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "out_channels": 4,
    },
    "hint": {
        "kinds": (RES, CROSS),
        "block_out_channels": (24, 16),
        "layers_per_block": 2,
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "in_channels": 8,
        "addition_embed_type": "image_hint",
    },
}
PLAIN, ATTN = ("DownEncoderBlock2D", "UpDecoderBlock2D"), ("AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D")
MOVQS = {
    "2 blocks": {"kinds": (ATTN, PLAIN), "block_out_channels": (32, 64), "layers_per_block": 2, "norm_num_groups": 8},
    "3 blocks, no codebook width": {
        "kinds": (PLAIN, PLAIN, ATTN),
        "block_out_channels": (64, 32, 96),
        "layers_per_block": 1,
        "norm_num_groups": 16,
        "vq_embed_dim": None,
        "latent_channels": 3,
    },
    "4 blocks": {
        "kinds": (PLAIN, ATTN, PLAIN, PLAIN),
        "block_out_channels": (32, 32, 64, 32),
        "layers_per_block": 1,
        "norm_num_groups": 32,
    },
}


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Random values for every parameter, also those that start as zeros or ones, at scales that keep signals alive."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and name == "weight":
                noise *= parameter[0].numel() ** -0.5
            elif name == "weight" and parameter.ndim == 1:
                noise = 1 + 0.3 * noise
            parameter.data = noise
    return model.eval()


def _mirrored(kinds: tuple[tuple[str, str], ...]) -> dict[str, tuple[str, ...]]:
    """The types of blocks going down, and their partners coming up."""
    return {"down_block_types": tuple(d for d, _ in kinds), "up_block_types": tuple(u for _, u in kinds[::-1])}


def build(kind: str, config: dict[str, Any]) -> torch.nn.Module:
    """The reference's model of a kind of network."""
    config = dict(config)
    if kind == "text":
        config = TEXT | {"max_position_embeddings": 13, "projection_dim": 16, "vocab_size": 30} | config
        return transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config))
    if kind == "vision":
        return transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION | config))
    if kind == "prior":
        return diffusers.PriorTransformer(**PRIOR | config)
    blocks = _mirrored(config.pop("kinds"))
    if kind == "movq":
        common = {"latent_channels": 4, "num_vq_embeddings": 50, "norm_type": "spatial"}
        return diffusers.VQModel(**common | blocks | config)
    common = {
        "in_channels": 4,
        "out_channels": 8,
        "cross_attention_dim": 12,
        "encoder_hid_dim": 20,
        "encoder_hid_dim_type": "image_proj",
        "addition_embed_type": "image",
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "resnet_time_scale_shift": "scale_shift",
    }
    return diffusers.UNet2DConditionModel(**common | blocks | config)


def twins(kind: str, config: dict[str, Any], folder: Path) -> tuple[Any, Any]:
    """A randomised PyTorch model, and ours loaded from what it saved."""
    reference = randomise(build(kind, config))
    reference.save_pretrained(folder)
    return reference, load_network(NETWORKS[type(reference).__name__], folder)


def meaning(reference: Any) -> dict[str, Any]:
    """A PyTorch model's configuration, defaults included, without what only tells where it came from."""
    diffusers_own = isinstance(reference, diffusers.ModelMixin)
    text = reference.to_json_string() if diffusers_own else reference.config.to_json_string(use_diff=False)
    origin = {"architectures", "dtype", "transformers_version"}
    return {k: v for k, v in json.loads(text).items() if not k.startswith("_") and k not in origin}


def jitted(module: nnx.Module, *args: Any, method: str = "__call__") -> Any:
    arrays = [jnp.asarray(x.numpy()) if isinstance(x, torch.Tensor) else x for x in args]
    return call(*Network.split(module), *arrays, method=method)


# Block lists whose programs take long to compile: in the slow suite.
LONG = (
    "3 blocks, 9 channels",
    "4 blocks",
    "3 blocks, no codebook width",
    "2 blocks of 3 layers",
    "2 blocks",
    "wide heads",
)


def cases(configs: dict[str, dict[str, Any]]) -> Any:
    return pytest.mark.parametrize("config", configs.values(), ids=configs.keys())


def alternate_batch(configs: dict[str, dict[str, Any]]) -> Any:
    """Each configuration, alternately with one row and with three: a compilation is what takes the time here."""
    values = [
        pytest.param(config, (1, 3)[i % 2], id=name, marks=pytest.mark.slow if name in LONG else ())
        for i, (name, config) in enumerate(configs.items())
    ]
    return pytest.mark.parametrize(("config", "batch"), values)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@cases(TEXTS)
@pytest.mark.parametrize(("batch", "length"), [(1, 13), (3, 8)])
def test_clip_text(config, batch, length, tmp_path):
    reference, ours = twins("text", config, tmp_path)
    ids = torch.randint(3, reference.config.vocab_size, (batch, length))
    # Each row has its end token, the largest id for the legacy kind, at another place; others may follow.
    end = config["eos_token_id"] if config["eos_token_id"] != 2 else reference.config.vocab_size - 1
    ids[ids == end] = 3
    for row in range(batch):
        ids[row, 2 + row :: 3] = end
    expected, got = reference(ids), jitted(ours, ids)
    assert worst(got.text_embeds, expected.text_embeds) <= BOUND
    assert worst(got.last_hidden_state, expected.last_hidden_state) <= BOUND


@cases(VISIONS)
@pytest.mark.parametrize("batch", [1, 3])
def test_clip_vision(config, batch, tmp_path):
    reference, ours = twins("vision", config, tmp_path)
    side = reference.config.image_size
    pixels = torch.randn(batch, 3, side, side)
    assert worst(jitted(ours, nhwc(pixels)), reference(pixels).image_embeds) <= BOUND


@alternate_batch(PRIORS)
def test_prior(config, batch, tmp_path):
    reference, ours = twins("prior", config, tmp_path)
    tokens, dim = reference.config.num_embeddings, reference.config.embedding_dim
    pooled = torch.randn(batch, config.get("embedding_proj_dim", dim))
    hidden = torch.randn(batch, tokens, dim)
    mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (batch, 1))
    condition = jitted(ours, pooled, hidden, mask, method="condition")
    # The same cache serves whatever step and noisy embedding come along.
    for timestep in (torch.arange(batch) * 311 + 7, torch.full((batch,), 999), torch.zeros(batch, dtype=torch.long)):
        noisy = torch.randn(batch, dim)
        expected = reference(noisy, timestep, pooled, hidden, mask).predicted_image_embedding
        got = jitted(ours, noisy, timestep, condition)
        assert worst(got, expected) <= BOUND
    finished = jitted(ours, got, method="post_process_latents")
    assert worst(finished, reference.post_process_latents(expected)) <= BOUND


@alternate_batch(UNETS)
def test_unet(config, batch, tmp_path):
    reference, ours = twins("unet", config, tmp_path)
    hinted = "addition_embed_type" in config
    height, width = (2 ** len(config["kinds"]) * n for n in (1, 2))
    sample = torch.randn(batch, config.get("in_channels", 4) - 4 * hinted, height, width)
    timestep = torch.arange(batch) * 311 + 7
    added = {"image_embeds": torch.randn(batch, 20)}
    if hinted:
        added["hint"] = torch.rand(batch, 3, 8 * height, 8 * width)
    expected = reference(sample, timestep, encoder_hidden_states=None, added_cond_kwargs=added).sample
    condition = jitted(ours, added["image_embeds"], *(nhwc(x) for x in list(added.values())[1:]), method="condition")
    assert worst(nchw(jitted(ours, nhwc(sample), timestep, condition)), expected) <= BOUND


@alternate_batch(MOVQS)
def test_movq(config, batch, tmp_path):
    reference, ours = twins("movq", config, tmp_path)
    factor = ours.config.scale_factor
    pixels = torch.randn(batch, 3, 3 * factor, 2 * factor)
    expected = reference.encode(pixels).latents
    assert worst(nchw(jitted(ours, nhwc(pixels), method="encode")), expected) <= BOUND

    latents = torch.randn(batch, ours.config.latent_channels, 3, 2)
    expected = reference.decode(latents, force_not_quantize=True).sample
    assert worst(nchw(jitted(ours, nhwc(latents), method="decode")), expected) <= BOUND


def test_movq_decodes_through_its_codebook(tmp_path):
    reference, ours = twins("movq", MOVQS["2 blocks"] | {"layers_per_block": 1}, tmp_path)
    latents = torch.randn(3, 4, 3, 2)
    network, params = Network.split(ours)
    decoded = jax.jit(lambda params, x: network.bind(params).decode(x, force_not_quantize=False))
    expected = reference.decode(latents, force_not_quantize=False).sample
    assert worst(nchw(decoded(params, nhwc(latents))), expected) <= BOUND


SOME_OF_EACH = [
    *(("text", config) for config in TEXTS.values()),
    ("vision", VISIONS["quick_gelu, cut edge"]),
    ("prior", PRIORS["default widths"]),
    ("prior", PRIORS["own widths"]),
    ("unet", UNETS["2 blocks of 3 layers"]),
    ("unet", UNETS["hint"]),
    ("movq", MOVQS["2 blocks"]),
    ("movq", MOVQS["3 blocks, no codebook width"]),
]


@pytest.mark.parametrize(("kind", "config"), SOME_OF_EACH, ids=[kind for kind, _ in SOME_OF_EACH])
def test_export_loads_in_the_reference(kind, config, tmp_path):
    reference, ours = twins(kind, config, tmp_path / "theirs")
    save_network(ours, tmp_path / "ours", "diffusers")
    again, info = type(reference).from_pretrained(tmp_path / "ours", output_loading_info=True, dtype=torch.float32)
    assert not any(info.values())
    expected, got = reference.state_dict(), again.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    # Tensors do not show an activation, an epsilon or a number of groups: the configuration must come back too.
    assert meaning(again) == meaning(reference)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "config"), SOME_OF_EACH[2:8], ids=[kind for kind, _ in SOME_OF_EACH[2:8]])
def test_orbax_round_trip(kind, config, tmp_path):
    _, ours = twins(kind, config, tmp_path / "theirs")
    save_network(ours, tmp_path / "ours", "orbax")
    again = load_network(type(ours), tmp_path / "ours")
    expected, got = flat_params(ours), flat_params(again)
    assert again.config == ours.config
    assert got.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name], strict=True)
