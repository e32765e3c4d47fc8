"""Wrong arguments of further modes: one clear error each, before anything is compiled."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from kandinsky_jax import (
    CheckpointError,
    KandinskyV22CombinedPipeline,
    KandinskyV22ControlnetCombinedPipeline,
    KandinskyV22ControlnetPipeline,
    KandinskyV22Img2ImgCombinedPipeline,
    KandinskyV22Img2ImgPipeline,
    KandinskyV22InpaintCombinedPipeline,
    KandinskyV22InpaintPipeline,
    KandinskyV22Pipeline,
    SchedulerError,
)
from tests.conftest import SHAPES_MODEL
from tests.pipelines.test_compile import compilations

RED = "a red circle on a blue background"
PICTURE = Image.new("RGB", (80, 70), (200, 30, 30))
MASK = Image.linear_gradient("L")
HINT = np.zeros((3, 64, 64), np.float32)
GIVEN = {
    "Img2Img": {"image": PICTURE},
    "Inpaint": {"image": PICTURE, "mask_image": MASK},
    "Controlnet": {"hint": HINT},
    "ControlnetImg2Img": {"image": PICTURE, "hint": HINT},
}

# mode, arguments, error, and what it must say
WRONG = [
    ("Img2Img", {"strength": 0}, ValueError, "strength must be a number above 0 and at most 1, got 0"),
    ("Img2Img", {"strength": 1.01}, ValueError, "at most 1, got 1.01"),
    ("Img2Img", {"strength": -0.3}, ValueError, "got -0.3"),
    ("Img2Img", {"strength": float("nan")}, ValueError, "got nan"),
    ("Img2Img", {"strength": "0.3"}, ValueError, "got '0.3'"),
    (
        "Img2Img",
        {"strength": 0.1, "num_inference_steps": 9},
        ValueError,
        "strength=0.1 of num_inference_steps=9 leaves",
    ),
    ("ControlnetImg2Img", {"strength": 0.0}, ValueError, "strength must be"),
    ("Img2Img", {"image": None}, TypeError, "image must be a PIL picture.*got NoneType"),
    ("Img2Img", {"image": []}, ValueError, "image is an empty list"),
    ("Img2Img", {"image": [PICTURE, PICTURE]}, ValueError, "image has 2 pictures for 1 prompts"),
    ("Img2Img", {"image": np.full((64, 64, 3), np.nan)}, ValueError, "image has numbers that are not finite"),
    ("Img2Img", {"image": "missing.png"}, ValueError, "there is no file missing.png"),
    ("Img2Img", {"image": __file__}, ValueError, "cannot be read as a picture"),
    ("Img2Img", {"height": 63}, ValueError, "height=63 is too small"),
    ("Img2Img", {"num_inference_steps": 0}, SchedulerError, "takes 1 to 1000"),
    ("Img2Img", {"mask_image": MASK}, TypeError, "mask_image"),
    ("Img2Img", {"callback": print, "callback_on_step_end": print}, ValueError, "not both"),
    ("Img2Img", {"callback": 3}, TypeError, "callback must be callable"),
    ("Img2Img", {"callback": print, "callback_steps": 0}, ValueError, "callback_steps must be an integer"),
    ("Inpaint", {"mask_image": None}, TypeError, "mask_image must be a PIL picture"),
    ("Inpaint", {"mask_image": np.full((64, 64), 1.2)}, ValueError, "mask_image has values from 1.2.*0 to 1"),
    ("Inpaint", {"mask_image": np.full((64, 64), -0.2)}, ValueError, "mask_image has values from -0.2"),
    ("Inpaint", {"mask_image": [MASK] * 3}, ValueError, "mask_image has 3 pictures for 1 prompts"),
    ("Inpaint", {"image": [PICTURE, np.full((8, 8, 3), 7.0)]}, ValueError, r"image\[1\] has values from 7 to 7"),
    ("Inpaint", {"paste_back": True, "output_type": "latent"}, ValueError, "paste_back works on pixels"),
    ("Inpaint", {"callback_on_step_end_tensor_inputs": ["hint"]}, ValueError, "masked_image"),
    ("Inpaint", {"strength": 0.5}, TypeError, "strength"),
    ("Controlnet", {"hint": None}, TypeError, "hint must be a PIL picture"),
    ("Controlnet", {"hint": np.zeros((3, 64, 32))}, ValueError, "hint has 64x32 pixels"),
    ("Controlnet", {"hint": np.full((3, 64, 64), 7.0)}, ValueError, "hint has values from 7 to 7"),
    ("Controlnet", {"hint": np.zeros((2, 3, 64, 64))}, ValueError, "hint has 2 pictures for 1 prompts"),
    ("Controlnet", {"hint": np.full((64, 64), np.nan)}, ValueError, "not finite"),
]


@pytest.mark.parametrize(("mode", "arguments", "error", "says"), WRONG)
def test_combined(ours, mode, arguments, error, says):
    pipe = ours[f"KandinskyV22{mode}CombinedPipeline"]
    given = {"prompt": RED, "height": 64, "width": 64} | GIVEN[mode] | arguments
    with compilations() as events, pytest.raises(error, match=says):
        pipe(**given)
    assert not events


EMBEDS = np.zeros((3, 64), np.float32)
DECODER = [
    (
        "Img2Img",
        {"image": [PICTURE, PICTURE]},
        "2 pictures for 3 prompts with num_images_per_prompt=2; needed are 1 or 3 or 6",
    ),
    ("Img2Img", {"negative_image_embeds": None}, "guidance_scale is above 1"),
    ("Inpaint", {"mask_image": [MASK] * 4}, "mask_image has 4 pictures"),
    ("Inpaint", {"latents": np.zeros((3, 4, 8, 8))}, r"needed is \(6, 4, 8, 8\)"),
    ("Controlnet", {"hint": np.zeros((2, 3, 64, 64))}, "hint has 2 pictures"),
    ("Controlnet", {"image_embeds": np.zeros((3, 63))}, r"needed is \[batch, 64\]"),
]


@pytest.mark.parametrize(("mode", "arguments", "says"), DECODER)
def test_decoder(ours, mode, arguments, says):
    given = {"image_embeds": EMBEDS, "negative_image_embeds": EMBEDS, "num_images_per_prompt": 2}
    with compilations() as events, pytest.raises(ValueError, match=says):
        ours[f"KandinskyV22{mode}Pipeline"](**given | {"height": 64, "width": 64} | GIVEN[mode] | arguments)
    assert not events


@pytest.mark.parametrize("name", ["KandinskyV22PriorPipeline", "KandinskyV22PriorEmb2EmbPipeline"])
@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"weights": [0.5]}, ValueError, "images_and_prompts has 2 items, weights has 1"),
        ({"images_and_prompts": [], "weights": []}, ValueError, "empty list"),
        ({"images_and_prompts": "a red circle"}, TypeError, "images_and_prompts must be a list, got str"),
        ({"weights": 1.0}, TypeError, "weights must be a list, got float"),
        ({"weights": [0.5, float("nan")]}, ValueError, r"weights\[1\] must be a finite number"),
        ({"weights": [0.5, "x"]}, ValueError, r"weights\[1\]"),
        ({"images_and_prompts": [RED, 3]}, TypeError, r"images_and_prompts\[1\] must be a PIL picture"),
        ({"images_and_prompts": [RED, np.zeros((2, 8, 8, 3))]}, ValueError, r"\[1\] has 2 pictures"),
        ({"images_and_prompts": [RED, np.full((8, 8, 3), np.nan)]}, ValueError, "not finite"),
        ({"images_and_prompts": [RED, np.full((1, 3, 64, 64), np.nan)]}, ValueError, "not finite"),
        ({"negative_prompt": None}, TypeError, "negative_prompt must be a string, got NoneType"),
        ({"negative_prompt": ["red", "blue"]}, TypeError, "negative_prompt must be a string, got list"),
        ({"negative_prior_prompt": ["red", "blue"]}, ValueError, "negative_prompt has 2 items for 1 prompts"),
        ({"num_inference_steps": 1}, SchedulerError, "takes 2 to 1000"),
        ({"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt"),
    ],
)
def test_interpolate(ours, name, arguments, error, says):
    given = {"images_and_prompts": [RED, PICTURE], "weights": [0.5, 0.5]} | arguments
    with compilations() as events, pytest.raises(error, match=says):
        ours[name].interpolate(**given)
    assert not events


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"strength": 0}, ValueError, "strength must be"),
        ({"strength": 0.01}, ValueError, "leaves no step"),
        ({"image": None}, TypeError, "image is None"),
        ({"image": np.zeros((2, 63))}, ValueError, r"needed is \[batch, 64\]"),
        ({"image": [PICTURE] * 3}, ValueError, "image has 3 pictures for 2 prompts"),
        ({"image": np.full((2, 64), np.nan)}, ValueError, "not finite"),
        ({"prompt": []}, ValueError, "empty list"),
        ({"output_type": "pil"}, ValueError, "output_type='pil'"),
        ({"generator": [1]}, ValueError, "1 items for 2 images"),
    ],
)
def test_emb2emb(ours, arguments, error, says):
    with compilations() as events, pytest.raises(error, match=says):
        ours["KandinskyV22PriorEmb2EmbPipeline"](**{"prompt": [RED, RED], "image": PICTURE} | arguments)
    assert not events


@pytest.mark.parametrize(
    ("pipeline", "checkpoint", "right"),
    [
        (KandinskyV22Pipeline, "decoder-inpaint", "KandinskyV22InpaintPipeline"),
        (KandinskyV22CombinedPipeline, "decoder-inpaint", "KandinskyV22InpaintPipeline"),
        (KandinskyV22Img2ImgPipeline, "decoder-inpaint", "KandinskyV22InpaintPipeline"),
        (KandinskyV22Img2ImgCombinedPipeline, "controlnet-depth", "KandinskyV22ControlnetPipeline"),
        (KandinskyV22InpaintPipeline, "decoder", "KandinskyV22Pipeline"),
        (KandinskyV22InpaintCombinedPipeline, "decoder", "KandinskyV22Pipeline"),
        (KandinskyV22ControlnetPipeline, "decoder", "KandinskyV22Pipeline"),
        (KandinskyV22ControlnetCombinedPipeline, "decoder", "KandinskyV22Pipeline"),
        (KandinskyV22ControlnetPipeline, "prior", "KandinskyV22PriorPipeline"),
    ],
)
def test_the_wrong_checkpoint(pipeline, checkpoint, right):
    """Also: a decoder without a hint encoder given a hint, for only controlnet pipelines take one."""
    with compilations() as events, pytest.raises(CheckpointError, match=f"load it with {right} or "):
        pipeline.from_pretrained(SHAPES_MODEL / f"kandinsky-2-2-{checkpoint}")
    assert not events


def test_a_decoder_takes_no_hint(shapes_pipe):
    with pytest.raises(TypeError, match="hint"):
        shapes_pipe(RED, hint=HINT)
    with pytest.raises(CheckpointError, match="type 'image', which KandinskyV22ControlnetPipeline cannot use"):
        KandinskyV22ControlnetPipeline(**shapes_pipe.decoder_pipe.components)
