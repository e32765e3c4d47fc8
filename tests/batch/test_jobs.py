"""Batch jobs with the small model: every row once, and always the bytes of an uninterrupted run."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from kandinsky_jax.batch import Job, JobError, Process, open_job, run
from kandinsky_jax.batch import runner as batch_runner
from kandinsky_jax.preemption import Stop
from tests.conftest import SHAPES_MODEL
from tests.pipelines.test_compile import compilations

PROMPTS = ("a red circle on a blue background", "a green star", "yellow ring", "an orange square", "a purple cross")
QUICK = {"steps": 3, "prior_steps": 2}


def job_of(folder: Path, rows, output="out", **settings):
    """An open job of the small model, two pictures at a time, three rows a shard."""
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    url = output if "://" in output else str(folder / output)
    options = {"model": str(SHAPES_MODEL), "rows_per_shard": 3, "batch": 2, "dtype": "float32"} | settings
    options["defaults"] = QUICK | options.get("defaults", {})
    return open_job(Job(str(folder / "rows.jsonl"), url, **options))


def run_job(job, pipe, process=None, **options):
    process = process or Process()
    return run(job, pipe, process, **{"quiet": True, "stop": Stop()} | options)


def members(folder: Path) -> dict[str, bytes]:
    """Everything in a job's tar files, in order."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                assert member.name not in found
                found[member.name] = tar.extractfile(member).read()
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)), int)


@pytest.mark.slow
def test_every_picture_is_that_of_a_call(whole, rows, shapes_pipe):
    """A row's pictures are those of a call with its prompt and seed, up to the last bits of another batch."""
    found = members(whole)
    assert len(found) == 20
    for number, row in enumerate(rows):
        name, count = row.get("id", f"{number:09d}"), row.get("num_images", 1)
        pictures = shapes_pipe(
            row["prompt"],
            negative_prompt=row.get("negative_prompt"),
            num_images_per_prompt=count,
            generator=row["seed"],
            height=64,
            width=64,
            num_inference_steps=row.get("steps", 3),
            prior_num_inference_steps=2,
            guidance_scale=row.get("guidance_scale", 4.0),
        ).images
        for i, picture in enumerate(pictures):
            key = name if count == 1 else f"{name}+{i}"
            assert abs(pixels(found[f"{key}.png"]) - np.asarray(picture, int)).max() <= 1
            about = json.loads(found[f"{key}.json"])
            assert about["seed"] == row["seed"]
            assert about["image_number"] == i
            assert about["prompt"] == row["prompt"]
            assert about.get("metadata") == row.get("metadata")
            assert about["steps"] == row.get("steps", 3)


def test_a_job_guides_both_stages_as_a_call_does(shapes_pipe, tmp_path):
    row = {"prompt": "a green star", "seed": 7, "id": "star", "guidance_scale": 3.0}
    settings = {"guider": "apg:eta=0.5", "prior_guider": "rescaled-cfg", "prior_guidance_interval": (0, 0.5)}
    job = job_of(tmp_path, [row], batch=1, **settings)
    run_job(job, shapes_pipe)
    found = members(tmp_path / "out")
    about = json.loads(found["star.json"])
    text = {name: about[name] for name in settings}
    assert text == settings | {"prior_guidance_interval": "0,0.5"}
    call = {"num_inference_steps": 3, "prior_num_inference_steps": 2, "guidance_scale": 3.0, "generator": 7}
    [picture] = shapes_pipe("a green star", height=64, width=64, **call, **settings).images
    with Image.open(io.BytesIO(found["star.png"])) as written:
        assert np.abs(np.asarray(written, int) - np.asarray(picture, int)).max() <= 1
    with pytest.raises(JobError, match=r"guider.*apg:eta=0\.5"):
        run_job(job_of(tmp_path, [row], batch=1), shapes_pipe)


def test_a_row_whose_scale_the_guider_does_not_take_is_an_error(shapes_pipe, tmp_path):
    rows = [{"prompt": "a green star", "guidance_scale": scale} for scale in (0.5, 3.0)]
    report = run_job(job_of(tmp_path, rows, guider="cfg++", scheduler="ddim"), shapes_pipe)
    assert (report.images, report.errors) == (1, 1)
    [error] = map(json.loads, (tmp_path / "out" / "errors.jsonl").read_text().splitlines())
    assert "guidance_scale: guider 'cfg++': scale is 3, needed is 0 to 1" in error["error"]


def test_it_is_a_web_dataset(whole):
    """As that library groups samples: neighbours with one key, in shards that are named by number."""
    assert sorted(path.name for path in whole.iterdir()) == ["000000.tar", "000001.tar", "000002.tar", "job.json"]
    names = list(members(whole))
    assert [name.split(".") for name in names[:2]] == [["000000000", "png"], ["000000000", "json"]]
    assert all(a.split(".")[0] == b.split(".")[0] for a, b in zip(names[::2], names[1::2], strict=True))


@pytest.mark.parametrize("count", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)])
def test_any_number_of_processes(whole, rows, shapes_pipe, tmp_path, count):
    """Not at the same time here; test_batch_kill.py has real ones. Without overlap, the bytes are the same too."""
    job = job_of(tmp_path, rows)
    reports = [run_job(job, shapes_pipe, Process(i, count), overlap=count > 1) for i in reversed(range(count))]
    assert [report.complete for report in reports] == [False] * (count - 1) + [True]
    assert contents(tmp_path / "out") == contents(whole)


def test_what_is_complete_is_skipped_and_what_was_left_is_removed(whole, rows, shapes_pipe, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "000001.tar").unlink()
    (tmp_path / "out" / ".000001.tar.partial").write_bytes(b"half a tar file")
    (tmp_path / "out" / ".job.json.0.partial").write_bytes(b"{")  # as an older release named them
    (tmp_path / "out" / ".errors.jsonl.0123456789abcdef.partial").write_bytes(b"{")
    (tmp_path / "out" / "errors").mkdir()
    (tmp_path / "out" / "errors" / "000001.jsonl").write_bytes(b"{}")  # what failed then does not fail now
    before = (tmp_path / "out" / "000000.tar").stat().st_mtime_ns
    report = run_job(job_of(tmp_path, rows), shapes_pipe)
    assert (report.shards, report.skipped) == (1, 2)
    assert contents(tmp_path / "out") == contents(whole)
    assert (tmp_path / "out" / "000000.tar").stat().st_mtime_ns == before


def test_a_job_compiles_once_for_each_shape(rows, shapes_pipe, tmp_path):
    job_rows = [{"prompt": prompt, "steps": 2 + i} for i, prompt in enumerate(PROMPTS)]
    run_job(job_of(tmp_path / "a", job_rows[:1]), shapes_pipe)
    with compilations() as events:
        run_job(job_of(tmp_path / "b", job_rows), shapes_pipe)
    assert not events


def test_at_a_url_and_as_a_folder(whole, rows, shapes_pipe, tmp_path):
    fs = fsspec.filesystem("memory")
    report = run_job(job_of(tmp_path, rows, "memory://bucket/out"), shapes_pipe)
    assert report.complete
    for path in whole.glob("*.tar"):
        assert fs.cat_file(f"/bucket/out/{path.name}") == path.read_bytes()
    assert run_job(job_of(tmp_path, rows, "memory://bucket/out"), shapes_pipe).skipped == 3

    report = run_job(job_of(tmp_path, rows, "pictures", form="folder"), shapes_pipe)
    assert report.complete
    manifest = pyarrow.parquet.read_table(tmp_path / "pictures" / "manifest").to_pylist()
    found = members(whole)
    assert len(manifest) == 10
    for row in manifest:
        data = (tmp_path / "pictures" / row["file_name"]).read_bytes()
        assert data == found[Path(row["file_name"]).name]
        about = json.loads(found[Path(row["file_name"]).stem + ".json"])
        assert (row["prompt"], row["seed"]) == (about["prompt"], about["seed"])
    assert json.loads(next(row["metadata"] for row in manifest if row["metadata"])) == {"source": ["x", 1]}


@pytest.mark.parametrize("ending", ["jpg", "webp"])
def test_other_encodings(whole, rows, shapes_pipe, tmp_path, ending):
    run_job(job_of(tmp_path, rows[:2], pictures=ending), shapes_pipe)
    found = members(tmp_path / "out")
    lossless = members(whole)
    assert abs(pixels(found[f"000000000.{ending}"]) - pixels(lossless["000000000.png"])).mean() < 5


def test_another_job_does_not_go_on_in_the_folder(rows, shapes_pipe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(JobError, match=r"neither empty nor a job's folder; it has photo\.jpg"):
        run_job(job_of(tmp_path, rows), shapes_pipe)
    (tmp_path / "out" / "photo.jpg").unlink()
    run_job(job_of(tmp_path, rows[:1]), shapes_pipe)
    for changed, says in (
        ({"batch": 3}, "batch was 2, now 3"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"defaults": {"steps": 4}}, "steps was 3, now 4"),
    ):
        with pytest.raises(JobError, match=f"another job.*\n  {says}$"):
            run_job(job_of(tmp_path, rows[:1], **changed), shapes_pipe)
    with pytest.raises(JobError, match=r"the count of rows was 1, now 8$"):
        run_job(job_of(tmp_path, rows), shapes_pipe)


# Modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rows_with_pictures(ours, tmp_path):
    """A job with an image, mask or hint generates the same as a call with these files."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[20:40, 20:44] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray((rng.random((50, 64)) * 60000).astype(np.uint16)).save(tmp_path / "depth.png")
    files = {"image": "photo.png", "mask": "mask.png", "hint": "depth.png"}
    size = {"height": 64, "width": 64}
    for mode, kind, needed in (
        ("img2img", "Img2Img", ["image"]),
        ("inpaint", "Inpaint", ["image", "mask"]),
        ("controlnet", "Controlnet", ["hint"]),
        ("controlnet-img2img", "ControlnetImg2Img", ["image", "hint"]),
    ):
        pipe = ours[f"KandinskyV22{kind}CombinedPipeline"]
        row = {"prompt": PROMPTS[0], "seed": 5, **size, **{name: files[name] for name in needed}}
        row |= {"strength": 0.7} if "img2img" in mode else {}
        job = job_of(tmp_path, [row, row | {"id": "again"}], f"out-{mode}")
        assert job.mode == mode
        assert run_job(job, pipe).errors == 0
        found = members(tmp_path / f"out-{mode}")
        named = {{"mask": "mask_image"}.get(name, name): tmp_path / files[name] for name in needed}
        named |= {"strength": 0.7} if "img2img" in mode else {}
        call = {"num_inference_steps": 3, "prior_num_inference_steps": 2, "generator": [5, 5], **size, **named}
        pictures = pipe([PROMPTS[0]] * 2, **call).images
        for name, picture in zip(("000000000", "again"), pictures, strict=True):
            assert np.array_equal(pixels(found[f"{name}.png"]), np.asarray(picture, int)), mode
            assert json.loads(found[f"{name}.json"]).items() >= {name: files[name] for name in needed}.items()


# Bad rows ---------------------------------------------------------------------------------------------------------

BAD = {
    "prompt is missing or empty": [{}, {"prompt": None}, {"id": "x1"}],
    "prompt: is empty": [{"prompt": ""}, {"prompt": "  \n"}],
    "prompt: must be text": [{"prompt": 3}, {"prompt": ["a"]}, {"prompt": {"a": 1}}, {"prompt": True}],
    "prompt: is not UTF-8": [{"prompt": "\udcff"}],
    "is not JSON": ["{", "prompt", '{"prompt": "a"', '{"prompt": "a"} x', "\x00"],
    "is a JSON": ["[]", "3", '"a"', "null"],
    "id: may hold": [{"id": x} for x in ("a.b", "../a", "a/b", "", " ", "x" * 201, "é", "a b")],
    "id: must be text": [{"id": 1.5}, {"id": []}],
    "is an earlier row's": [{"id": "good"}],
    "seed: must be": [{"seed": x} for x in (-1, 2**63, 1.5, "x", [], True, float("nan"))],
    "num_images": [{"num_images": x} for x in (0, -1, 1.5, "x", 10**6, True)],
    "height": [{"height": x} for x in (0, 63, -64, 5000, 64.5, "tall", "64px", True)],
    "width": [{"width": x} for x in (0, 63, 10**9, [], float("inf"))],
    "steps": [{"steps": x} for x in (0, -1, 1001, 2.5, "x", True)],
    "prior_steps": [{"prior_steps": x} for x in (0, 1, 1001)],
    "guidance_scale": [{"guidance_scale": x} for x in (float("nan"), float("inf"), "x", "1,5", [], True)],
    "prior_guidance_scale": [{"prior_guidance_scale": x} for x in (float("nan"), "high")],
    "strength": [{"strength": x} for x in (0, -0.5, 1.5, float("nan"), "x", 0.01)],
    "image is missing": [{"image": None}],
    "there is no file": [{"image": x} for x in ("absent.png", "sub/absent.png", "sub", "good.png/x")],
    "leads out of the job's folder": [
        {"image": x} for x in ("../rows.jsonl", "/etc/hostname", "out.png", "a/../../b", "file:///etc/hostname", "")
    ],
    "cannot be read as a picture": [{"image": x} for x in ("broken.png", "empty.png", "text.png", "cut.png", "x.svg")],
    "image: must be text": [{"image": 3}, {"image": ["good.png"]}],
    "mask is not used by the mode": [{"mask": "good.png"}],
    "hint is not used by the mode": [{"hint": "good.png"}],
    "negative_prompt: must be text": [{"negative_prompt": 3}],
    "there is no column 'promt'": [{"promt": "x"}],
}


def test_a_hundred_bad_rows(ours, tmp_path):
    """Each is reported with its reason; none is fatal; the valid rows between them are generated."""
    root = tmp_path / "job"
    (root / "sub").mkdir(parents=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    picture.save(root / "good.png")
    picture.save(tmp_path / "outside.png")
    (root / "out.png").symlink_to(tmp_path / "outside.png")
    data = (root / "good.png").read_bytes()
    (root / "broken.png").write_bytes(data[:100] + b"\xff" * 50 + data[150:])
    (root / "cut.png").write_bytes(data[:2000])
    (root / "empty.png").write_bytes(b"")
    (root / "text.png").write_text("no picture")
    (root / "x.svg").write_text("<svg/>")
    good = {"prompt": PROMPTS[0], "image": "good.png", "strength": 0.7}
    lines, wanted = [json.dumps(good | {"id": "good"})], {}
    for says, rows in BAD.items():
        for row in rows:
            wanted[len(lines)] = says
            full = row if isinstance(row, str) or says.startswith("prompt is") else good | row
            lines.append(full if isinstance(full, str) else json.dumps(full))
    lines.append(json.dumps(good | {"id": "last"}))
    assert len(wanted) >= 100
    (root / "rows.jsonl").write_text("\n".join(lines) + "\n")
    options = {"model": str(SHAPES_MODEL), "mode": "img2img", "batch": 2, "rows_per_shard": 40, "dtype": "float32"}
    job = open_job(Job(str(root / "rows.jsonl"), str(tmp_path / "out"), defaults=QUICK, **options))
    report = run_job(job, ours["KandinskyV22Img2ImgCombinedPipeline"])
    assert report.errors == len(wanted)
    assert report.complete
    errors = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert [error["row"] for error in errors] == sorted(wanted)
    for error in errors:
        assert wanted[error["row"]] in error["error"], (lines[error["row"]], error)
    assert [name for name in members(tmp_path / "out") if name.endswith("png")] == ["good.png", "last.png"]


@pytest.mark.parametrize("form", ["webdataset", "folder"])
def test_bad_rows_leave_the_job_complete_and_its_files_json(shapes_pipe, tmp_path, form):
    rows = [
        {"prompt": "a red circle", "metadata": {"score": float("inf"), "parts": [float("nan")]}},
        {"prompt": "a red circle", "id": "x" * 96},
        {"prompt": "a red circle", "id": float("nan")},
        {"prompt": "a red circle", "id": "x" * 95},
    ]
    report = run_job(job_of(tmp_path, rows, form=form), shapes_pipe)
    assert (report.images, report.errors, report.complete) == (2, 2, True)

    def constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    lines = [
        json.loads(x, parse_constant=constant) for x in (tmp_path / "out" / "errors.jsonl").read_text().split("\n")[:-1]
    ]
    assert [(line["row"], line["id"]) for line in lines] == [(1, "x" * 96), (2, "nan")]
    if form == "webdataset":
        about = json.loads(members(tmp_path / "out")["000000000.json"], parse_constant=constant)
        assert about["metadata"] == {"score": "Infinity", "parts": ["NaN"]}


def test_all_faults_of_a_row_are_reported(shapes_pipe, tmp_path):
    job = job_of(tmp_path, [{"prompt": "", "seed": -1, "height": 3, "steps": 0, "colour": "red"}])
    run_job(job, shapes_pipe)
    [line] = (tmp_path / "out" / "errors.jsonl").read_text().splitlines()
    for part in ("prompt", "seed", "height", "steps", "'colour'"):
        assert part in json.loads(line)["error"]


def test_a_picture_that_is_not_finite_is_an_error_of_its_row(rows, shapes_pipe, tmp_path, monkeypatch):
    real = type(shapes_pipe).generate

    def spoilt(self, prompt, **given):
        pending = real(self, prompt, **given)
        bad = [i for i, text in enumerate(prompt) if text == PROMPTS[1]]
        return pending._replace(array=pending.array.at[np.array(bad, int)].set(np.nan)) if bad else pending

    monkeypatch.setattr(type(shapes_pipe), "generate", spoilt)
    report = run_job(job_of(tmp_path, [{"prompt": prompt} for prompt in PROMPTS]), shapes_pipe)
    assert (report.images, report.errors) == (4, 1)
    [line] = (tmp_path / "out" / "errors.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "row": 1,
        "id": "000000001",
        "error": "the model's picture 0 has numbers that are not finite",
    }


@pytest.mark.slow
def test_a_full_disk_ends_the_job_and_loses_nothing(whole, rows, shapes_pipe, tmp_path, monkeypatch):
    job = job_of(tmp_path, rows)
    real, calls = type(job.output).write, []

    def write(self, shard, *rest):
        calls.append(shard)
        if shard == 1:
            monkeypatch.setattr(os, "fsync", full)
        real(self, shard, *rest)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(job.output), "write", write)
    with pytest.raises(OSError, match="No space left"):
        run_job(job, shapes_pipe)
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000000.tar", "job.json"]
    assert run_job(job_of(tmp_path, rows), shapes_pipe).shards == 2
    assert contents(tmp_path / "out") == contents(whole)


# Ending early -----------------------------------------------------------------------------------------------------


class StopAt(Stop):
    """Asked to end after so many calls."""

    def __init__(self, calls: int, grace: float):
        super().__init__(grace)
        self.calls = calls

    def took(self, seconds: float) -> None:
        super().took(seconds)
        self.calls -= 1
        if self.calls == 0:
            self.ask()


@pytest.mark.parametrize(("grace", "shards"), [(1000.0, [1, 2]), pytest.param(0.0, [0, 1], marks=pytest.mark.slow)])
def test_a_signal_finishes_the_shard_or_leaves_it(whole, rows, shapes_pipe, tmp_path, grace, shards):
    """With time for it, the shard in hand is finished; without, it is left, and nothing of it remains."""
    for calls, expected in zip((1, 4), shards, strict=True):
        folder = tmp_path / f"{calls}"
        report = run_job(job_of(folder, rows), shapes_pipe, stop=StopAt(calls, grace))
        assert report.stopped
        assert report.shards == expected
        assert len(list((folder / "out").glob("*.tar"))) == expected
        assert not list((folder / "out").glob(".*"))
        assert run_job(job_of(folder, rows), shapes_pipe).complete
        assert contents(folder / "out") == contents(whole)


def kandinsky(*arguments: str, cwd: Path, **options):
    command = [sys.executable, "-W", "error", "-m", "kandinsky_jax.cli", "batch", *arguments]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.slow
def test_the_command(rows, tmp_path):
    """From a shell: SIGTERM on the way, a second run that finishes; its help has an example."""
    (tmp_path / "p.csv").write_text("prompt,seed\n" + "".join(f"{PROMPTS[i % 5]},{i}\n" for i in range(400)))
    call = ["p.csv", "-o", "out", "-m", str(SHAPES_MODEL), "--steps", "8", "--rows-per-shard", "4", "--batch", "4"]
    with kandinsky(*call, "--grace", "20", cwd=tmp_path) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("out/*.tar")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "start it again to continue" in out
    assert "image/s" in err
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left[-1] == "job.json"
    assert all(name.endswith(".tar") for name in left[:-1])
    with kandinsky("p.csv", "-o", "out", "-m", str(SHAPES_MODEL), "--steps", "9", cwd=tmp_path) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("error: this job cannot be run:\n  out holds another job")


def test_the_help_and_bad_settings(tmp_path):
    from typer.testing import CliRunner

    from kandinsky_jax.cli import app

    text = CliRunner().invoke(app, ["batch", "--help"]).output
    assert "Example:" in text
    assert "guidance_scale" in text
    result = CliRunner().invoke(app, ["batch", "absent.jsonl", "-o", str(tmp_path / "o"), "--batch", "0"])
    assert isinstance(result.exception, JobError)
    assert len(result.exception.faults) == 2
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_memory_does_not_hold_what_is_written(rows, shapes_pipe, tmp_path, monkeypatch):
    """No more than a few shards are in flight, however slow the disk."""
    running, most = 0, 0
    job = job_of(tmp_path, [{"prompt": PROMPTS[i % 5]} for i in range(24)], rows_per_shard=1)
    real_read, real_write = batch_runner._Stages._read, type(job.output).write

    def read(self, number):
        nonlocal running, most
        running += 1
        most = max(most, running)
        return real_read(self, number)

    def write(self, *rest):
        nonlocal running
        time.sleep(0.2)
        real_write(self, *rest)
        running -= 1

    monkeypatch.setattr(batch_runner._Stages, "_read", read)
    monkeypatch.setattr(type(job.output), "write", write)
    assert run_job(job, shapes_pipe).complete
    assert running == 0
    assert most <= 2 * batch_runner.AHEAD + 2
