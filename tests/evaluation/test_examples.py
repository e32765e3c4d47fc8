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
    unguided, guided = found[1.0], found[4.0]
    assert guided.pictures == unguided.pictures == 16
    assert guided["clip-score"].value > unguided["clip-score"].value + 3
    assert guided["nearest-name"].value >= 0.75
    assert guided["colourfulness"].value > unguided["colourfulness"].value
    lines = [json.loads(line) for line in Path("evaluation/out-4/pictures.jsonl").read_text().splitlines()]
    assert {line["prompt"] for line in lines} == set(Path("evaluation/names.txt").read_text().split("\n"))


def test_examples_are_short():
    for path in FOLDER.glob("*.py"):
        assert len(path.read_text().splitlines()) < 60
