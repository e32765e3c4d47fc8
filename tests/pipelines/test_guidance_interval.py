"""Guidance in part of the steps: equal to the reference with a callback that switches it, at half the cost."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from kandinsky_jax import TorchGenerator
from kandinsky_jax.pipelines import checks, denoising
from tests.cli.test_cli import invoke
from tests.conftest import SHAPES_MODEL, note
from tests.pipelines.test_compile import compilations
from tests.pipelines.test_modes import for_reference, given

SIZE = {"height": 64, "width": 64, "output_type": "np"}
CALL = {"num_inference_steps": 6, "guidance_scale": 4.0} | SIZE


@pytest.mark.slow
def test_one_program_more_for_all_intervals(ours, embeds):
    pipe, rows = ours["KandinskyV22Pipeline"], [x[:1] for x in embeds]
    pipe(*rows, generator=TorchGenerator(0), **CALL)
    with compilations() as events:
        pipe(*rows, generator=TorchGenerator(0), guidance_interval=(0.2, 0.8), **CALL)
    assert len(events) <= 2  # the loop on conditional rows, and the taking of them
    with compilations() as events:
        pipe(*rows, generator=TorchGenerator(1), guidance_interval=(0.5, 1.0), **CALL)
        pipe(*rows, generator=TorchGenerator(1), guidance_interval=(0, 0.1), **CALL | {"num_inference_steps": 9})
    assert not events


def switched(pipe, embeds, first: int, last: int, **arguments) -> np.ndarray:
    """The reference's pictures, its guidance switched on before step `first` and off before step `last`."""
    doubled = ["masked_image", "mask_image"] if "mask_image" in arguments else []

    def switch(pipe, i, t, tensors):
        if i + 1 == first:
            pipe._guidance_scale = 4.0
            both = {name: torch.cat([tensors[name]] * 2) for name in doubled}
            return dict(tensors) | both | {"image_embeds": torch.cat([torch.tensor(x) for x in embeds[::-1]])}
        if i + 1 == last:
            pipe._guidance_scale = 1.0
            return {k: v if k == "latents" else v.chunk(2)[1] for k, v in tensors.items()}
        return tensors

    return pipe(
        image_embeds=torch.tensor(embeds[0]),
        negative_image_embeds=torch.tensor(embeds[1]),
        callback_on_step_end=switch,
        callback_on_step_end_tensor_inputs=["latents", "image_embeds", *doubled],
        **CALL | {"guidance_scale": 1.0},
        **arguments,
    ).images


@pytest.mark.parametrize("mode", ["", pytest.param("Inpaint", marks=pytest.mark.slow)])
def test_as_the_reference_with_its_scale_switched(ours, theirs, embeds, mode):
    name = f"KandinskyV22{mode}Pipeline"
    rows, pictures = [x[:1] for x in embeds], given("inpaint", 1, 64, 64) if mode else {}
    generated = ours[name](
        image_embeds=rows[0],
        negative_image_embeds=rows[1],
        guidance_interval=(0.3, 0.7),  # of 6 steps the third and fourth
        generator=TorchGenerator(3),
        **pictures,
        **CALL,
    ).images
    generator = torch.Generator().manual_seed(3)
    expected = switched(theirs[name], rows, 2, 4, generator=generator, **for_reference(pictures))
    difference = np.abs(generated - expected) * 255
    assert note(difference.mean(), "mean |d|, of 255") <= 0.2
    assert note(difference.max(), "max |d|, of 255") <= 4
    full = ours[name](
        image_embeds=rows[0], negative_image_embeds=rows[1], generator=TorchGenerator(3), **pictures, **CALL
    ).images
    assert np.abs(generated - full).max() * 255 > 10  # and it is another picture than with guidance all the way


def test_an_interval_of_all_steps_is_the_call_without_one(ours, embeds):
    pipe, rows = ours["KandinskyV22Pipeline"], [x[:1] for x in embeds]
    full = pipe(*rows, generator=TorchGenerator(5), **CALL).images
    assert np.array_equal(pipe(*rows, generator=TorchGenerator(5), guidance_interval=(0, 1), **CALL).images, full)
    off = CALL | {"guidance_scale": 1.0}
    plain = pipe(*rows, generator=TorchGenerator(5), **off).images
    assert np.array_equal(pipe(*rows, generator=TorchGenerator(5), guidance_interval=(0.2, 0.8), **off).images, plain)


def test_slices_end_where_the_interval_does(ours, embeds, monkeypatch):
    seen, real = [], denoising.denoise_steps

    def watched(network, params, loop_inputs, table, steps, noise, guider, lo, hi):
        seen.append((int(lo), int(hi), guider.is_on, loop_inputs.uncond is not None))
        return real(network, params, loop_inputs, table, steps, noise, guider, lo, hi)

    monkeypatch.setattr(denoising, "denoise_steps", watched)
    monkeypatch.setattr(denoising, "SLICE_SECONDS", 60)  # so that slices grow as far as they may
    ours["KandinskyV22Pipeline"](
        *(x[:1] for x in embeds),
        generator=TorchGenerator(0),
        guidance_interval=(0.2, 0.8),
        **CALL | {"num_inference_steps": 30},
    )
    assert [lo for lo, *_ in seen[1:]] == [hi for _, hi, *_ in seen[:-1]]
    under = {row: (guided, uncond) for lo, hi, guided, uncond in seen for row in range(lo, hi)}
    assert under == {row: (True, True) if 6 <= row < 24 else (False, False) for row in range(30)}
    assert len(seen) < 20


@pytest.mark.slow
def test_a_callback_sees_the_rows_that_it_knows(ours, embeds):
    shapes, name = [], "KandinskyV22InpaintPipeline"

    def watch(pipe, i, t, tensors):
        shapes.append({key: value.shape[0] for key, value in tensors.items()})
        changed = {"image_embeds": tensors["image_embeds"] * 0.5} if i == 3 else {}
        return dict(tensors) | changed

    tensors = ["latents", "image_embeds", "negative_image_embeds", "masked_image", "mask_image"]
    call = {"guidance_interval": (0.3, 0.7)} | given("inpaint", 1, 64, 64) | CALL
    rows = dict(zip(("image_embeds", "negative_image_embeds"), (x[:1] for x in embeds), strict=True))
    watching = {"callback_on_step_end": watch, "callback_on_step_end_tensor_inputs": tensors}
    changed = ours[name](**rows, **call, **watching, generator=TorchGenerator(1)).images
    expected = {"latents": 1, "image_embeds": 2, "negative_image_embeds": 1, "masked_image": 2, "mask_image": 2}
    assert shapes == [expected] * 6
    plain = ours[name](**rows, **call, generator=TorchGenerator(1)).images
    assert np.abs(changed - plain).max() > 0.01  # it took effect after the interval


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ((0.8, 0.2), r"two rising numbers from 0 to 1, such as \(0.4, 1\), got \(0.8, 0.2\)"),
        ((0.5, 0.5), "rising"),
        ((-0.1, 0.5), "rising"),
        ((0.5, 1.1), "rising"),
        ((0.1, float("nan")), "rising"),
        ((0.1, 0.5, 0.9), "rising"),
        (0.5, "rising"),
        ("0.2,0.8", "rising"),
        ((False, True), "rising"),
        ((0.45, 0.55), r"guidance_interval=\(0.45, 0.55\) holds none of 4 steps"),
    ],
    ids=str,
)
def test_bad_intervals(ours, value, says):
    pipe = ours["KandinskyV22CombinedPipeline"]
    with compilations() as events, pytest.raises(ValueError, match=says):
        pipe("a red circle", guidance_interval=value, **CALL | {"num_inference_steps": 4})
    assert not events


def test_interval_in_steps():
    assert checks.interval(None, 50) is None
    assert checks.interval((0.2, 0.8), 50) == (10, 40)
    assert checks.interval([0, 0.29], 100) == (0, 29)
    assert checks.interval(np.array([0.0, 1.0]), 7) == (0, 7)


@pytest.mark.slow
def test_on_the_command_line(ours, tmp_path):
    short = "-q --steps 6 --prior-steps 4 --seed 5 --torch-noise -o out.png --guidance-interval".split()
    short = ["-m", str(SHAPES_MODEL), *short]
    done = invoke(["generate", "yellow ring", *short, "0.3,0.7"], tmp_path)
    assert done.exit_code == 0, done.output
    [expected] = ours["KandinskyV22CombinedPipeline"](
        "yellow ring", guidance_interval=(0.3, 0.7), prior_num_inference_steps=4, generator=TorchGenerator(5), **CALL
    ).images
    with Image.open(tmp_path / "out.png") as picture:
        assert np.abs(np.asarray(picture) - expected * 255).max() <= 1
        assert json.loads(picture.text["kandinsky_jax"])["guidance_interval"] == [0.3, 0.7]
    for text, says in {"a,b": "must be numbers with commas between", "0.8,0.2": "--guidance-interval must be"}.items():
        done = invoke(["generate", "x", *short, text], tmp_path)
        assert isinstance(done.exception, ValueError)
        assert says in str(done.exception)
