"""The command line, run as a user runs it."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from kandinsky_jax import scheduler_named
from kandinsky_jax.checkpoint import hub
from kandinsky_jax.cli import app
from kandinsky_jax.cli.main import main
from tests import shapes
from tests.conftest import SHAPES_MODEL

DECODER, INPAINT = (str(SHAPES_MODEL / name) for name in (hub.DECODER, hub.INPAINT))
SHORT = ["--model", str(SHAPES_MODEL), "--steps", "3", "--prior-steps", "2"]


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
        assert picture.text["parameters"].startswith(f"{prompt}\nSteps: {about['num_inference_steps']}, ")
    assert about["prompt"] == prompt
    assert about["seed"] == 7
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.slow
def test_several_pictures(tmp_path):
    arguments = [*SHORT, "--seed", "3", "--num-images", "2", "--quiet", "-o", "b.webp"]
    done = kandinsky("generate", "a red circle", "yellow ring", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "it/s" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"b-{i}.webp" for i in range(4)]
    assert {pixels(path).shape for path in tmp_path.iterdir()} == {(64, 64, 3)}


@pytest.mark.slow
def test_torch_noise_is_the_references_picture(tmp_path, shapes_pipe):
    from kandinsky_jax import TorchGenerator

    arguments = [*SHORT, "--seed", "5", "--torch-noise", "--width", "128", "-o", "c.png"]
    done = kandinsky("generate", "yellow ring", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = shapes_pipe(
        "yellow ring",
        height=64,
        width=128,
        num_inference_steps=3,
        prior_num_inference_steps=2,
        generator=TorchGenerator(5),
    ).images[0]
    difference = np.abs(pixels(tmp_path / "c.png") - np.asarray(expected, int))
    assert difference.max() <= 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["x", "--model", "nowhere"], "nowhere is not a folder here, no embedded model (tiny) and no Hub repository"),
        (["x", "--model", "tiny", "-o", "a.bmp"], "a.bmp should end in one of .png"),
        (["x", "--model", "tiny", "-o", "missing/a.png"], "missing does not exist"),
        (["x", "--model", "tiny", "--height", "10"], "--height=10 is too small"),
        (["x", *SHORT[:2], "--steps", "0"], "num_inference_steps=0 is out of range"),
        (["x", "--model", "tiny", "--seed", "-1"], "--seed=-1 is not a seed"),
        (["x", "--scheduler", "dpm2m"], "there is no scheduler 'dpm2m'; did you mean dpm"),
        (["x", "--guider", "agp"], "--guider: there is no guider 'agp'; did you mean"),
        (["x", "--guider", "cfg++", "--model", "tiny"], "--guider: guider 'cfg++': scale is 2, needed is 0 to 1"),
        (["x", "--prior-guidance-interval", "0.5,0.2"], "--prior-guidance-interval must be two rising numbers"),
        (["x", "--scheduler", "heun", "--steps", "600"], "num_inference_steps=600 is out of range"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kandinsky-jax", "generate", *arguments])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # main() changes both for its process
    monkeypatch.setenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert says in said
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_process_ends_with_the_error_alone(tmp_path):
    done = kandinsky("generate", "x", "--model", "nowhere", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: nowhere is not a folder here")
    assert len(done.stderr.splitlines()) == 1


def invoke(arguments: list[str], folder) -> Any:
    """Run a command in this process, whose programs are compiled already."""
    with contextlib.chdir(folder):
        return CliRunner().invoke(app, arguments)


@pytest.fixture
def folder(tmp_path):
    """A folder with the files that the examples name."""
    rng = np.random.default_rng(0)
    asked = shapes.captions(2, seed=2)
    for name, caption in zip(("circle.png", "star.png"), asked, strict=True):
        Image.fromarray(np.uint8(shapes.draw(caption, rng) * 255)).save(tmp_path / name)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    mask.save(tmp_path / "mask.png")
    Image.fromarray(np.uint16(shapes.depth("cross", (32, 32), 18) * 65535)).save(tmp_path / "depth.png")
    return tmp_path


COMMANDS = ["generate", "img2img", "inpaint", "controlnet", "mix", "vary"]


def test_every_command_is_listed(tmp_path):
    shown = invoke(["--help"], tmp_path).output
    assert all(f" {name} " in shown for name in COMMANDS)


@pytest.mark.slow  # each mode compiles programs of its own; test_generate is in the quick suite
@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_in_the_help_runs(folder, name):
    """As it is printed, offline, only with fewer steps, whichever model is embedded."""
    parts = [hub.EMBEDDED["tiny"] / hub.DECODER / part / "config.json" for part in ("unet", "movq")]
    unet, movq = (json.loads(path.read_text()) for path in parts)
    native = unet["sample_size"] * 2 ** (len(movq["block_out_channels"]) - 1)
    shown = " ".join(invoke([name, "--help"], folder).output.split())
    [example] = re.findall(r"Example: kandinsky-jax (.*--model tiny)", shown)
    assert "--negative-prompt" in shown
    assert "--compilation-cache" in shown
    arguments = shlex.split(example)
    target = folder / arguments[arguments.index("-o") + 1]
    for named in (folder / argument for argument in arguments if argument.endswith(".png")):
        if named != target and not named.exists():
            shutil.copy(folder / "circle.png", named)
    done = invoke([*arguments, "--steps", "4", "--prior-steps", "4", "--seed", "3", "--quiet"], folder)
    assert done.exit_code == 0, done.output
    with Image.open(target) as picture:
        assert picture.size == (native, native)
        about = json.loads(picture.text["kandinsky_jax"])
    assert about["seed"] == 3
    assert about.get("prompt", about.get("items"))
    assert ("files" in about) == (name not in ("generate", "mix"))


@pytest.mark.slow
def test_the_commands_do_what_the_pipelines_do(folder, ours):
    """Files, sizes and seeds arrive: the same pictures as from Python."""
    prompt = "a green star on a white background"
    short = ["--steps", "4", "--prior-steps", "4", "-m", str(SHAPES_MODEL), "-q"]
    steps = {"num_inference_steps": 4, "prior_num_inference_steps": 4, "height": 64, "width": 64}
    image, mask, hint = (Image.open(folder / name) for name in ("circle.png", "mask.png", "depth.png"))
    cases = {
        "img2img --image circle.png --strength 0.5": ("Img2Img", {"image": image, "strength": 0.5}),
        "inpaint --image circle.png --mask mask.png --paste-back": (
            "Inpaint",
            {"image": image, "mask_image": mask, "paste_back": True},
        ),
        "controlnet --hint depth.png": ("Controlnet", {"hint": hint}),
        "controlnet --hint depth.png --image circle.png --strength 0.5": (
            "ControlnetImg2Img",
            {"hint": hint, "image": image, "strength": 0.5},
        ),
    }
    for line, (mode, pictures) in cases.items():
        command, *arguments = line.split()
        arguments += ["--seed", "5", "-o", "out.png", "-n", "red", *short]
        pipe = ours[f"KandinskyV22{mode}CombinedPipeline"]
        [expected] = pipe(prompt, negative_prompt="red", generator=5, **pictures, **steps).images
        original, pipe.scheduler = pipe.scheduler, scheduler_named("dpm++2m-karras", pipe.scheduler.config)
        [solved] = pipe(prompt, negative_prompt="red", generator=5, **pictures, **steps).images
        pipe.scheduler = original
        assert np.abs(np.asarray(expected, int) - np.asarray(solved, int)).max() > 8
        for picture, solver in ((expected, []), (solved, ["--scheduler", "dpm++2m-karras"])):
            done = invoke([command, prompt, *arguments, *solver], folder)
            assert done.exit_code == 0, done.output
            assert done.output.split("\n")[:2] == ["out.png", "seed 5"]
            assert np.abs(pixels(folder / "out.png") - np.asarray(picture, int)).max() <= 1


def test_a_mix_has_the_given_proportions(folder, ours):
    short = ["--steps", "4", "--prior-steps", "4", "-m", str(SHAPES_MODEL), "-q", "--seed", "5", "-o", "out.png"]
    done = invoke(["mix", "yellow ring", "star.png", "--weights", "0.3,0.7", *short], folder)
    assert done.exit_code == 0, done.output
    embeds = ours["KandinskyV22PriorPipeline"].interpolate(
        ["yellow ring", Image.open(folder / "star.png")], [0.3, 0.7], num_inference_steps=4, generator=5
    )
    [expected] = ours["KandinskyV22Pipeline"](**embeds, height=64, width=64, num_inference_steps=4, generator=5).images
    assert np.abs(pixels(folder / "out.png") - np.asarray(expected, int)).max() <= 1


@pytest.mark.slow
def test_guiders_of_both_stages(folder, ours):
    short = ["--steps", "4", "--prior-steps", "4", "-m", str(SHAPES_MODEL), "-q", "--seed", "5", "-o", "out.png"]
    text = "--guider apg:eta=0.5 --guidance-interval 0.2,1 --prior-guider rescaled-cfg --prior-guidance-interval 0,0.5"
    prior = {"guider": "rescaled-cfg", "guidance_interval": (0, 0.5), "num_inference_steps": 4, "generator": 5}
    decoder = {"guider": "apg:eta=0.5", "guidance_interval": (0.2, 1), "num_inference_steps": 4, "generator": 5}
    pipe = ours["KandinskyV22CombinedPipeline"]
    for command in ("generate", "mix"):
        done = invoke([command, "a green star", *short, *text.split()], folder)
        assert done.exit_code == 0, done.output
        if command == "generate":
            embeds = pipe.prior_pipe("a green star", **prior)
        else:
            embeds = pipe.prior_pipe.interpolate(["a green star"], [1.0], **prior)
        [expected] = pipe.decoder_pipe(*embeds.values(), height=64, width=64, **decoder).images
        assert np.abs(pixels(folder / "out.png") - np.asarray(expected, int)).max() <= 1
        with Image.open(folder / "out.png") as picture:
            about = json.loads(picture.text["kandinsky_jax"])
        assert about["guider"] == "apg:eta=0.5"
        assert "rescaled-cfg" in (about.get("prior_guider"), about.get("prior", {}).get("guider"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["img2img", "x", "-i", "no.png"], "--image|image: there is no file no.png"),
        (["img2img", "x", "-i", "circle.png", "--strength", "0"], "strength must be a number above 0"),
        (["img2img", "x", "-i", "circle.png", "--strength", "0.01", "--steps", "50"], "leaves no step to do"),
        (["img2img", "x", "-i", "circle.png", "-i", "star.png"], "image has 2 pictures for 1 prompts"),
        (["img2img", "x", "-i", "notes.txt"], "notes.txt cannot be read as a picture"),
        (["inpaint", "x", "-i", "circle.png", "--mask", "no.png"], "there is no file no.png"),
        (["mix", "x", "y", "--weights", "0.5"], "2 items, weights has 1"),
        (["mix", "x", "y", "--weights", "a,b"], "--weights must be numbers with commas between, got 'a,b'"),
        (["mix", "x", "no.png"], "there is no file no.png"),
        (["vary", "x", "-i", "circle.png", "--strength", "2"], "strength must be"),
        (["controlnet", "x", "--hint", "depth.png", "-m", DECODER], "KandinskyV22Pipeline, which"),
        (["inpaint", "x", "-i", "circle.png", "--mask", "mask.png", "-m", DECODER], "which"),
        (["generate", "x", "-m", INPAINT], "load it with KandinskyV22InpaintPipeline"),
    ],
)
def test_errors_of_the_modes(folder, arguments, says):
    """Before a model is loaded, but for those about the model."""
    (folder / "notes.txt").write_text("no picture")
    before = set(folder.iterdir())
    model = [] if "-m" in arguments else ["-m", "tiny/nothing"]
    done = invoke([*arguments, *model], folder)
    assert isinstance(done.exception, ValueError)
    assert re.search(says, str(done.exception))
    assert set(folder.iterdir()) == before
