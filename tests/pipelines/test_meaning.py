"""Pictures show what the captions say: the end-to-end check of networks, loops and schedulers."""

from __future__ import annotations

import numpy as np
import pytest

from tests import shapes
from tests.conftest import note

BATCH = 25
CAPTIONS = shapes.captions(100)
TRUTHS = [asked.truth for asked in CAPTIONS]
# What diffusers gets from the same checkpoint (1.00, 1.00, 0.98, 0.98 of 100), less three pictures in a hundred: other
# noise gives other pictures, and a malformed small star or cross in some of them.
LEAST = {"colour": 0.97, "background": 0.97, "shape": 0.95, "all": 0.95}


@pytest.fixture(scope="module")
def verdicts(shapes_pipe) -> list[shapes.Verdict]:
    """What the model's pictures of the captions show."""
    found = []
    for first in range(0, len(CAPTIONS), BATCH):
        pictures = shapes_pipe(
            [asked.text for asked in CAPTIONS[first : first + BATCH]],
            prior_num_inference_steps=25,
            prior_guidance_scale=4.0,
            num_inference_steps=50,
            guidance_scale=4.0,
            height=shapes.SIDE,
            width=shapes.SIDE,
            generator=first,
            output_type="np",
        ).images
        found += map(shapes.classify, pictures)
    return found


def test_captions_are_within_the_grammar():
    texts = [asked.text for asked in CAPTIONS]
    assert len(set(texts)) == len(texts)
    assert all(truth.colour != truth.background for truth in TRUTHS)
    assert {truth.shape for truth in TRUTHS} == set(shapes.SHAPES)
    orange = shapes.Verdict("orange", "gray", "ring")
    assert [shapes.caption(orange, template=template).text for template in shapes.TEMPLATES] == [
        "an orange ring on a gray background",
        "orange ring, gray background",
        "a gray background with an orange ring",
        "orange ring on gray",
    ]


@pytest.mark.slow
def test_scorer_is_right_on_true_pictures():
    asked = shapes.captions(300, seed=1)
    rng = np.random.default_rng(1)
    seen = [shapes.classify(shapes.draw(one, rng)) for one in asked]
    wrong = [(one.text, verdict) for one, verdict in zip(asked, seen, strict=True) if one.truth != verdict]
    assert len(wrong) <= 1, wrong


def test_scorer_finds_nothing_in_a_blank_picture():
    verdict = shapes.classify(np.full((shapes.SIDE, shapes.SIDE, 3), 255, np.uint8))
    assert verdict.colour == verdict.background == "white"


@pytest.mark.slow
def test_pictures_obey_the_captions(verdicts):
    rates = shapes.rates(verdicts, TRUTHS)
    for part, rate in rates.items():
        note(rate, f"share of right pictures, {part}")
    wrong = [(c.text, verdict) for c, verdict in zip(CAPTIONS, verdicts, strict=True) if c.truth != verdict]
    assert all(rates[part] >= LEAST[part] for part in LEAST), f"{rates}, at least {LEAST}; wrong: {wrong}"


@pytest.mark.slow
def test_rates_collapse_against_other_captions(verdicts):
    rates = shapes.rates(verdicts, TRUTHS[1:] + TRUTHS[:1])
    assert rates["all"] <= 0.05, rates
    assert max(rates.values()) <= 0.3, rates
