"""CallOptions of calls: signatures and documentation follow from the dataclasses that they are written in.

So do types: mypy reads `typed_calls.py`."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections import Counter

import pytest

import kandinsky_jax
from kandinsky_jax.pipelines import Pipeline, options
from kandinsky_jax.pipelines.modes import MODES, PRIORS, pipeline_named

CLASSES = [name for mode in MODES.values() for name in (mode.decoder, mode.combined)] + list(PRIORS)


@pytest.mark.parametrize("name", CLASSES)
def test_help_explains_every_argument_of_a_call(name):
    call = getattr(kandinsky_jax, name).__call__
    text = inspect.getdoc(call)
    arguments = text.partition("\nArgs:\n")[2].partition("\nR")[0]  # up to Returns or Raises
    explained = [
        part for names in re.findall(r"^    ([\w, ]+): \S", arguments, re.MULTILINE) for part in names.split(", ")
    ]
    assert explained == list(inspect.signature(call).parameters)[1:]


def test_each_option_is_written_once():
    """Groups of one name differ in meaning: a decoder's noise and a prior's, pictures and embeddings."""
    groups = [
        group
        for _, group in inspect.getmembers(options, inspect.isclass)
        if issubclass(group, options.CallOptions) and options.CallOptions in group.__bases__
    ]
    names = Counter(field.name for group in groups for field in dataclasses.fields(group))
    twice = {name for name, count in names.items() if count > 1}
    assert twice == {"latents", "image", "num_inference_steps", "output_type"}
    assert max(names.values()) == 2


def test_wrong_arguments_name_the_pipeline_and_the_argument():
    pipe = object.__new__(kandinsky_jax.KandinskyV22Img2ImgPipeline)
    with pytest.raises(TypeError, match=r"Img2ImgPipeline\.__call__: got an unexpected keyword argument 'mask'"):
        pipe([], [], [], mask=1)
    with pytest.raises(TypeError, match=r"'steps'; did you mean 'num_inference_steps'\?"):
        pipe([], [], [], steps=1)
    with pytest.raises(TypeError, match=r"'num_inference_step'; did you mean 'num_inference_steps'\?"):
        pipe([], [], [], num_inference_step=1)
    combined = object.__new__(kandinsky_jax.KandinskyV22CombinedPipeline)
    with pytest.raises(
        TypeError, match=r"KandinskyV22CombinedPipeline\.generate: missing a required argument: 'prompt'"
    ):
        combined.generate()
    with pytest.raises(TypeError, match="missing a required argument: 'image'"):
        pipe([])


def test_every_mode_is_in_the_registry_once():
    pipelines = {name for name in kandinsky_jax.__all__ if inspect.isclass(getattr(kandinsky_jax, name))}
    pipelines = {name for name in pipelines if issubclass(getattr(kandinsky_jax, name), Pipeline)}
    assert pipelines == set(CLASSES)
    for name in CLASSES:
        assert pipeline_named(name) is getattr(kandinsky_jax, name)
    for mode in MODES.values():
        assert mode.combined_class.DECODER is mode.decoder_class
        assert mode.combined_class.REPOSITORY == mode.decoder_class.REPOSITORY == mode.repository
        fields = [field.name for field in dataclasses.fields(mode.combined_class.OPTIONS)]
        assert [name for name in fields if name in ("image", "mask_image", "hint")] == list(mode.pictures)
        assert mode.takes_strength == ("strength" in fields)
