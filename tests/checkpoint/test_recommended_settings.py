"""A model's own settings: used by commands and batch jobs where the user says nothing, and by nothing else."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest
from PIL import Image
from typer.testing import CliRunner

import kandinsky_jax
from kandinsky_jax import CheckpointError
from kandinsky_jax.batch import Job, JobError, open_job
from kandinsky_jax.checkpoint import hub, recommended_settings
from kandinsky_jax.checkpoint.conversion import convert
from kandinsky_jax.checkpoint.recommended_settings import FILE, FastSettings, RecommendedSettings
from kandinsky_jax.cli import app
from kandinsky_jax.cli.options import Options
from kandinsky_jax.pipelines.modes import MODES
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
        ('{"format_version": 3}', "format_version is 3, this release knows 1 to 2"),
        ('{"format_version": 0}', "format_version is 0, this release knows 1 to 2"),
        ('{"format_version": 2, "fast": "lora"}', "fast is 'lora', needed is an object"),
        ('{"format_version": 2, "fast": {"scheduler": "lcm"}}', "fast: lora is missing, the adapter's file"),
        ('{"format_version": 1, "fast": {"lora": "a.bin"}}', "fast needs a format_version of 2"),
        ('{"format_version": 2, "fast": {"lora": "../a.bin"}}', "fast: lora is '../a.bin', needed is the name of a"),
        ('{"format_version": 2, "fast": {"lora": "/a.bin"}}', "fast: lora is '/a.bin', needed is the name of a"),
        ('{"format_version": 2, "fast": {"lora": "*.bin"}}', "fast: lora is .*needed is the name of a .safetensors or"),
        ('{"format_version": 2, "fast": {"lora": "a.pkl"}}', "fast: lora is 'a.pkl', needed is the name of a"),
        (
            '{"format_version": 2, "height": 1, "fast": {"lora": 1, "prior_num_inference_steps": 1}}',
            "height is 1, .*; fast: lora is 1, .*; fast: prior_num_inference_steps is 1, needed .* from 2 to 1000$",
        ),
        (
            '{"format_version": 2, "fast": {"lora": "a.bin", "height": 64}}',
            r"fast: \['height'\] are not settings; there are lora, ",
        ),
        ('{"format_version": 1, "steps": 3}', r"\['steps'\] are not settings; there are num_inference_steps"),
        ('{"format_version": 1, "guidance_scale": "2"}', "guidance_scale is '2', needed is a number from 0.0 to 100.0"),
        ('{"format_version": 1, "guidance_scale": NaN}', "guidance_scale|JSON|NaN"),
        ('{"format_version": 1, "height": 64.5}', "height is 64.5, needed is a whole number from 64 to 8192"),
        ('{"format_version": 1, "num_inference_steps": true}', "num_inference_steps is True"),
        ('{"format_version": 1, "scheduler": "fast"}', "scheduler is 'fast', needed is a short name such as ddpm"),
        ('{"format_version": 1, "height": 0, "width": 1e9}', "height is 0.*; width is 1000000000.0"),
        ('{"format_version": 1, "guidance_scale": 1' + "0" * 400 + "}", "guidance_scale is 1000"),
        ('{"format_version": true}', "format_version is True"),
        (" " * 100_000, "65,?536|bytes"),
    ],
)
def test_what_is_wrong_with_the_file_is_said_at_once(tmp_path, content, message):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        recommended_settings.read(tmp_path)
    assert FILE in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_are_read_as_they_were_written(tmp_path):
    fast = FastSettings("a.safetensors", None, 4, guidance_scale=1.0, scheduler="lcm", prior_num_inference_steps=2)
    for settings, version in (
        (RecommendedSettings(guidance_scale=2.0, fast=fast), 2),
        (RecommendedSettings(guidance_scale=2.0, scheduler="ddim", height=64), 1),
    ):
        recommended_settings.write(settings, tmp_path)
        assert recommended_settings.read(tmp_path) == settings
        assert json.loads((tmp_path / FILE).read_text())["format_version"] == version
    assert settings.with_fast(fast) == RecommendedSettings(4, 2, 1.0, None, 64, None, "lcm")
    assert settings.arguments() == {"guidance_scale": 2.0, "height": 64}


def test_a_damaged_file_spoils_no_pipeline_but_is_reported_by_commands(model, tmp_path):
    family = tmp_path / "family"
    shutil.copytree(model.parent, family)
    (family / hub.DECODER / FILE).write_text("{")
    kandinsky_jax.KandinskyV22Pipeline.from_pretrained(family)
    command = ["generate", "a", "--model", str(family / hub.DECODER), "-o", str(tmp_path / "a.png")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code != 0
    assert FILE in str(done.exception)


@pytest.mark.slow
def test_steps_of_the_model_count_in_checks(model, tmp_path):
    """A model that recommends many steps may go a small part of the way."""
    family = tmp_path / "family"
    shutil.copytree(model.parent, family)
    (family / hub.DECODER / FILE).write_text(json.dumps(OWN | {"num_inference_steps": 100}))
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    command = ["img2img", "a red ring", "-i", tmp_path / "red.png", "-o", tmp_path / "a.png", "--model"]
    invoke(*command, family / hub.DECODER, "--strength", 0.015)
    refused = CliRunner().invoke(app, [*map(str, command), str(model), "--strength", "0.015"])
    assert "leaves no step to do" in str(refused.exception)


def test_a_job_of_another_recommended_size_is_another_job(model, tmp_path):
    family = tmp_path / "family"
    shutil.copytree(model.parent, family)
    (tmp_path / "rows.txt").write_text("a red ring\n")
    job = Job(str(tmp_path / "rows.txt"), str(tmp_path / "out"), model=str(family / hub.DECODER))
    open_job(job).begin()
    open_job(job).begin()
    (family / hub.DECODER / FILE).write_text(json.dumps(OWN | {"width": 64}))
    with pytest.raises(JobError, match=r"\n  size was \[64, 128\], now \[64, 64\]$"):
        open_job(job).begin()
    given = open_job(dataclasses.replace(job, defaults={"height": 64, "width": 128}))
    assert given.identity["size"] == [64, 128]


def test_a_link_to_nothing_and_a_folder_are_reported(tmp_path):
    (tmp_path / FILE).symlink_to("nowhere.json")
    with pytest.raises(CheckpointError, match="is a link to nothing"):
        recommended_settings.read(tmp_path)
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).mkdir()
    with pytest.raises(CheckpointError, match=FILE):
        recommended_settings.read(tmp_path)


def test_settings_go_with_the_unet_and_do_not_stay_behind(model, tmp_path):
    family = tmp_path / "family"
    shutil.copytree(model.parent, family)
    decoder = kandinsky_jax.KandinskyV22Pipeline.from_pretrained(family / hub.DECODER)
    prior = kandinsky_jax.KandinskyV22PriorPipeline.from_pretrained(family / hub.PRIOR)
    shutil.rmtree(family)
    for pipes in ((prior, decoder), (decoder, prior)):
        assert kandinsky_jax.KandinskyV22CombinedPipeline.from_pipe(*pipes).recommended_settings.width == 128
    decoder.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / FILE).read_text()) == OWN
    kandinsky_jax.KandinskyV22Pipeline.from_pretrained(SHAPES_MODEL).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / FILE).exists()


def test_what_a_prior_says_of_itself_comes_before_its_decoder(model, tmp_path):
    """As a prior distilled in full does; in pipelines, commands and batch jobs."""
    prior = tmp_path / "prior"
    shutil.copytree(model.parent / hub.PRIOR, prior)
    own = {"format_version": 1, "prior_num_inference_steps": 5, "prior_guidance_scale": 3.0, "guidance_scale": 9.0}
    (prior / FILE).write_text(json.dumps(own))
    expected = recommended_settings.read(model).arguments()
    expected |= {"prior_num_inference_steps": 5, "prior_guidance_scale": 3.0}
    pipe = kandinsky_jax.KandinskyV22CombinedPipeline.from_pretrained(model, prior=prior)
    stages = [pipe.decoder_pipe, kandinsky_jax.KandinskyV22PriorPipeline.from_pretrained(prior)]
    for pipes in ([pipe], stages, stages[::-1]):
        made = kandinsky_jax.KandinskyV22CombinedPipeline.from_pipe(*pipes)
        assert made.recommended_settings.arguments() == expected
    plain = kandinsky_jax.KandinskyV22PriorPipeline.from_pretrained(model.parent / hub.PRIOR)
    for pipes in ([pipe, plain], [pipe.decoder_pipe, plain]):  # those of the prior that is used
        made = kandinsky_jax.KandinskyV22CombinedPipeline.from_pipe(*pipes)
        assert made.recommended_settings == recommended_settings.read(model)
    pipe.decoder_pipe.save_pretrained(tmp_path / "decoder")
    pipe.prior_pipe.save_pretrained(tmp_path / "saved")
    assert recommended_settings.read(tmp_path / "decoder") == recommended_settings.read(model)
    assert recommended_settings.read(tmp_path / "saved") == recommended_settings.read(prior)
    options = Options(model=str(model), prior=str(prior)).completed(MODES["generate"])
    assert (options.prior_steps, options.prior_guidance_scale, options.guidance_scale) == (5, 3.0, 1.5)
    (tmp_path / "rows.txt").write_text("a red ring\n")
    job = open_job(Job(str(tmp_path / "rows.txt"), str(tmp_path / "out"), model=str(model), prior=str(prior)))
    assert {"prior_steps": 5, "prior_guidance_scale": 3.0, "guidance_scale": 1.5}.items() <= job.settings.items()


def test_damaged_settings_of_a_prior_spoil_nothing_of_its_decoder(model, tmp_path):
    prior = tmp_path / "prior"
    shutil.copytree(model.parent / hub.PRIOR, prior)
    (prior / FILE).write_text("{")
    pipe = kandinsky_jax.KandinskyV22CombinedPipeline.from_pretrained(model, prior=prior)
    assert pipe.decoder_pipe.recommended_settings == recommended_settings.read(model)
    with pytest.raises(CheckpointError, match=FILE):
        _ = pipe.recommended_settings
    with pytest.warns(UserWarning, match="saved without recommended settings: .*prior"):
        pipe.save_pretrained(tmp_path / "saved")


def test_a_file_that_the_manifest_does_not_know_is_unexpected(model, tmp_path):
    kandinsky_jax.KandinskyV22Pipeline.from_pretrained(SHAPES_MODEL).save_pretrained(tmp_path / "saved")
    invoke("verify", tmp_path / "saved")
    (tmp_path / "saved" / FILE).write_text(json.dumps(OWN))
    assert CliRunner().invoke(app, ["verify", str(tmp_path / "saved")]).exit_code == 1


@pytest.mark.slow
def test_saving_and_converting_keep_the_file(model, tmp_path):
    pipe = kandinsky_jax.KandinskyV22Pipeline.from_pretrained(model)
    pipe.save_pretrained(tmp_path / "saved")
    kandinsky_jax.KandinskyV22Pipeline.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "again")
    convert(model, tmp_path / "converted", progress=False)
    for folder in ("saved", "again", "converted"):
        assert json.loads((tmp_path / folder / FILE).read_text()) == OWN
        invoke("verify", tmp_path / folder)


def test_the_embedded_model_recommends_what_it_was_measured_best_with():
    sizes = 0
    for name in (hub.DECODER, hub.INPAINT, hub.CONTROLNET):
        folder = hub.resolve(f"tiny/{name}", name)
        own = recommended_settings.read(folder)
        fast = {"guidance_scale": 1.0, "prior_guidance_scale": 1.0, "scheduler": "tcd"}
        fast |= {"num_inference_steps": 4, "prior_num_inference_steps": 4}
        assert own.fast is not None
        assert own.fast.given() == fast
        assert dataclasses.replace(own, fast=None) == RecommendedSettings(guidance_scale=2.0, prior_guidance_scale=1.0)
        sizes += (folder / own.fast.lora).stat().st_size
    assert sizes <= 3e6
