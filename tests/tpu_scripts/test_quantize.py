"""What quantization costs is measured layer by layer, for every layer that a network calls."""

from __future__ import annotations

import pytest

from kandinsky_jax import KandinskyV22CombinedPipeline
from kandinsky_jax.models.quantized import quantized_layers
from tpu_scripts.quantize import measure

PROMPTS = ["a red circle on a blue background", "a green star"]


@pytest.mark.slow
def test_each_quantized_layer_has_an_error(shapes_pipe):
    quantized = KandinskyV22CombinedPipeline.from_pipe(shapes_pipe)
    quantized.set_progress_bar_config(disable=True)
    quantized.quantize(prompts=PROMPTS)
    runs = measure.evaluations(shapes_pipe, PROMPTS, steps=2)
    for name in measure.NETWORKS:
        full, made = (getattr(pipe, name) for pipe in (shapes_pipe, quantized))
        errors = measure.layer_errors(full, made, runs[name][:1])
        assert errors.keys() == {layer for layer, _ in quantized_layers(made)}
        assert all(0 < error < 0.5 for error in errors.values()), errors
