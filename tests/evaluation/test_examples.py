"""The examples of evaluation run as they are, and show what they say."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "evaluation"


@pytest.mark.slow
def test_own_metric(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(FOLDER / "own_metric.py"))["found"]
    assert capsys.readouterr().out.count("| colourfulness |") == 2
    few, many = found[2], found[25]
    assert few.pictures == many.pictures == 16
    assert many["clip-score"].value > few["clip-score"].value + 3
    assert many["nearest-name"].value >= 0.75
    assert few["colourfulness"].value != many["colourfulness"].value
    lines = [json.loads(line) for line in Path("evaluation/out-25/pictures.jsonl").read_text().splitlines()]
    assert {line["prompt"] for line in lines} == set(Path("evaluation/names.txt").read_text().split("\n"))


def test_examples_are_short():
    for path in FOLDER.glob("*.py"):
        assert len(path.read_text().splitlines()) < 60
