"""CallOptions of calls: signatures, documentation and types follow from the dataclasses that they are written in."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

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


RIGHT = """
import numpy as np
import kandinsky_jax as kj

def right(pipe: kj.KandinskyV22Pipeline, combined: kj.KandinskyV22InpaintCombinedPipeline) -> None:
    embeds = np.zeros((1, 8))
    pipe(embeds, embeds, 512, 512, 50, 2.0, 1, 0)
    combined("a", "a.png", "b.png", ["c"], 50, height=64, generator=[1, 2], paste_back=True)
"""
WRONG = {
    'pipe(embeds, embeds, "tall")': 'Argument 3 to "__call__".*incompatible type "str"; expected "int"',
    "pipe(embeds)": 'Missing positional argument "negative_image_embeds"',
    "pipe(embeds, embeds, strength=0.5)": 'Unexpected keyword argument "strength"',
    'combined("a", "a.png", "b.png", None, 2.5)': 'Argument 5 to "__call__".*incompatible type "float"; expected "int"',
    'combined("a", "a.png", "b.png", paste_back="yes")': 'Argument "paste_back" to "__call__".*incompatible type "str"',
}


@pytest.mark.slow  # half a minute: mypy reads the whole package
def test_mypy_checks_positional_and_keyword_calls(tmp_path):
    program = RIGHT + "".join(f"    {line}\n" for line in WRONG)
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, "-m", "mypy", "--config-file", "", "--ignore-missing-imports", "--follow-imports=silent"]
    command += ["--cache-dir", str(tmp_path / "cache"), str(tmp_path / "program.py")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    errors = re.findall(r"program.py:(\d+): error: (.*)$", done.stdout, re.MULTILINE)
    first = RIGHT.count("\n") + 1
    assert [int(line) for line, _ in errors] == list(range(first, first + len(WRONG))), done.stdout + done.stderr
    for (_, message), expected in zip(errors, WRONG.values(), strict=True):
        assert re.search(expected, message), message
