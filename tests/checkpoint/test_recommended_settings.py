"""A model's own settings: used by commands and batch jobs where the user says nothing, and by nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest
from PIL import Image
from typer.testing import CliRunner

import kandinsky_jax
from kandinsky_jax import CheckpointError
from kandinsky_jax.checkpoint import hub, recommended_settings
from kandinsky_jax.checkpoint.conversion import convert
from kandinsky_jax.checkpoint.recommended_settings import FILE, RecommendedSettings
from kandinsky_jax.cli import app
from tests.conftest import SHAPES_MODEL

OWN = {"format_version": 1, "num_inference_steps": 3, "prior_num_inference_steps": 2, "guidance_scale": 1.5}
OWN |= {"prior_guidance_scale": 1.0, "height": 64, "width": 128, "scheduler": "dpm++2m"}


def invoke(*arguments: object) -> str:
    done = CliRunner().invoke(app, [*map(str, arguments), "--quiet"])
    assert done.exit_code == 0, done.output + str(done.exception)
    return done.output


def facts_of(path: Path) -> dict:
    with Image.open(path) as image:
        return json.loads(image.text["kandinsky_jax"]) | {"size": image.size}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The model of shapes with settings of its own."""
    folder = tmp_path_factory.mktemp("family") / "model"
    shutil.copytree(SHAPES_MODEL, folder)
    (folder / hub.DECODER / FILE).write_text(json.dumps(OWN))
    return folder / hub.DECODER


def test_a_command_uses_them_where_nothing_is_said(model, tmp_path):
    invoke("generate", "a red ring", "--model", model, "--seed", 1, "-o", tmp_path / "own.png")
    facts = facts_of(tmp_path / "own.png")
    assert facts["size"] == (128, 64)
    assert {name: facts[name] for name in OWN if name != "format_version"} == {
        k: v for k, v in OWN.items() if k in facts
    }
    given = ["--steps", 2, "--prior-steps", 3, "--guidance-scale", 3, "--prior-guidance-scale", 2, "--width", 64]
    invoke("generate", "a red ring", "--model", model, "-o", tmp_path / "given.png", "--scheduler", "ddim", *given)
    facts = facts_of(tmp_path / "given.png")
    found = [facts[name] for name in OWN if name != "format_version"]
    assert found == [2, 3, 3.0, 2.0, 64, 64, "ddim"]


def test_pipelines_keep_the_defaults_of_diffusers(model):
    pipe = kandinsky_jax.KandinskyV22CombinedPipeline.from_pretrained(model)
    assert pipe.recommended_settings == RecommendedSettings(**{k: v for k, v in OWN.items() if k != "format_version"})
    assert pipe.recommended_settings.arguments().keys() == OWN.keys() - {"format_version", "scheduler"}
    assert type(pipe.scheduler).__name__ == "DDPMScheduler"
    plain = kandinsky_jax.KandinskyV22CombinedPipeline.from_pretrained(SHAPES_MODEL)
    assert plain.recommended_settings == RecommendedSettings()


def test_a_batch_job_uses_them_where_neither_row_nor_job_says_anything(model, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a red ring"}\n{"prompt": "a blue star", "guidance_scale": 2.5}\n')
    job = ["batch", tmp_path / "rows.jsonl", "-o", tmp_path / "out", "--model", model, "--batch", 1]
    invoke(*job, "--format", "folder", "--prior-steps", 3)
    identity = json.loads((tmp_path / "out" / "job.json").read_text())
    assert identity["scheduler"] == "dpm++2m"
    expected = {"steps": 3, "prior_steps": 3, "guidance_scale": 1.5, "prior_guidance_scale": 1.0}
    assert expected.items() <= identity["defaults"].items()
    rows = pyarrow.parquet.read_table(tmp_path / "out" / "manifest").to_pylist()
    made = [(row["guidance_scale"], row["prior_guidance_scale"], row["height"], row["width"]) for row in rows]
    assert made == [(1.5, 1.0, 64, 128), (2.5, 1.0, 64, 128)]


def test_a_job_begun_with_other_settings_is_refused_in_one_sentence(model, tmp_path):
    (tmp_path / "rows.txt").write_text("a red ring\n")
    job = ["batch", tmp_path / "rows.txt", "-o", tmp_path / "out", "--model", model, "--batch", 1, "--quiet"]
    assert CliRunner().invoke(app, [*map(str, job)]).exit_code == 0
    begun = json.loads((tmp_path / "out" / "job.json").read_text())
    begun["defaults"]["guidance_scale"] = 4.0  # as before the model had settings of its own
    (tmp_path / "out" / "job.json").write_text(json.dumps(begun))
    done = CliRunner().invoke(app, [*map(str, job)])
    message = str(done.exception)
    assert done.exit_code != 0
    assert "guidance_scale" in message
    assert "4.0" in message
    assert "1.5" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "is not a JSON object|holds|object"),
        ('{"format_version": 2}', "format_version is 2, this release knows 1"),
        ('{"format_version": 1, "steps": 3}', r"\['steps'\] are not settings; there are num_inference_steps"),
        ('{"format_version": 1, "guidance_scale": "2"}', "guidance_scale is '2', needed is a number from 0.0 to 100.0"),
        ('{"format_version": 1, "guidance_scale": NaN}', "guidance_scale|JSON|NaN"),
        ('{"format_version": 1, "height": 64.5}', "height is 64.5, needed is a whole number from 64 to 8192"),
        ('{"format_version": 1, "num_inference_steps": true}', "num_inference_steps is True"),
        ('{"format_version": 1, "scheduler": "fast"}', "scheduler is 'fast', needed is a short name such as ddpm"),
        ('{"format_version": 1, "height": 0, "width": 1e9}', "height is 0.*; width is 1000000000.0"),
    ],
)
def test_what_is_wrong_with_the_file_is_said_at_once(tmp_path, content, message):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        recommended_settings.read(tmp_path)
    assert FILE in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_spoils_no_pipeline_but_is_reported_by_commands(model, tmp_path):
    family = tmp_path / "family"
    shutil.copytree(model.parent, family)
    (family / hub.DECODER / FILE).write_text("{")
    kandinsky_jax.KandinskyV22Pipeline.from_pretrained(family)
    command = ["generate", "a", "--model", str(family / hub.DECODER), "-o", str(tmp_path / "a.png")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code != 0
    assert FILE in str(done.exception)


def test_saving_and_converting_keep_the_file(model, tmp_path):
    pipe = kandinsky_jax.KandinskyV22Pipeline.from_pretrained(model)
    pipe.save_pretrained(tmp_path / "saved")
    kandinsky_jax.KandinskyV22Pipeline.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "again")
    convert(model, tmp_path / "converted", progress=False)
    for folder in ("saved", "again", "converted"):
        assert json.loads((tmp_path / folder / FILE).read_text()) == OWN
        invoke("verify", tmp_path / folder)


def test_the_embedded_model_recommends_what_it_was_measured_best_with():
    for name in (hub.DECODER, hub.INPAINT, hub.CONTROLNET):
        own = recommended_settings.read(hub.resolve(f"tiny/{name}", name))
        assert (own.guidance_scale, own.prior_guidance_scale, own.height, own.width) == (2.0, 1.0, 64, 64)
