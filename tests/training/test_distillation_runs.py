"""Runs of distillation, from data to a fast student, and what their results recommend."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import tarfile
from pathlib import Path

import diffusers
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from safetensors.numpy import load_file

import kandinsky_jax
from kandinsky_jax import KandinskyV22CombinedPipeline, KandinskyV22Pipeline, lora
from kandinsky_jax.checkpoint import flat_params
from kandinsky_jax.training.config import Config
from kandinsky_jax.training.data import DataError, listing
from kandinsky_jax.training.distillation import DistillationConfig
from kandinsky_jax.training.errors import TrainingError
from kandinsky_jax.training.kinds import Kind
from kandinsky_jax.training.loop import Run
from kandinsky_jax.training.tasks import make_task
from tests.training.test_training_loop import config_of, pictures


def files_below(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def assert_refused_before_it_encodes(kind: Kind, config: Config, pipe, data: Path) -> None:
    """Other settings and captions, and fewer pictures; also where the newest checkpoint is damaged."""
    output = Path(config.output)
    encoded = files_below(output / "encoded")
    assert encoded
    lines = (data / "metadata.jsonl").read_text().splitlines()
    steps = sorted((output / "checkpoints").iterdir(), key=lambda path: int(path.name))
    for change in ("resolution", "data", "number of pictures", "damaged"):
        given = dataclasses.replace(config, data=str(data))
        if change == "resolution":
            given = dataclasses.replace(given, resolution=128)
        elif change == "data":
            (data / "metadata.jsonl").write_text("\n".join([lines[0].replace("a ", "one "), *lines[1:]]))
        else:
            (data / "metadata.jsonl").write_text("\n".join(lines[1:]))
            (data / "0.png").unlink(missing_ok=True)
        if change == "damaged":
            (steps[-1] / "place" / "metadata").write_text("{")
        with pytest.raises(TrainingError, match=f"changed are {change if change != 'damaged' else 'number'}"):
            Run(kind, given, pipe, quiet=True)
        assert files_below(output / "encoded") == encoded


@pytest.mark.parametrize(
    ("kind", "with_lora"),
    [
        pytest.param(Kind.DISTILL_DECODER, True, marks=pytest.mark.slow),
        pytest.param(Kind.DISTILL_PRIOR, False, marks=pytest.mark.slow),
        pytest.param(Kind.DISTILL_DECODER, False, marks=pytest.mark.campaign),
        pytest.param(Kind.DISTILL_PRIOR, True, marks=pytest.mark.campaign),
    ],
)
def test_a_distillation(pipe, folder, tmp_path_factory, tmp_path, kind, with_lora):
    """Samples are generated in few steps, and the result says how it is used."""
    steps = {"learning_rate": 3e-3, "ema_decay": 0.9}
    distillation = DistillationConfig(lora=with_lora, ema_target=True, num_inference_steps=2)
    options = {"validation_steps": 4, "validation_prompts": ("a red circle",), "precompute": True}
    config = config_of(folder, tmp_path, optimizer=steps, distillation=distillation, **options)
    run = Run(kind, config, pipe, quiet=True)
    [module], scheduler = run.task.modules.values(), pipe.scheduler
    before = {name: np.asarray(leaf) for name, leaf in flat_params(module).items()}
    result = run.train()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4
    assert np.all(np.isfinite(losses))
    assert (tmp_path / "samples" / "00000004.png").exists()
    assert pipe.scheduler is scheduler
    after = flat_params(module)
    assert all(np.array_equal(after[name], leaf) for name, leaf in before.items())
    assert_refused_before_it_encodes(kind, config, pipe, shutil.copytree(folder, tmp_path_factory.mktemp("d") / "d"))
    if with_lora:
        component = "prior." if kind == Kind.DISTILL_PRIOR else "unet."
        assert all(name.startswith(component) for name in load_file(result / lora.FILE))
        return
    stage = "Prior" if kind == Kind.DISTILL_PRIOR else ""
    saved = getattr(kandinsky_jax, f"KandinskyV22{stage}Pipeline").from_pretrained(result)
    recommended = {"num_inference_steps": 2, "guidance_scale": 1.0}
    if kind == Kind.DISTILL_PRIOR:
        recommended = {f"prior_{name}": value for name, value in recommended.items()}
    assert saved.recommended_settings.arguments() == recommended
    assert saved.recommended_settings.fast is None
    getattr(diffusers, f"KandinskyV22{stage}Pipeline").from_pretrained(result)


def test_pictures_without_captions(tmp_path):
    """Of every form of data; with captions needed each is reported."""
    wanted = [data for _, data in pictures(4)]
    (tmp_path / "first.png").write_bytes(wanted[0])
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "second.png").write_bytes(wanted[1])
    (tmp_path / "z" / "metadata.jsonl").write_text('{"file_name": "second.png"}\n')
    with tarfile.open(tmp_path / "third.tar", "w") as tar:
        member = tarfile.TarInfo("third.png")
        member.size = len(wanted[2])
        tar.addfile(member, io.BytesIO(wanted[2]))
    rows = pyarrow.Table.from_pylist([{"image": {"bytes": wanted[3], "path": None}}])
    pyarrow.parquet.write_table(rows, tmp_path / "fourth.parquet")
    found = listing(tmp_path, needs_captions=False)
    assert sorted(item.read() for item in found) == sorted(wanted)
    assert {item.text for item in found} == {""}
    assert not found.skipped.count
    with pytest.raises(DataError) as error:
        listing(tmp_path)
    assert len(error.value.faults) == 5  # second.png is not named by its metadata, and has no .txt


def test_settings_that_distillation_does_not_use(pipe, folder, tmp_path):
    given = {"condition_dropout": 0.1, "snr_gamma": 5.0, "distillation": DistillationConfig(ema_target=True)}
    with pytest.raises(ValueError, match=r"condition_dropout is of no use.*\n.*snr_gamma.*\n.*set optimizer.ema_decay"):
        Run(Kind.DISTILL_DECODER, config_of(folder, tmp_path, **given), pipe, quiet=True)
    with pytest.raises(
        ValueError, match=r"(?s)method='lcn'.*guidance_scale_max must be from guidance_scale.*huber_c must be"
    ):
        DistillationConfig(method="lcn", huber_c=0.0, guidance_scale_max=1.0)


@pytest.mark.parametrize("kind", [Kind.DECODER, Kind.DISTILL_DECODER])
def test_other_weights_have_no_fast_adapter(tmp_path, kind):
    """That of the model was made for its own weights; the model's other settings stay, and so does its adapter."""
    pipe = KandinskyV22CombinedPipeline.from_pretrained("tiny", dtype="float32")
    config = Config(model="tiny", data="", output="", distillation=DistillationConfig(lora=False))
    task = make_task(kind, config, pipe)
    task.export(tmp_path / "model", None, [])
    settings = KandinskyV22Pipeline.from_pretrained(tmp_path / "model").recommended_settings
    expected = {"guidance_scale": 2.0, "prior_guidance_scale": 1.0}
    if kind == Kind.DISTILL_DECODER:
        expected |= {"num_inference_steps": 4, "guidance_scale": 1.0}
    assert settings.arguments() == expected
    assert settings.scheduler == ("tcd" if kind == Kind.DISTILL_DECODER else None)
    assert settings.fast is None
    assert not list((tmp_path / "model").glob("*.safetensors"))
    pipe.decoder_pipe.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "fast_lora.safetensors").exists()
