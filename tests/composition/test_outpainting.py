"""Outpainting: the canvas and its mask, what an inpainting pipeline makes of it, and the picture pasted back."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from kandinsky_jax import composition
from tests.conftest import note

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 40, 3), np.uint8))
LEVELS = np.asarray(PICTURE)


@pytest.mark.parametrize("fill", ["edge", "reflect", "noise", (10, 20, 30)])
def test_the_canvas_holds_the_picture_and_the_mask_the_rest(fill):
    canvas = composition.outpaint_canvas(PICTURE, left=8, right=16, top=40, bottom=24, fill=fill)
    assert canvas.image.size == canvas.mask_image.size == (64, 128)
    assert canvas.box == (8, 40, 48, 104)
    levels, mask = np.asarray(canvas.image), np.asarray(canvas.mask_image)
    np.testing.assert_array_equal(levels[40:104, 8:48], LEVELS)
    expected = np.full((128, 64), 255)
    expected[40:104, 8:48] = 0
    np.testing.assert_array_equal(mask, expected)
    if fill == "edge":
        np.testing.assert_array_equal(levels[:40, 8:48], np.broadcast_to(LEVELS[:1], (40, 40, 3)))
        np.testing.assert_array_equal(levels[0, 0], LEVELS[0, 0])
    elif fill == "reflect":
        np.testing.assert_array_equal(levels[40:104, 48:], LEVELS[:, -1:-17:-1])
    elif fill == "noise":
        assert 60 < levels[mask == 255].std() < 85  # of uniform levels: 74
        again = composition.outpaint_canvas(PICTURE, left=8, right=16, top=40, bottom=24, fill=fill)
        np.testing.assert_array_equal(levels, again.image)
    else:
        np.testing.assert_array_equal(np.unique(levels[mask == 255], axis=0), [fill])


def test_an_overlap_is_taken_from_the_sides_that_are_extended():
    canvas = composition.outpaint_canvas(PICTURE, right=24, overlap=5)
    mask = np.asarray(canvas.mask_image)
    assert canvas.box == (0, 0, 40, 64)
    np.testing.assert_array_equal(mask, np.where(np.arange(64) < 35, 0, 255)[None].repeat(64, 0))


def test_a_file_is_read(tmp_path):
    PICTURE.save(tmp_path / "picture.png")
    canvas = composition.outpaint_canvas(tmp_path / "picture.png", left=24)
    np.testing.assert_array_equal(np.asarray(canvas.image)[:, 24:], LEVELS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "are all 0; give the pixels to add"),
        ({"left": -1}, "left must be an integer of at least 0, got -1"),
        ({"left": 8}, "a width of 48 pixels; needed is a multiple of 64, such as 16 pixels more"),
        ({"top": 1, "left": 24}, "a height of 65 pixels; needed is a multiple of 64, such as 63 pixels more"),
        ({"left": 24, "overlap": 40}, "overlap=40 leaves nothing of a picture of 64 x 40 pixels"),
        ({"left": 24, "fill": "grey"}, "fill must be 'edge', 'reflect', 'noise' or three levels"),
        ({"left": 24, "fill": (1, 2, 300)}, "fill must be"),
    ],
)
def test_what_makes_no_canvas_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        composition.outpaint_canvas(PICTURE, **arguments)


def test_the_original_fades_in_from_the_new_part():
    generated = Image.new("RGB", (64, 64), (100, 100, 100))
    picture = Image.new("RGB", (40, 64), (200, 200, 200))
    found = np.asarray(composition.paste_original(generated, picture, (24, 0, 64, 64), feather=10))[..., 0]
    np.testing.assert_array_equal(found[:, :24], 100)
    np.testing.assert_array_equal(found[:, 34:], 200)  # also at the canvas's own borders
    np.testing.assert_allclose(found[32, 24:34], 100 + 10 * (np.arange(10) + 0.5), atol=1)
    other = np.asarray(composition.paste_original(generated, picture, (0, 0, 40, 64), feather=10))[..., 0]
    np.testing.assert_array_equal(other, found[:, ::-1])
    hard = np.asarray(composition.paste_original(generated, picture, (24, 0, 64, 64), feather=0))[..., 0]
    np.testing.assert_array_equal(hard, np.where(np.arange(64) < 24, 100, 200)[None].repeat(64, 0))
    with pytest.raises(ValueError, match=r"box=\(0, 0, 64, 64\) does not fit a picture of \(40, 64\)"):
        composition.paste_original(generated, picture, (0, 0, 64, 64))


@pytest.mark.slow
def test_an_inpainting_pipeline_keeps_the_picture_and_generates_the_rest(ours):
    from tests import shapes

    pipe = ours["KandinskyV22InpaintCombinedPipeline"]
    truth = Image.fromarray(
        (shapes.draw(shapes.captions(1, seed=3)[0], np.random.default_rng(0)) * 255).astype(np.uint8)
    )
    picture = truth.crop((0, 0, 40, 64))
    canvas = composition.outpaint_canvas(picture, right=24, fill="noise")
    results = [
        np.asarray(
            pipe(
                shapes.captions(1, seed=3)[0].text,
                image=canvas.image,
                mask_image=canvas.mask_image,
                height=64,
                width=64,
                num_inference_steps=10,
                prior_num_inference_steps=10,
                generator=generator,
            ).images[0],
            np.float32,
        )
        for generator in (0, 1)
    ]
    kept, new = np.s_[:, :24], np.s_[:, 40:]  # a latent beside the mask is generated as well, and MoVQ blurs over one
    for result in results:
        error = np.sqrt(np.mean((result[kept] - np.asarray(canvas.image, np.float32)[kept]) ** 2))
        assert note(error, "kept part beside the picture, of 255") < 12
        assert np.sqrt(np.mean((result[new] - np.asarray(canvas.image, np.float32)[new]) ** 2)) > 30
        assert np.abs(result[new] - np.asarray(truth, np.float32)[new]).mean() < 60
    assert np.abs(results[0][new] - results[1][new]).mean() > 1
