"""Every mode compared with the reference: same seed, same picture, in one table of modes and variants, float32.

Where the reference is defective, it is called in the way that avoids the defect: with height and width exchanged
(img2img), and picture by picture (inpaint).
"""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import kandinsky_jax
from kandinsky_jax import TorchGenerator
from tests import shapes
from tests.conftest import TABLE, note, quick_and_slow, worst

PROMPTS = ["a red circle on a blue background", "large yellow star, black background", "a purple ring on white"]
NEGATIVES = ["green", "a small square", "gray"]
STEPS = {"num_inference_steps": 20, "guidance_scale": 4.0}
PRIOR = {"num_inference_steps": 8, "guidance_scale": 4.0}
STRENGTH = 0.6

# variant -> prompts, pictures of each, whether negative prompts are given, height, width
VARIANTS: dict[str, tuple[int, int, bool, int, int]] = {
    "batch 1": (1, 1, False, 64, 64),
    "batch 3": (3, 1, False, 64, 64),
    "two images": (1, 2, False, 64, 64),
    "negative prompt": (1, 1, True, 64, 64),
    "not square": (1, 1, False, 64, 128),
}
# Batches and other sizes are programs of their own in every mode: not in the quick suite.
QUICK = ("batch 1", "negative prompt")
QUICK_FIRST = quick_and_slow(VARIANTS, *QUICK)
MODES = {
    "text2img": "KandinskyV22Pipeline",
    "img2img": "KandinskyV22Img2ImgPipeline",
    "inpaint": "KandinskyV22InpaintPipeline",
    "controlnet": "KandinskyV22ControlnetPipeline",
    "controlnet img2img": "KandinskyV22ControlnetImg2ImgPipeline",
}
# Two variants of the first mode, and one of two others, in the quick suite.
IN_QUICK = {("text2img", "batch 1"), ("text2img", "negative prompt"), ("img2img", "batch 1"), ("inpaint", "batch 1")}
QUICK_MODES = quick_and_slow(((mode, variant) for mode in MODES for variant in VARIANTS), *IN_QUICK)


def picture(i: int) -> Image.Image:
    """A source picture of another size than the generated one."""
    rng = np.random.default_rng(i)
    generated = shapes.draw(shapes.captions(4, seed=9)[i], rng)
    return Image.fromarray(np.uint8(generated * 255)).resize((90 - i, 75 + i), Image.Resampling.BICUBIC)


def mask(i: int) -> Image.Image:
    levels = np.zeros((80, 100 + i), np.uint8)
    levels[20 + 5 * i : 60, 10 : 60 + 10 * i] = 255
    return Image.fromarray(levels)


def hint(i: int, height: int, width: int) -> np.ndarray:
    plane = np.tile(shapes.depth(shapes.SHAPES[i], (30 + i, 34), 16), (height // 64, width // 64))
    return np.repeat(plane[None], 3, axis=0)


def given(mode: str, count: int, height: int, width: int) -> dict[str, list]:
    """The pictures that a mode takes, one for each prompt."""
    found: dict[str, list] = {}
    if "img2img" in mode or mode == "inpaint":
        found["image"] = [picture(i) for i in range(count)]
    if mode == "inpaint":
        found["mask_image"] = [mask(i) for i in range(count)]
    if "controlnet" in mode:
        found["hint"] = [hint(i, height, width) for i in range(count)]
    return found


def extra(mode: str) -> dict[str, Any]:
    return {"strength": STRENGTH} if "img2img" in mode else {}


def for_reference(pictures: dict[str, list]) -> dict[str, Any]:
    """The same, as the reference takes it."""
    return {name: torch.tensor(np.stack(x)) if name == "hint" else list(x) for name, x in pictures.items()}


def reference_decode(
    theirs, mode: str, embeds, pictures, repeats: int, size: tuple[int, int], generators
) -> np.ndarray:
    """The reference's pictures of a mode, without its defects."""
    pipe, (height, width) = theirs[MODES[mode]], size
    if "img2img" in mode:
        height, width = width, height
    settings = {"height": height, "width": width, "output_type": "np"} | STEPS | extra(mode)

    def generate(rows: slice, generator) -> np.ndarray:
        own = for_reference({name: x[rows] for name, x in pictures.items()})
        image_embeds, negative_image_embeds = (torch.from_numpy(np.asarray(x).copy())[rows] for x in embeds)
        return pipe(
            image_embeds=image_embeds,
            negative_image_embeds=negative_image_embeds,
            num_images_per_prompt=repeats,
            generator=generator,
            **own,
            **settings,
        ).images

    if isinstance(generators, list):
        return np.concatenate([generate(slice(i, i + 1), generator) for i, generator in enumerate(generators)])
    return generate(slice(None), generators)


def assert_same(ours: np.ndarray, reference: np.ndarray, mode: str, variant: str) -> None:
    assert ours.shape == reference.shape
    difference = np.abs(ours - reference) * 255
    TABLE.setdefault(mode, {})[variant] = f"{difference.mean():.4f} {difference.max():.3f}"
    assert note(difference.mean(), "mean |d|, of 255") <= 0.2
    assert note(difference.max(), "max |d|, of 255") <= 4


def generators(mode: str, count: int, seed: int) -> tuple[Any, Any]:
    """Ours and the reference's: one for the batch, or one for each picture where the reference must go one by one."""
    if mode == "inpaint" and count > 1:
        seeds = range(seed, seed + count)
        return [TorchGenerator(s) for s in seeds], [torch.Generator().manual_seed(s) for s in seeds]
    return TorchGenerator(seed), torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def embeds(ours):
    """Embeddings for the decoders: (positive, negative) of three prompts, without and with negative prompts."""
    pipe = ours["KandinskyV22PriorPipeline"]
    plain = pipe(PROMPTS, generator=0, output_type="np", return_dict=False)
    return {False: plain, True: pipe(PROMPTS, NEGATIVES, generator=1, output_type="np", return_dict=False)}


@pytest.mark.parametrize(("mode", "variant"), QUICK_MODES)
def test_decoder(ours, theirs, embeds, mode, variant):
    count, repeats, negative, height, width = VARIANTS[variant]
    rows = [x[:count] for x in embeds[negative]]
    pictures = given(mode, count, height, width)
    mine, other = generators(mode, count, seed=3)
    generated = ours[MODES[mode]](
        image_embeds=rows[0],
        negative_image_embeds=rows[1],
        num_images_per_prompt=repeats,
        generator=mine,
        height=height,
        width=width,
        output_type="np",
        **pictures,
        **STEPS,
        **extra(mode),
    ).images
    reference = reference_decode(theirs, mode, rows, pictures, repeats, (height, width), other)
    assert_same(generated, reference, mode, variant)


@pytest.mark.parametrize(("mode", "variant"), QUICK_MODES)
def test_combined(ours, theirs, mode, variant):
    """prompt -> picture in one call, beside the reference's prior and decoder with one generator."""
    count, repeats, negative, height, width = VARIANTS[variant]
    pictures = given(mode, count, height, width)
    prompts, negatives = PROMPTS[:count], NEGATIVES[:count] if negative else None
    mine, other = generators(mode, count, seed=5)
    generated = ours[MODES[mode].replace("Pipeline", "CombinedPipeline")](
        prompts,
        negative_prompt=negatives,
        num_images_per_prompt=repeats,
        generator=mine,
        height=height,
        width=width,
        prior_num_inference_steps=PRIOR["num_inference_steps"],
        prior_guidance_scale=PRIOR["guidance_scale"],
        output_type="np",
        **pictures,
        **STEPS,
        **extra(mode),
    ).images
    found = theirs["KandinskyV22PriorPipeline"](
        prompts, negatives, num_images_per_prompt=repeats, generator=other, return_dict=False, **PRIOR
    )
    # The reference's combined pipelines repeat the picture, not the embedding, for several images of a prompt.
    pictures = {name: [x for x in items for _ in range(repeats)] for name, items in pictures.items()}
    reference = reference_decode(theirs, mode, found, pictures, 1, (height, width), other)
    assert_same(generated, reference, f"{mode}, combined", variant)


def text2img(ours, theirs, mine, other, size: tuple[int, int], mode: str, variant: str) -> None:
    """Both embeddings through text2img, each library's own."""
    height, width = size
    generated = ours["KandinskyV22Pipeline"](
        **mine, generator=TorchGenerator(8), height=height, width=width, output_type="np", **STEPS
    ).images
    generator = torch.Generator().manual_seed(8)
    assert_same(generated, reference_decode(theirs, "text2img", other, {}, 1, size, generator), mode, variant)


@pytest.mark.parametrize("variant", QUICK_FIRST)
def test_emb2emb(ours, theirs, variant):
    count, repeats, negative, height, width = VARIANTS[variant]
    name, settings = (
        "KandinskyV22PriorEmb2EmbPipeline",
        {"strength": STRENGTH, "num_images_per_prompt": repeats} | PRIOR,
    )
    arguments = {"prompt": PROMPTS[:count], "image": [picture(i) for i in range(count)], **settings}
    arguments["negative_prompt"] = NEGATIVES[:count] if negative else None
    mine = ours[name](generator=TorchGenerator(7), output_type="np", **arguments)
    other = theirs[name](generator=torch.Generator().manual_seed(7), return_dict=False, **arguments)
    assert worst(mine[0], other[0]) <= 1e-3
    assert worst(mine[1], other[1]) <= 1e-3
    text2img(ours, theirs, mine, other, (height, width), "emb2emb", variant)


@pytest.mark.parametrize("variant", QUICK_FIRST)
@pytest.mark.parametrize("name", ["KandinskyV22PriorPipeline", "KandinskyV22PriorEmb2EmbPipeline"])
def test_interpolate(ours, theirs, name, variant):
    """Prompts and pictures with weights. The reference's Emb2Emb mixes only pictures, and its negative is noise without
    a seed; there ours is held against what the other prior makes of the same items."""
    count, repeats, negative, height, width = VARIANTS[variant]
    items, weights = [PROMPTS[1], picture(0), PROMPTS[0], picture(1)][: count + 1], [0.5, 0.3, 0.2, -0.1][: count + 1]
    settings = {"num_images_per_prompt": repeats} | PRIOR
    if negative:
        settings |= {"negative_prompt": "a green star", "negative_prior_prompt": "gray"}
    generator, reference = TorchGenerator(6), torch.Generator().manual_seed(6)
    mine = ours[name].interpolate(items, weights, generator=generator, **settings)
    other = theirs["KandinskyV22PriorPipeline"].interpolate(items, weights, generator=reference, **settings)
    assert worst(mine.image_embeds, other.image_embeds) <= 1e-3
    assert worst(mine.negative_image_embeds, other.negative_image_embeds) <= 1e-3
    # Both generators have gone equally far.
    np.testing.assert_allclose(generator.randn(16), torch.randn(16, generator=reference), atol=1e-6)
    found = other.image_embeds, other.negative_image_embeds
    text2img(ours, theirs, mine, found, (height, width), f"interpolate of {name[len('KandinskyV22') : -8]}", variant)


def test_interpolate_pictures(ours, theirs):
    """What the reference's Emb2Emb does mix."""
    items, weights = [picture(0), picture(1)], [0.7, 0.6]
    name = "KandinskyV22PriorEmb2EmbPipeline"
    mine = ours[name].interpolate(items, weights, num_images_per_prompt=2)
    other = theirs[name].interpolate(items, weights, num_images_per_prompt=2)
    assert worst(mine.image_embeds, other.image_embeds) <= 1e-4


REFERENCES = [name for name in dir(diffusers) if name.startswith("KandinskyV22")]


@pytest.mark.parametrize("name", [*REFERENCES, "KandinskyV22PriorPipeline.interpolate"])
def test_arguments_are_the_references(name):
    """Same classes, names, order and defaults; ours come after, and `**kwargs` and `device` have gone."""
    name, _, method = name.partition(".")
    assert len(REFERENCES) == 10
    mine, other = (getattr(getattr(module, name), method or "__call__") for module in (kandinsky_jax, diffusers))
    own = {k: v.default for k, v in inspect.signature(mine).parameters.items()}
    wanted = {k: v.default for k, v in inspect.signature(other).parameters.items() if k not in ("kwargs", "device")}
    wanted = {k: tuple(v) if isinstance(v, list) else v for k, v in wanted.items()}
    assert list(own.items())[: len(wanted)] == list(wanted.items())


@pytest.mark.parametrize("name", REFERENCES)
def test_constructors_are_the_references(name):
    mine, other = (list(inspect.signature(getattr(m, name)).parameters) for m in (kandinsky_jax, diffusers))
    assert sorted(mine) == sorted(other)
