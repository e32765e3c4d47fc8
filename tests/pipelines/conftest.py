"""Shared by the pipelines' tests."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def embeds(ours):
    """Image embeddings of two captions, and the negative ones."""
    prompts = ["a red circle on a blue background", "yellow ring, black background"]
    return ours["KandinskyV22PriorPipeline"](
        prompts, num_inference_steps=4, generator=2, output_type="np", return_dict=False
    )
