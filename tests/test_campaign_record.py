"""A campaign's record holds every test's outcome, also where its parts are run one after the other."""

from __future__ import annotations

import json
from types import SimpleNamespace

from tests.campaign_record import record


def report(name: str, when: str = "call") -> SimpleNamespace:
    return SimpleNamespace(nodeid=f"tests/{name}.py::test", duration=1.26, when=when)


def test_parts_are_added_to_the_days_record(tmp_path):
    first = {"passed": [report("a", "setup"), report("a"), report("b")], "error": [report("b", "teardown")]}
    record(first, {("test", "error"): [0.5, 1.23456, 0.7], ("test", "lost"): [float("nan")]}, 61.4, tmp_path)
    uncollected = SimpleNamespace(nodeid="tests/d.py", when="collect")
    path = record({"failed": [report("a")], "passed": [report("c")], "error": [uncollected]}, {}, 5, tmp_path)
    found = json.loads(path.read_text())
    outcomes = {name: test["outcome"] for name, test in found["tests"].items()}
    assert outcomes.pop("tests/d.py") == "error"
    assert outcomes == {"tests/a.py::test": "failed", "tests/b.py::test": "error", "tests/c.py::test": "passed"}
    assert found["tests"]["tests/c.py::test"]["seconds"] == 1.3
    assert found["measured"]["test: error"] == {"worst": 1.23, "median": 0.7, "of": 3}
    assert found["measured"]["test: lost"]["worst"] is None
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_run_of_no_test_leaves_no_record(tmp_path):
    assert record({"deselected": [report("a")]}, {}, 1, tmp_path) is None
    assert not list(tmp_path.iterdir())
