"""Single networks and schedulers load and save as in diffusers and transformers."""

from __future__ import annotations

import json

import diffusers
import numpy as np
import pytest
import torch

import kandinsky_jax
from kandinsky_jax import CheckpointError, CLIPTextModelWithProjection, PriorTransformer
from kandinsky_jax.checkpoint import flat_params, hub
from tests.conftest import SHAPES_MODEL, quick_and_slow

PRIOR = SHAPES_MODEL / hub.PRIOR


@pytest.mark.parametrize("where", [{"name": PRIOR, "subfolder": "prior"}, {"name": PRIOR / "prior"}], ids=str)
def test_a_network_from_its_folder_and_back(where, tmp_path):
    network = PriorTransformer.from_pretrained(where.pop("name"), **where, torch_dtype=torch.float32)
    assert {str(array.dtype) for array in flat_params(network).values()} == {"float32"}
    network.save_pretrained(tmp_path, variant="fp16", push_to_hub=False)
    theirs = diffusers.PriorTransformer.from_pretrained(tmp_path, variant="fp16")
    assert np.array_equal(flat_params(network)["proj_in.bias"], theirs.proj_in.bias.detach().numpy())
    network.save_config(tmp_path / "config")
    assert diffusers.PriorTransformer.load_config(tmp_path / "config")["_class_name"] == "PriorTransformer"
    with pytest.raises(TypeError, match="hf upload"):
        network.save_pretrained(tmp_path, push_to_hub=True)


def test_an_embedded_network():
    network = CLIPTextModelWithProjection.from_pretrained(
        f"tiny/{hub.PRIOR}", subfolder="text_encoder", dtype="float16"
    )
    assert {str(array.dtype) for array in flat_params(network).values()} == {"float16"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"subfolder": "nothing"}, "has no folder nothing; it has image_encoder, "),
        ({"subfolder": "prior", "variant": "fp16"}, "has no files of the variant 'fp16'"),
        ({}, "config.json is missing"),
    ],
    ids=str,
)
def test_a_network_that_is_not_there(arguments, says):
    with pytest.raises(CheckpointError, match=says):
        PriorTransformer.from_pretrained(PRIOR, **arguments)


def test_a_scheduler_of_a_model(tmp_path):
    decoder = SHAPES_MODEL / hub.DECODER
    scheduler = kandinsky_jax.DDPMScheduler.from_pretrained(decoder, subfolder="scheduler", clip_sample=True)
    assert scheduler.clip_sample
    scheduler.save_config(tmp_path)
    assert kandinsky_jax.DDPMScheduler.from_pretrained(tmp_path) == scheduler


@pytest.mark.parametrize("name", quick_and_slow(("prior", "text_encoder", "image_encoder"), "text_encoder"))
def test_a_network_of_random_weights(name, tmp_path):
    cls = {"prior": PriorTransformer, "text_encoder": CLIPTextModelWithProjection}.get(name)
    cls = cls or kandinsky_jax.CLIPVisionModelWithProjection
    config = cls.load_config(PRIOR, subfolder=name)
    network = cls.from_config(config)
    loaded = cls.from_pretrained(PRIOR, subfolder=name)
    assert network.config == loaded.config
    ours, theirs = flat_params(network), flat_params(loaded)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    same, other = cls.from_config(network.config, seed=0), cls.from_config(network.config, seed=1)
    first = max(ours, key=lambda key: ours[key].size)
    assert np.array_equal(flat_params(same)[first], ours[first])
    assert not np.array_equal(flat_params(other)[first], ours[first])
    assert json.loads(network.to_json_string()) == network.config.to_dict()
    network.to_json_file(tmp_path / "config.json")
    assert cls.from_config(json.loads((tmp_path / "config.json").read_text())).config == network.config
    with pytest.raises(kandinsky_jax.ConfigError, match="colour='red' is a field this version does not know"):
        cls.from_config(config, colour="red")
