"""Arguments of the command line, with a missing model, so that nothing is generated."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from PIL import Image

from kandinsky_jax.cli.main import main
from kandinsky_jax.common import reading
from tests.fuzz.harness import Reader, check_message

SETTINGS = "--steps 10 --guidance-scale 4 --seed 1 --num-images 2 --scheduler ddim --dtype float32 --prior-steps 5"


def _arguments(command: str) -> Callable[[Path], list[Path]]:
    def build(folder: Path) -> list[Path]:
        Image.new("RGB", (64, 64)).save(folder / "a.png")
        given = [word.replace("_", " ") for word in command.split()]
        (folder / "arguments.json").write_text(json.dumps([*given, *SETTINGS.split()]))
        return [*[folder / "arguments.json"] * 3, folder / "a.png"]

    return build


def _text(word: object) -> str:
    return word if isinstance(word, str) else json.dumps(word)


def _run(folder: Path) -> None:
    """Run the command in this process; a traceback leaves it as the exception that it is."""
    try:
        given = reading.read_json(folder / "arguments.json")
    except (OSError, reading.ReadError):
        given = ["generate"]
    words = (
        [_text(word).replace("\0", "").replace("FOLDER", str(folder)) for word in given]
        if isinstance(given, list)
        else []
    )
    output, errors, code = io.StringIO(), io.StringIO(), None
    with (
        mock.patch.object(sys, "argv", ["kandinsky-jax", *words]),
        contextlib.chdir(folder),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code
    printed = errors.getvalue()
    assert code in (0, 1, 2), code
    assert "Traceback" not in printed, printed
    if printed.startswith("error: "):
        check_message(printed)


READERS = tuple(
    Reader(
        f"arguments of {command.split()[0]}", _arguments(f"{command} --model FOLDER/none -o FOLDER/out.png"), _run, ()
    )
    for command in (
        "generate a_red_circle a_blue_square --height 64 --width 64",
        "img2img a_red_circle --image FOLDER/a.png --strength 0.5",
        "inpaint a_red_circle --image FOLDER/a.png --mask FOLDER/a.png",
        "mix a_red_circle FOLDER/a.png --weights 0.4,0.6",
    )
)
