"""What a server loads: the modes that are asked for, or those that the model has."""

from __future__ import annotations

import shutil

import pytest

from kandinsky_jax.checkpoint import CheckpointError, hub
from kandinsky_jax.serve.requests import ImageRequest, RequestError
from kandinsky_jax.serve.served_model import ServedModel
from kandinsky_jax.serve.server_settings import ServerSettings
from tests.serve.servers import tiny

TINY = hub.EMBEDDED["tiny"]


def test_the_modes_that_are_asked_for_and_no_others():
    assert ServedModel.load("tiny", modes=["generate"]).modes == ("generate",)
    assert ServedModel.load("tiny", modes=["vary", "inpaint"]).modes == ("inpaint", "vary")
    assert len(ServedModel.load("tiny").modes) == 7
    pipe = ServedModel.load("tiny", modes=["generate"]).pipe("generate")
    with pytest.raises(ValueError, match="no pipeline for inpaint; those given are for generate, img2img, mix, vary"):
        ServedModel([pipe], "tiny", modes=["inpaint"])


def test_a_model_that_is_not_there_is_said_as_elsewhere(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="is not a folder here, no embedded model"):
        ServedModel.load("nosuch")
    with pytest.raises(CheckpointError, match="is not a folder here, no embedded model"):
        ServedModel.load("n" * 5000)
    with pytest.raises(CheckpointError, match=r"has no model_index\.json"):
        ServedModel.load(tmp_path)
    with pytest.raises(CheckpointError, match="holds a KandinskyV22PriorPipeline, which is no decoder"):
        ServedModel.load("tiny/kandinsky-2-2-prior")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="is not in the Hub's cache"):
        ServedModel.load("no/such")


def test_a_family_may_lack_modes_but_none_may_be_damaged(tmp_path):
    for member in (hub.PRIOR, hub.DECODER, hub.INPAINT):
        shutil.copytree(TINY / member, tmp_path / member)
    assert ServedModel.load(tmp_path).modes == ("generate", "img2img", "inpaint", "mix", "vary")
    assert ServedModel.load(tmp_path / hub.INPAINT).modes == ("inpaint",)
    with pytest.raises(CheckpointError, match="no subfolder kandinsky-2-2-controlnet-depth"):
        ServedModel.load(tmp_path, modes=["controlnet"])
    (tmp_path / hub.INPAINT / "model_index.json").write_text("{damaged")
    with pytest.raises(CheckpointError, match=hub.INPAINT):
        ServedModel.load(tmp_path)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"height": 100, "width": 100}, "size", "size 100x100 is not served; needed are multiples of 64"),
        ({"height": 64, "width": 65}, "size", "size 65x64 is not served; needed are multiples of"),
        ({"guidance_scale": -5.0}, "guidance_scale", "guidance_scale is -5; needed is a number from 0 to 100"),
        ({"prior_guidance_scale": 101.0}, "prior_guidance_scale", "needed is a number from 0 to 100"),
    ],
)
def test_values_that_are_refused(fields, param, message):
    with pytest.raises(RequestError, match=message) as raised:
        tiny().complete(ImageRequest(prompt="heart", **fields), ServerSettings(any_size=True))
    assert raised.value.param == param


@pytest.mark.parametrize("weight", [1e300, -101.0])
def test_weights_that_would_overflow_are_refused(weight):
    mix = ImageRequest(mode="mix", items=("a", "b"), weights=(0.5, weight))
    with pytest.raises(RequestError, match=r"a weight of the mix is .*; needed is a number from -100 to 100") as raised:
        tiny().complete(mix, ServerSettings())
    assert raised.value.param == "weights"


def test_a_request_without_a_size_has_one_that_is_served():
    wide = ServerSettings(sizes=((64, 128), (128, 64)))
    request = tiny().complete(ImageRequest(prompt="heart"), wide)
    assert (request.height, request.width) == (64, 128) == tiny().usual_size("generate", wide)
    own = ServerSettings(sizes=((64, 128), (64, 64)))
    assert tiny().usual_size("generate", own) == tiny().usual_size("generate", ServerSettings()) == (64, 64)


def test_a_server_without_lora_files_says_how_to_have_some():
    with pytest.raises(RequestError, match=r"there is no LoRA 'x'; this server has none \(its --lora-folder\)"):
        tiny().complete(ImageRequest(prompt="heart", loras={"x": 1.0}), ServerSettings())


def test_a_size_that_is_not_served_is_as_the_client_wrote_it():
    with pytest.raises(RequestError, match=r"^size 100x128 is not served; there are 64x64 \(the server's --size\)$"):
        tiny().complete(ImageRequest(prompt="heart", width=100, height=128), ServerSettings())
