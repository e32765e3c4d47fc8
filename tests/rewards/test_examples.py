"""The programs in examples/rewards run as they are, and show what they say."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import SHAPES_MODEL, run_program, slow_and_campaign

FOLDER = Path(__file__).parents[2] / "examples" / "rewards"
NUMBER = r"-?[\d.]*\d"


def size_of(name: str) -> tuple[int, int]:
    with Image.open(name) as picture:
        return picture.size


def check_draft(printed: str) -> None:
    before, after = (float(x) for x in re.findall(NUMBER, printed.partition("names:")[2]))
    assert after > before + 0.04
    assert size_of("draft.png") == (8 * 64, 2 * 64)
    with Image.open("snowman.png") as picture:
        assert np.asarray(picture).std() > 10
    assert Path("draft_lora/pytorch_lora_weights.safetensors").is_file()


def check_noise(printed: str) -> None:
    before, _, after = (float(x) for x in re.findall(NUMBER, printed.splitlines()[0]))
    assert after > before + 0.02
    first, last = (float(x) for x in re.findall(NUMBER, printed.splitlines()[1]))
    assert abs(last / first - 1) < 0.2
    assert size_of("noise.png") == (8 * 64, 2 * 64)


def check_ddpo(printed: str) -> None:
    epochs = [[float(x) for x in re.findall(NUMBER, line.partition(":")[2])] for line in printed.splitlines()]
    assert len(epochs) == len(Path("ddpo.jsonl").read_text().splitlines()) == 6
    (first, error), (last, _) = epochs[0], epochs[-1]
    assert last < first - error
    assert size_of("ddpo.png") == (4 * 64, 2 * 64)


def check_dpo(printed: str) -> None:
    prompts, before, _, after = (int(x) for x in re.findall(NUMBER, printed))
    assert prompts == 8
    assert before <= 4
    assert after >= 6
    assert size_of("dpo.png") == (8 * 64, 2 * 64)


CHECKS = {"ddpo": check_ddpo, "dpo": check_dpo, "draft": check_draft, "noise": check_noise}


@pytest.mark.parametrize("name", slow_and_campaign(CHECKS, "noise"))
def test_an_example_shows_what_it_says(name, tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "shapes_model").symlink_to(SHAPES_MODEL)
    monkeypatch.chdir(tmp_path)
    CHECKS[name](run_program(FOLDER / f"{name}.py", tmp_path))


def test_every_example_is_checked():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(CHECKS)
