"""Evaluations of true pictures of shapes: every kind of source, resumed and damaged ones, references."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from kandinsky_jax import CLIPVisionModelWithProjection
from kandinsky_jax.common.errors import RunError
from kandinsky_jax.evaluation import (
    CLIPMaximumMeanDiscrepancy,
    CLIPScore,
    EvaluationError,
    FrechetInceptionDistance,
    FunctionFeatures,
    KernelInceptionDistance,
    NearestCandidate,
    PictureMetric,
    Resampling,
    evaluate,
    frechet_distance,
    maximum_mean_discrepancy,
)
from tests import shapes
from tests.conftest import SHAPES_MODEL
from tests.evaluation.conftest import drawn, write_folder, write_job

QUIET = {"quiet": True, "batch": 4, "resampling": Resampling(resamples=50)}
COLOURS = FunctionFeatures("mean-colour", lambda picture: np.asarray(picture.image, np.float32).mean((0, 1)))


def numbers(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())["metrics"]


class Counter:
    """A metric that counts the pictures that it has looked at, and fails at one of them once."""

    def __init__(self, fails_at: int | None = None, version: str = "1"):
        self.looked, self.fails_at = 0, fails_at
        self.metric = PictureMetric("brightness", self.brightness, version=version)

    def brightness(self, picture) -> float:
        if self.looked == self.fails_at:
            self.fails_at = None
            raise KeyboardInterrupt
        self.looked += 1
        return np.asarray(picture.image, float).mean()


@pytest.fixture(scope="module")
def pictures():
    return drawn(20)


@pytest.fixture
def job(pictures, tmp_path) -> str:
    write_job(str(tmp_path / "job"), pictures, errors=2)
    return str(tmp_path / "job")


# Sources ----------------------------------------------------------------------------------------------------------


def test_every_kind_of_source_has_the_same_numbers(pictures, job, towers, tmp_path):
    write_job(str(tmp_path / "as_folder"), pictures, form="folder", per_shard=5)
    write_job("memory://evaluation/job", pictures, per_shard=20)
    write_folder(tmp_path / "plain", pictures)
    metrics = [CLIPScore(towers.images, towers.texts)]
    first = evaluate(job, tmp_path / "first", metrics=metrics, **QUIET)
    assert first.pictures == 20
    assert first.source["rows_failed"] == 2
    assert ": 20 pictures; 2 rows of the job had failed" in first.table()
    assert 20 < first["clip-score"].value < 100
    for number, source in enumerate([tmp_path / "as_folder", "memory://evaluation/job", tmp_path / "plain"]):
        found = evaluate(source, tmp_path / f"out{number}", metrics=metrics, **QUIET)
        assert found["clip-score"].value == first["clip-score"].value
        assert found["clip-score"].interval == first["clip-score"].interval


def test_the_output_at_a_url(job, tmp_path):
    counter = Counter()
    for _ in range(2):
        found = evaluate(job, "memory://evaluation/out", metrics=[counter.metric], **QUIET)
    assert counter.looked == 20
    stored = json.loads(fsspec.filesystem("memory").cat_file("/evaluation/out/evaluation.json"))
    assert stored["metrics"]["brightness"]["value"] == found["brightness"].value


def test_the_numbers_of_each_picture(pictures, job, tmp_path):
    found = evaluate(job, tmp_path / "out", metrics=[Counter().metric], **QUIET)
    lines = [json.loads(line) for line in (tmp_path / "out" / "pictures.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [prompt for prompt, _ in pictures]
    expected = [np.asarray(picture, float).mean() for _, picture in pictures]
    np.testing.assert_allclose([line["brightness"] for line in lines], expected, rtol=1e-6)
    assert found["brightness"].value == pytest.approx(np.mean(expected))


# Metrics ----------------------------------------------------------------------------------------------------------


def test_clip_takes_shapes_for_their_names(job, towers, tmp_path):
    """And the scorer without a network, through the same door, for what they are."""

    def right(picture) -> list[bool]:
        wanted = next(one for one in shapes.captions(20) if one.text == picture.prompt).truth
        found = shapes.classify(picture.image)
        return [found.colour == wanted.colour, found.shape == wanted.shape]

    scorer = PictureMetric("shapes", right, ["colour", "shape"])
    names = ["a red heart"]
    found = evaluate(
        job, tmp_path / "out", metrics=["nearest-name", scorer], clip=str(SHAPES_MODEL), names=names, **QUIET
    )
    assert found["nearest-name"].value >= 0.9
    assert found["nearest-name"].details["candidates"] == 21
    assert found["shapes/colour"].value >= 0.95
    assert found["shapes/shape"].value >= 0.9
    others = [prompt for prompt, _ in drawn(20)]
    write_job(str(tmp_path / "wrong"), [(others[i - 1], picture) for i, (_, picture) in enumerate(drawn(20))])
    wrong = evaluate(tmp_path / "wrong", tmp_path / "out2", metrics=["nearest-name"], clip=str(SHAPES_MODEL), **QUIET)
    assert wrong["nearest-name"].value <= 0.2


def test_the_nearest_of_given_candidates(pictures, job, tmp_path):
    candidates = np.stack([np.asarray(picture, np.float32).mean((0, 1)) for _, picture in pictures])
    metric = NearestCandidate("nearest-colour", COLOURS, candidates, lambda name, prompt: int(name))
    assert evaluate(job, tmp_path / "out", metrics=[metric], **QUIET)["nearest-colour"].value == 1
    turned = NearestCandidate("nearest-colour", COLOURS, candidates[::-1], lambda name, prompt: int(name))
    assert evaluate(job, tmp_path / "out", metrics=[turned], **QUIET)["nearest-colour"].value == 0


def test_distances_are_those_of_the_features(pictures, job, towers, tmp_path):
    """The formulas are tests of their own; here the features are the right ones, of both sets."""
    others = drawn(24, seed=1)
    write_folder(tmp_path / "reference", others)
    metrics = [CLIPMaximumMeanDiscrepancy(towers.images)]
    metrics += [FrechetInceptionDistance(COLOURS), KernelInceptionDistance(COLOURS, subset_size=1000)]
    found = evaluate(job, tmp_path / "out", metrics=metrics, reference=tmp_path / "reference", **QUIET)
    assert (found.pictures, found.reference_pictures) == (20, 24)
    x, y = (np.stack([np.asarray(p, np.float64).mean((0, 1)) for _, p in some]) for some in (pictures, others))
    expected = frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    assert found["fid"].value == pytest.approx(expected, rel=1e-5)
    assert found["kid"].details["subset_size"] == 20
    assert found["fid"].interval.resamples == 20
    pixels = [np.concatenate([towers.image_processor(p) for _, p in some]) for some in (pictures, others)]
    seen = [np.asarray(towers.images.encode(some), np.float64) for some in pixels]
    a, b = (some / np.linalg.norm(some, axis=1, keepdims=True) for some in seen)
    assert found["kandinsky-clip-mmd"].value == pytest.approx(maximum_mean_discrepancy(a, b), rel=1e-4)
    for name in ("fid", "kid", "kandinsky-clip-mmd"):
        interval = found[name].interval
        assert interval.low <= found[name].value <= interval.high


def test_a_metric_that_fails_does_not_lose_the_others(job, tmp_path):
    write_folder(tmp_path / "reference", drawn(1))
    metrics = [FrechetInceptionDistance(COLOURS), Counter().metric]
    found = evaluate(job, tmp_path / "out", metrics=metrics, reference=tmp_path / "reference", **QUIET)
    assert found.faults == {"fid": "needs at least 2 pictures of each set, there are 20 and 1 of the reference"}
    assert [one.name for one in found.measurements] == ["brightness"]
    assert "fid could not be measured: needs at least 2" in (tmp_path / "out" / "evaluation.md").read_text()


# Going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails_at", [0, 7, 8, 19])
def test_a_run_that_was_ended_goes_on(job, tmp_path, fails_at):
    whole = evaluate(job, tmp_path / "whole", metrics=[Counter().metric], **QUIET)
    ended = Counter(fails_at)
    with pytest.raises(KeyboardInterrupt):
        evaluate(job, tmp_path / "out", metrics=[ended.metric], **QUIET)
    assert not (tmp_path / "out" / "evaluation.json").exists()
    again = Counter()
    found = evaluate(job, tmp_path / "out", metrics=[again.metric], **QUIET)
    assert again.looked == 20 - fails_at // 8 * 8  # whole shards stay
    assert found.as_json() == whole.as_json()
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_what_has_changed_is_computed_anew(pictures, job, tmp_path):
    first, changed, third = Counter(), Counter(), Counter(version="2")
    evaluate(job, tmp_path / "out", metrics=[first.metric], **QUIET)
    before = numbers(tmp_path / "out")
    os.remove(f"{job}/000001.tar")
    inverted = [(prompt, Image.fromarray(255 - np.asarray(picture))) for prompt, picture in pictures]
    write_job(job, inverted, errors=2)
    evaluate(job, tmp_path / "out", metrics=[changed.metric], **QUIET)
    assert (first.looked, changed.looked) == (20, 8)
    assert numbers(tmp_path / "out") != before
    assert len(list((tmp_path / "out" / "features").glob("*/*"))) == 3  # none of the shard before
    evaluate(job, tmp_path / "out", metrics=[third.metric], **QUIET)
    assert third.looked == 20
    again = Counter()
    evaluate(job, tmp_path / "out", metrics=[again.metric], **QUIET)
    assert again.looked == 0  # of version 1, still there


def test_other_weights_are_other_features(job, tmp_path):
    copied = shutil.copytree(SHAPES_MODEL, tmp_path / "model")
    first = evaluate(job, tmp_path / "out", clip=str(SHAPES_MODEL), **QUIET)
    folder = copied / "kandinsky-2-2-prior" / "image_encoder"
    tower = CLIPVisionModelWithProjection.from_pretrained(folder, dtype="float32")
    tower.visual_projection.weight[...] = -tower.visual_projection.weight[...]
    tower.save_pretrained(folder)
    other = evaluate(job, tmp_path / "out", clip=str(copied), **QUIET)
    assert other["clip-score"].value < first["clip-score"].value / 2


def test_damaged_features_are_told(job, tmp_path):
    evaluate(job, tmp_path / "out", metrics=[Counter().metric], **QUIET)
    [path] = (tmp_path / "out" / "features").glob("*/000001-*")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(RunError, match=r"000001.* is damaged: .*; remove it and start the evaluation again"):
        evaluate(job, tmp_path / "out", metrics=[Counter().metric], **QUIET)
    path.unlink()
    again = Counter()
    evaluate(job, tmp_path / "out", metrics=[again.metric], **QUIET)
    assert again.looked == 8


# Bad pictures -----------------------------------------------------------------------------------------------------


def test_bad_pictures_are_reported_and_the_others_evaluated(pictures, tmp_path):
    folder = write_folder(tmp_path / "plain", pictures)
    (folder / "00003.png").write_bytes(b"no picture")
    (folder / "00007.png").write_bytes((folder / "00007.png").read_bytes()[:200])

    def darkness(picture) -> float:
        if picture.prompt == pictures[5][0]:
            raise ValueError("is not to be measured")
        return np.nan if picture.prompt == pictures[6][0] else 255 - np.asarray(picture.image, float).mean()

    found = evaluate(folder, tmp_path / "out", metrics=[PictureMetric("darkness", darkness)], **QUIET)
    assert (found.pictures, found.failed) == (16, 4)
    expected = [255 - np.asarray(picture, float).mean() for _, picture in pictures]
    assert found["darkness"].value == pytest.approx(np.mean([expected[i] for i in range(20) if i not in (3, 5, 6, 7)]))
    errors = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert [error["picture"] for error in errors] == [f"{i:05d}.png" for i in (3, 5, 6, 7)]
    assert errors[0]["error"].startswith("cannot be read as a picture: cannot identify")
    assert [error["error"] for error in errors[1:3]] == [
        "darkness: is not to be measured",
        "its darkness features are not finite",
    ]


def test_a_fault_of_one_metric_is_not_kept_for_others(pictures, tmp_path):
    folder = write_folder(tmp_path / "plain", pictures)

    def fails(picture) -> float:
        raise ValueError("fails")

    metrics = [PictureMetric("failing", fails), Counter().metric]
    with pytest.raises(ValueError, match="none of 20 pictures could be evaluated"):
        evaluate(folder, tmp_path / "out", metrics=metrics, **QUIET)
    counted = Counter()
    found = evaluate(folder, tmp_path / "out", metrics=[counted.metric], **QUIET)
    assert (found.pictures, found.failed, counted.looked) == (20, 0, 0)


def test_failures_of_the_reference_are_its_own(pictures, job, tmp_path):
    folder = write_folder(tmp_path / "reference", pictures)
    (folder / "00003.png").write_bytes(b"no picture")
    metric = FrechetInceptionDistance(COLOURS)
    found = evaluate(job, tmp_path / "out", metrics=[metric], reference=folder, **QUIET)
    assert (found.pictures, found.failed, found.reference_pictures, found.reference_failed) == (20, 0, 19, 1)
    assert "(19 pictures; 1 failed, see errors.jsonl)" in found.table()


@pytest.mark.parametrize(
    ("output", "metrics", "message"),
    [
        ("", None, "the output is empty"),
        ("job", None, "is a batch job's folder, whose errors.jsonl would be replaced"),
        ("out", [Counter().metric, Counter().metric], "two metrics are named brightness"),
        ("out", [len], r"no metric; for a function, PictureMetric\(name, function\)"),
        ("out", "clip-score", "metrics must be a list of them"),
    ],
)
def test_what_would_do_harm_or_nothing_is_refused(job, tmp_path, monkeypatch, output, metrics, message):
    monkeypatch.chdir(tmp_path)
    Path(job, "errors.jsonl").write_text("{}\n")
    with pytest.raises(EvaluationError, match=message):
        evaluate(job, output, metrics=metrics, clip=str(SHAPES_MODEL), **QUIET)
    assert Path(job, "errors.jsonl").read_text() == "{}\n"


def test_prompts_that_clip_reads_alike_are_one_candidate(pictures, tmp_path):
    both = [(prompt.upper() if i % 2 else f"{prompt} ", picture) for i, (prompt, picture) in enumerate(pictures)]
    write_job(str(tmp_path / "job"), [*pictures, *both])
    found = evaluate(tmp_path / "job", tmp_path / "out", metrics=["nearest-name"], clip=str(SHAPES_MODEL), **QUIET)
    assert found["nearest-name"].value >= 0.9


def test_an_interval_that_is_no_number_is_left_out(pictures, tmp_path):
    folder = write_folder(tmp_path / "two", pictures[:2])
    reference = write_folder(tmp_path / "reference", pictures)
    metric = KernelInceptionDistance(COLOURS)
    with np.errstate(all="ignore"):
        found = evaluate(folder, tmp_path / "out", metrics=[metric], reference=reference, **QUIET)
    assert np.isfinite(found["kid"].value)
    json.loads((tmp_path / "out" / "evaluation.json").read_text(), parse_constant=pytest.fail)


def test_the_rest_of_a_damaged_shard_is_reported(job, tmp_path):
    data = bytearray(Path(job, "000001.tar").read_bytes())
    middle = data.index(b"000000011.png")
    data[middle : middle + 512] = os.urandom(512)
    Path(job, "000001.tar").write_bytes(data)
    found = evaluate(job, tmp_path / "out", metrics=[Counter().metric], **QUIET)
    assert (found.pictures, found.failed) == (15, 1)
    [error] = map(json.loads, (tmp_path / "out" / "errors.jsonl").read_text().splitlines())
    assert error["picture"] is None
    assert "000001.tar cannot be read" in error["error"]


def test_no_picture_that_can_be_evaluated(tmp_path):
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"no picture")
    (folder / "a.txt").write_text("a red circle")
    with pytest.raises(ValueError, match=r"none of 1 pictures could be evaluated; see errors.jsonl"):
        evaluate(folder, tmp_path / "out", metrics=[Counter().metric], **QUIET)
    assert "cannot identify" in (tmp_path / "out" / "errors.jsonl").read_text()


# References -------------------------------------------------------------------------------------------------------


def test_a_saved_reference_has_the_same_numbers(pictures, job, tmp_path):
    folder = write_folder(tmp_path / "reference", drawn(24, seed=1))
    saved = tmp_path / "reference.safetensors"
    found = evaluate(folder, tmp_path / "of_reference", save=saved, clip=str(SHAPES_MODEL), **QUIET)
    assert (found.pictures, found.measurements) == (24, [])
    options = {"metrics": ["kandinsky-clip-mmd"], "clip": str(SHAPES_MODEL), **QUIET}
    first = evaluate(job, tmp_path / "out", reference=folder, **options)
    again = evaluate(job, tmp_path / "out", reference=saved, **options)
    assert first.measurements == again.measurements
    assert again.reference_pictures == 24
    with pytest.raises(EvaluationError, match="computed with other weights or settings"):
        evaluate(job, tmp_path / "out", reference=saved, metrics=["kandinsky-clip-mmd"], clip="tiny", **QUIET)
    with pytest.raises(EvaluationError, match="has no mean-colour features; it has clip-image"):
        evaluate(job, tmp_path / "out", reference=saved, metrics=[FrechetInceptionDistance(COLOURS)], **QUIET)


def test_means_and_covariances_are_enough_for_fid(pictures, job, tmp_path):
    class Colours:
        name, needs_prompt, devices = "inception", False, 1
        fingerprint, prepare, encode = COLOURS.fingerprint, COLOURS.prepare, COLOURS.encode

    y = np.random.default_rng(0).normal(100, 30, (50, 3))
    np.savez(tmp_path / "reference.npz", mu=y.mean(0), sigma=np.cov(y, rowvar=False))
    metrics = [FrechetInceptionDistance(Colours()), KernelInceptionDistance(Colours())]
    found = evaluate(job, tmp_path / "out", metrics=metrics, reference=tmp_path / "reference.npz", **QUIET)
    x = np.stack([np.asarray(picture, np.float64).mean((0, 1)) for _, picture in pictures])
    expected = frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    assert found["fid"].value == pytest.approx(expected, rel=1e-5)
    assert found.faults["kid"].endswith("it has means and covariances alone")
    np.savez(tmp_path / "objects.npz", mu=np.array([{}], object), sigma=np.eye(3))
    with pytest.raises(EvaluationError, match=r"objects.npz cannot be read: Object arrays cannot be loaded"):
        evaluate(job, tmp_path / "out", metrics=metrics, reference=tmp_path / "objects.npz", **QUIET)


# Faults -----------------------------------------------------------------------------------------------------------


def test_all_faults_at_once_and_before_anything_is_read(tmp_path):
    with pytest.raises(EvaluationError) as caught:
        evaluate(
            tmp_path / "nothing",
            tmp_path / "out",
            metrics=["clip-scores", "fid", "kandinsky-clip-mmd"],
            clip=str(tmp_path),
            batch=0,
            resampling=Resampling(level=2.0),
            names=["a name"],
            save=tmp_path / "features.bin",
        )
    told = "\n".join(caught.value.faults)
    for part in (
        "batch must be",
        "level must be a number above 0 and below 1, got 2.0",
        "there is no metric 'clip-scores'; there are clip-score, kandinsky-clip-mmd, fid, kid, nearest-name",
        "has no model_index.json",
        "fid: needed are the weights of FID's Inception network",
        "names are candidates of nearest-name",
        "nothing",
        "features.bin should end in .safetensors",
        "needs a reference set",
    ):
        assert part in told
    assert not (tmp_path / "out").exists()


def test_a_job_that_is_not_complete(job, tmp_path):
    os.remove(f"{job}/000001.tar")
    metrics = [Counter().metric]
    with pytest.raises(EvaluationError, match=r"is not complete: 1 of 3 shards are not there"):
        evaluate(job, tmp_path / "out", metrics=metrics, **QUIET)
    found = evaluate(job, tmp_path / "out", metrics=metrics, incomplete=True, **QUIET)
    assert (found.pictures, found.source["shards_missing"]) == (12, 1)


def test_pictures_without_captions_have_no_clip_score(pictures, tmp_path):
    folder = write_folder(tmp_path / "plain", pictures[:3])
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(EvaluationError, match="there is no caption"):
        evaluate(folder, tmp_path / "out", clip=str(SHAPES_MODEL), **QUIET)
    assert evaluate(folder, tmp_path / "out", metrics=[Counter().metric], **QUIET).pictures == 3
