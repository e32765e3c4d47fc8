"""Accidents of a run: no work is lost, and faults are reported in one sentence."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from kandinsky_jax import KandinskyV22CombinedPipeline, lora
from kandinsky_jax.lora import LoraConfig
from kandinsky_jax.training import latent_cache
from kandinsky_jax.training.bad_data import MAX_LINES, BadData
from kandinsky_jax.training.checkpoints import Checkpoints
from kandinsky_jax.training.checksums import checksums
from kandinsky_jax.training.config import Config
from kandinsky_jax.training.data import Captioned, DataError, data_fingerprint, listing
from kandinsky_jax.training.errors import TrainingError
from kandinsky_jax.training.kinds import Kind
from kandinsky_jax.training.latent_cache import open_latent_cache
from kandinsky_jax.training.loop import Run
from kandinsky_jax.training.metrics import Metrics
from kandinsky_jax.training.run_folder import RunFolder
from kandinsky_jax.training.run_record import FREE, describe_changes, record_changes, run_record, weights_digest
from kandinsky_jax.training.step import OptimizerConfig, Trainer
from kandinsky_jax.training.tasks import PriorTask
from tests.conftest import SHAPES_MODEL
from tests.fuzz.harness import trials
from tests.fuzz.training import ENCODED

ROOT = Path(__file__).parents[2]
COUNT = 6


def fill(folder: Path, count: int = COUNT) -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


def config_of(data: Path, output: Path, **changed) -> Config:
    optimizer = {"learning_rate": 1e-3, "max_train_steps": 4} | changed.pop("optimizer", {})
    given = {"resolution": 64, "train_batch_size": 2, "checkpointing_steps": 2, "text_length": 16} | changed
    return Config(
        model=str(SHAPES_MODEL), data=str(data), output=str(output), optimizer=OptimizerConfig(**optimizer), **given
    )


@pytest.fixture(scope="module")
def pipe() -> KandinskyV22CombinedPipeline:
    return KandinskyV22CombinedPipeline.from_pretrained(SHAPES_MODEL, dtype="float32")


# What makes a run the same run ------------------------------------------------------------------------------------

ITEMS = [Captioned(f"{i}", f"text {i}", bytes, None, 10 * i) for i in range(4)]
CHANGED = {
    "seed": 1,
    "train_batch_size": 4,
    "resolution": 128,
    "snr_gamma": 5.0,
    "condition_dropout": 0.1,
    "random_flip": True,
    "random_crop": True,
    "precompute": True,
    "text_length": 8,
    "quantized_share": 0.5,
    "optimizer.learning_rate": 1e-4,
    "optimizer.lr_scheduler": "cosine",
    "optimizer.lr_warmup_steps": 3,
    "optimizer.adam_beta1": 0.8,
    "optimizer.adam_beta2": 0.9,
    "optimizer.adam_weight_decay": 0.0,
    "optimizer.adam_epsilon": 1e-6,
    "optimizer.max_grad_norm": 2.0,
    "optimizer.gradient_accumulation_steps": 2,
    "optimizer.ema_decay": 0.9,
    "optimizer.dtype": "bfloat16",
    "lora.rank": 8,
    "lora.alpha": 2.0,
    "lora.pattern": "to_q",
    "distillation.lora": False,
    "distillation.method": "lcm",
    "distillation.guidance_scale": 2.0,
    "distillation.guidance_scale_max": 9.0,
    "distillation.original_inference_steps": 50,
    "distillation.distance": "l2",
    "distillation.huber_c": 0.1,
    "distillation.timestep_scaling": 5.0,
    "distillation.ema_target": True,
    "distillation.embeddings": "prior",
}
CHANGED_DPO = {"dpo.beta": 100.0, "dpo.lora": False}
FREELY = {
    "model": "m",
    "prior": "p",
    "data": "e",
    "output": "q",
    "checkpointing_steps": 7,
    "checkpoints_total_limit": 9,
    "validation_prompts": ("a",),
    "validation_steps": 5,
    "wandb_project": "w",
    "mesh.data": 1,
    "mesh.fsdp_min_size": 1,
    "mesh.fsdp": 1,
    "optimizer.max_train_steps": 99,
    "optimizer.remat": True,
    "distillation.num_inference_steps": 2,
}


def replaced(config: Config, name: str, value: object) -> Config:
    part, _, field = name.rpartition(".")
    if not part:
        return dataclasses.replace(config, **{name: value})
    return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **{field: value})})


def test_every_setting_either_is_compared_or_may_change():
    base = config_of(Path("d"), Path("o"))
    record = run_record(Kind.DISTILL_PRIOR, base, ITEMS, {})
    for name, value in CHANGED.items():
        found = record_changes(record, run_record(Kind.DISTILL_PRIOR, replaced(base, name, value), ITEMS, {}))
        assert name in found, name
        assert name in describe_changes(found)
    of_dpo = run_record(Kind.DPO_DECODER, base, ITEMS, {})
    for name, value in CHANGED_DPO.items():
        assert name in record_changes(of_dpo, run_record(Kind.DPO_DECODER, replaced(base, name, value), ITEMS, {}))
    for name, value in FREELY.items():
        assert not record_changes(record, run_record(Kind.DISTILL_PRIOR, replaced(base, name, value), ITEMS, {})), name
    settings = dataclasses.asdict(base)
    names = {
        f"{n}.{m}" if isinstance(v, dict) else n
        for n, v in settings.items()
        for m in (v if isinstance(v, dict) else [0])
    }
    assert names == CHANGED.keys() | CHANGED_DPO.keys() | FREELY.keys()
    assert FREELY.keys() == FREE
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize(
    "items",
    [ITEMS[:3], ITEMS[::-1], [*ITEMS[:3], ITEMS[3]._replace(text="other")], [*ITEMS[:3], ITEMS[3]._replace(size=1)]],
)
def test_other_data_is_another_run(items):
    base = config_of(Path("d"), Path("o"))
    found = record_changes(run_record(Kind.PRIOR, base, ITEMS, {}), run_record(Kind.PRIOR, base, items, {}))
    assert "data" in found
    assert found.keys() <= {"data", "number of pictures"}
    assert data_fingerprint(ITEMS) == data_fingerprint([item._replace(modified=3) for item in ITEMS])


def test_other_weights_are_another_run():
    base, params = config_of(Path("d"), Path("o")), {"a": {"weight": np.arange(6.0, dtype=np.float32)}}
    other = {"a": {"weight": params["a"]["weight"].copy()}}
    other["a"]["weight"][3] = np.nextafter(np.float32(3), np.float32(4))
    one, two = (run_record(Kind.PRIOR, base, ITEMS, {"unet": weights_digest(tree)}) for tree in (params, other))
    assert describe_changes(record_changes(one, two)) == "weights of unet"
    assert checksums(params) != checksums(jax.tree.map(lambda leaf: leaf.reshape(2, 3), params))
    assert checksums({"a": np.float32(3)}) == checksums({"a": jax.numpy.float32(3)})


# Files of a run ---------------------------------------------------------------------------------------------------


def test_bad_data_is_named_once_and_bounded(tmp_path):
    path = tmp_path / "bad_data.txt"
    bad = BadData(path)
    for step in range(8):
        bad.report(f"a.png: it cannot be read, at 0x{step}", f"step {step}", "a.png")
        bad.report("\udcff.png: it cannot be read", f"step {step}", "\udcff.png")
    assert len(path.read_text().splitlines()) == 2
    again = BadData(path)  # the run goes on
    again.report("a.png: it cannot be read, at 0x9", "step 9", "a.png")
    assert len(path.read_text().splitlines()) == 2
    for i in range(3 * MAX_LINES):
        again.report(f"{i}.png: {'x' * 2000}", "step 9", f"{i}.png")
    lines = path.read_text().splitlines()
    assert len(lines) == MAX_LINES + 1
    assert lines[-1] == "further ones are not listed"
    assert max(map(len, lines)) < 450
    BadData(path).report("new.png: it cannot be read", "step 10", "new.png")
    assert len(path.read_text().splitlines()) == MAX_LINES + 1


def test_one_bad_byte_in_the_metrics_costs_one_line(tmp_path):
    lines = [json.dumps({"step": step, "loss": 0.5}).encode() for step in range(1, 9)]
    lines[2] = lines[2].replace(b"loss", b"l\xffss")
    lines[3:4] = [
        b"[" * 100_000,
        b'{"step": ' + b"9" * 5000 + b"}",
        b"[1]",
        b'{"step": "4"}',
        b"null",
        b"\xef\xbb\xbf" + lines[3],
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines)[:-3])
    Metrics(tmp_path, config_of(Path("d"), tmp_path)).forget_after(7)
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in kept] == [1, 2, 5, 6, 7]


def test_a_place_of_the_result_that_is_taken_is_found_before_the_first_step(tmp_path, pipe):
    data = fill(tmp_path / "data", 2)
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / "notes.txt").write_text("mine")
    for kind in (Kind.LORA_PRIOR, Kind.PRIOR):
        with pytest.raises(TrainingError, match="model exists and is not a result of such a run"):
            Run(kind, config_of(data, tmp_path / "out"), pipe, quiet=True)
    (tmp_path / "file").write_text("a file")
    with pytest.raises(TrainingError, match="file is not a folder; choose another output"):
        Run(Kind.PRIOR, config_of(data, tmp_path / "file"), pipe, quiet=True)


# Encoded data -----------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    path.write_bytes(data)


def test_stale_and_damaged_encoded_data_is_made_again(tmp_path, pipe, monkeypatch):
    """Of several parts, only the damaged one; all of them where the inputs are others."""
    monkeypatch.setattr(latent_cache, "PART_ITEMS", 1)
    data, folder = fill(tmp_path / "data"), tmp_path / "out" / "encoded"
    folder.parent.mkdir()
    task = PriorTask(pipe, config_of(data, tmp_path / "out", precompute=True))
    parts = [folder / f"{number:05d}" for number in range(COUNT)]
    assert len(parts) > 2

    def arrays() -> dict[str, np.ndarray]:
        found, _ = open_latent_cache(RunFolder(str(folder.parent)), task, listing(data), quiet=True)
        assert found.which == list(range(COUNT))
        rows = [found(i, np.random.default_rng(0)) for i in range(COUNT)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def times() -> list[int]:
        return [(part / "about.json").stat().st_mtime_ns for part in parts]

    folder.mkdir()
    (folder / "image_embeds.npy").write_bytes(b"of an older version")
    first = arrays()
    assert sorted(folder.iterdir()) == parts
    before = times()
    arrays()
    assert times() == before  # used as it is
    old = {"mark": "0" * 64, "which": [1]}
    (parts[1] / "foreign.npy").write_bytes(b"no array")
    assert arrays().keys() == first.keys()
    one = r"1 of \d parts are not used, their pictures are encoded again: 00001: .*"
    for damage, says in (
        (lambda: flip(parts[1] / "image_embeds.npy"), one + r"image_embeds\.npy is damaged"),
        (lambda: (parts[1] / "image_embeds.npy").unlink(), one + r"image_embeds\.npy is missing"),
        (lambda: (parts[1] / "text_mask.npy").write_bytes(b""), one + r"text_mask\.npy is damaged"),
        (lambda: (parts[1] / "about.json").write_text("{"), one + r"about\.json is damaged"),
        (lambda: (parts[1] / "about.json").unlink(), one + r"about\.json is damaged or missing"),
        (lambda: flip(parts[1] / "about.json"), one + r"about\.json is damaged"),
        (lambda: (parts[1] / "about.json").write_text(json.dumps(old)), one + "another format version"),
        (lambda: (shutil.rmtree(parts[1]), parts[1].write_text("a file")), one + "damaged or missing"),
        (lambda: os.utime(data / "0.png", ns=(1, 1)), r"(\d) of \1 parts are not used.*made of other pictures"),
    ):
        before = times()
        damage()
        with pytest.warns(UserWarning, match=says):
            found = arrays()
        assert all(np.array_equal(found[name], array) for name, array in first.items())
        assert [a == b for a, b in zip(times(), before, strict=True)].count(True) == ("00001" in says) * (
            len(parts) - 1
        )
    before = times()[:1]
    shutil.rmtree(parts[1])  # as a killed process leaves it
    assert all(np.array_equal(found[name], array) for found in [arrays()] for name, array in first.items())
    assert times()[:1] == before
    Image.new("RGB", (64, 64), "red").save(data / "0.png")
    with pytest.warns(UserWarning, match="made of other pictures"):
        assert not np.array_equal(arrays()["image_embeds"], first["image_embeds"])


@pytest.mark.slow
def test_encoded_data_that_is_damaged_anywhere_is_not_used(tmp_path):
    assert not [trial for trial in trials(ENCODED, 40, 5, tmp_path) if trial.fault]


# Whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_with_a_batch_of_one_goes_on_past_damage_and_refuses_another_seed(tmp_path, pipe):
    """One compiled step for: a batch of one, skipped data, a damaged checkpoint and metrics, another seed."""
    data = fill(tmp_path / "data", 3)
    (data / "alone.png").write_bytes(b"")

    def run(output: str, **changed) -> Run:
        options = {"train_batch_size": 1, "lora": LoraConfig(rank=2)} | changed
        return Run(Kind.LORA_PRIOR, config_of(data, tmp_path / output, **options), pipe, quiet=True)

    with pytest.warns(
        UserWarning, match=r"3 pictures are used, not used are 1 files or rows .*alone\.png: there is no"
    ):
        run("out").train()
    assert "not used: alone.png: there is no caption" in (tmp_path / "out" / "bad_data.txt").read_text()
    (data / "alone.png").unlink()
    wanted = load_file(tmp_path / "out" / "model" / lora.FILE)
    for seed_run in (run("out", seed=1), run("out", train_batch_size=2)):
        with pytest.raises(TrainingError, match=r"changed are (seed \(0, now 1\)|train_batch_size \(1, now 2\));"):
            seed_run.train()
    metrics = tmp_path / "out" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + b"\xff\n")
    for path in (tmp_path / "out" / "checkpoints" / "4" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:50])
    shutil.rmtree(tmp_path / "out" / "model")
    with pytest.warns(UserWarning, match="damaged checkpoints are not used, training continues from step 2"):
        run("out").train()
    found = load_file(tmp_path / "out" / "model" / lora.FILE)
    assert all(np.array_equal(found[name], array) for name, array in wanted.items())
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    # Data that cannot be read any more ends the run, and what was done is kept.
    for path in data.glob("*.png"):
        path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(DataError, match="cannot be used") as caught:
        run("out", optimizer={"max_train_steps": 9}).train()
    assert str(data) in str(caught.value)
    assert len(str(caught.value)) < 500
    assert sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir()) == ["2", "4"]


@pytest.mark.slow
def test_the_command_says_it_in_one_line(tmp_path):
    data, output = fill(tmp_path / "data", 2), tmp_path / "out"
    (tmp_path / "c.toml").write_text(
        f'model = "{SHAPES_MODEL}"\ndata = "{data}"\noutput = "{output}"\nresolution = 64\ntrain_batch_size = 1\n'
    )
    state = Trainer(lambda params, batch: 0.0, OptimizerConfig()).init({"a": jax.numpy.zeros(3)})
    with Checkpoints(output, {"kind": "lora-prior", "seed": 7}, 3) as checkpoints:
        checkpoints.save(1, state._replace(step=jax.numpy.int32(1)), {"next_index": 1})
    command = [sys.executable, "-W", "error", "-m", "kandinsky_jax.cli", "train", "lora-prior", "c.toml", "-q"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {output} holds the checkpoints of a run with other settings or data: changed are seed (7, now 0); "
        "change that back, choose another output folder, or start with --accept-changes to continue with the new ones\n"
    )
