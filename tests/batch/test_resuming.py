"""Identity of a job that is resumed, and messages for differences. No network is read."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from kandinsky_jax.batch import Job, JobError, open_job
from kandinsky_jax.batch.model_files import names_and_sizes
from kandinsky_jax.checkpoint.manifest import sha256_of_files
from tests.conftest import SHAPES_MODEL

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the small family of models."""
    shutil.copytree(SHAPES_MODEL, tmp_path / "model")
    return tmp_path / "model"


def job(folder: Path, text: str = "a\nb\n", **settings):
    (folder / "rows.txt").write_text(text)
    options = {"model": str(folder / "model"), "mode": "generate", "defaults": {"steps": 1}} | settings
    return open_job(Job(str(folder / "rows.txt"), str(folder / "out"), **options))


def change_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] = ord(" ") if data[-1:] == b"\n" else data[-1] ^ 1  # JSON stays JSON
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("path", "named"),
    [
        (f"kandinsky-2-2-decoder/unet/{WEIGHTS}", f"unet/{WEIGHTS}"),
        (f"kandinsky-2-2-decoder/movq/{WEIGHTS}", f"movq/{WEIGHTS}"),
        (f"kandinsky-2-2-prior/prior/{WEIGHTS}", f"prior/prior/{WEIGHTS}"),
        ("kandinsky-2-2-prior/text_encoder/model.safetensors", "prior/text_encoder/model.safetensors"),
        ("kandinsky-2-2-decoder/scheduler/scheduler_config.json", "scheduler/scheduler_config.json"),
        ("kandinsky-2-2-prior/tokenizer/vocab.json", "prior/tokenizer/vocab.json"),
    ],
)
def test_job_does_not_go_on_with_other_files_of_a_model(tmp_path, model, path, named):
    """Though their sizes are the same."""
    job(tmp_path).begin()
    job(tmp_path).begin()
    change_last_byte(model / path)
    with pytest.raises(JobError, match=rf"another job.*\n  the model's files changed: {named}$"):
        job(tmp_path).begin()


def test_job_continues_with_files_that_are_not_read(tmp_path, model):
    job(tmp_path).begin()
    decoder = model / "kandinsky-2-2-decoder"
    for name in ("README.md", "notes.json", "unet/README.md", f"unet/{WEIGHTS[:-12]}.fp16.safetensors", "extra/a.bin"):
        (decoder / name).parent.mkdir(exist_ok=True)
        (decoder / name).write_text("new")
    shutil.move(model, tmp_path / "elsewhere")
    job(tmp_path, model=str(tmp_path / "elsewhere")).begin()
    (tmp_path / "elsewhere/kandinsky-2-2-prior/tokenizer/added_tokens.json").write_text("{}")
    with pytest.raises(JobError, match=r"changed: prior/tokenizer/added_tokens\.json \(new\)$"):
        job(tmp_path, model=str(tmp_path / "elsewhere")).begin()


def test_shards_of_weights_count(tmp_path, model):
    unet = model / "kandinsky-2-2-decoder" / "unet"
    (unet / "diffusion_pytorch_model-00001-of-00001.safetensors").write_bytes((unet / WEIGHTS).read_bytes())
    (unet / f"{WEIGHTS}.index.json").write_text(
        json.dumps({"weight_map": {"a": "diffusion_pytorch_model-00001-of-00001.safetensors"}})
    )
    job(tmp_path).begin()
    change_last_byte(unet / "diffusion_pytorch_model-00001-of-00001.safetensors")
    with pytest.raises(JobError, match=r"changed: unet/diffusion_pytorch_model-00001-of-00001\.safetensors$"):
        job(tmp_path).begin()


def test_a_file_in_the_hubs_cache_is_known_by_its_name(tmp_path):
    """So that a model of many gigabytes is not read; files that are not named so, are."""
    blob = tmp_path / ("ab" * 32)
    blob.write_bytes(b"x")
    (tmp_path / "linked").symlink_to(blob)
    (tmp_path / "plain").write_bytes(b"x")
    found = sha256_of_files([tmp_path / "linked", tmp_path / "plain"])
    assert [*found.values()] == ["ab" * 32, hashlib.sha256(b"x").hexdigest()]


@pytest.mark.parametrize("version", [0, 1])
def test_a_job_of_an_older_release_goes_on(tmp_path, model, version):
    """Which compared the names and sizes of all of the model's files."""
    opened = job(tmp_path)
    known = opened.identity | {"model": names_and_sizes(opened.pipeline, opened.model, None)}
    usual = {"guidance_scale": 4.0, "prior_guidance_scale": 4.0, "prior_steps": 25, "steps": 1}  # as they wrote them
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "job.json").write_text(
        json.dumps(known | {"defaults": usual} | ({"format_version": 1} if version else {}))
    )
    job(tmp_path).begin()
    (model / "kandinsky-2-2-decoder" / "notes.txt").write_text("x")
    with pytest.raises(JobError, match=r"the model's files changed$"):
        job(tmp_path).begin()


LONG = "blurry, low quality, " * 20
CHANGES = {
    "steps was 1, now 2": {"defaults": {"steps": 2}},
    "height was not given, now 64": {"defaults": {"steps": 1, "height": 64}},
    "scheduler was not given, now 'ddim'": {"scheduler": "ddim"},
    r"guidance_scale was 2\.0, now 2\.5\n  steps was 1, now 3": {"defaults": {"steps": 3, "guidance_scale": 2.5}},
    "rows_per_shard was 256, now 7": {"rows_per_shard": 7},
    "the count of rows was 2, now 3": {"text": "a\nb\nc\n"},
    "the file of rows changed; the number of rows did not": {"text": "a\nc\n"},
}


@pytest.mark.parametrize("says", CHANGES, ids=range(len(CHANGES)))
def test_each_changed_setting_is_named_with_both_values(tmp_path, says):
    job(tmp_path, model="tiny").begin()
    with pytest.raises(JobError, match=rf"out holds another job; .*\n  {says}$") as caught:
        job(tmp_path, model="tiny", **CHANGES[says]).begin()
    assert len(str(caught.value)) < 500


def test_a_default_that_is_given_as_it_is_anyway_changes_nothing(tmp_path):
    """As by the command line, where a program gave none; nor where an earlier release did not record it."""
    job(tmp_path, model="tiny").begin()
    given = {"steps": 1, "num_images": 1, "strength": 0.3}
    job(tmp_path, model="tiny", defaults=given).begin()
    known = json.loads((tmp_path / "out" / "job.json").read_text())
    for name in ("num_images", "strength"):
        del known["defaults"][name]
    (tmp_path / "out" / "job.json").write_text(json.dumps(known))
    job(tmp_path, model="tiny", defaults=given).begin()
    with pytest.raises(JobError, match=r"num_images was 1, now 2$"):
        job(tmp_path, model="tiny", defaults=given | {"num_images": 2}).begin()


def test_long_settings_are_shown_where_they_differ(tmp_path):
    job(tmp_path, model="tiny", defaults={"negative_prompt": LONG + "ugly"}).begin()
    with pytest.raises(JobError, match=r"negative_prompt was '?\.\.\..*ugly', now '?\.\.\..*blue'$"):
        job(tmp_path, model="tiny", defaults={"negative_prompt": LONG + "blue"}).begin()
