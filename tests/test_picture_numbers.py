"""Interpretation of the values of pictures, masks and arrays by dtype and range, compared with diffusers."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.kandinsky2_2 import pipeline_kandinsky2_2_inpainting as reference
from PIL import Image

from kandinsky_jax import images
from kandinsky_jax.common.arrays import to_numpy
from kandinsky_jax.pipelines import checks

H, W = 64, 128
GREY = np.asarray(Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7), dtype=np.uint8)).resize((W, H)))
BINARY = GREY > 128
EXPECTED = np.repeat(GREY[None, ..., None], 3, axis=-1) / np.float32(127.5) - 1


def pil(array: np.ndarray, mode: str) -> Image.Image:
    picture = Image.fromarray(array)
    assert picture.mode == mode
    return picture


# Pictures ---------------------------------------------------------------------------------------------------------

RGB = np.repeat(GREY[..., None], 3, axis=-1)
SAME_PICTURE = {
    "PIL I of 8 bits": pil(GREY.astype(np.int32), "I"),
    "PIL I of 16 bits": pil(GREY.astype(np.int32) * 257, "I"),
    "PIL I;16 of 8 bits": pil(GREY.astype(np.uint16), "I;16"),
    "PIL I;16": pil(GREY.astype(np.uint16) * 257, "I;16"),
    "PIL F of 0..255": pil(GREY.astype(np.float32), "F"),
    "PIL F of 0..1": pil(GREY / np.float32(255), "F"),
    "uint8": RGB,
    "int32": RGB.astype(np.int32),
    "int64": RGB.astype(np.int64),
    "uint16 of 8 bits": RGB.astype(np.uint16),
    "uint16": RGB.astype(np.uint16) * 257,
    "float32 of 0..255": RGB.astype(np.float32),
    "float64 of 0..255": RGB.astype(np.float64),
    "float16": (RGB / 255).astype(np.float16),
    "torch of 0..255": torch.tensor(RGB.astype(np.float32).transpose(2, 0, 1)),
}


@pytest.mark.parametrize("given", SAME_PICTURE)
def test_picture_of_any_depth_is_the_same(given):
    found = images.pictures(SAME_PICTURE[given], "image", H, W)
    np.testing.assert_allclose(found, EXPECTED, atol=2e-3 if given == "float16" else 1e-5)


def test_png_of_16_bits_is_the_same(tmp_path):
    for name, levels in (("low.png", GREY.astype(np.uint16)), ("full.png", GREY.astype(np.uint16) * 257)):
        Image.fromarray(levels).save(tmp_path / name)
        np.testing.assert_allclose(images.pictures(tmp_path / name, "image", H, W), EXPECTED, atol=1e-5)


def test_pictures_of_an_array_share_their_range():
    """A black picture among levels is not a picture of 0..1."""
    several = np.stack([RGB, np.ones_like(RGB)]).astype(np.float32)
    np.testing.assert_allclose(images.pictures(several, "image", H, W)[1], 1 / 127.5 - 1, atol=1e-5)


AMBIGUOUS = {
    "floats above 1": RGB / np.float32(255) * 1.5,
    "dark levels as floats": np.full((H, W, 3), 20.0),
    "10 bits": RGB.astype(np.uint16) * 4,
    "12 bits": RGB.astype(np.int32) * 16,
    "17 bits": RGB.astype(np.int64) * 514,
    "negative": RGB.astype(np.int16) - 1,
    "-1..1": RGB / np.float32(127.5) - 1,
    "PIL I of 12 bits": pil(GREY.astype(np.int32) * 16, "I"),
    "PIL I;16 of 12 bits": pil(GREY.astype(np.uint16) * 16, "I;16"),
    "PIL F above 255": pil(GREY.astype(np.float32) * 2, "F"),
}


@pytest.mark.parametrize("given", AMBIGUOUS)
def test_picture_that_could_be_in_two_units_is_refused(given):
    with pytest.raises(ValueError, match=r"^image has values from .* to .*, needed are"):
        images.pictures(AMBIGUOUS[given], "image", H, W)


# Masks ------------------------------------------------------------------------------------------------------------


def rgba(colour: np.ndarray, alpha: np.ndarray) -> Image.Image:
    return Image.fromarray(np.dstack([*[colour.astype(np.uint8)] * 3, alpha.astype(np.uint8)]))


def palette(colours: list[int]) -> Image.Image:
    picture = pil(BINARY.astype(np.uint8), "L").copy()
    picture.putpalette(colours)
    return picture


SAME_MASK = {
    "PIL L of 0 and 1": pil(BINARY.astype(np.uint8), "L"),
    "PIL L": pil(BINARY.astype(np.uint8) * 255, "L"),
    "PIL 1": Image.fromarray(BINARY),
    "PIL RGB of 0 and 1": Image.fromarray(np.dstack([BINARY.astype(np.uint8)] * 3)),
    "PIL I of 0 and 1": pil(BINARY.astype(np.int32), "I"),
    "PIL I of 8 bits": pil(BINARY.astype(np.int32) * 255, "I"),
    "PIL I of 16 bits": pil(BINARY.astype(np.int32) * 65535, "I"),
    "PIL I;16 of 0 and 1": pil(BINARY.astype(np.uint16), "I;16"),
    "PIL I;16 of 8 bits": pil(BINARY.astype(np.uint16) * 255, "I;16"),
    "PIL I;16": pil(BINARY.astype(np.uint16) * 65535, "I;16"),
    "PIL F of 0..1": pil(BINARY.astype(np.float32), "F"),
    "PIL F of 0..255": pil(BINARY * np.float32(255), "F"),
    "PIL P": palette([0, 0, 0, 255, 255, 255]),
    "PIL P of 0 and 1": palette([0, 0, 0, 1, 1, 1]),
    "PIL LA": pil(BINARY.astype(np.uint8) * 255, "L").convert("LA"),
    "PIL RGBA": rgba(BINARY * 255, BINARY * 0 + 255),
    "PIL RGBA, white strokes on nothing": rgba(BINARY * 255, BINARY * 255),
    "PIL RGBA of 0 and 1": rgba(BINARY, BINARY * 0 + 255),
    "bool": BINARY,
    "uint8 of 0 and 1": BINARY.astype(np.uint8),
    "uint8": BINARY.astype(np.uint8) * 255,
    "int64 of 0 and 1": BINARY.astype(np.int64),
    "uint16": BINARY.astype(np.uint16) * 65535,
    "uint16 of 8 bits": BINARY.astype(np.uint16) * 255,
    "float of 0..1": BINARY.astype(np.float32),
    "float of 0..255": BINARY * 255.0,
    "bfloat16": jnp.asarray(BINARY, jnp.bfloat16),
    "torch bool": torch.tensor(BINARY),
    "torch bfloat16": torch.tensor(BINARY).to(torch.bfloat16),
}


@pytest.mark.parametrize("given", SAME_MASK)
def test_mask_of_any_kind_is_the_same(given):
    np.testing.assert_array_equal(images.masks(SAME_MASK[given], "mask_image", H, W)[0], BINARY)


@pytest.mark.parametrize("alpha", [BINARY * 255, 255 - BINARY * 255, BINARY * 100])
@pytest.mark.parametrize("level", [0, 255])
def test_mask_in_the_transparency_is_refused(alpha, level):
    for mask in (rgba(np.full((H, W), level), alpha), rgba(np.full((H, W), level), alpha).convert("LA")):
        with pytest.raises(ValueError, match=r"^mask_image is of one colour, and its content is in its transparency"):
            images.masks(mask, "mask_image", H, W)


NOTHING = {
    "PIL L, black": Image.new("L", (W, H)),
    "PIL L of labels": pil(BINARY.astype(np.uint8) * 20, "L"),
    "PIL P of dark colours": palette([0, 0, 0, 128, 0, 0]),
    "uint8 of labels": BINARY.astype(np.uint8) * 2,
    "bool": BINARY & False,
    "PIL I;16, dark": pil(BINARY.astype(np.uint16) * 30000, "I;16"),
    "float": BINARY * 0.4,
}


@pytest.mark.parametrize("given", NOTHING)
def test_mask_that_repaints_nothing_is_worth_a_warning(given):
    with pytest.warns(UserWarning, match=r"mask_image repaints nothing: its largest value is .* of .*white is"):
        assert not images.masks(NOTHING[given], "mask_image", H, W).any()


@pytest.mark.parametrize(
    "mask", [Image.new("L", (9, 9), 255), Image.new("L", (9, 9), 1), BINARY | True, GREY * 0 + 200]
)
def test_mask_that_repaints_everything_is_worth_a_warning(mask):
    with pytest.warns(UserWarning, match="mask_image repaints everything"):
        assert images.masks(mask, "mask_image", H, W).all()


@pytest.mark.slow
def test_mask_between_the_latents_is_worth_a_warning(ours):
    """The reference looks at one pixel of each latent's 64."""
    mask = np.zeros((H, H), bool)
    mask[9:12, 9:12] = True
    embeds = np.zeros((1, 64), np.float32)
    size = {"height": H, "width": H, "num_inference_steps": 1, "output_type": "latent", "generator": 0}
    with pytest.warns(UserWarning, match="mask_image of image 0 repaints nothing: its white parts are smaller than"):
        ours["KandinskyV22InpaintPipeline"](embeds, RGB[:, :H], mask, embeds, **size)


def test_one_mask_of_several_is_named():
    with pytest.warns(UserWarning, match=r"mask_image\[1\] repaints nothing"):
        images.masks(np.stack([BINARY, BINARY & False]), "mask_image", H, W)


# Sizes ------------------------------------------------------------------------------------------------------------

SIZES = [(H, W), (100, 70), (33, 200), (48, 96), (65, 129), (16, 9)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_arrays_of_another_size_are_the_references(size, kind):
    """Resized to the nearest pixel, as in diffusers: pictures before encoding, masks on their way to latents."""
    pixels = np.random.default_rng(1).random((2, *size, 3), np.float32)
    given = kind(pixels if kind is np.asarray else pixels.transpose(0, 3, 1, 2))
    theirs = VaeImageProcessor(vae_scale_factor=8).preprocess(given, H, W)
    np.testing.assert_allclose(images.pictures(given, "image", H, W).transpose(0, 3, 1, 2), theirs, atol=1e-6)
    mask = np.random.default_rng(2).random(size) < 0.3
    small = torch.nn.functional.interpolate(torch.tensor(mask[None, None].astype(np.float32)), (H // 8, W // 8))
    ours = images.masks(kind(mask), "mask_image", H, W)[0, ::8, ::8]
    np.testing.assert_array_equal(ours, small.numpy()[0, 0] == 1)


def test_masked_numpy_call_of_another_size_is_the_references():
    """All of what inpainting makes of a NumPy mask of another size than the picture."""
    from kandinsky_jax.diffusion.inpainting import latent_repaint_mask

    mask = np.zeros((48, 96), np.float32)
    mask[10:20, 30:60] = 1
    keep, _ = reference.prepare_mask_and_masked_image(np.zeros((H, W, 3), np.uint8), mask.copy(), H, W)
    theirs = reference.prepare_mask(torch.nn.functional.interpolate(keep, (H // 8, W // 8), mode="nearest"))
    ours = latent_repaint_mask(images.masks(mask, "mask_image", H, W), H // 8, W // 8)
    np.testing.assert_array_equal(ours, theirs[:, 0] == 0)


@pytest.mark.parametrize("size", [(1, 1_000_000), (1_000_000, 1)])
def test_picture_without_proportions_is_refused_or_cut(size):
    picture = Image.new("RGB", size)
    with pytest.raises(ValueError, match=r"^image has .*too long for its proportions.*give height and width"):
        images.fitting_size(picture, 512)
    assert images.CLIPImageProcessor()(picture).shape == (1, 224, 224, 3)
    assert images.pictures(picture, "image", H, W).shape == (1, H, W, 3)


def test_long_picture_is_cut_for_clip_as_a_whole_one(monkeypatch):
    # No extremes: bicubic passes in another order clip them differently.
    pixels = np.random.default_rng(0).integers(90, 160, (30, 900, 3), dtype=np.uint8)
    for picture in (Image.fromarray(pixels), Image.fromarray(pixels.transpose(1, 0, 2))):
        monkeypatch.setattr(images, "LONGEST", 10**6)
        whole = images.CLIPImageProcessor()(picture)
        monkeypatch.setattr(images, "LONGEST", 16)
        np.testing.assert_allclose(images.CLIPImageProcessor()(picture), whole, atol=0.04)  # two of 255 levels


def test_damaged_exif_is_ignored(tmp_path):
    picture = Image.fromarray(GREY)
    picture.save(tmp_path / "a.jpg", exif=b"Exif\0\0nonsense")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert images.read(tmp_path / "a.jpg").size == (W, H)


# Arrays -----------------------------------------------------------------------------------------------------------

NUMBERS = np.random.default_rng(0).random((2, 5), np.float32) * np.float32(0.9)
SAME_ARRAY = {
    "torch": torch.tensor(NUMBERS),
    "torch with a gradient": torch.tensor(NUMBERS, requires_grad=True),
    "torch parameter": torch.nn.Parameter(torch.tensor(NUMBERS)),
    "torch bfloat16": torch.tensor(NUMBERS, dtype=torch.bfloat16),
    "torch bfloat16 with a gradient": torch.tensor(NUMBERS, dtype=torch.bfloat16, requires_grad=True) * 1,
    "torch float16": torch.tensor(NUMBERS, dtype=torch.float16),
    "torch float8": torch.tensor(NUMBERS).to(torch.float8_e5m2),
    "torch view": torch.tensor(NUMBERS.T).T,
    "torch negated view": torch.view_as_complex(torch.tensor(np.stack([NUMBERS, -NUMBERS], -1))).conj().imag,
    "jax": jnp.asarray(NUMBERS),
    "jax bfloat16": jnp.asarray(NUMBERS, jnp.bfloat16),
    "jax float8": jnp.asarray(NUMBERS, jnp.float8_e5m2),
    "numpy bfloat16": NUMBERS.astype(ml_dtypes.bfloat16),
    "numpy float64": NUMBERS.astype(np.float64),
    "list": NUMBERS.tolist(),
    "list of tensors": list(torch.tensor(NUMBERS, dtype=torch.bfloat16, requires_grad=True)),
    "list of arrays": list(jnp.asarray(NUMBERS, jnp.bfloat16)),
}


@pytest.mark.parametrize("given", SAME_ARRAY)
def test_array_of_any_library_and_dtype(given):
    for array in (to_numpy(SAME_ARRAY[given], "x"), checks.latents(SAME_ARRAY[given], (2, 5))):
        assert array.dtype.kind == "f"
        np.testing.assert_allclose(array, NUMBERS, atol=0.2 if "float8" in given else 0.01)


@pytest.mark.parametrize("given", [name for name in SAME_ARRAY if "list" not in name])
def test_embeddings_pictures_hints_of_any_library_and_dtype(given):
    value = SAME_ARRAY[given]
    embeds = checks.embeds([value, value], "image_embeds", 5)
    assert (embeds.dtype, embeds.shape) == (np.float32, (4, 5))
    plain = to_numpy(value, "x")
    for reader in (images.pictures, images.masks, images.hints):
        np.testing.assert_allclose(reader(value, "x", 64, 64), reader(plain, "x", 64, 64), atol=1e-6)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (torch.zeros(2, 5, device="meta"), "x cannot be read as an array of numbers: "),
        (torch.zeros(2, 5, dtype=torch.complex64), "x must be an array of numbers, has dtype complex64"),
        (np.zeros((2, 5), complex), "x must be an array of numbers, has dtype complex128"),
        (np.array([["a"]]), "x must be an array of numbers, has dtype <U1"),
        (np.zeros(3, [("a", float)]), "x must be an array of numbers, has dtype"),
        (np.zeros(3, "V8"), "x must be an array of numbers, has dtype"),
        (np.array([None]), "x must be an array of numbers, has dtype object"),
        ([[1, 2], [3]], "x cannot be read as an array of numbers: .*inhomogeneous"),
        (jax.random.key(0), "x cannot be read as an array of numbers: "),
    ],
)
def test_no_array_of_numbers_is_a_short_error(value, says):
    with pytest.raises(TypeError, match=says) as caught:
        to_numpy(value, "x")
    assert len(str(caught.value)) < 500
    with pytest.raises(TypeError, match="latents"):
        checks.latents(value, (2, 5))


def test_weights_of_a_mix_may_be_an_array():
    for weights in (np.array([0.25, 0.5]), jnp.array([0.25, 0.5]), torch.tensor([0.25, 0.5], dtype=torch.bfloat16)):
        assert checks.interpolation(["a", "b"], weights)[1] == [0.25, 0.5]


@pytest.mark.slow
def test_call_takes_tensors_of_any_library_and_dtype(ours):
    """Embeddings, latents, a picture, and what a callback gives back: as the same numbers in NumPy."""
    rng = np.random.default_rng(0)
    embeds, negative = (rng.random((1, 64)).astype(ml_dtypes.bfloat16).astype(np.float32) for _ in range(2))
    latents = rng.standard_normal((1, 4, 8, 8)).astype(ml_dtypes.bfloat16).astype(np.float32)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.tensor(array, dtype=torch.bfloat16, requires_grad=True)

    def halved(convert):
        return lambda pipe, i, t, tensors: {name: convert(np.asarray(value) / 2) for name, value in tensors.items()}

    found = []
    for convert in (np.asarray, tensor, lambda x: jnp.asarray(x, jnp.bfloat16)):
        given = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "latent", "generator": 0}
        given |= {"callback_on_step_end": halved(convert), "callback_on_step_end_tensor_inputs": ["image_embeds"]}
        arrays = {"image_embeds": embeds, "negative_image_embeds": negative, "latents": latents}
        arrays = {name: convert(array) for name, array in arrays.items()}
        found.append(np.asarray(ours["KandinskyV22Pipeline"](**arrays, **given).images))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
