"""Planning a job takes little memory, whatever its rows, and about as long as reading them."""

from __future__ import annotations

import sys

import pytest

from tpu_scripts.batch.batch_planning import LAYOUTS, compare, measure, write

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count"),
    # pyarrow reads 150,000 rows in less time than can be compared.
    [("jsonl", 150_000), ("csv with line breaks", 150_000), ("parquet, one group", 1_000_000)],
)
def test_planning_of_many_rows_is_cheap(name, count):
    """Memory of many rows, and a processor time that no quadratic step would keep; the machine may be busy."""
    found = compare(name, count, rounds=1)
    assert found["plan_memory_mb"] < 120  # most of it pyarrow's, or the blocks' that are being read
    assert found["slices_memory_mb"] < 150
    assert found["cpu_ratio"] < 3
    assert found["slices_seconds"] < 10 * found["library_seconds"] + 10


@pytest.mark.slow
def test_planning_with_every_id_twice_is_cheap(tmp_path):
    path = write(tmp_path, "jsonl", 50_000)
    path.write_bytes(path.read_bytes() * 2)
    assert measure("plan", path)["memory"] < 120e6


@pytest.mark.campaign
@pytest.mark.parametrize("name", LAYOUTS)
def test_planning_of_a_million_rows(name):
    """As tpu_scripts/batch/batch_planning.py, whose dated result is in tpu_scripts/results."""
    found = compare(name, 1_000_000, rounds=3)
    assert found["plan_memory_mb"] <= 200
    assert found["ratio"] <= 1.5
