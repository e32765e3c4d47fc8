"""`--fast`: the model's fast adapter and its settings, where nothing is said."""

from __future__ import annotations

import json
import tarfile
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from kandinsky_jax import CheckpointError, KandinskyV22CombinedPipeline
from kandinsky_jax.checkpoint import hub
from kandinsky_jax.cli import app
from kandinsky_jax.cli.options import Options
from kandinsky_jax.pipelines.modes import MODES
from tests import fast_model
from tests.conftest import SHAPES_MODEL
from tests.fast_model import ARGUMENTS
from tests.pipelines.test_compile import compilations

PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def model(shapes_pipe, tmp_path_factory) -> Path:
    return fast_model.write(tmp_path_factory.mktemp("family") / "shapes", shapes_pipe)


@pytest.fixture
def picture(tmp_path) -> Path:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments), "--quiet"])


def facts_of(path: Path, *arguments: object) -> dict[str, Any]:
    """Run a command, and return what its picture says."""
    done = invoke(*arguments, "--seed", 5, "-o", path)
    assert done.exit_code == 0, done.output + str(done.exception)
    with Image.open(path) as image:
        return json.loads(image.text["kandinsky_jax"])


def test_the_picture_is_that_of_load_fast_and_says_so(model, tmp_path):
    facts = facts_of(tmp_path / "a.png", "generate", PROMPT, "-m", model, "--fast")
    assert ARGUMENTS.items() <= facts.items()
    assert (facts["fast"], facts["scheduler"]) == (True, "lcm")
    pipe = KandinskyV22CombinedPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_fast()
    [expected] = pipe(PROMPT, height=64, width=64, generator=5).images
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(expected))


@pytest.mark.parametrize(
    ("given", "unused"),
    [
        ({}, "--negative-prompt has"),
        ({"guidance_interval": "0,1"}, "--negative-prompt and --guidance-interval have"),
        ({"guidance_interval": "0,1", "guidance_scale": 2.0}, None),
        ({"prior_guidance_scale": 2.0}, None),
    ],
)
def test_what_has_no_effect_without_guidance_is_said(given, unused, model):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        options = Options(model=str(model), fast=True, negative_prompt="blur", **given)
        options.completed(MODES["generate"])
    found = [str(warning.message) for warning in said]
    guided = [text for text in found if "distilled for no guidance" in text]
    assert len(guided) == any(name.endswith("guidance_scale") for name in given)
    found = [text for text in found if text not in guided]
    assert [text.partition(" no effect without guidance")[0] for text in found] == ([] if unused is None else [unused])
    if "prior_guidance_scale" in given:
        with pytest.warns(UserWarning, match="no effect|no guidance") as said:
            options.completed(MODES["generate"], guides_prior=False)  # as in mix
        assert "--negative-prompt has no effect" in str(said[0].message)


@pytest.mark.slow
def test_what_is_given_wins(model, tmp_path):
    given = ["--steps", 2, "--prior-steps", 3, "--guidance-scale", 3, "--scheduler", "ddim"]
    with pytest.warns(UserWarning, match="distilled for no guidance"):
        facts = facts_of(tmp_path / "a.png", "generate", PROMPT, "-m", model, "--fast", *given)
    found = [facts[name] for name in ("num_inference_steps", "prior_num_inference_steps", "guidance_scale")]
    assert [*found, facts["prior_guidance_scale"], facts["scheduler"]] == [2, 3, 3.0, 1.0, "ddim"]
    facts = facts_of(tmp_path / "b.png", "generate", PROMPT, "-m", model, *given[:4])
    assert (facts["fast"], facts["guidance_scale"], facts["scheduler"]) == (False, 2.0, None)


@pytest.mark.slow
def test_nothing_is_compiled_besides_what_the_settings_need(model, tmp_path):
    by_hand = ["--steps", 3, "--prior-steps", 2, "--guidance-scale", 1, "--prior-guidance-scale", 1]
    compiled = []
    for how in (["--fast"], [*by_hand, "--scheduler", "lcm"]):
        jax.clear_caches()
        with compilations() as events:
            facts_of(tmp_path / "a.png", "generate", PROMPT, "-m", model, *how)
        compiled.append(sorted(events))
    assert compiled[0] == compiled[1]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["img2img", "mix", "vary"])
def test_other_commands(command, model, picture, tmp_path):
    arguments = [PROMPT, picture] if command == "mix" else [PROMPT, "-i", picture, "--strength", 0.7]
    facts = facts_of(tmp_path / "a.png", command, *arguments, "-m", model, "--fast")
    assert (facts["fast"], facts["scheduler"], facts["num_inference_steps"]) == (True, "lcm", 3)
    prior = facts.get("prior", {"num_inference_steps": facts.get("prior_num_inference_steps")})
    assert prior["num_inference_steps"] == 2


@pytest.mark.parametrize("command", ["generate", "img2img", "inpaint", "controlnet", "mix", "vary", "batch"])
def test_a_model_without_one_is_an_error_before_anything_is_compiled(command, picture, tmp_path):
    pictures = {"img2img": ["-i"], "inpaint": ["-i", "--mask"], "controlnet": ["--hint"], "vary": ["-i"]}
    arguments: list[object] = [PROMPT, *(x for option in pictures.get(command, []) for x in (option, picture))]
    if command == "batch":
        (tmp_path / "rows.txt").write_text(PROMPT)
        arguments = [tmp_path / "rows.txt"]
    with compilations() as events:
        done = invoke(command, *arguments, "-m", SHAPES_MODEL, "--fast", "-o", tmp_path / "out.png")
    assert isinstance(done.exception, CheckpointError)
    assert "have no fast adapter" in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not events
    assert not (tmp_path / "out.png").exists()


def test_a_file_that_is_missing_is_an_error_before_anything_is_compiled(model, shapes_pipe, tmp_path):
    family = fast_model.write(tmp_path / "family", shapes_pipe)
    (family / hub.PRIOR / fast_model.LORA).unlink()
    with compilations() as events:
        done = invoke("generate", PROMPT, "-m", family, "--fast", "-o", tmp_path / "a.png")
    assert f"{hub.PRIOR}/{fast_model.LORA} is not there" in str(done.exception)
    assert not events


def test_a_batch_job(model, tmp_path):
    (tmp_path / "rows.csv").write_text(f"prompt,steps,seed\n{PROMPT},,5\n{PROMPT},2,5\n")
    done = invoke("batch", tmp_path / "rows.csv", "-o", tmp_path / "out", "-m", model, "--fast", "--batch", 1)
    assert done.exit_code == 0, done.output + str(done.exception)
    with tarfile.open(tmp_path / "out" / "000000.tar") as tar:
        names = [member.name for member in tar if member.name.endswith(".json")]
        about = [json.load(tar.extractfile(name)) for name in names]
    assert [(each["steps"], each["guidance_scale"], each["prior_steps"]) for each in about] == [(3, 1, 2), (2, 1, 2)]
    assert all(each["fast"] and each["scheduler"] == "lcm" for each in about)
