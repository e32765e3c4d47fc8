"""Same seed, same picture: our pipelines compared with the reference, with the trained small model, float32."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from kandinsky_jax import (
    DDIMScheduler,
    DDPMScheduler,
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    TorchGenerator,
    scheduler_named,
)
from kandinsky_jax.schedulers.compatibility import STEP_ARGUMENTS
from tests.conftest import SHAPES_MODEL, note, official_config, quick_and_slow, worst

RED = "a red circle on a blue background"
STAR = "small green star, white background"
TWO = ["a large white triangle on a green background", "yellow ring, black background"]

CASES = {
    "red": {"prompt": RED, "seed": 0},
    "star": {"prompt": STAR, "seed": 1},
    "purple": {"prompt": "a purple square on a gray background", "seed": 2**40 + 3},
    "red, negative": {"prompt": RED, "seed": 3, "negative_prompt": "green"},
    "star, negative": {"prompt": STAR, "seed": 4, "negative_prompt": "a large star"},
    "two, negative": {"prompt": TWO, "seed": 5, "negative_prompt": ["red", "blue"]},
    "two": {"prompt": TWO, "seed": 6},
    "two images": {"prompt": RED, "seed": 7, "num_images_per_prompt": 2},
    "two images, negative": {"prompt": RED, "seed": 8, "num_images_per_prompt": 2, "negative_prompt": "green"},
    "two by two": {"prompt": TWO, "seed": 9, "num_images_per_prompt": 2},
    "guidance 1 and 1": {"prompt": RED, "seed": 10, "guidance_scale": 1.0, "prior_guidance_scale": 1.0},
    "guidance 1 and 1, negative": {
        "prompt": STAR,
        "seed": 11,
        "guidance_scale": 1.0,
        "prior_guidance_scale": 1.0,
        "negative_prompt": "red",
    },
    "guidance 4 and 1": {"prompt": STAR, "seed": 12, "guidance_scale": 4.0, "prior_guidance_scale": 1.0},
    "wide": {"prompt": RED, "seed": 13, "width": 128},
    "tall, rounded up": {"prompt": STAR, "seed": 14, "height": 100},
}


def split(case: dict) -> tuple[dict, dict, int]:
    """A case's arguments for the prior and for the decoder, and its seed."""
    case = dict(case)
    seed = case.pop("seed")
    prior = {"guidance_scale": case.pop("prior_guidance_scale", 4.0)}
    prior |= {k: case.pop(k) for k in ("prompt", "negative_prompt", "num_images_per_prompt") if k in case}
    return prior, {"height": 64, "width": 64, "num_inference_steps": 50, "output_type": "np"} | case, seed


def reference_picture(reference, case: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The reference's (image embeds, negative image embeds, pictures), one generator through both stages."""
    prior_pipe, decoder_pipe = reference
    prior, decoder, seed = split(case)
    generator = torch.Generator("cpu").manual_seed(seed)
    embeds, negative = prior_pipe(**prior, generator=generator, return_dict=False)
    pictures = decoder_pipe(embeds, negative, generator=generator, **decoder).images
    return embeds.numpy(), negative.numpy(), pictures


def assert_same_pictures(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    difference = np.abs(ours - theirs) * 255
    assert note(difference.mean(), "mean |d|, of 255") <= 0.2
    assert note(difference.max(), "max |d|, of 255") <= 4


# Batches, sizes and guidance of their own have programs of their own to compile.
QUICK = ("red", "red, negative", "star", "purple", "star, negative")


@pytest.mark.parametrize("name", quick_and_slow(CASES, *QUICK))
def test_same_seed_same_picture(shapes_pipe, reference, name):
    case = CASES[name]
    embeds, negative, pictures = reference_picture(reference, case)
    prior, decoder, seed = split(case)
    generator = TorchGenerator(seed)
    ours = shapes_pipe.prior_pipe(**prior, generator=generator, output_type="np")
    assert worst(ours.image_embeds, embeds) <= 1e-3
    assert worst(ours.negative_image_embeds, negative) <= 1e-3
    # text2img on our own embeddings, going on with the same generator
    assert_same_pictures(shapes_pipe.decoder_pipe(**ours, generator=generator, **decoder).images, pictures)


COMBINED = ("red", "two, negative", "two by two", "guidance 1 and 1", "wide")


@pytest.mark.parametrize("name", quick_and_slow(COMBINED, "red"))
def test_same_seed_same_picture_combined(shapes_pipe, reference, name):
    case = CASES[name]
    _, _, pictures = reference_picture(reference, case)
    arguments = {"height": 64, "width": 64, "num_inference_steps": 50, "output_type": "np"} | case
    ours = shapes_pipe(generator=TorchGenerator(arguments.pop("seed")), **arguments).images
    assert_same_pictures(ours, pictures)


SOLVERS = ["dpm++2m-karras", "dpm++2m-sde", "dpm++3s", "dpm++sde", "sa", "lcm", "tcd"]  # what its pipelines can run


@pytest.mark.parametrize("kind", ["official DDPM", "DDIM", "DDIM without thresholding", *SOLVERS])
def test_other_schedulers(shapes_pipe, reference, kind):
    """Schedulers that know no learned variance, so that the network's second half is dropped; among them the official
    configuration (fixed_small, clip_sample, offset 1), which the small model does not come with."""
    _, decoder_pipe = reference
    config = official_config("kandinsky-2-2-decoder", "scheduler")
    changes = {"thresholding": "without" not in kind}
    if kind == "official DDPM":
        theirs, ours = diffusers.DDPMScheduler.from_config(config), DDPMScheduler.from_config(config)
    elif kind in SOLVERS:
        ours = scheduler_named(kind, config)
        fields = {field.name for field in ours.fields()} - STEP_ARGUMENTS
        theirs = getattr(diffusers, type(ours).__name__)(**{k: v for k, v in ours.config.items() if k in fields})
    else:
        config = {k: v for k, v in shapes_pipe.scheduler.config.items() if k != "variance_type"}
        theirs = diffusers.DDIMScheduler.from_config(config, **changes)
        ours = DDIMScheduler.from_config(config, **changes)
    embeds = shapes_pipe.prior_pipe(RED, generator=0, output_type="np", return_dict=False)
    size = {"height": 64, "width": 64, "num_inference_steps": 20, "output_type": "np"}
    kept = decoder_pipe.scheduler, shapes_pipe.scheduler
    decoder_pipe.scheduler, shapes_pipe.scheduler = theirs, ours
    try:
        generator = torch.Generator("cpu").manual_seed(4)
        picture = decoder_pipe(*map(torch.tensor, embeds), generator=generator, **size).images
        assert_same_pictures(shapes_pipe.decoder_pipe(*embeds, generator=TorchGenerator(4), **size).images, picture)
    finally:
        decoder_pipe.scheduler, shapes_pipe.scheduler = kept


@pytest.mark.slow
def test_latents_given(shapes_pipe, reference):
    """The user's latents, in PyTorch's order of axes, for both stages."""
    prior_pipe, decoder_pipe = reference
    rng = np.random.default_rng(0)
    start = rng.standard_normal((1, 64)).astype(np.float32)
    noise = rng.standard_normal((1, 4, 8, 16)).astype(np.float32)
    embeds, negative = prior_pipe(
        RED, latents=torch.tensor(start), generator=torch.Generator().manual_seed(1), return_dict=False
    )
    ours = shapes_pipe.prior_pipe(RED, latents=start, generator=TorchGenerator(1), output_type="np")
    assert worst(ours.image_embeds, embeds.numpy()) <= 1e-3
    size = {"height": 64, "width": 128, "num_inference_steps": 10, "output_type": "np"}
    theirs = decoder_pipe(
        embeds, negative, latents=torch.tensor(noise), generator=torch.Generator().manual_seed(2), **size
    ).images
    pictures = shapes_pipe.decoder_pipe(**ours, latents=noise, generator=TorchGenerator(2), **size).images
    assert_same_pictures(pictures, theirs)


SHORT = {"height": 64, "width": 64, "num_inference_steps": 5, "prior_num_inference_steps": 4}


def test_output_types(shapes_pipe, reference):
    [pil] = shapes_pipe(RED, generator=0, **SHORT).images
    array = shapes_pipe(RED, generator=0, output_type="np", **SHORT).images
    planes = shapes_pipe(RED, generator=0, output_type="pt", **SHORT).images
    latents = shapes_pipe(RED, generator=0, output_type="latent", **SHORT).images
    assert pil.size == (64, 64)
    assert pil.mode == "RGB"
    assert array.dtype == np.float32
    assert array.min() >= 0
    assert array.max() <= 1
    np.testing.assert_array_equal(np.asarray(pil), (array[0] * 255).round())
    np.testing.assert_array_equal(planes, array.transpose(0, 3, 1, 2))
    assert latents.shape == (1, 4, 8, 8)
    decoder = reference[1]
    with torch.no_grad():
        decoded = decoder.movq.decode(torch.tensor(np.asarray(latents)), force_not_quantize=True).sample
    np.testing.assert_allclose(array, (decoded.numpy().transpose(0, 2, 3, 1) / 2 + 0.5).clip(0, 1), atol=1e-5)
    assert shapes_pipe(RED, generator=0, output_type="np", return_dict=False, **SHORT)[0].shape == array.shape


@pytest.mark.slow
def test_an_image_does_not_depend_on_its_batch(shapes_pipe):
    """JAX keys: image i uses fold_in(key, i), so it is the same in a batch of any size."""
    one = shapes_pipe(RED, generator=3, output_type="np", **SHORT).images
    many = shapes_pipe([RED, STAR, STAR], generator=3, output_type="np", **SHORT).images
    np.testing.assert_allclose(many[0], one[0], atol=1e-4)
    assert np.abs(many[1] - many[2]).max() > 0.1  # same prompt, other noise


def test_callback_sees_and_changes(shapes_pipe, reference):
    """Callbacks see what the reference's see, at the same steps, and what they return takes effect likewise."""
    prior_pipe, decoder_pipe = reference
    seen: dict[str, list] = {"ours": [], "theirs": []}

    def watch(who):
        def callback(pipe, i, t, tensors):
            seen[who].append((i, int(t), {k: torch.as_tensor(v).numpy().copy() for k, v in tensors.items()}))
            changed = {"latents": tensors["latents"] * 0.5} if i == 1 else {}
            if i == 2 and "image_embeds" in tensors:
                changed["image_embeds"] = tensors["image_embeds"] * 0.9
            return tensors | changed

        return callback

    names = ["latents", "image_embeds", "negative_image_embeds"]
    size = {"height": 64, "width": 64, "num_inference_steps": 5, "output_type": "np"}
    prior_names = ["latents", "prompt_embeds", "text_encoder_hidden_states", "text_mask"]
    embeds = prior_pipe(
        RED,
        negative_prompt="green",
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(5),
        callback_on_step_end=watch("theirs"),
        callback_on_step_end_tensor_inputs=prior_names,
        return_dict=False,
    )
    theirs = decoder_pipe(
        *embeds,
        generator=torch.Generator().manual_seed(6),
        callback_on_step_end=watch("theirs"),
        callback_on_step_end_tensor_inputs=names,
        **size,
    ).images
    ours_embeds = shapes_pipe.prior_pipe(
        RED,
        negative_prompt="green",
        num_inference_steps=4,
        generator=TorchGenerator(5),
        callback_on_step_end=watch("ours"),
        callback_on_step_end_tensor_inputs=prior_names,
    )
    ours = shapes_pipe.decoder_pipe(
        **ours_embeds,
        generator=TorchGenerator(6),
        callback_on_step_end=watch("ours"),
        callback_on_step_end_tensor_inputs=names,
        **size,
    ).images
    assert [(i, t, sorted(x)) for i, t, x in seen["ours"]] == [(i, t, sorted(x)) for i, t, x in seen["theirs"]]
    for (_, _, mine), (_, _, other) in zip(seen["ours"], seen["theirs"], strict=True):
        for name in mine:
            assert worst(mine[name], other[name]) <= 2e-4, name
    assert_same_pictures(ours, theirs)


def test_components_round_trip(shapes_pipe):
    again = KandinskyV22CombinedPipeline(**shapes_pipe.components)
    assert all(again.components[name] is part for name, part in shapes_pipe.components.items())
    decoder = KandinskyV22Pipeline(**shapes_pipe.decoder_pipe.components)
    assert decoder.unet is shapes_pipe.unet


def test_progress_bar(shapes_pipe, capsys):
    shapes_pipe.set_progress_bar_config(disable=False, ascii=True)
    try:
        shapes_pipe(RED, generator=0, **SHORT)
    finally:
        shapes_pipe.set_progress_bar_config(disable=True)
    shown = capsys.readouterr().err
    assert "prior: 100%" in shown
    assert "decoder: 100%" in shown
    assert "5/5" in shown


@pytest.mark.slow
def test_bfloat16_generates_nearly_the_same(shapes_pipe):
    low = KandinskyV22CombinedPipeline.from_pretrained(SHAPES_MODEL, dtype="bfloat16")
    low.set_progress_bar_config(disable=True)
    exact = shapes_pipe(RED, generator=0, output_type="np", **SHORT | {"num_inference_steps": 25}).images
    rough = low(RED, generator=0, output_type="np", **SHORT | {"num_inference_steps": 25}).images
    assert rough.dtype == np.float32
    assert np.abs(rough - exact).mean() < 0.03
