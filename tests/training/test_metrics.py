"""Metrics of a run: the file, TensorBoard events, and Weights & Biases, offline and with failures."""

from __future__ import annotations

import json
import os
import pty
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from kandinsky_jax.training.config import Config
from kandinsky_jax.training.metrics import Metrics

LOSSES = {1: 0.5, 2: 0.25, 3: 0.125}
ONE_STEP = """
import sys
from pathlib import Path
from kandinsky_jax.training.config import Config
from kandinsky_jax.training.metrics import Metrics
folder = Path(sys.argv[1])
with Metrics(folder, Config(model="m", data="d", output=str(folder), wandb_project="p")) as metrics:
    metrics.write(4, {"loss": 1.0})
"""


def config_of(folder: Path, project: str | None = None) -> Config:
    return Config(model="tiny", data="d", output=str(folder), wandb_project=project)


def measure(folder: Path, project: str | None = None) -> None:
    with Metrics(folder, config_of(folder, project)) as metrics:
        for step, loss in LOSSES.items():
            metrics.write(step, {"loss": loss})
        metrics.picture(3, Image.new("RGB", (64, 32), "red"))


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder: Path) -> list[Event]:
    """TensorBoard's records: a length, its checksum, the message, its checksum."""
    [path] = (folder / "events").iterdir()
    data, found = path.read_bytes(), []
    while data:
        [length] = struct.unpack("<Q", data[:8])
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


@pytest.fixture
def offline(monkeypatch):
    """The real wandb, which asks no server; its process ends with the test."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()  # it reads the environment once
    yield
    wandb.teardown()


def test_without_a_project_nothing_is_started(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would fail
    measure(tmp_path)
    assert lines(tmp_path) == [{"step": step, "loss": loss} for step, loss in LOSSES.items()]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events", "metrics.jsonl"]
    values = [value for event in events(tmp_path) for value in event.summary.value]
    assert [value.simple_value for value in values if value.tag == "loss"] == list(LOSSES.values())
    [picture] = [value.image for value in values if value.tag == "samples"]
    assert (picture.width, picture.height) == (64, 32)


@pytest.mark.slow
def test_weights_and_biases_offline(tmp_path, offline):
    measure(tmp_path, "kandinsky")
    measure(tmp_path, "kandinsky")  # a run that goes on
    assert len(lines(tmp_path)) == 2 * len(LOSSES)
    runs = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert [path.stem for path in runs] == ["run-" + (tmp_path / "wandb" / "run_id.txt").read_text()] * 2
    written = runs[0].read_bytes()
    assert all(part in written for part in (b"loss", b"0.125", b"samples", b"kandinsky", b"train_batch_size"))
    [picture] = runs[0].parent.glob("files/media/images/*.png")
    with Image.open(picture) as image:
        assert image.size == (64, 32)


def test_what_fails_is_a_warning(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("the server is on fire")

    works = SimpleNamespace(define_metric=lambda *_, **__: None, log=fail, finish=fail)
    fake = SimpleNamespace(setup=lambda _: None, Settings=dict, Image=None, init=lambda **_: works)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.warns(UserWarning, match="Weights & Biases: the server is on fire"):
        measure(tmp_path, "p")
    fake.init = fail
    with pytest.warns(UserWarning, match="on fire") as caught:  # not even offline
        measure(tmp_path, "p")
    assert len(caught) == 2
    assert "on fire; metrics are kept in" in str(caught[0].message)
    fake.init, works.log = (lambda **_: works), lambda *_: None
    with pytest.warns(UserWarning, match="on fire"):  # at the end
        Metrics(tmp_path, config_of(tmp_path, "p")).__exit__(None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.warns(UserWarning, match="pip install wandb"):
        measure(tmp_path, "p")
    assert len(lines(tmp_path)) == 3 * len(LOSSES)


@pytest.mark.slow
def test_there_is_no_prompt_for_a_key(tmp_path):
    """At a terminal, not logged in: a warning, and files to send later."""
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "TERM": "xterm"}
    command = [sys.executable, "-c", ONE_STEP, str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    try:
        subprocess.run(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, check=True, timeout=120)
        said = os.read(ours, 1 << 16).decode()
    finally:
        os.close(theirs)
        os.close(ours)
    assert "for `wandb sync`" in said
    assert "choice" not in said
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb"))
    assert lines(tmp_path / "out") == [{"step": 4, "loss": 1.0}]
