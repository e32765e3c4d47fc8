"""The command line's modes: pixels of the pictures, and what is written beside them."""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from digest_cases import Case, inputs

STEPS = ["--steps", "2", "--prior-steps", "2", "--guidance-scale", "2", "--prior-guidance-scale", "1.5"]
COMMON = [*STEPS, "--height", "64", "--width", "64", "--dtype", "float32", "--quiet"]


def cases() -> list[Case]:
    """All cases of the module."""
    shapes = str(inputs.SHAPES_MODEL)
    decoder = f"{shapes}/kandinsky-2-2-decoder"
    calls = {
        "generate": ["generate", "purple heart", "--seed", "1", "--model", "tiny"],
        "generate two prompts and two images": [
            "generate", *inputs.PROMPTS, "--num-images", "2", "--seed", "1", "--model", "tiny", "-n", "red",
        ],
        "generate torch noise and solver": [
            "generate", "purple heart", "--seed", "1", "--model", "tiny", "--torch-noise",
            "--scheduler", "dpm++2m-karras",
        ],
        "img2img": [
            "img2img", "purple heart", "--image", "photo.png", "--strength", "0.6", "--seed", "1", "--model", decoder,
        ],
        "inpaint": [
            "inpaint", "a red circle", "--image", "photo.png", "--mask", "mask.png", "--seed", "1",
            "--model", f"{shapes}/kandinsky-2-2-decoder-inpaint", "--paste-back",
        ],
        "controlnet": [
            "controlnet", "a red circle", "--hint", "depth.png", "--seed", "1",
            "--model", f"{shapes}/kandinsky-2-2-controlnet-depth",
        ],
        "mix": ["mix", "purple heart", "photo.png", "--weights", "0.6,0.4", "--seed", "1", "--model", "tiny"],
        "vary": ["vary", "purple heart", "--image", "photo.png", "--strength", "0.5", "--seed", "1", "--model", "tiny"],
    }  # fmt: skip
    found = []
    for name, arguments in calls.items():
        found.append(Case(f"command/{name}", functools.partial(_pictures, arguments), quick=name == "generate"))
    return found


def _pictures(arguments: list[str], folder: Path) -> Any:
    write_files(folder)
    kandinsky_jax(folder, *arguments, *COMMON, "--output", "out.png")
    found = {}
    for path in sorted(folder.glob("out*.png")):
        with Image.open(path) as image:
            about = {name: _without_folders(text) for name, text in image.info.items() if isinstance(text, str)}
            found[path.name] = {"pixels": np.asarray(image), "about": about}
    return found


def _without_folders(text: str) -> str:
    """A text without the place of the small model, which may be elsewhere."""
    return text.replace(json.dumps(str(inputs.SHAPES_MODEL))[1:-1], "SHAPES_MODEL")


def write_files(folder: Path) -> None:
    """A photo, a mask and a depth map."""
    inputs.picture().save(folder / "photo.png")
    Image.fromarray(np.uint8(inputs.mask()) * 255).save(folder / "mask.png")
    Image.fromarray(inputs.depth()).save(folder / "depth.png")


def launcher() -> list[str]:
    """The command that starts `kandinsky-jax` of the code that is imported here, as its pyproject.toml says."""
    spec = importlib.util.find_spec("kandinsky_jax")
    assert spec is not None
    assert spec.origin is not None
    project = tomllib.loads((Path(spec.origin).parents[1] / "pyproject.toml").read_text())
    module, _, function = project["project"]["scripts"]["kandinsky-jax"].partition(":")
    program = f"import sys; from {module} import {function}; sys.argv[0] = 'kandinsky-jax'; sys.exit({function}())"
    return [sys.executable, "-c", program]


def kandinsky_jax(folder: Path, *arguments: str, allowed: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
    """Run the command line in a folder.

    Raises:
        RuntimeError: with the end of what it printed, where its exit code is not allowed.
    """
    return _checked([*launcher(), *arguments], folder, allowed)


def convert(folder: Path, *arguments: str) -> None:
    """Run `python -m convert_weights` in a folder."""
    _checked([sys.executable, "-m", "convert_weights", *arguments], folder, (0,))


def _checked(command: list[str], folder: Path, allowed: tuple[int, ...]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode not in allowed:
        said = " ".join((done.stderr or done.stdout).split())
        raise RuntimeError(f"{' '.join(command[3:5])} ended with {done.returncode}: {said[-250:]}")
    return done
