"""The command line, run as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

SHORT = ["--model", "tiny", "--steps", "3", "--prior-steps", "2"]


def kandinsky(*arguments: str, cwd) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "kandinsky_jax.cli", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def pixels(path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture, int)


def test_generate(tmp_path):
    prompt = "a red circle on a blue background"
    done = kandinsky("generate", prompt, *SHORT, "--seed", "7", "-o", "a.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["a.png", "seed 7"]
    assert "decoder: 100%" in done.stderr
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (64, 64)
        about = json.loads(picture.text["kandinsky_jax"])
    assert about["prompt"] == prompt
    assert about["seed"] == 7
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_several_pictures(tmp_path):
    arguments = [*SHORT, "--seed", "3", "--num-images", "2", "--quiet", "-o", "b.webp", "--width", "128"]
    done = kandinsky("generate", "a red circle", "yellow ring", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "it/s" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"b-{i}.webp" for i in range(4)]
    assert {pixels(path).shape for path in tmp_path.iterdir()} == {(64, 128, 3)}


def test_torch_noise_is_the_references_picture(tmp_path, tiny_pipe):
    from kandinsky_jax import TorchGenerator

    done = kandinsky("generate", "yellow ring", *SHORT, "--seed", "5", "--torch-noise", "-o", "c.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = tiny_pipe(
        "yellow ring",
        height=64,
        width=64,
        num_inference_steps=3,
        prior_num_inference_steps=2,
        generator=TorchGenerator(5),
    ).images[0]
    difference = np.abs(pixels(tmp_path / "c.png") - np.asarray(expected, int))
    assert difference.max() <= 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["x", "--model", "nowhere"], "nowhere is no folder here, no embedded model (tiny) and no Hub repository"),
        (["x", "--model", "tiny", "-o", "a.bmp"], "a.bmp should end in one of .png"),
        (["x", "--model", "tiny", "-o", "missing/a.png"], "missing does not exist"),
        (["x", "--model", "tiny", "--height", "10"], "--height=10 is too small"),
        (["x", *SHORT[:2], "--steps", "0"], "num_inference_steps=0 is out of range"),
        (["x", "--model", "tiny", "--seed", "-1"], "generator=-1 is no seed"),
    ],
)
def test_errors_are_one_line(tmp_path, arguments, says):
    done = kandinsky("generate", *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert says in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_help_shows_an_example(tmp_path):
    done = kandinsky("generate", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "Example:" in done.stdout
    assert "--negative-prompt" in done.stdout
