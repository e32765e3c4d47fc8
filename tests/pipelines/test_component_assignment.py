"""Components that are assigned must be ours, are converted if that is exact, or are refused at once."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
import transformers

import kandinsky_jax
from kandinsky_jax import CheckpointError
from kandinsky_jax.checkpoint import hub
from tests.conftest import SHAPES_MODEL

CONVERTED = ["DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "LCMScheduler", "UnCLIPScheduler"]


@pytest.fixture
def pipe(ours):
    return kandinsky_jax.KandinskyV22CombinedPipeline.from_pipe(ours["KandinskyV22CombinedPipeline"])


@pytest.mark.parametrize("name", CONVERTED)
def test_a_scheduler_of_diffusers_becomes_ours(pipe, name):
    theirs = getattr(diffusers, name)(num_train_timesteps=900)
    pipe.scheduler = theirs
    assert type(pipe.scheduler) is getattr(kandinsky_jax, name)
    assert pipe.decoder_pipe.scheduler is pipe.scheduler
    for field in pipe.scheduler.fields():
        if field.name in theirs.config:
            ours, reference = getattr(pipe.scheduler, field.name), theirs.config[field.name]
            assert ours == (tuple(reference) if isinstance(reference, list) else reference)


def test_it_does_so_wherever_one_is_given(pipe):
    theirs = diffusers.DDIMScheduler.from_config(dict(pipe.scheduler.config))
    decoder = pipe.decoder_pipe
    for found in (
        kandinsky_jax.KandinskyV22Pipeline(unet=pipe.unet, movq=pipe.movq, scheduler=theirs),
        kandinsky_jax.KandinskyV22Pipeline.from_pipe(decoder, scheduler=theirs),
        kandinsky_jax.KandinskyV22Pipeline.from_pretrained(
            SHAPES_MODEL, scheduler=theirs, unet=pipe.unet, movq=pipe.movq
        ),
    ):
        assert found.scheduler == kandinsky_jax.DDIMScheduler.from_config(theirs.config)
    pipe.register_modules(scheduler=theirs)
    assert type(pipe.scheduler) is kandinsky_jax.DDIMScheduler


def test_a_converted_scheduler_gives_the_references_images(ours, theirs):
    embeds = ours["KandinskyV22PriorPipeline"]("a red circle", num_inference_steps=4, generator=0, output_type="np")
    size = {"height": 64, "width": 64, "num_inference_steps": 6, "output_type": "np"}
    reference = theirs["KandinskyV22Pipeline"]
    scheduler = diffusers.DDPMScheduler.from_config(reference.scheduler.config, timestep_spacing="trailing")
    expected = diffusers.KandinskyV22Pipeline(**reference.components | {"scheduler": scheduler})
    expected.set_progress_bar_config(disable=True)
    tensors = {name: torch.tensor(array) for name, array in embeds.items()}
    found = kandinsky_jax.KandinskyV22Pipeline.from_pipe(ours["KandinskyV22Pipeline"])
    found.scheduler = scheduler
    difference = np.abs(
        found(**embeds, generator=torch.Generator().manual_seed(1), **size).images
        - expected(**tensors, generator=torch.Generator().manual_seed(1), **size).images
    )
    assert difference.max() * 255 <= 4


def test_an_image_processor_of_transformers_becomes_ours(ours):
    prior = ours["KandinskyV22PriorPipeline"]
    folder = SHAPES_MODEL / hub.PRIOR / "image_processor"
    theirs = transformers.CLIPImageProcessor.from_pretrained(folder)
    assert kandinsky_jax.KandinskyV22PriorPipeline.from_pipe(prior, image_processor=theirs).image_processor == (
        prior.image_processor
    )


def test_a_network_that_went_through_torch_compile_is_the_network(pipe):
    unet = pipe.unet
    with pytest.warns(UserWarning, match=r"torch.compile\(unet\) has no effect here"):
        pipe.unet = torch.compile(unet, mode="reduce-overhead", fullgraph=True)
    assert pipe.unet is unet


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        (
            "scheduler",
            diffusers.DDPMScheduler,
            "the class diffusers.* not an instance; write pipe.scheduler = kandinsky_",
        ),
        ("scheduler", diffusers.FlowMatchEulerDiscreteScheduler(), "diffusers' FlowMatchEulerDiscreteScheduler cannot"),
        (
            "prior_scheduler",
            None,
            r"got None; write pipe.prior_scheduler = kandinsky_jax.*\(pipe.prior_scheduler.config",
        ),
        ("movq", diffusers.VQModel(), r"got a diffusers.*VQModel; .*load_network\(VQModel, FOLDER\)"),
        ("unet", "a path", "unet must be a UNet2DConditionModel of kandinsky_jax, got str"),
        ("unet", lambda x: x, "got function; networks are compiled by XLA already, so leave wrappers out"),
        ("prior_image_encoder", 3, "prior_image_encoder must be a CLIPVisionModelWithProjection"),
        ("prior_tokenizer", "gpt2", "prior_tokenizer must be a CLIPTokenizer"),
    ],
)
def test_anything_else_is_refused_at_once(pipe, name, value, says):
    before = getattr(pipe, name)
    with pytest.raises(TypeError, match=says) as caught:
        setattr(pipe, name, value)
    assert len(str(caught.value)) < 500
    assert getattr(pipe, name) is before


def test_a_unet_for_another_mode_is_refused_at_once(pipe, ours):
    before = pipe.unet
    with pytest.raises(
        CheckpointError, match="which KandinskyV22Pipeline cannot use; it is one for KandinskyV22Inpaint"
    ):
        pipe.unet = ours["KandinskyV22InpaintPipeline"].unet
    assert pipe.unet is before
