"""Readers of training: configurations, data, checkpoints, encoded data, metrics."""

from __future__ import annotations

import functools
import io
import json
import shutil
import tarfile
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from kandinsky_jax.images import CLIPImageProcessor
from kandinsky_jax.pipelines import KandinskyV22CombinedPipeline
from kandinsky_jax.training.checkpoints import Checkpoints
from kandinsky_jax.training.config import Config, TrainingConfigError, load
from kandinsky_jax.training.data import DataError, listing
from kandinsky_jax.training.data import Reader as PictureReader
from kandinsky_jax.training.errors import TrainingError
from kandinsky_jax.training.latent_cache import open_latent_cache
from kandinsky_jax.training.metrics import Metrics
from kandinsky_jax.training.run_folder import RunFolder
from kandinsky_jax.training.step import TrainState
from kandinsky_jax.training.tasks import PriorTask
from tests.conftest import SHAPES_MODEL
from tests.fuzz.harness import Reader, check_message, lasting_folder
from tests.fuzz.jobs import PIXELS

CONFIG = """model = "tiny"
data = "data"
output = "out"
resolution = 64
train_batch_size = 4
seed = 3
snr_gamma = 5.0
random_flip = true
validation_prompts = ["a red circle", "a blue square"]

[optimizer]
learning_rate = 1e-4
max_train_steps = 10
lr_scheduler = "cosine"

[lora]
rank = 4
alpha = 8.0

[mesh]
data = 1
"""


def _config(folder: Path) -> list[Path]:
    (folder / "train.toml").write_text(CONFIG)
    return [folder / "train.toml"]


# Data -------------------------------------------------------------------------------------------------------------


def _png(colour: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.roll(PIXELS[..., :3], colour, axis=0)).save(data, "PNG")
    return data.getvalue()


def _pairs(folder: Path) -> list[Path]:
    for i in range(3):
        (folder / f"{i}.png").write_bytes(_png(i))
        (folder / f"{i}.txt").write_text(f"picture {i}")
    (folder / "2.txt").unlink()
    (folder / "2.json").write_text(json.dumps({"caption": "picture 2"}))
    return list(folder.iterdir())


def _metadata(folder: Path) -> list[Path]:
    lines = []
    for i in range(3):
        (folder / f"{i}.png").write_bytes(_png(i))
        lines.append({"file_name": f"{i}.png", "text": f"picture {i}", "hint_file_name": f"{i}.png"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [folder / "metadata.jsonl"]


def _tar(folder: Path) -> list[Path]:
    with tarfile.open(folder / "data.tar", "w") as tar:
        for i in range(3):
            about = json.dumps({"text": f"picture {i}"}).encode()
            for name, data in ((f"{i}.png", _png(i)), (f"{i}.json", about), (f"{i}.hint.png", _png(i))):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return [folder / "data.tar"]


def _long_names(format: int, folder: Path) -> list[Path]:
    """A tar whose members have headers of their own for their names."""
    with tarfile.open(folder / "data.tar", "w", format=format) as tar:
        for i in range(3):
            for ending, data in (("png", _png(i)), ("txt", b"picture"), ("hint.png", _png(i))):
                member = tarfile.TarInfo(f"{'x' * 120}{i}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return [folder / "data.tar"]


def _table(folder: Path) -> list[Path]:
    rows = [{"image": {"bytes": _png(i), "path": None}, "text": f"picture {i}"} for i in range(4)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data.parquet", row_group_size=2)
    return [folder / "data.parquet"]


def _read_data(folder: Path) -> None:
    reader = PictureReader(64, CLIPImageProcessor(32, 32), hints=True)
    found = listing(folder, scratch=folder)
    for item in found:
        reader(item, np.random.default_rng(0))
    for fault in (*found.skipped.faults, *reader.unreadable, *reader.unreadable.values()):
        check_message(fault)


# Runs -------------------------------------------------------------------------------------------------------------

RECORD = {"kind": "prior", "seed": 0, "number of pictures": 3}


def _state(step: int) -> TrainState:
    params = {"layer": {"weight": jnp.full((4, 3), float(step))}}
    return TrainState(jnp.asarray(step, jnp.int32), params, {"mu": jnp.zeros((4, 3))}, None)


@functools.cache
def _run() -> Path:
    folder = lasting_folder()
    with Checkpoints(folder, RECORD, 3) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, _state(step), {"next_index": step})
    return folder


def _checkpoints(folder: Path) -> list[Path]:
    shutil.copytree(_run(), folder, dirs_exist_ok=True)
    return [path for path in (folder / "checkpoints").rglob("*") if path.is_file()]


def _restore(folder: Path) -> None:
    with warnings.catch_warnings(), Checkpoints(folder, RECORD, 3) as checkpoints:
        warnings.filterwarnings("ignore", "damaged|.*(damaged|format version)", UserWarning)
        found = checkpoints.restore(_state(0))
    assert found is not None, "damaged, and begun anew"
    wanted = _state(found[1]["next_index"])
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(wanted), strict=True))


def _metrics(folder: Path) -> list[Path]:
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "loss": 0.5}) + "\n" for i in range(1, 6)))
    return [folder / "metrics.jsonl"]


def _forget(folder: Path) -> None:
    config: Any = Config(model="tiny", data=".", output=str(folder))
    with Metrics(folder, config) as metrics:
        metrics.forget_after(3)
        metrics.write(4, {"loss": 0.25})


@functools.cache
def _task() -> tuple[PriorTask, Path]:
    """A prior's task on a folder of pictures that outlives the trials."""
    data = lasting_folder() / "data"
    data.mkdir()
    _pairs(data)
    pipe = KandinskyV22CombinedPipeline.from_pretrained(SHAPES_MODEL, dtype="float32")
    return PriorTask(pipe, Config(model="tiny", data=str(data), output="o", resolution=64)), data


def _encoded(folder: Path) -> list[Path]:
    task, data = _task()
    open_latent_cache(RunFolder(str(folder)), task, listing(data), quiet=True)
    return [path for path in (folder / "encoded").rglob("*") if path.is_file()]


def _read_encoded(folder: Path) -> None:
    """Whatever the damage, what is used are the right arrays."""
    task, data = _task()
    items, rng = listing(data), np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*their pictures are encoded again", UserWarning)
        found, _ = open_latent_cache(RunFolder(str(folder)), task, items, quiet=True)
    whole, _ = open_latent_cache(RunFolder(str(data.with_name("whole"))), task, items, quiet=True)
    for i in range(len(items)):
        for name, array in whole(i, rng).items():
            assert np.array_equal(found(i, rng)[name], array)


READERS = (
    Reader("training configuration", _config, lambda folder: load(folder / "train.toml"), (TrainingConfigError,)),
    Reader("training data: pictures and captions", _pairs, _read_data, (DataError,)),
    Reader("training data: metadata.jsonl", _metadata, _read_data, (DataError,)),
    Reader("training data: tar", _tar, _read_data, (DataError,)),
    Reader("training data: tar (pax)", functools.partial(_long_names, tarfile.PAX_FORMAT), _read_data, (DataError,)),
    Reader("training data: tar (gnu)", functools.partial(_long_names, tarfile.GNU_FORMAT), _read_data, (DataError,)),
    Reader("training data: Parquet", _table, _read_data, (DataError,)),
    Reader("training checkpoints", _checkpoints, _restore, (TrainingError,)),
    Reader("metrics.jsonl", _metrics, _forget, (TrainingError,)),
)

# Not among the readers of the quick suite: most inputs run networks again.
ENCODED = Reader("training encoded data", _encoded, _read_encoded, (TrainingError,))
