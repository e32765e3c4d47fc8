"""The embedded model's fast adapter in both libraries: one file, the same picture."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from kandinsky_jax import KandinskyV22CombinedPipeline, TorchGenerator, scheduler_named
from kandinsky_jax.checkpoint import hub
from kandinsky_jax.checkpoint.recommended_settings import read
from tests.conftest import note
from tests.pipelines.test_pipelines import assert_same_pictures

FAMILY = hub.EMBEDDED["tiny"]
SCHEDULERS = {"lcm": diffusers.LCMScheduler, "tcd": diffusers.TCDScheduler}


@pytest.fixture(scope="module")
def fast():
    """Our pipeline with the adapter loaded."""
    pipe = KandinskyV22CombinedPipeline.from_pretrained("tiny", dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_fast()
    return pipe


@pytest.fixture(scope="module")
def theirs():
    """The reference's decoder with the same file."""
    folder = FAMILY / hub.DECODER
    pipe = diffusers.KandinskyV22Pipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.load_lora_adapter(folder, prefix="unet", weight_name=read(folder).fast.lora)
    return pipe


@pytest.mark.parametrize(("name", "steps"), [("tcd", 4), ("lcm", 2)])
def test_the_fast_picture_is_that_of_diffusers(fast, theirs, name, steps):
    embeds = fast.prior_pipe(["purple heart", "pizza"], generator=0, output_type="np", return_dict=False)
    size = {"height": 64, "width": 64, "output_type": "np", "num_inference_steps": steps, "guidance_scale": 1.0}
    fast.scheduler = scheduler_named(name, fast.scheduler.config)
    theirs.scheduler = SCHEDULERS[name].from_config(theirs.scheduler.config)
    ours = fast.decoder_pipe(*embeds, generator=TorchGenerator(5), **size).images
    given = [torch.from_numpy(np.array(each)) for each in embeds]
    wanted = theirs(*given, generator=torch.Generator("cpu").manual_seed(5), **size).images
    assert_same_pictures(ours, wanted)
    fast.disable_lora()
    assert np.abs(fast.decoder_pipe(*embeds, generator=TorchGenerator(5), **size).images - ours).mean() * 255 > 1
    fast.enable_lora()


NAMES = [
    "red heart",
    "pizza",
    "rocket",
    "dog face",
    "soccer ball",
    "christmas tree",
    "umbrella",
    "penguin",
    "four leaf clover",
    "guitar",
    "wine glass",
    "snowman",
    "fire",
    "purple heart",
    "thumbs up",
    "trophy",
    "palm tree",
    "watermelon",
    "crown",
    "tulip",
    "skull",
    "ghost",
    "sunflower",
    "strawberry",
    "books",
]


@pytest.mark.slow
def test_fast_pictures_show_what_guided_ones_do(fast):
    """Of 25 guided pictures the nearest to a fast one is that of its prompt."""
    size = {"height": 64, "width": 64, "output_type": "latent", "generator": list(range(25))}

    def latents(**settings) -> np.ndarray:
        return np.asarray(fast(NAMES, **size, **settings).images).reshape(len(NAMES), -1)

    def share(found: np.ndarray) -> float:
        apart = np.square(found[:, None] - guided).sum(-1)
        return (apart.argmin(1) == np.arange(len(NAMES))).mean()

    fast.unload_fast()
    guided = latents(num_inference_steps=25, guidance_scale=2.0, prior_guidance_scale=1.0)
    plain = share(latents(num_inference_steps=1, guidance_scale=1.0, prior_guidance_scale=1.0))
    fast.load_fast()
    assert note(share(latents()), "share of fast pictures nearest to their guided one") >= 0.9
    two = note(share(latents(num_inference_steps=2)), "the same in 2 steps")
    one = note(share(latents(num_inference_steps=1)), "the same in 1 step")
    assert two >= 0.85
    assert one >= 0.85
    assert note(plain, "the same in 1 step without the adapter") < one


@pytest.mark.slow
def test_calls_while_the_adapter_is_off_use_the_scheduler_before(fast):
    """And the adapter's own again with the adapter, in pipelines that share the networks too."""
    short = {"height": 64, "width": 64, "output_type": "latent", "generator": 0}
    fast.unload_fast()
    before = fast.scheduler
    fast.load_fast()
    own = fast.scheduler
    other = type(fast).from_pipe(fast)
    fast.disable_lora()
    fast("pizza", num_inference_steps=2, **short)
    assert fast.scheduler is before
    fast.enable_lora()
    assert other("pizza", **short).images.shape == (1, 4, 8, 8)
    assert other.scheduler is own
    fast.unload_fast()
    other("pizza", num_inference_steps=2, **short)
    assert other.scheduler is before
    fast.load_fast()
