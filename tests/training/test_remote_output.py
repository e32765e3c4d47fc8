"""Runs whose data, configuration and output lie in an object store, by one process and by two."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import fsspec
import pytest

from kandinsky_jax.training.config import TrainingConfigError, load
from kandinsky_jax.training.run_folder import RunFolder
from tests.batch.store import object_store
from tests.conftest import slow_and_campaign
from tpu_scripts.hosts import train_hosts
from tpu_scripts.hosts.train_hosts import Layout

STEPS = 6


@pytest.fixture(scope="module")
def store():
    with object_store("bucket") as store:
        os.environ["TENSORSTORE_GCS_HTTP_URL"] = store.url  # of Orbax's arrays
        yield store
    del os.environ["TENSORSTORE_GCS_HTTP_URL"]


def names(url: str) -> set[str]:
    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    return {path.removeprefix(f"{root}/") for path in fs.find(root)}


def download(url: str, target: Path) -> Path:
    fs, root = fsspec.core.url_to_fs(url)
    fs.get(root, str(target), recursive=True)
    return target


@pytest.mark.parametrize("processes", slow_and_campaign([1, 2], 1))
def test_a_run_in_a_bucket_is_a_run_in_a_folder(store, tmp_path, processes):
    """Stopped after some steps and continued by new machines: losses, weights and files of one run on a disk."""
    layout = Layout(processes, 2 // processes)
    train_hosts.write_data(tmp_path / "data", 20)
    base = f"gs://bucket/{layout}"
    fs, _ = fsspec.core.url_to_fs(base)
    fs.put(str(tmp_path / "data"), f"bucket/{layout}/data", recursive=True)
    for name, data, output in (
        ("here", str(tmp_path / "data"), str(tmp_path / "out")),
        ("there", f"{base}/data", f"{base}/out"),
    ):
        for steps in (STEPS // 2, STEPS) if name == "there" else (STEPS,):
            config = tmp_path / f"{name}.toml"
            train_hosts.write_config(config, data, output, steps, 2, precompute=True)
            if name == "there":
                fs.put_file(str(config), f"bucket/{layout}/{name}.toml")
                config = f"{base}/there.toml"
            train_hosts.finished(layout, "lora-prior", config, tmp_path / "logs")
    found = download(f"{base}/out", tmp_path / "found")
    assert train_hosts.compare(found, tmp_path / "out")["equal_bits"]
    assert train_hosts.losses(found) == train_hosts.losses(tmp_path / "out")
    steps_kept = {path.name for path in (found / "checkpoints").iterdir()}
    assert steps_kept == {"3", "4", "6"}  # the last three: where it was stopped, and every second step
    assert {"layout.json", "metrics.jsonl", "encoded", "model", "checkpoints", "events"} <= {
        path.name for path in found.iterdir()
    }
    assert json.loads((found / "layout.json").read_text())["processes"][0]["devices"] == layout.devices


def test_only_what_has_changed_is_sent(store, tmp_path):
    folder = RunFolder("gs://bucket/sent")
    folder.begin()
    (folder.path / "metrics.jsonl").write_text("1\n")
    (folder.path / "samples").mkdir()
    (folder.path / "samples" / "1.png").write_bytes(b"1")
    folder.publish()
    store.published.clear()
    folder.publish()
    assert not store.published
    (folder.path / "metrics.jsonl").write_text("1\n2\n")
    folder.publish()
    assert dict(store.published) == {"sent/metrics.jsonl": 1}
    again = RunFolder("gs://bucket/sent")
    again.begin()
    assert (again.path / "metrics.jsonl").read_text() == "1\n2\n"
    other = RunFolder("gs://bucket/sent", first=False)  # which writes none of these files
    other.begin()
    assert not list(other.path.iterdir())


def test_a_folder_is_complete_when_its_last_file_is_there(store, tmp_path):
    folder = RunFolder("gs://bucket/folders")
    for files in (("a", "b/c", "mark"), ("a", "mark")):
        shutil.rmtree(folder.path / "part", ignore_errors=True)
        for file in files:
            (folder.path / "part" / file).parent.mkdir(parents=True, exist_ok=True)
            (folder.path / "part" / file).write_text(file)
        store.published.clear()
        folder.publish_folder("part", "mark")
        assert names("gs://bucket/folders") == {f"part/{file}" for file in files}
        assert list(store.published)[-1] == "folders/part/mark"
        assert store.published.total() == len(files)
    other = RunFolder("gs://bucket/folders")
    other.bring_folder("part", "mark")
    assert sorted(path.name for path in (other.path / "part").iterdir()) == ["a", "mark"]
    fsspec.core.url_to_fs("gs://bucket")[0].rm_file("bucket/folders/part/mark")
    third = RunFolder("gs://bucket/folders")
    third.bring_folder("part", "mark")
    assert not (third.path / "part").exists()


def test_other_stores_are_refused(tmp_path):
    config = tmp_path / "c.toml"
    config.write_text('model = "tiny"\ndata = "d"\noutput = "s3://bucket/out"\n')
    with pytest.raises(TrainingConfigError, match="output must be a folder or a gs:// URL, got s3://bucket/out"):
        load(config)
