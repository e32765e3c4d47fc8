"""Training runs on the small model: from data to weights; killed, resumed, and with damaged data."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import weakref
from pathlib import Path

import diffusers
import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from safetensors.numpy import load_file

from kandinsky_jax import KandinskyV22CombinedPipeline, lora
from kandinsky_jax.checkpoint import flat_params
from kandinsky_jax.preemption import Stop
from kandinsky_jax.training.config import Config, TrainingConfigError, load
from kandinsky_jax.training.data import Batches, DataError, Reader, listing, without_padding
from kandinsky_jax.training.kinds import Kind
from kandinsky_jax.training.loop import Run, TrainingError
from kandinsky_jax.training.step import OptimizerConfig
from tests import shapes
from tests.conftest import SHAPES_MODEL, slow_and_campaign

ROOT = Path(__file__).parents[2]
COUNT = 12


def pictures(count: int = COUNT) -> list[tuple[str, bytes]]:
    """Captions with the PNGs of their pictures."""
    rng = np.random.default_rng(0)
    found = []
    for caption in shapes.captions(count, seed=3):
        data = io.BytesIO()
        Image.fromarray((shapes.draw(caption, rng) * 255).round().astype(np.uint8)).resize((70, 64)).save(data, "PNG")
        found.append((caption.text, data.getvalue()))
    return found


def write_folder(folder: Path) -> Path:
    """Write data with metadata.jsonl."""
    with (folder / "metadata.jsonl").open("w") as file:
        for i, (text, data) in enumerate(pictures()):
            (folder / f"{i}.png").write_bytes(data)
            file.write(json.dumps({"file_name": f"{i}.png", "text": text}) + "\n")
    return folder


class StopAfter(Stop):
    """A signal after three steps."""

    calls = 0

    @property
    def asked(self) -> bool:
        self.calls += 1
        return self.calls > 3


def config_of(data: Path, output: Path, **changed) -> Config:
    optimizer = {"learning_rate": 1e-3, "max_train_steps": 4} | changed.pop("optimizer", {})
    given = {"resolution": 64, "train_batch_size": 4, "checkpointing_steps": 2} | changed
    return Config(
        model=str(SHAPES_MODEL), data=str(data), output=str(output), optimizer=OptimizerConfig(**optimizer), **given
    )


# Data -------------------------------------------------------------------------------------------------------------


def test_every_form_of_data_is_the_same(folder, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "tars").mkdir()
    wanted = pictures()
    for form in ("txt", "json"):
        with tarfile.open(tmp_path / "tars" / f"{form}.tar", "w") as tar:
            for i, (text, data) in enumerate(wanted):
                about = text.encode() if form == "txt" else json.dumps({"prompt": text}).encode()
                for ending, content in (("png", data), (form, about)):
                    member = tarfile.TarInfo(f"{i}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    rows = [{"image": {"bytes": data, "path": None}, "text": text} for text, data in wanted]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for i, (text, data) in enumerate(wanted):
        (tmp_path / "texts" / f"{i:02d}.png").write_bytes(data)
        (tmp_path / "texts" / f"{i:02d}.txt").write_text(text + "\n")
    for place, times in ((folder, 1), (tmp_path / "tars", 2), (tmp_path / "rows.parquet", 1), (tmp_path / "texts", 1)):
        assert [(item.text, item.read()) for item in listing(place)] == wanted * times


def test_faults_are_reported_by_file_name(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        listing(tmp_path / "absent")
    with pytest.raises(DataError, match="there is no picture in it"):
        listing(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.png: there is no caption"):
        listing(tmp_path)
    lines = [
        {"file_name": "a.png", "text": "a cat"},
        {"file_name": "b.png", "text": "a cat"},
        {"file_name": "a.png"},
        {"file_name": "../a.png", "text": "a cat"},
        {"file_name": "a.png", "text": " "},
        {"file_name": "a.png", "text": 3},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{\n")
    found = listing(tmp_path)
    assert [item.text for item in found] == ["a cat"]
    faults = "\n".join(found.skipped.faults)
    for part in (
        "b.png: there is no such file",
        "line 3",
        "line 4: '../a.png' leads out",
        "caption is empty",
        "not text",
        "line 7",
    ):
        assert part in faults


def test_arrays_of_a_picture(pipe, folder):
    reader = Reader(64, pipe.prior_image_processor, pipe.prior_tokenizer, random_flip=True)
    [first, *_] = listing(folder)
    flipped = set()
    for seed in range(8):
        arrays = reader(first, np.random.default_rng(seed))
        assert arrays["pixels"].shape == (64, 64, 3)
        assert arrays["pixels"].dtype == np.uint8
        assert arrays["input_ids"].shape == arrays["text_mask"].shape == (77,)
        flipped.add(arrays["pixels"].tobytes())
    assert len(flipped) == 2


def test_the_order_is_resumed(folder):
    items, reader = listing(folder), Reader(64, random_flip=True, random_crop=True)
    batches = Batches(items, reader, 5, seed=1)
    seen = [next(batches) for _ in range(3)]
    state = json.loads(json.dumps(batches.state))
    after = [next(batches) for _ in range(4)]
    again = Batches(items, reader, 5, seed=1)
    again.state = state
    for one, two in zip(after, again, strict=False):
        assert all(np.array_equal(one[name], two[name]) for name in one)
    epoch = np.concatenate([batch["index"] for batch in seen + after])[:COUNT]
    assert sorted(epoch) == list(range(COUNT))
    assert not np.array_equal(epoch, np.concatenate([next(Batches(items, reader, COUNT, 2))["index"]]))


# Configurations ---------------------------------------------------------------------------------------------------


def test_a_configuration(tmp_path):
    (tmp_path / "c.toml").write_text(
        'model = "tiny"\ndata = "d"\noutput = "o"\nsnr_gamma = 5\nvalidation_prompts = ["a", "b"]\n'
        "[optimizer]\nlearning_rate = 1e-3\nema_decay = 0.99\n[lora]\nrank = 8\n"
    )
    config = load(tmp_path / "c.toml")
    assert config.snr_gamma == 5.0
    assert config.optimizer == OptimizerConfig(learning_rate=1e-3, ema_decay=0.99)
    assert (config.lora.rank, config.validation_prompts) == (8, ("a", "b"))


def test_all_faults_of_a_configuration(tmp_path):
    (tmp_path / "c.toml").write_text(
        'model = 3\noutput = "o"\nresolutoin = 64\nrandom_flip = "yes"\nvalidation_prompts = "a"\nlora = 4\n'
        '[optimizer]\nlearning_rate = "fast"\nlr = 1\n'
    )
    with pytest.raises(TrainingConfigError) as caught:
        load(tmp_path / "c.toml")
    faults = "\n".join(caught.value.faults)
    for part in (
        "model must be str, got 3",
        "data is missing",
        "no resolutoin; did you mean resolution?",
        "random_flip must be bool",
        "validation_prompts must be a list",
        "lora must be a table",
        "optimizer.learning_rate must be float",
        "no optimizer.lr",
    ):
        assert part in faults
    (tmp_path / "c.toml").write_text('model = "t"\ndata = "d"\noutput = "o"\nresolution = 65\ntrain_batch_size = 0\n')
    with pytest.raises(TrainingConfigError, match=r"train_batch_size must be at least 1.*\n.*multiple of 64"):
        load(tmp_path / "c.toml")
    for text in ("model = ", None):
        if text is not None:
            (tmp_path / "d.toml").write_text(text)
        with pytest.raises(TrainingConfigError, match=r"[de]\.toml"):
            load(tmp_path / ("d.toml" if text else "e.toml"))


# Runs -------------------------------------------------------------------------------------------------------------


DIFFUSION = (Kind.PRIOR, Kind.DECODER, Kind.LORA_PRIOR, Kind.LORA_DECODER)


@pytest.mark.parametrize("kind", slow_and_campaign(DIFFUSION, Kind.LORA_PRIOR))
def test_a_run(pipe, folder, tmp_path, kind):
    """The loss falls, sample pictures are generated, and diffusers loads the result."""
    steps = {"max_train_steps": 6, "learning_rate": 1e-2 if "lora" in kind else 1e-3, "ema_decay": 0.9}
    options = {"validation_steps": 3, "validation_prompts": ("a red circle", "a star"), "condition_dropout": 0.2}
    run = Run(kind, config_of(folder, tmp_path, optimizer=steps, snr_gamma=5.0, **options), pipe, quiet=True)
    before = {name: np.asarray(leaf) for name, leaf in flat_params(*run.task.modules.values()).items()}
    result = run.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(line["loss"]) and line["images_per_second"] > 0 for line in lines)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["00000003.png", "00000006.png"]
    with Image.open(tmp_path / "samples" / "00000003.png") as sheet:
        assert sheet.size == (128, 64)
    assert list((tmp_path / "events").iterdir())
    after = flat_params(*run.task.modules.values())
    assert all(np.array_equal(after[name], leaf) for name, leaf in before.items())  # restored after sampling
    if "lora" in kind:
        changed = load_file(result / lora.FILE)
        assert all(name.startswith("prior." if "prior" in kind else "unet.") for name in changed)
        assert any(array.any() for name, array in changed.items() if "lora_B" in name)
        return
    part = diffusers.KandinskyV22PriorPipeline if kind == Kind.PRIOR else diffusers.KandinskyV22Pipeline
    theirs = part.from_pretrained(result)
    trained = theirs.prior if kind == Kind.PRIOR else theirs.unet
    name = "transformer_blocks.0.attn1.to_q.weight" if kind == Kind.PRIOR else "conv_in.weight"
    assert np.abs(trained.state_dict()[name].numpy()).sum() > 0


@pytest.mark.slow
def test_padding_that_no_caption_needs_is_left_out(pipe, folder, tmp_path):
    """As little text as the longest caption needs, and the loss, with empty prompts in some places, is the same."""
    run = Run(Kind.PRIOR, config_of(folder, tmp_path, condition_dropout=0.5), pipe, quiet=True)
    whole = run.task.reader()
    batch = without_padding(next(run.batches))
    rows = [whole(run.items[i], np.random.default_rng(0)) for i in batch.pop("index")]
    padded = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    assert padded["input_ids"].shape == (4, 77)
    assert 8 < padded["text_mask"].sum(1).max() <= 16
    assert batch["input_ids"].shape == batch["text_mask"].shape == (4, 16)
    longer = padded["text_mask"].copy()
    for tokens, kept in {16: 16, 17: 32, 33: 64, 65: 77}.items():
        longer[2, :tokens] = True
        assert without_padding(padded | {"text_mask": longer})["input_ids"].shape == (4, kept)
    draw, loss = run.task.draw(), jax.jit(run.task.loss())
    params = run.task.initial(jax.random.key(0))
    for key in map(jax.random.key, range(3)):
        short, full = (loss(params, draw(run.task.encode(each), key)) for each in (batch, padded))
        np.testing.assert_allclose(short, full, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("precompute", [True, False])
def test_networks_that_no_step_runs_move_to_the_host(folder, tmp_path, precompute):
    """Of a pipeline that the run has loaded; then sample pictures and the result are made as before."""
    results = []
    for own in (True, False):
        output = tmp_path / f"{own}"
        options = {"precompute": precompute, "validation_steps": 2, "optimizer": {"max_train_steps": 2}}
        pipe = None if own else KandinskyV22CombinedPipeline.from_pretrained(SHAPES_MODEL, dtype="float32")
        run = Run(Kind.PRIOR, config_of(folder, output, **options), pipe, quiet=True)
        alive = {name: weakref.ref(next(iter(flat_params(net).values()))) for name, net in run.task.networks.items()}
        result = run.train()
        gone = {name for name, ref in alive.items() if ref() is None}
        moved = set() if not own else set(alive) if precompute else {"prior"}
        assert gone == moved
        results.append((next(result.glob("prior/*.safetensors")).read_bytes(), (output / "samples").iterdir()))
    assert results[0][0] == results[1][0]
    [[first], [second]] = ([path.read_bytes() for path in samples] for _, samples in results)
    assert first == second


@pytest.mark.slow
def test_training_learns(pipe, folder, tmp_path):
    """LoRA of the prior on a dozen pictures: the loss on the same noise falls by a third."""
    optimizer = {"max_train_steps": 60, "learning_rate": 2e-2}
    run = Run(
        Kind.LORA_PRIOR,
        config_of(folder, tmp_path, train_batch_size=12, checkpointing_steps=100, optimizer=optimizer),
        pipe,
        quiet=True,
    )
    batch = next(run.batches)
    batch.pop("index")
    encoded, draw, loss = run.task.encode(batch), run.task.draw(), jax.jit(run.task.loss())
    keys, frozen = [jax.random.key(i) for i in range(8)], run.trainer.frozen
    state = run.trainer.init(run.task.initial(jax.random.key(0)))
    start = np.mean([loss(state.params, draw(encoded, key), frozen) for key in keys])
    for _ in range(60):
        state, _ = run.trainer.step(state, encoded, run.key)
    assert np.mean([loss(state.params, draw(encoded, key), frozen) for key in keys]) < start * 2 / 3


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model" / lora.FILE)


@pytest.mark.parametrize("kind", slow_and_campaign((Kind.LORA_PRIOR, Kind.DISTILL_DECODER), Kind.LORA_PRIOR))
def test_killed_and_resumed_is_never_stopped(folder, tmp_path, kind):
    """SIGKILL and SIGTERM at random moments: the weights are those of an undisturbed run, bit for bit."""
    text = (
        'model = "{model}"\ndata = "{data}"\noutput = "{output}"\nresolution = 64\ntrain_batch_size = 4\n'
        "checkpointing_steps = 5\nrandom_flip = true\n"
        "[optimizer]\nmax_train_steps = 40\nlr_warmup_steps = 5\nema_decay = 0.9\n"
    )
    for name in ("whole", "killed"):
        (tmp_path / f"{name}.toml").write_text(text.format(model=SHAPES_MODEL, data=folder, output=tmp_path / name))

    def start(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-W", "error", "-m", "kandinsky_jax.cli", "train", kind, f"{name}.toml", "-q"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)

    whole = start("whole")
    _, error = whole.communicate()
    assert whole.returncode == 0, error
    rng, kills, process = np.random.default_rng(0), 0, start("killed")
    while kills < 2:
        metrics, before = tmp_path / "killed" / "metrics.jsonl", time.monotonic()
        lines = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        wanted = lines + int(rng.integers(3, 12))
        while time.monotonic() - before < 120 and process.poll() is None:
            if metrics.exists() and len(metrics.read_text().splitlines()) >= wanted:
                break
            time.sleep(0.01)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL if kills % 2 == 0 else signal.SIGTERM)
        process.communicate()
        assert process.returncode in (-9, 143)
        kills += 1
        process = start("killed")
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert kills >= 2
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_stopped_and_resumed(folder, tmp_path):
    """In one process: a signal between two steps, and another run that goes on."""

    def run(output: str) -> Run:
        fresh = KandinskyV22CombinedPipeline.from_pretrained(SHAPES_MODEL, dtype="float32")
        options = {"optimizer": {"max_train_steps": 6}}
        return Run(Kind.LORA_PRIOR, config_of(folder, tmp_path / output, **options), fresh, quiet=True)

    run("whole").train()
    assert run("parts").train(stop=StopAfter()) is None
    assert not (tmp_path / "parts" / "model").exists()
    run("parts").train()
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(np.array_equal(one[name], two[name]) for name in one)
    with pytest.raises(TrainingError, match="model exists and is not a result of such a run"):
        Run(Kind.PRIOR, config_of(folder, tmp_path / "parts"), quiet=True)
    shutil.rmtree(tmp_path / "parts" / "model")
    other = Run(Kind.PRIOR, config_of(folder, tmp_path / "parts"), quiet=True)
    with pytest.raises(TrainingError, match="holds checkpoints of lora-prior, not of prior"):
        other.train()


@pytest.mark.slow
def test_bad_pictures_and_losses_do_not_lose_the_run(pipe, folder, tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    lines = (folder / "metadata.jsonl").read_text().splitlines()[:4]
    for i in range(4):
        (data / f"{i}.png").write_bytes((folder / f"{i}.png").read_bytes() if i != 2 else b"no picture")
    (data / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    run = Run(Kind.LORA_PRIOR, config_of(data, tmp_path / "out"), pipe, quiet=True)
    assert run.train() is not None
    text = (tmp_path / "out" / "bad_data.txt").read_text()
    assert "step 0: 2.png" in text
    assert "cannot be read as a picture" in text

    run = Run(Kind.LORA_PRIOR, config_of(folder, tmp_path / "nan", optimizer={"max_train_steps": 30}), pipe, quiet=True)
    encode = type(run.task).encode
    monkeypatch.setattr(
        type(run.task),
        "encode",
        lambda self, batch: encode(self, batch) | {"prompt_embeds": np.full((4, 64), np.nan, np.float32)},
    )
    with pytest.raises(TrainingError, match="the loss was not finite in 10 steps"):
        run.train()
    assert "step 0: loss nan of " in (tmp_path / "nan" / "bad_data.txt").read_text()
    monkeypatch.undo()
    again = Run(
        Kind.LORA_PRIOR, config_of(folder, tmp_path / "nan", optimizer={"max_train_steps": 12}), pipe, quiet=True
    )
    assert again.train() is not None  # from the last checkpoint, whose weights nothing has spoilt
    assert all(np.isfinite(array).all() for array in weights(tmp_path / "nan").values())
