"""The programs in examples/rewards run as they are, and show what they say."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).parents[2] / "examples" / "rewards"
NUMBER = r"-?[\d.]*\d"


def check_draft(printed: str) -> None:
    before, after = (float(x) for x in re.findall(NUMBER, printed.partition("names:")[2]))
    assert after > before
    assert np.asarray(Image.open("draft.png")).std() > 10
    assert Path("draft_lora/pytorch_lora_weights.safetensors").is_file()


def check_noise(printed: str) -> None:
    before, _, after = (float(x) for x in re.findall(NUMBER, printed.splitlines()[0]))
    assert after > before + 0.02
    first, last = (float(x) for x in re.findall(NUMBER, printed.splitlines()[1]))
    assert abs(last / first - 1) < 0.2
    assert Image.open("noise.png").size == (8 * 64, 2 * 64)


def check_ddpo(printed: str) -> None:
    epochs = [[float(x) for x in re.findall(NUMBER, line.partition(":")[2])] for line in printed.splitlines()]
    assert len(epochs) == len(Path("ddpo.jsonl").read_text().splitlines()) == 6
    (first, error), (last, _) = epochs[0], epochs[-1]
    assert last < first - error
    assert Image.open("ddpo.png").size == (4 * 64, 2 * 64)


def check_dpo(printed: str) -> None:
    before, _, after = (float(x) for x in re.findall(NUMBER, printed.partition("names:")[2]))
    assert after < 0.8 * before


# What these two check does not hold yet: they learn too little in the time that they take.
NOT_YET = ("ddpo", "dpo")
CHECKS = {"ddpo": check_ddpo, "dpo": check_dpo, "draft": check_draft, "noise": check_noise}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.campaign if name in NOT_YET else pytest.mark.slow) for name in CHECKS]
)
def test_an_example_shows_what_it_says(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(FOLDER / f"{name}.py"))
    CHECKS[name](capsys.readouterr().out)


def test_every_example_is_checked():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(CHECKS)
