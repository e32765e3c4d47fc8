"""The rewards that come along, beside transformers' CLIP and Pillow's JPEG."""

from __future__ import annotations

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from kandinsky_jax import rewards
from kandinsky_jax.images import CLIPImageProcessor
from kandinsky_jax.rewards.functions import preprocess
from tests import shapes
from tests.conftest import nchw, note
from tests.rewards import small

PROMPTS = ["a red circle on a white background", "blue star, yellow background", "a cross"]


@pytest.fixture(scope="module")
def clip(shapes_pipe) -> rewards.ClipSimilarity:
    return rewards.ClipSimilarity.from_pipeline(shapes_pipe.prior_pipe, PROMPTS)


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.float32([shapes.draw(caption, rng) for caption in shapes.captions(3, seed=1)])


def test_clip_similarity_is_that_of_transformers(clip, pictures, reference):
    pipe = reference[0]
    with torch.no_grad():
        tokens = pipe.tokenizer(PROMPTS, padding="max_length", return_tensors="pt")
        texts = pipe.text_encoder(tokens.input_ids).text_embeds
        mean, std = (
            np.array(x)[:, None, None] for x in (pipe.image_processor.image_mean, pipe.image_processor.image_std)
        )
        pixels = torch.from_numpy(np.float32((nchw(pictures) - mean) / std))
        embeds = pipe.image_encoder(pixels).image_embeds
    expected = torch.nn.functional.cosine_similarity(embeds[:, None], texts[None], dim=-1).numpy()
    assert note(np.abs(clip(pictures) - np.diag(expected)).max(), "difference of cosines") < 1e-5
    prompts = np.array([2, 0, 0])
    assert np.abs(clip(pictures, prompts) - expected[np.arange(3), prompts]).max() < 1e-5
    one = rewards.ClipSimilarity(clip.tower, clip.params, clip.texts[:1], clip.processor)
    assert np.abs(one(pictures) - expected[:, 0]).max() < 1e-5


@pytest.mark.parametrize("size", [(96, 72), (50, 64), (64, 64), (200, 150)])
def test_preprocessing_is_the_processors(size):
    """Up to what Pillow rounds, at any size; a smooth picture, and one of noise."""
    rng = np.random.default_rng(0)
    processor = CLIPImageProcessor(size=64, crop=56)
    y, x = np.mgrid[: size[0], : size[1]]
    smooth = 0.5 + 0.5 * np.sin(np.stack([x / 9, y / 7, (x + y) / 11], -1))
    for picture, levels in ((smooth, 1.1), (rng.random((*size, 3)), 2)):
        rounded = np.round(picture * 255).astype(np.uint8)
        theirs = processor(Image.fromarray(rounded))
        ours = preprocess(jnp.float32(rounded[None] / 255), processor)
        assert ours.shape == theirs.shape
        difference = np.abs(ours - theirs) * np.array(processor.image_std)
        assert note(255 * difference.max(), "levels of 255") < levels


def test_prompts_that_the_reward_does_not_know(clip, pictures):
    assert np.isnan(clip(pictures, jnp.array([0, 2, 3]))).tolist() == [False, False, True]
    with pytest.raises(ValueError, match="the reward has 3 prompts; needed is one for each of 4 embeddings"):
        rewards.train_draft(small.sampler(), small.embeds(4), clip)


def test_a_combined_pipeline_has_the_towers_too(clip, shapes_pipe):
    np.testing.assert_array_equal(rewards.ClipSimilarity.from_pipeline(shapes_pipe, PROMPTS).texts, clip.texts)


def test_a_crop_larger_than_the_picture_is_refused():
    with pytest.raises(ValueError, match="cuts 80 pixels out of 64"):
        preprocess(jnp.zeros((1, 64, 64, 3)), CLIPImageProcessor(size=64, crop=80))


def test_the_gradient_of_clip_similarity_goes_through_the_resizing(clip, pictures):
    large = np.float32([np.asarray(Image.fromarray(np.uint8(p * 255)).resize((80, 96))) / 255 for p in pictures])
    large = 0.1 + 0.8 * large  # away from where it is clipped
    direction = np.random.default_rng(1).normal(size=large.shape).astype(np.float32)
    value = jax.jit(lambda x: clip(x).sum())
    slope = (value(large + 2e-3 * direction) - value(large - 2e-3 * direction)) / 4e-3
    along = float((jax.jit(jax.grad(value))(large) * direction).sum())
    assert abs(slope - along) < 0.02 * abs(slope)


def test_compressibility_is_the_size_of_pillows_jpeg(pictures):
    found = rewards.jpeg_compressibility(pictures, np.zeros(3, np.int32))
    for value, picture in zip(found, pictures, strict=True):
        file = io.BytesIO()
        Image.fromarray((picture * 255).round().astype(np.uint8)).save(file, "JPEG", quality=95)
        assert value == np.float32(-len(file.getvalue()) / 1000)
    noisy = np.random.default_rng(0).random(pictures.shape)
    assert (rewards.jpeg_compressibility(noisy) < found).all()
    assert (rewards.jpeg_compressibility(pictures, quality=20) > found).all()


def test_compressibility_has_no_gradient():
    with pytest.raises(TypeError, match="has no gradient; use it as a reward of train_ddpo"):
        jax.grad(lambda x: rewards.jpeg_compressibility(x).sum())(jnp.zeros((1, 8, 8, 3)))
