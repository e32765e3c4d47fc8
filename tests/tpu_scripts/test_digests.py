"""tpu_scripts/digests/digests.py: its digests, and its comparison of changed results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

SCRIPT = Path(__file__).parents[2] / "tpu_scripts" / "digests" / "digests.py"
sys.path.insert(0, str(SCRIPT.parent))  # as Python does for a script

from digest_cases import GROUPS, cases_of  # noqa: E402
from digest_cases.values import record_of  # noqa: E402


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)


def write(path: Path, cases: dict, jax: str = "1") -> Path:
    path.write_text(json.dumps({"environment": {"jax": jax, "commit": path.name}, "cases": cases}))
    return path


VALUE = {"images": np.linspace(0, 1, 100, dtype=np.float32), "about": "a prompt"}


def test_equal_records(tmp_path):
    old = write(tmp_path / "old.json", {"a": record_of(VALUE), "b": record_of(3)})
    new = write(tmp_path / "new.json", {"a": record_of(dict(VALUE)), "b": record_of(3), "c": record_of(1.5)})
    done = run("compare", old, new)
    assert done.returncode == 0, done.stdout
    assert "new        c" in done.stdout
    assert "2 equal, 0 different, 0 missing, 1 new" in done.stdout
    assert "environment" not in done.stdout


def test_what_changed_or_is_missing_is_listed(tmp_path):
    other = VALUE | {"images": VALUE["images"] + np.float32(0.25)}
    old = write(tmp_path / "old.json", {name: record_of(VALUE) for name in ("a", "b", "c", "d")})
    now = {"a": record_of(other), "b": record_of(VALUE | {"about": "x"}), "d": {"error": "ValueError: no"}}
    new = write(tmp_path / "new.json", now, jax="2")
    done = run("compare", old, new)
    assert done.returncode == 1
    assert "DIFFERENT  a: changed: images; max |difference| of the recorded numbers 0.25, " in done.stdout
    assert "DIFFERENT  b: changed: about; the recorded numbers are equal" in done.stdout
    assert "DIFFERENT  d: was a result, now ValueError: no" in done.stdout
    assert "MISSING    c" in done.stdout
    assert "environment: jax was 1, now 2" in done.stdout
    assert "0 equal, 3 different, 1 missing, 0 new" in done.stdout


def test_a_reason_explains_a_difference_within_its_bound(tmp_path):
    other = VALUE | {"images": VALUE["images"] + np.float32(1e-3)}
    old = write(tmp_path / "old.json", {name: record_of(VALUE) for name in ("a/1", "a/2", "b")})
    new = write(tmp_path / "new.json", {name: record_of(other) for name in ("a/1", "a/2")})
    (tmp_path / "why.json").write_text(json.dumps({"a/*": {"reason": "one product", "within": 0.01}}))
    done = run("compare", old, new, "--reasons", tmp_path / "why.json")
    assert "explained  a/1: one product" in done.stdout
    assert "0 equal, 0 different, 1 missing, 0 new, 2 explained" in done.stdout
    assert done.returncode == 1
    why = {"a/*": {"reason": "one product", "within": 0.001}, "b": {"reason": "gone"}}
    (tmp_path / "why.json").write_text(json.dumps(why))
    done = run("compare", old, new, "--reasons", tmp_path / "why.json")
    assert "explained  b: gone" in done.stdout
    assert "0 equal, 2 different, 0 missing, 0 new, 1 explained" in done.stdout


@pytest.mark.parametrize(
    "changed",
    [
        VALUE["images"].astype(np.float64),
        VALUE["images"].reshape(10, 10),
        VALUE["images"][::-1],
        np.where(np.arange(100) == 50, np.nextafter(VALUE["images"], np.float32(2)), VALUE["images"]),
    ],
    ids=["dtype", "shape", "order", "one bit"],
)
def test_a_digest_is_of_dtype_shape_and_every_bit(changed):
    assert record_of(changed)["sha256"] != record_of(VALUE["images"])["sha256"]


def test_the_numbers_of_a_safetensors_file_are_recorded():
    array = np.arange(12, dtype=np.float32)
    numbers = record_of({"model.safetensors": save({"a": array[:4], "b": array[4:]})})["numbers"]
    assert numbers[:5] == [12, 5.5, pytest.approx(array.std()), 0, 11]


def test_the_order_of_a_safetensors_file_s_metadata_does_not_count():
    """Its writer has another order in every run."""
    found = {metadata: _with_metadata(metadata) for metadata in ('{"a":"1","b":"2"}', '{"b":"2","a":"1"}')}
    records = [record_of({"x.safetensors": data})["sha256"] for data in (*found.values(), _with_metadata('{"a":"3"}'))]
    assert len(set(found.values())) == 2
    assert records[0] == records[1] != records[2]


def _with_metadata(metadata: str) -> bytes:
    header = f'{{"__metadata__":{metadata},"x":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}}}'.encode()
    return len(header).to_bytes(8, "little") + header + b"x"


def test_every_group_has_cases_of_different_names():
    names = [case.name for group in GROUPS for case in cases_of(group)]
    assert len(names) == len(set(names)) > 500
    quick = {case.name for group in GROUPS for case in cases_of(group, quick=True)}
    assert 0 < len(quick) < len(names) / 2


def test_code_of_another_checkout_is_not_recorded_by_mistake(tmp_path):
    done = run("--checkout", tmp_path, "record", tmp_path / "a.json", "--group", "files", "--only", "no such case")
    assert f"not from {tmp_path}" in done.stderr


def test_help_has_an_example():
    assert "python tpu_scripts/digests/digests.py record before.json" in run("--help").stdout


@pytest.mark.slow
def test_a_recorded_case_is_equal_when_it_is_run_again(tmp_path):
    only = ["--only", "solver/DDIMScheduler/add_noise", "--group", "solvers"]
    assert run("record", tmp_path / "old.json", *only).returncode == 0
    done = run("record", tmp_path / "new.json", *only, "--against", tmp_path / "old.json")
    assert done.returncode == 0, done.stdout
    assert "1 equal, 0 different" in done.stdout
