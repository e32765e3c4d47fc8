"""`kandinsky-jax batch` reports failed rows at its end, even if an earlier run did the work."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from kandinsky_jax.cli import app
from tests.conftest import SHAPES_MODEL


def run(folder: Path, rows: str):
    """The command on rows of a text file, one row a shard."""
    (folder / "rows.csv").write_text(rows)
    settings = ["--steps", "2", "--prior-steps", "2", "--rows-per-shard", "1", "--quiet"]
    return CliRunner().invoke(
        app, ["batch", str(folder / "rows.csv"), "-o", str(folder / "out"), "-m", str(SHAPES_MODEL), *settings]
    )


@pytest.mark.slow
def test_a_completed_job_says_what_failed(tmp_path):
    rows = "prompt,height,num_images\nyellow ring,,1\nyellow ring,3,1\nyellow ring,-1,2\n"
    for written in ("1 image in 3 shards", "0 images in 0 shards"):
        done = run(tmp_path, rows)
        assert done.exit_code == 0, done.exception
        assert written in done.output
        *_, counted, hint = done.output.splitlines()
        assert counted.endswith(f"2 rows could not be generated, see {tmp_path}/out/errors.jsonl")
        assert f"remove 000001.tar, 000002.tar in {tmp_path}/out and start the job again" in hint
    for name in ("000001.tar", "000002.tar"):
        (tmp_path / "out" / name).unlink()
    assert "0 images in 2 shards" in run(tmp_path, rows).output


def test_a_job_without_one_picture_is_an_error(tmp_path):
    for _ in range(2):
        done = run(tmp_path, "prompt,height\nyellow ring,3\nyellow ring,4\n")
        assert isinstance(done.exception, ValueError)
        assert str(done.exception) == f"none of the 2 rows could be generated; see {tmp_path}/out/errors.jsonl"


def test_the_version_is_printed(tmp_path):
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0
    assert done.output.splitlines()[0].startswith("kandinsky_jax 0.")
