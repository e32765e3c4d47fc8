"""Preparation of pictures, masks and hints, compared with the reference, and inputs that it does not take."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.kandinsky2_2 import pipeline_kandinsky2_2_inpainting as reference
from PIL import Image

from kandinsky_jax import images
from kandinsky_jax.diffusion.inpainting import latent_repaint_mask

H, W = 64, 128


def noise(height: int, width: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A picture of any mode with something in every corner."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def nchw(pixels: np.ndarray) -> np.ndarray:
    return pixels.transpose(0, 3, 1, 2)


@pytest.mark.parametrize("size", [(H, W), (100, 70), (33, 200), (512, 600)])
def test_pictures_are_the_references(size):
    """Both of the reference's ways in: img2img's, and inpaint's."""
    picture = noise(*size)
    ours = nchw(images.pictures(picture, "image", H, W))
    processor = VaeImageProcessor(vae_scale_factor=8, resample="bicubic", reducing_gap=1)
    np.testing.assert_allclose(ours, processor.preprocess(picture, H, W), atol=1e-6)
    mask = Image.new("L", size[::-1])
    _, inpaint = reference.prepare_mask_and_masked_image(picture, mask, H, W)
    np.testing.assert_allclose(ours, inpaint, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGB", "1"])
@pytest.mark.parametrize("size", [(H, W), (100, 70), (33, 200)])
def test_masks_are_the_references(size, mode):
    mask = noise(*size, mode)
    theirs, _ = reference.prepare_mask_and_masked_image(noise(H, W), mask, H, W)  # 1: kept
    np.testing.assert_array_equal(~images.masks(mask, "mask_image", H, W), theirs.numpy()[:, 0] == 1)


@pytest.mark.parametrize("seed", range(6))
def test_kept_latents_are_the_references(seed):
    """Nearest latents and the erosion by six of eight neighbours, on masks of any kind of border."""
    rng = np.random.default_rng(seed)
    mask = rng.random((3, H, W)) < [0.02, 0.1, 0.5][seed % 3]
    if seed > 2:
        mask = np.stack([np.array(noise(H, W, "L", seed=seed + i)) > 128 for i in range(3)])
    keep = torch.tensor(1 - mask[:, None].astype(np.float32))
    small = torch.nn.functional.interpolate(keep, (H // 8, W // 8), mode="nearest")
    theirs = reference.prepare_mask(small)[:, 0]
    np.testing.assert_array_equal(latent_repaint_mask(mask, H // 8, W // 8), theirs == 0)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "I", "F"])
def test_any_mode_is_the_picture(mode):
    """Whatever a picture's mode, it shows the same."""
    grey = noise(H, W, "L")
    if mode in ("I;16", "I"):
        picture = Image.fromarray(np.asarray(grey).astype({"I": np.int32, "I;16": np.uint16}[mode]) * 257)
    elif mode == "F":
        picture = Image.fromarray(np.asarray(grey, np.float32) / 255)
    else:
        picture = grey.convert("RGB").convert(mode)
    assert picture.mode == mode
    expected = images.pictures(picture.convert("RGB") if mode in ("1", "P", "CMYK") else grey, "image", H, W)
    np.testing.assert_allclose(images.pictures(picture, "image", H, W), expected, atol=0.02 if mode == "CMYK" else 1e-6)


def test_transparent_palette():
    picture = noise(H, W).convert("P")
    picture.info["transparency"] = bytes(range(256))
    shown = picture.convert("RGBA").convert("RGB")
    np.testing.assert_array_equal(images.pictures(picture, "image", H, W), images.pictures(shown, "image", H, W))


def test_pictures_are_turned_upright(tmp_path):
    """By their EXIF, whether they come from a file or opened; so are masks and hints."""
    upright = noise(W, H)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 270 degrees to see it upright
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    expected = images.pictures(upright, "image", W, H)
    np.testing.assert_array_equal(images.pictures(tmp_path / "turned.png", "image", W, H), expected)
    np.testing.assert_array_equal(images.pictures(str(tmp_path / "turned.png"), "image", W, H), expected)
    with Image.open(tmp_path / "turned.png") as opened:
        np.testing.assert_array_equal(images.pictures(opened, "image", W, H), expected)
        np.testing.assert_array_equal(images.masks(opened, "mask", W, H), images.masks(upright, "mask", W, H))
        np.testing.assert_array_equal(images.hints(opened, "hint", W, H), images.hints(upright, "hint", W, H))


def test_arrays_are_the_picture():
    picture = noise(H, W)
    levels = np.asarray(picture)
    expected = images.pictures(picture, "image", H, W)
    floats = levels / np.float32(255)
    for array in (
        levels,
        levels.astype(np.int64),
        floats,
        floats.astype(np.float64),
        jnp.asarray(floats),
        floats.transpose(2, 0, 1),
        floats[None],
        floats.transpose(2, 0, 1)[None],
        torch.tensor(floats.transpose(2, 0, 1)),
        np.concatenate([levels, np.zeros((H, W, 1), np.uint8)], axis=-1),
        [levels],
        [floats[None]],
    ):
        np.testing.assert_allclose(images.pictures(array, "image", H, W), expected, atol=1e-6)
    rough = images.pictures(jnp.asarray(floats, jnp.bfloat16), "image", H, W)
    np.testing.assert_allclose(rough, expected, atol=0.01)
    grey = np.asarray(picture.convert("L"))
    np.testing.assert_allclose(
        images.pictures(grey, "image", H, W), images.pictures(picture.convert("L"), "image", H, W), atol=1e-6
    )


def test_stacks_and_lists():
    levels = np.stack([np.asarray(noise(H, W, seed=i)) for i in range(3)])
    expected = np.concatenate([images.pictures(x, "image", H, W) for x in levels])
    stacked = [levels, list(levels), [levels[:2], levels[2]], [Image.fromarray(x) for x in levels], tuple(levels)]
    for several in stacked:
        np.testing.assert_allclose(images.pictures(several, "image", H, W), expected, atol=1e-6)
    binary = levels[..., 0] > 100
    for several in (binary, binary[..., None], binary[:, None], list(binary), binary * 1.0, binary * np.uint8(255)):
        np.testing.assert_array_equal(images.masks(several, "mask_image", H, W), binary)


def test_masks_of_whole_numbers():
    """0 and 1, as in the reference, or levels."""
    binary = np.arange(H * W).reshape(H, W) % 3 == 0
    for mask in (binary, binary.astype(np.uint8), binary.astype(int), binary * 255, binary * np.float32(1)):
        np.testing.assert_array_equal(images.masks(mask, "mask_image", H, W), binary[None])
    levels = np.array([[0, 127, 128, 255]], np.uint8).repeat(64, axis=0).repeat(16, axis=1)
    assert images.masks(levels, "mask_image", 64, 64)[0, 0].reshape(4, 16).any(axis=1).tolist() == [
        False,
        False,
        True,
        True,
    ]


def test_ready_hints_are_taken_as_they_are():
    hint = np.random.default_rng(0).random((3, H, W), np.float32)
    expected = hint.transpose(1, 2, 0)[None]
    for value in (hint, hint[None], jnp.asarray(hint), [hint], expected, torch.tensor(hint)):
        np.testing.assert_array_equal(images.hints(value, "hint", H, W), expected)


def test_depth_maps_become_hints():
    """Whatever an estimator gives: 8-bit levels, 16 bits, or floats in any unit and of any size."""
    depth = np.asarray(noise(H, W, "L"), np.float32)
    depth = (depth - depth.min()) / (depth.max() - depth.min())
    expected = np.repeat(depth[None, ..., None], 3, axis=-1)
    levels = (depth * 255).round().astype(np.uint8)
    for value, atol in (
        (depth, 1e-6),
        (depth * 80 + 2, 1e-5),
        (-1 / (depth + 1), None),
        (depth[..., None], 1e-6),
        (depth[None], 1e-6),
        (depth[None, None], 1e-6),
        (jnp.asarray(depth), 1e-6),
        (levels, 0.003),
        (Image.fromarray(levels), 0.003),
        (Image.fromarray(levels).convert("RGB"), 0.003),
        (Image.fromarray((depth * 65535).astype(np.uint16)), 1e-4),
        (Image.fromarray((depth * 1000).astype(np.uint16)), 2e-3),
        (Image.fromarray(depth * 7), 1e-6),
    ):
        hint = images.hints(value, "hint", H, W)
        assert hint.shape == (1, H, W, 3)
        assert hint.dtype == np.float32
        assert hint.min() >= 0
        assert hint.max() <= 1
        if atol is not None:
            np.testing.assert_allclose(hint, expected, atol=atol)
    # 8-bit levels keep their meaning, as in diffusers' documentation: level / 255
    np.testing.assert_allclose(images.hints(levels // 2, "hint", H, W)[0, ..., 0], (levels // 2) / 255, atol=1e-6)
    assert images.hints(np.asarray(noise(48, 96, "F")), "hint", H, W).shape == (1, H, W, 3)
    assert not images.hints(np.full((H, W), 3.0), "hint", H, W).any()


def bomb(path) -> None:
    """A picture whose header claims more pixels than is safe."""
    Image.new("1", (20_000, 10_000)).save(path)


def large(path) -> None:
    """One for which Pillow only warns."""
    Image.new("1", (12_000, 10_000)).save(path)


def damaged(path) -> None:
    noise(H, W).save(path)
    path.write_bytes(path.read_bytes()[:-200])


def postscript(path) -> None:
    """A picture whose reader would start Ghostscript."""
    noise(H, W).save(path, format="EPS")


@pytest.mark.parametrize("reader", [images.pictures, images.masks, images.hints])
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (bomb, "too large to be opened safely"),
        (large, "too large to be opened safely"),
        (postscript, "cannot be read as a picture: cannot identify"),
        (damaged, "cannot be read as a picture"),
        (lambda path: path.write_text("no picture"), "cannot be read as a picture"),
        (lambda path: path.mkdir(), "cannot be read as a picture"),
        (lambda path: None, "there is no file"),
    ],
)
def test_files_that_are_no_pictures(tmp_path, reader, make, says):
    make(tmp_path / "x.png")
    with pytest.raises(ValueError, match=f"what.*x.png.*{says}|what.*{says}.*x.png"):
        reader(tmp_path / "x.png", "what", H, W)


PICTURE = np.zeros((H, W, 3), np.float32)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(("low", "high", "top"), [(-1e-9, 1.0000001, 1), (-9e-4, 1.0009, 1), (-0.2, 255.2, 255)])
def test_floats_that_overshoot_by_rounding_are_clipped(dtype, low, high, top):
    picture = np.full((H, W, 3), high, dtype)
    picture[0] = low
    exact = np.full((H, W, 3), top, dtype)
    exact[0] = 0
    for mine, right in ((picture, exact), (picture[..., 0], exact[..., 0])):
        assert np.array_equal(images.unit(mine, "what"), images.unit(right, "what"))
    assert np.array_equal(images.pictures(picture, "what", H, W), images.pictures(exact, "what", H, W))
    assert np.array_equal(images.masks(picture[..., 0], "what", H, W), images.masks(exact[..., 0], "what", H, W))
    assert np.array_equal(images.hints(picture, "what", H, W), images.hints(exact, "what", H, W))


@pytest.mark.parametrize(("value", "shown"), [(1.0025, "1.0025"), (-0.00101, "-0.00101"), (255.3, "255.3")])
def test_larger_overshoots_are_reported_in_full(value, shown):
    picture = PICTURE + np.float32(0.5)
    picture[3, 4] = value
    with pytest.raises(ValueError, match=f"what has values from .*{shown}.*; clip what overshoots"):
        images.pictures(picture, "what", H, W)


@pytest.mark.parametrize("mode", ["RGBa", "La"])
def test_premultiplied_pictures_are_read_as_their_plain_kin(mode):
    plain = Image.fromarray(np.random.default_rng(0).integers(100, 256, (32, 32, 4), dtype=np.uint8))
    plain = plain.convert({"RGBa": "RGBA", "La": "LA"}[mode])
    plain.putalpha(255)
    for reader in (images.pictures, images.masks, images.hints):
        assert np.array_equal(reader(plain.convert(mode), "what", 32, 32), reader(plain, "what", 32, 32))


WRONG = [
    (images.pictures, np.full((H, W, 3), np.nan), ValueError, "numbers that are not finite"),
    (images.pictures, PICTURE - 1, ValueError, r"from -1 to -1, needed are floats of 0 to 1 \(x / 2 \+ 0.5"),
    (images.pictures, PICTURE + 256, ValueError, "from 256 to 256, needed are floats of 0 to 1"),
    (images.pictures, np.full((H, W, 3), 256), ValueError, "needed are whole numbers of 0 to 255"),
    (images.pictures, np.zeros((H, W, 5)), ValueError, r"\(64, 128, 5\), needed is \[H, W, C\].*1 or 3 or 4 channels"),
    (images.pictures, np.zeros(3), ValueError, r"shape \(3,\)"),
    (images.pictures, np.zeros((0, W, 3)), ValueError, r"shape \(0, 128, 3\)"),
    (images.pictures, [], ValueError, "empty list"),
    (images.pictures, [PICTURE, None], TypeError, r"what\[1\] must be a PIL picture.*got NoneType"),
    (images.pictures, 3, TypeError, "got int"),
    (images.pictures, np.array(["a"]), TypeError, "array of numbers"),
    (images.pictures, PICTURE + 1j, TypeError, "array of numbers"),
    (images.masks, np.full((H, W), 1.5), ValueError, "from 1.5 to 1.5, needed are floats of 0 to 1"),
    (images.masks, np.full((H, W), -0.1), ValueError, "needed are floats of 0 to 1"),
    (images.masks, np.full((H, W), -1), ValueError, "needed are whole numbers"),
    (images.masks, np.full((H, W), 300), ValueError, "needed are whole numbers"),
    (images.masks, np.full((H, W), np.nan), ValueError, "not finite"),
    (images.masks, np.zeros((H, W, 3)), ValueError, r"\(64, 128, 3\), which is 3 channels; needed is one"),
    (images.hints, np.zeros((3, 32, W)), ValueError, "32x128 pixels"),
    (images.hints, np.full((3, H, W), 2.0), ValueError, "needed are floats of 0 to 1"),
    (images.hints, np.full((3, H, W), np.nan), ValueError, "not finite"),
    (images.hints, np.full((H, W), np.inf), ValueError, "not finite; fill the holes"),
]


@pytest.mark.parametrize(("reader", "value", "error", "says"), WRONG)
def test_wrong_pictures(reader, value, error, says):
    with pytest.raises(error, match=says):
        reader(value, "what", H, W)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((64, 64), (64, 64)), ((4000, 3000), (64, 64)), ((300, 100), (64, 128)), ((9, 900), (640, 64))],
)
def test_fitting_size(size, expected):
    assert images.fitting_size(Image.new("L", size), 64) == expected


def test_fitting_size_keeps_proportions():
    height, width = images.fitting_size(Image.new("L", (3000, 2000)), 512)
    assert (height, width) == (448, 640)
