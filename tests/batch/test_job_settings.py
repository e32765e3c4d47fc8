"""Faults of a job are reported before anything is written and before a network is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kandinsky_jax.batch import Job, JobError, open_job
from kandinsky_jax.cli import app

ROWS = {
    "rows.txt": "a cat\n",
    "rows.csv": "prompt,image\na cat,a.png\n",
    "steps.csv": "prompt,steps\na cat,4\n",
    "empty.csv": "prompt,image\na cat,\na dog,\n",
    "some.csv": "prompt,image\na cat,a.png\na dog,\n",
    "broken.jsonl": "{\n[]\n",
    "rows.jsonl": json.dumps({"prompt": "a cat"}) + "\n",
    "images.jsonl": json.dumps({"prompt": "a cat"}) + "\n" + json.dumps({"prompt": "x", "image": "a.png"}) + "\n",
}


def begin(folder: Path, name: str, arguments: str):
    """The command up to the job's folder: a model that is not there ends what would go on."""
    (folder / name).write_text(ROWS[name])
    return CliRunner().invoke(
        app, ["batch", str(folder / name), "-o", str(folder / "out"), "-m", "tiny", *arguments.split()]
    )


BAD = [
    ("rows.txt", "--steps 0", "steps must be an integer of at least 1, got 0"),
    ("rows.txt", "--steps 5000", r"steps: num_inference_steps=5000 is out of range for DDPMScheduler, .* 1 to 1000"),
    ("rows.txt", "--steps 1001 --scheduler ddim", "steps: .*out of range for DDIMScheduler"),
    ("steps.csv", "--steps 5000", "steps: num_inference_steps=5000"),
    ("rows.jsonl", "--steps 5000", "steps: num_inference_steps=5000"),
    ("rows.txt", "--prior-steps 1", "prior_steps: .*out of range for UnCLIPScheduler, which takes 2 to"),
    ("rows.txt", "--prior-steps 0", "prior_steps must be an integer of at least 1"),
    ("rows.txt", "--height 100000", "height must be at most 4096, got 100000"),
    ("rows.txt", "--width 63", "width=63 is too small"),
    ("rows.txt", "--height 4096 --width 2048", "height and width: 4096 x 2048 is more than 4,194,304 pixels"),
    ("rows.txt", "--num-images 1001", "num_images must be at most 1000, got 1001"),
    ("rows.txt", "--num-images 1000 --height 1024 --width 1024", "num_images: 1000 of 1024 x 1024 are more than"),
    (
        "rows.txt",
        "--mode inpaint",
        "the mode inpaint needs image and mask of a row, for which .*rows.txt has no column",
    ),
    ("rows.csv", "--mode inpaint", "the mode inpaint needs mask of a row"),
    ("rows.csv", "--mode controlnet", "the mode controlnet needs hint of a row"),
    ("rows.jsonl", "--mode img2img", "needs image of a row, which no row of .*rows.jsonl has"),
    ("images.jsonl", "--mode controlnet-img2img", "the mode controlnet-img2img needs hint of a row"),
    ("empty.csv", "--mode img2img", "the mode img2img needs image of a row"),
    ("rows.csv", "--mode generate", "the mode generate does not use image, which every row of .*rows.csv has"),
    ("rows.csv", "--strength 2", "strength must be a number above 0 and at most 1, got 2"),
    ("rows.txt", "--strength 0", "strength must be a number above 0"),
    ("rows.csv", "--strength nan", "strength must be a number above 0"),
    ("rows.csv", "--strength 0.1 --steps 5", "steps: strength=0.1 of num_inference_steps=5 leaves no step to do"),
    ("rows.txt", "--files nowhere", "files: there is no folder nowhere"),
    ("rows.txt", "--files file:///nowhere", "files: there is no folder file:///nowhere"),
    ("rows.txt", "--grace -1", "grace must be a number of seconds from 0 on, got -1"),
    ("rows.txt", "--grace nan", "grace must be a number of seconds"),
    ("rows.txt", "--dtype int8", "dtype=int8 is not supported"),
    ("rows.txt", "--scheduler dmd", "there is no scheduler 'dmd'"),
    ("rows.txt", "--guidance-scale inf", "guidance_scale must be a finite number"),
    ("rows.txt", "--guider agp", "guider: there is no guider 'agp'"),
    ("rows.txt", "--prior-guider apg:eta=x", "prior_guider: guider 'apg:eta=x': eta must be a finite number"),
    ("rows.txt", "--guider cfg++", "guider 'cfg[+][+]': scale is 2, needed is 0 to 1"),
    ("rows.txt", "--guider cfg++:scale=0.5 --scheduler dpm++2m", "guider: the guider cfg.. is for solvers whose"),
    ("rows.txt", "--guider autoguidance:model=nowhere/", "nowhere/ is not a folder here"),
    ("rows.txt", "--guidance-interval 0.8,0.2", "guidance_interval must be two rising numbers"),
    ("rows.txt", "--prior-guidance-interval a", "--prior-guidance-interval must be numbers with commas"),
    ("rows.txt", "--model tiny/kandinsky-2-2-prior", "holds a .*, which the mode generate cannot use"),
    ("rows.csv", "--model tiny/kandinsky-2-2-controlnet-depth", "which the mode img2img cannot use; it needs a Kand"),
]


@pytest.mark.parametrize(("name", "arguments", "says"), BAD, ids=[f"{name} {given}" for name, given, _ in BAD])
def test_setting_that_no_row_can_use_stops_the_job_at_once(tmp_path, name, arguments, says):
    done = begin(tmp_path, name, arguments)
    assert isinstance(done.exception, ValueError), done.output
    assert len(str(done.exception)) < 500
    with pytest.raises(ValueError, match=says):
        raise done.exception
    assert not (tmp_path / "out").exists()


GOOD = [
    ("rows.txt", {"steps": 1000, "prior_steps": 2}, {}),
    ("rows.csv", {"steps": 4, "strength": 0.25}, {}),
    ("rows.txt", {"strength": 0.01, "height": 2048, "width": 2048, "num_images": 64}, {}),
    ("images.jsonl", {}, {"mode": "img2img"}),
    ("images.jsonl", {}, {"mode": "generate"}),
    ("broken.jsonl", {}, {}),  # each of its rows has its own fault
    ("some.csv", {}, {"mode": "generate"}),
    ("empty.csv", {}, {"mode": "generate"}),
    ("images.jsonl", {"steps": 3}, {"mode": "img2img"}),  # rows may say their strength
    ("rows.txt", {"negative_prompt": "blurry", "height": None}, {"dtype": "bfloat16", "scheduler": "ddim"}),
    ("rows.txt", {}, {"root": "memory://pictures"}),
]


@pytest.mark.parametrize(("name", "defaults", "settings"), GOOD, ids=range(len(GOOD)))
def test_setting_that_a_row_can_use_is_taken(tmp_path, name, defaults, settings):
    (tmp_path / name).write_text(ROWS[name])
    job = Job(str(tmp_path / name), str(tmp_path / "out"), model="tiny", defaults=defaults, **settings)
    open_job(job).begin()
    assert (tmp_path / "out" / "job.json").is_file()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("output", "nope://x", "output: nope://x cannot be opened: Protocol not known: nope"),
        ("output", "nope://user:password@x", "output: nope://***@x cannot be opened: Protocol not known: nope"),
        ("output", "gs:/bucket/x", "output: gs:/bucket/x has one slash after gs:, needed are two, as in gs://"),
        ("output", "file:/tmp/x", "output: file:/tmp/x has one slash after file:, needed are two, as in file://"),
        ("root", "nope://x", "files: nope://x cannot be opened: Protocol not known: nope"),
        ("root", "s3:/x", "files: s3:/x has one slash after s3:, needed are two, as in s3://"),
        ("rows", "nope://x/a.txt", "nope://x/a.txt cannot be opened: Protocol not known: nope"),
        ("rows", "gs:/x/a.txt", "gs:/x/a.txt has one slash after gs:, needed are two, as in gs://"),
    ],
)
def test_urls_that_are_none(tmp_path, monkeypatch, name, value, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.txt").write_text("a cat\n")
    job = Job(**{"rows": str(tmp_path / "rows.txt"), "output": str(tmp_path / "out"), "model": "tiny"} | {name: value})
    with pytest.raises(JobError) as caught:
        open_job(job)
    assert caught.value.faults == [says]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.txt"]


def test_all_faults_are_named_together(tmp_path):
    (tmp_path / "rows.txt").write_text("a\n")
    defaults = {"steps": 0, "height": 10**5, "strength": 2, "image": "a.png", "negative_prompt": 3}
    job = Job(str(tmp_path / "rows.txt"), str(tmp_path / "out"), root="nowhere", dtype="int8", defaults=defaults)
    with pytest.raises(JobError) as caught:
        open_job(job)
    named = ("dtype=int8", "'image'", "negative_prompt: must be text", "height", "steps", "strength", "files")
    for part in named:
        assert sum(fault.startswith(part) or part in fault for fault in caught.value.faults) >= 1, part
    assert len(caught.value.faults) == len(named)
