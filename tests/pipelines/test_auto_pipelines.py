"""Choice of classes by the AutoPipelines, and loading of the UNet for another task."""

from __future__ import annotations

import json

import numpy as np
import pytest

import kandinsky_jax as kj
from kandinsky_jax import CheckpointError
from kandinsky_jax.checkpoint import hub
from tests.conftest import SHAPES_MODEL


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        (SHAPES_MODEL, "KandinskyV22Pipeline"),
        ("tiny/kandinsky-2-2-prior", "KandinskyV22PriorPipeline"),
        (SHAPES_MODEL / hub.CONTROLNET, "KandinskyV22ControlnetPipeline"),
    ],
    ids=str,
)
def test_diffusion_pipeline_gives_the_class_that_the_index_names(name, cls):
    pipe = kj.DiffusionPipeline.from_pretrained(name, dtype="float32")
    assert type(pipe).__name__ == cls
    assert isinstance(pipe, kj.DiffusionPipeline)


def test_diffusion_pipeline_refuses_other_models(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(CheckpointError, match="holds a StableDiffusionPipeline, which is not a pipeline"):
        kj.DiffusionPipeline.from_pretrained(tmp_path)


def test_the_older_name_of_the_prior():
    assert kj.KandinskyPriorPipeline is kj.KandinskyV22PriorPipeline
    with pytest.raises(ImportError):
        from kandinsky_jax import KandinskyV30Pipeline  # noqa: F401


@pytest.fixture(scope="module")
def text2img():
    return kj.KandinskyV22CombinedPipeline.from_pretrained(SHAPES_MODEL, dtype="float32")


@pytest.mark.parametrize(
    ("auto", "cls", "channels"),
    [
        ("AutoPipelineForText2Image", "KandinskyV22CombinedPipeline", 4),
        ("AutoPipelineForImage2Image", "KandinskyV22Img2ImgCombinedPipeline", 4),
        ("AutoPipelineForInpainting", "KandinskyV22InpaintCombinedPipeline", 9),
    ],
)
def test_from_pipe_keeps_components_and_finds_the_unet(text2img, auto, cls, channels):
    found = getattr(kj, auto).from_pipe(text2img)
    assert type(found).__name__ == cls
    assert found.unet.config.in_channels == channels
    kept = ["movq", "scheduler", "prior_prior", "prior_text_encoder"] + ["unet"] * (channels == 4)
    assert all(getattr(found, name) is getattr(text2img, name) for name in kept)
    back = kj.AutoPipelineForText2Image.from_pipe(found)
    assert back.unet.config.in_channels == 4
    assert back.movq is text2img.movq


def test_from_pipe_of_a_decoder_alone_and_with_a_unet_that_is_given(text2img, ours):
    unet = ours["KandinskyV22InpaintPipeline"].unet
    found = kj.AutoPipelineForInpainting.from_pipe(text2img.decoder_pipe, unet=unet)
    assert type(found) is kj.KandinskyV22InpaintPipeline
    assert found.unet is unet


def test_from_pipe_asks_for_the_unet_if_there_is_no_sibling(ours):
    """These pipelines were made of components, from nowhere."""
    says = (
        r"or AutoPipelineForImage2Image, or give one: AutoPipelineForInpainting.from_pipe\(pipe, unet=KandinskyV22Inp"
    )
    with pytest.raises(CheckpointError, match=says) as caught:
        kj.AutoPipelineForInpainting.from_pipe(ours["KandinskyV22CombinedPipeline"])
    assert len(str(caught.value)) < 500


def test_from_pipe_converts(ours):
    pipe = kj.KandinskyV22Pipeline.from_pretrained(SHAPES_MODEL, dtype="float32")
    assert kj.AutoPipelineForImage2Image.from_pipe(pipe, torch_dtype="bfloat16").dtype.name == "bfloat16"
    assert pipe.dtype.name == "bfloat16"  # the networks are shared, as in diffusers
    assert np.dtype(ours["KandinskyV22Pipeline"].dtype) == np.float32
