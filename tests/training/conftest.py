"""Fixtures of tests of training: captioned pictures, and the model of shapes to be trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from kandinsky_jax import KandinskyV22CombinedPipeline
from tests.conftest import SHAPES_MODEL
from tests.training.test_training_loop import write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture
def pipe() -> KandinskyV22CombinedPipeline:
    return KandinskyV22CombinedPipeline.from_pretrained(SHAPES_MODEL, dtype="float32")
