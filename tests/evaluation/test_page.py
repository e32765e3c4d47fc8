"""The code in docs/evaluation.md runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"


@pytest.mark.slow
def test_the_page_of_evaluation(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 2  # the first one needs the weights of FID's network
    made: dict = {}
    exec(compile(blocks[1], PAGE.name, "exec"), made)
    assert made["found"].pictures == 3
    redness = dict(zip(("red apple", "purple heart", "snowman"), made["found"]["redness"].values, strict=True))
    assert max(redness, key=redness.get) == "red apple"
    assert (tmp_path / "out" / "evaluation.json").is_file()
