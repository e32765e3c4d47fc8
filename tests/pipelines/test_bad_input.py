"""Wrong arguments: one clear error each, before anything is compiled."""

from __future__ import annotations

import numpy as np
import pytest

from kandinsky_jax import KandinskyV22CombinedPipeline, KandinskyV22Pipeline, SchedulerError
from kandinsky_jax.checkpoint import CheckpointError
from kandinsky_jax.models import UNet2DConditionModel
from kandinsky_jax.models.layers import abstract
from tests.conftest import SHAPES_MODEL, official_config
from tests.pipelines.test_compile import compilations

RED = "a red circle on a blue background"
EMBEDS = np.zeros((2, 64), np.float32)

# arguments of the combined pipeline -> error, and what it must say
COMBINED = [
    ({"prompt": []}, ValueError, "empty list"),
    ({"prompt": 3}, TypeError, "got int"),
    ({"prompt": [RED, None]}, TypeError, r"prompt\[1\]"),
    ({"prompt": b"red"}, TypeError, "got bytes"),
    ({"prompt": RED, "negative_prompt": 5}, TypeError, "negative_prompt"),
    ({"prompt": [RED, RED], "negative_prompt": ["green"]}, ValueError, "1 items for 2 prompts"),
    ({"prompt": RED, "negative_prompt": []}, ValueError, "negative_prompt is an empty list"),
    ({"prompt": RED, "height": 63}, ValueError, "height=63 is too small"),
    ({"prompt": RED, "width": 0}, ValueError, "width=0"),
    ({"prompt": RED, "height": 64.0}, TypeError, "height must be an integer"),
    ({"prompt": RED, "width": "64"}, TypeError, "width must be an integer"),
    ({"prompt": RED, "width": True}, TypeError, "width must be an integer"),
    ({"prompt": RED, "prior_num_inference_steps": 1}, SchedulerError, "takes 2 to 1000"),
    ({"prompt": RED, "num_inference_steps": 0}, SchedulerError, "takes 1 to 1000"),
    ({"prompt": RED, "num_inference_steps": 1001}, SchedulerError, "takes 1 to 1000"),
    ({"prompt": RED, "num_inference_steps": 2.5}, SchedulerError, "must be an integer"),
    ({"prompt": RED, "num_images_per_prompt": 0}, ValueError, "num_images_per_prompt"),
    ({"prompt": RED, "guidance_scale": float("nan")}, ValueError, "guidance_scale"),
    ({"prompt": RED, "prior_guidance_scale": "4"}, ValueError, "guidance_scale"),
    ({"prompt": RED, "latents": np.zeros((1, 63))}, ValueError, r"\(1, 63\), needed is \(1, 64\)"),
    ({"prompt": RED, "negative_prompt": "x", "latents": np.zeros((1, 64))}, ValueError, r"needed is \(2, 64\)"),
    ({"prompt": RED, "latents": np.full((1, 64), np.nan)}, ValueError, "not finite"),
    ({"prompt": RED, "output_type": "jpg"}, ValueError, "output_type='jpg'"),
    ({"prompt": RED, "generator": 1.5}, TypeError, "generator must be"),
    ({"prompt": RED, "generator": [1, 2]}, ValueError, "2 items for 1 images"),
    ({"prompt": RED, "callback_on_step_end": 3}, TypeError, "callable"),
    (
        {"prompt": RED, "callback_on_step_end_tensor_inputs": ["latents", "noise"]},
        ValueError,
        r"\['noise'\]; there are \['latents', 'image_embeds'",
    ),
    ({"prompt": RED, "prior_callback_on_step_end_tensor_inputs": ["mask"]}, ValueError, "text_mask"),
    ({"prompt": RED, "stepps": 3}, TypeError, "stepps"),
]

DECODER = [
    ({"image_embeds": []}, ValueError, "empty list"),
    ({"image_embeds": np.zeros((2, 63))}, ValueError, r"\(2, 63\), needed is \[batch, 64\]"),
    ({"image_embeds": np.zeros(64)}, ValueError, r"needed is \[batch, 64\]"),
    ({"negative_image_embeds": np.zeros((3, 64))}, ValueError, "3 embeddings, image_embeds has 2"),
    ({"negative_image_embeds": None}, ValueError, "guidance_scale is above 1"),
    ({"latents": np.zeros((2, 8, 8, 4))}, ValueError, r"needed is \(2, 4, 8, 8\)"),
    ({"output_type": None}, ValueError, "output_type"),
    ({"image_embeds": np.full((2, 64), np.inf)}, ValueError, "not finite"),
]


@pytest.mark.parametrize(("arguments", "error", "says"), COMBINED)
def test_combined(shapes_pipe, arguments, error, says):
    with compilations() as events, pytest.raises(error, match=says):
        shapes_pipe(**{"height": 64, "width": 64} | arguments)
    assert not events


@pytest.mark.parametrize(("arguments", "error", "says"), DECODER)
def test_decoder(shapes_pipe, arguments, error, says):
    given = {"image_embeds": EMBEDS, "negative_image_embeds": EMBEDS, "height": 64, "width": 64} | arguments
    with compilations() as events, pytest.raises(error, match=says):
        shapes_pipe.decoder_pipe(**given)
    assert not events


def test_callback_returns_nonsense(shapes_pipe):
    one, size = EMBEDS[:1], {"height": 64, "width": 64, "num_inference_steps": 3}
    with pytest.raises(TypeError, match="must return a dict, returned NoneType"):
        shapes_pipe.decoder_pipe(one, one, callback_on_step_end=lambda *_: None, **size)
    with pytest.raises(ValueError, match=r"latents have shape \(2, 4, 8, 8\), needed is \(1, 4, 8, 8\)"):
        shapes_pipe.decoder_pipe(one, one, callback_on_step_end=lambda *_: {"latents": np.zeros((2, 4, 8, 8))}, **size)


def test_long_prompt_is_cut_with_a_warning(shapes_pipe):
    words = " ".join(["red"] * 25)  # three tokens each here: with the start token, 76 of 77
    with pytest.warns(UserWarning, match="this was cut: 'blue circle'"):
        shapes_pipe.prior_pipe(f"{words} blue circle", num_inference_steps=2, generator=0)


def test_wrong_components(shapes_pipe):
    parts = shapes_pipe.decoder_pipe.components
    with pytest.raises(TypeError, match="movq must be a VQModel of kandinsky_jax, got UNet2DConditionModel"):
        KandinskyV22Pipeline(**parts | {"movq": parts["unet"]})
    with pytest.raises(TypeError, match="has no component"):
        KandinskyV22Pipeline.from_pretrained(SHAPES_MODEL, unett=parts["unet"])


@pytest.mark.parametrize(
    ("repository", "right"),
    [
        ("kandinsky-2-2-decoder-inpaint", "KandinskyV22InpaintPipeline"),
        ("kandinsky-2-2-controlnet-depth", "KandinskyV22ControlnetPipeline"),
    ],
)
def test_wrong_kind_of_decoder(shapes_pipe, repository, right):
    with pytest.raises(CheckpointError, match=f"load it with {right}"):
        KandinskyV22Pipeline.from_pretrained(SHAPES_MODEL / repository)
    unet = abstract(UNet2DConditionModel, UNet2DConditionModel.CONFIG.from_dict(official_config(repository, "unet")))
    with pytest.raises(CheckpointError, match=right):
        KandinskyV22Pipeline(**shapes_pipe.decoder_pipe.components | {"unet": unet})


def test_prior_is_no_decoder():
    with pytest.raises(CheckpointError, match="holds a KandinskyV22PriorPipeline"):
        KandinskyV22CombinedPipeline.from_pretrained(SHAPES_MODEL / "kandinsky-2-2-prior")
