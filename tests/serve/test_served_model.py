"""What a server loads: the modes that are asked for, or those that the model has."""

from __future__ import annotations

import shutil

import pytest

from kandinsky_jax.checkpoint import CheckpointError, hub
from kandinsky_jax.serve.served_model import ServedModel

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
