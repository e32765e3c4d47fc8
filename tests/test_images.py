"""Conversion of pictures, compared with the reference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kandinsky_jax import images
from kandinsky_jax.checkpoint import hub
from tests.conftest import OFFICIAL, SHAPES_MODEL

PROCESSORS = [SHAPES_MODEL / hub.PRIOR / "image_processor", OFFICIAL / hub.PRIOR / "image_processor"]


@pytest.mark.parametrize("folder", PROCESSORS, ids=["shapes", "official"])
@pytest.mark.parametrize("size", [(64, 64), (300, 200), (97, 331), (224, 500), (30, 31)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_clip_image_processor(folder, size, mode):
    """The same numbers as transformers' own, from files that it reads and writes."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).convert(mode)
    theirs = CLIPImageProcessorPil.from_pretrained(folder)(picture, return_tensors="np").pixel_values
    ours = images.CLIPImageProcessor.from_pretrained(folder)(picture)
    assert ours.shape == theirs.transpose(0, 2, 3, 1).shape
    np.testing.assert_allclose(ours, theirs.transpose(0, 2, 3, 1), atol=1e-6)


def test_clip_image_processor_saved(tmp_path):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = images.CLIPImageProcessor.from_pretrained(PROCESSORS[0])
    processor.save_pretrained(tmp_path)
    assert images.CLIPImageProcessor.from_pretrained(tmp_path) == processor
    assert CLIPImageProcessorPil.from_pretrained(tmp_path).crop_size["height"] == processor.crop


def changed(folder: Path, change: dict[str, Any]) -> Path:
    shutil.copytree(PROCESSORS[0], folder)
    path = folder / images.CLIPImageProcessor.FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        *({"rescale_factor": factor} for factor in (1 / 127.5, 1 / 255, 1 / 256, 1)),
        {"size": 48, "crop_size": 40},
        {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_pad": False},
    ],
)
def test_settings_of_the_clip_image_processor(tmp_path, change):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = changed(tmp_path / "p", change)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    theirs = CLIPImageProcessorPil.from_pretrained(folder)(picture, return_tensors="np").pixel_values
    ours = images.CLIPImageProcessor.from_pretrained(folder)
    np.testing.assert_allclose(ours(picture), theirs.transpose(0, 2, 3, 1), rtol=1e-6, atol=1e-6)
    ours.save_pretrained(tmp_path / "again")
    assert images.CLIPImageProcessor.from_pretrained(tmp_path / "again") == ours
    theirs = CLIPImageProcessorPil.from_pretrained(tmp_path / "again")(picture, return_tensors="np").pixel_values
    np.testing.assert_allclose(ours(picture), theirs.transpose(0, 2, 3, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"do_center_crop": False}, "do_center_crop=False"),
        ({"resample": 2}, "resample=2"),
        ({"image_mean": None}, "image_mean must be a list"),
        ({"rescale_factor": None}, "rescale_factor must be a"),
        ({"rescale_factor": "1/255"}, "rescale_factor must be a"),
        ({"rescale_factor": True}, "rescale_factor must be a"),
        ({"rescale_factor": 0}, "rescale_factor must be from"),
        ({"size": {"height": 64, "width": 64}}, r"size=.*height.* \(only {\"shortest_edge\": N}\)"),
        ({"size": {"shortest_edge": 64, "longest_edge": 90}}, "size=.*longest_edge"),
        ({"crop_size": {"height": 64, "width": 32}}, "crop_size=.*32"),
        ({"crop_size": {"shortest_edge": 64}}, "crop_size=.*only .*height"),
        ({"do_pad": True}, "do_pad=True"),
        ({"use_square_size": True}, "use_square_size=True"),
    ],
)
def test_clip_image_processor_refuses(tmp_path, change, says):
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json cannot be used: .*{says}"):
        images.CLIPImageProcessor.from_pretrained(changed(tmp_path / "p", change))


def test_levels_round_as_the_reference():
    from diffusers.image_processor import VaeImageProcessor

    pixels = np.random.default_rng(0).random((2, 8, 9, 3), np.float32)
    ours = images.to_output(pixels, "pil")
    theirs = VaeImageProcessor.numpy_to_pil(pixels)
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(other))


def test_a_written_picture_is_complete_or_absent(tmp_path):
    picture = Image.new("RGB", (8, 8))
    images.write(tmp_path / "a.png", picture, {"prompt": "é"})
    with pytest.raises(TypeError):
        images.write(tmp_path / "b.png", picture, {"prompt": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
