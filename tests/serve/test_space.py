"""The files of a Hub Space: their form, and that the command line they start is one of ours."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from typer.testing import CliRunner

from kandinsky_jax.cli import app

SPACE = Path(__file__).parents[2] / "examples" / "space"
# Of https://huggingface.co/docs/hub/spaces-config-reference.
FIELDS = {
    *("title", "emoji", "colorFrom", "colorTo", "sdk", "app_port", "pinned", "license", "models", "short_description"),
    *("python_version", "sdk_version", "suggested_hardware", "app_file", "tags", "fullWidth", "header"),
}
COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}


def test_the_readmes_fields():
    _, head, text = (SPACE / "README.md").read_text().split("---\n", 2)
    facts = yaml.safe_load(head)
    assert facts.keys() <= FIELDS
    assert {facts["colorFrom"], facts["colorTo"]} <= COLOURS
    assert (facts["sdk"], facts["app_port"], facts["license"]) == ("docker", 7860, "apache-2.0")
    assert len(facts["short_description"]) <= 60
    assert "Untried" in text


def test_the_requirements():
    lines = [line for line in (SPACE / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    [one] = map(Requirement, lines)
    assert (one.name, one.extras) == ("kandinsky-jax", {"serve"})


def test_the_dockerfile():
    text = (SPACE / "Dockerfile").read_text().replace("\\\n", " ")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    known = {"FROM", "RUN", "USER", "ENV", "WORKDIR", "COPY", "EXPOSE", "CMD"}
    assert {step for step, _ in steps} <= known
    assert steps[0][0] == "FROM"
    for step, rest in steps:
        if step == "COPY":
            assert (SPACE / rest.split()[-2]).is_file()
    named = dict(re.findall(r"(\w+)=(\S+)", text))
    assert named["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert ("USER", "user") in map(tuple, steps)


@pytest.mark.parametrize(
    "environment",
    [{}, {"MODEL": "official", "KANDINSKY_JAX_API_KEY": "x"}, {"MODEL": "a/b", "SPACE_HOST": "a-b.hf.space"}],
)
def test_the_command_line_has_options_that_there_are(environment):
    line = runpy.run_path(str(SPACE / "app.py"))["command"](environment)
    assert line[:2] == ["kandinsky-jax", "serve"]
    help_text = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    assert {option for option in line if option.startswith("--")} <= set(re.findall(r"--[a-z-]+", help_text))
    assert ("--behind-proxy" in line) == ("SPACE_HOST" in environment)
    assert ("--without-key" in line) == ("KANDINSKY_JAX_API_KEY" not in environment)
