"""Rates of the small models, measured by `evaluate`."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from kandinsky_jax.evaluation import Picture
from tests import shapes
from tests.conftest import SHAPES_MODEL
from tpu_scripts.evaluation import small_models


def test_a_picture_is_judged_by_its_own_prompt():
    prompts, metric = small_models.right_shapes(8)
    drawn = shapes.draw(shapes.captions(8, seed=small_models.SEED)[0], np.random.default_rng(0))
    image = Image.fromarray((drawn * 255).round().astype(np.uint8))
    [extractor] = metric.extractors
    assert extractor.prepare(Picture("0", prompts[0], image, {})).tolist() == [1, 1, 1, 1]
    assert [extractor.prepare(Picture("0", prompt, image, {}))[-1] for prompt in prompts[1:]] == [0] * 7


@pytest.mark.slow
def test_rates_of_shapes_are_measured_as_any_metric(tmp_path):
    prompts, metric = small_models.right_shapes(8)
    found = small_models.measure(tmp_path, prompts, metric, str(SHAPES_MODEL), height=64, width=64, steps=15)
    assert found.pictures == 8
    assert list(found.as_json()["metrics"]) == [f"shapes/{column}" for column in small_models.COLUMNS]
    assert found["shapes/all"].value >= 0.75
