"""The converter loses nothing between the layouts, and writes its target atomically."""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from kandinsky_jax import CheckpointError, ConfigError
from kandinsky_jax.checkpoint import flat_params, hub, load_network
from kandinsky_jax.checkpoint.conversion import convert
from kandinsky_jax.checkpoint.manifest import MANIFEST
from kandinsky_jax.checkpoint.tensor_files import ZERO_EMBED
from kandinsky_jax.common.storage import complete_or_absent
from kandinsky_jax.models import NETWORKS, UNet2DConditionModel
from tests.conftest import SHAPES_MODEL

COMMAND = [sys.executable, "-m", "convert_weights"]
SCRATCH = ".target.*.partial"  # a conversion's scratch folder
DECODER, PRIOR = SHAPES_MODEL / hub.DECODER, SHAPES_MODEL / hub.PRIOR


def files_of(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a model's networks in diffusers' layout, by component and name."""
    return {
        f"{file}:{name}": tensor
        for file, path in files_of(folder).items()
        if path.suffix == ".safetensors" and path.name != ZERO_EMBED
        for name, tensor in load_file(path).items()
    }


def assert_same_tensors(ours: dict[str, np.ndarray], expected: dict[str, np.ndarray], dtype=None) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        cast = tensor if dtype is None else tensor.astype(dtype)
        assert ours[name].dtype == cast.dtype, name
        assert ours[name].tobytes() == cast.tobytes(), name


def is_complete_orbax(folder: Path) -> bool:
    """Whether a folder is the small decoder, converted: its last component reads as the source does."""
    converted, source = (flat_params(load_network(UNet2DConditionModel, f / "unet")) for f in (folder, DECODER))
    return {"model_index.json", "movq/config.json"} <= files_of(folder).keys() and all(
        np.array_equal(np.asarray(converted[name]), np.asarray(source[name])) for name in source
    )


@pytest.fixture(scope="module")
def there(tmp_path_factory) -> Path:
    """Both repositories in our layout, by the names of the official ones."""
    folder = tmp_path_factory.mktemp("orbax")
    for source in (DECODER, PRIOR):
        convert(source, folder / source.name, progress=False)
    return folder


@pytest.fixture(scope="module")
def back(there, tmp_path_factory) -> Path:
    """... and converted back."""
    folder = tmp_path_factory.mktemp("diffusers")
    for source in (DECODER, PRIOR):
        convert(there / source.name, folder / source.name, progress=False)
    return folder


# The tensors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [DECODER, PRIOR], ids=lambda path: path.name)
def test_there_and_back_loses_nothing(source: Path, there, back):
    assert not tensors_of(there / source.name)
    assert files_of(back / source.name).keys() == files_of(source).keys() | {MANIFEST}
    assert_same_tensors(tensors_of(back / source.name), tensors_of(source))
    for name, path in files_of(source).items():
        if path.name not in ("config.json", "model.safetensors", "diffusion_pytorch_model.safetensors"):
            for converted in (there, back):
                assert (converted / source.name / name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("component", "cls"),
    [
        (f"{hub.DECODER}/unet", diffusers.UNet2DConditionModel),
        (f"{hub.DECODER}/movq", diffusers.VQModel),
        (f"{hub.PRIOR}/prior", diffusers.PriorTransformer),
        (f"{hub.PRIOR}/text_encoder", transformers.CLIPTextModelWithProjection),
        (f"{hub.PRIOR}/image_encoder", transformers.CLIPVisionModelWithProjection),
    ],
    ids=str,
)
def test_reference_reads_what_was_converted(component: str, cls, back):
    ours, original = (cls.from_pretrained(root / component, dtype=torch.float32) for root in (back, SHAPES_MODEL))
    states = ours.state_dict(), original.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    # What the configuration says and no tensor does: heads, activations, epsilons.
    configs = [dict(c if isinstance(c, dict) else c.to_dict()) for c in (ours.config, original.config)]
    without = NETWORKS[cls.__name__].CONFIG.IGNORED
    settings, expected = ({k: v for k, v in c.items() if k[0] != "_" and k not in without} for c in configs)
    assert settings == expected


def test_reference_reads_converted_pipelines(back):
    decoder = diffusers.KandinskyV22Pipeline.from_pretrained(back / hub.DECODER)
    assert type(decoder.scheduler).__name__ == "DDPMScheduler"
    prior = diffusers.KandinskyV22PriorPipeline.from_pretrained(back / hub.PRIOR)
    prompt = "a red circle on a blue background"
    original = transformers.CLIPTokenizer.from_pretrained(PRIOR / "tokenizer")
    assert prior.tokenizer(prompt).input_ids == original(prompt).input_ids
    assert len(set(original(prompt).input_ids)) > 5


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("layout", ["orbax", "diffusers"])
def test_dtype(layout: str, dtype, tmp_path):
    name = np.dtype(dtype).name
    convert(PRIOR, tmp_path / "cast", layout=layout, dtype=name, progress=False)
    if layout == "orbax":
        convert(tmp_path / "cast", tmp_path / "back", progress=False)
    assert_same_tensors(tensors_of(tmp_path / ("back" if layout == "orbax" else "cast")), tensors_of(PRIOR), dtype)


def test_code_and_pickles_stay_behind(tmp_path):
    source = Path(shutil.copytree(PRIOR, tmp_path / "source"))
    for name in ("README.md", "custom.py", "text_encoder/pytorch_model.bin", "tokenizer/custom.py"):
        (source / name).write_text("x")
    convert(source, tmp_path / "target", progress=False)
    new = {name for name in files_of(tmp_path / "target") if "params/" not in name} - files_of(PRIOR).keys()
    assert new == {"README.md", "kandinsky_jax_manifest.json"}


def test_decoders_of_a_family_take_along_the_movq_they_share(tmp_path):
    target = convert(SHAPES_MODEL / hub.CONTROLNET, tmp_path / "controlnet", layout="diffusers", progress=False)
    expected = {k: v for k, v in tensors_of(DECODER).items() if k.startswith("movq/")}
    assert_same_tensors({k: v for k, v in tensors_of(target).items() if k.startswith("movq/")}, expected)


# Errors ------------------------------------------------------------------------------------------------------------


def run_in_place(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """`python -m convert_weights` without a new process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["convert_weights", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("convert_weights", run_name="__main__")
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def spoiled(tmp_path: Path) -> Path:
    source = Path(shutil.copytree(DECODER, tmp_path / "spoiled"))
    [path] = (source / "unet").glob("*.safetensors")
    tensors = load_file(path)
    tensors["conv_in.bias"] = np.full_like(tensors["conv_in.bias"], np.nan)
    del tensors["conv_out.bias"]
    save_file(tensors, path)
    return source


@pytest.mark.parametrize(
    ("source", "options", "messages"),
    [
        (lambda tmp: tmp / "nothing", [], ["is not a folder here, no embedded model (tiny)"]),
        (lambda tmp: tmp, [], ["has no model_index.json"]),
        (lambda tmp: "no-owner/no-repository", [], ["no-owner/no-repository is not in the Hub's cache"]),
        (lambda tmp: "tiny/kandinsky-3", [], ["tiny has kandinsky-2-2-prior"]),
        (lambda tmp: "tiny", ["--dtype", "int8"], ["--dtype=int8 is not supported, only float32"]),
        (lambda tmp: "tiny", ["--layout", "onnx"], ["--layout=onnx is not supported, only orbax"]),
        (spoiled, [], ["2 tensors differ", "missing: conv_out.bias", "not finite as float16: conv_in.bias"]),
    ],
    ids=["no folder", "no model", "no repository", "no embedded model", "dtype", "layout", "tensors"],
)
def test_bad_source_is_one_error(source, options, messages, tmp_path, monkeypatch, capsys):
    target = tmp_path / "target"
    code, out, err = run_in_place(monkeypatch, capsys, source(tmp_path), target, *options)
    assert (code, out) == (1, "")
    *_, last = err.split("\r")[-1].partition("error: ")
    for message in messages:
        assert message in last
    assert "Traceback" not in err
    assert not target.exists()
    assert not list(tmp_path.glob(".*"))


def test_command(tmp_path, monkeypatch, capsys):
    command = [*COMMAND, "tiny/kandinsky-2-2-prior", "target"]
    first = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert (first.returncode, first.stdout) == (0, "wrote target\n"), first.stderr
    before = files_of(tmp_path / "target")
    assert "prior/params/_METADATA" in before
    monkeypatch.chdir(tmp_path)
    code, out, err = run_in_place(monkeypatch, capsys, "tiny/kandinsky-2-2-prior", "target")
    assert (code, out) == (1, "")
    assert (
        err == f"error: {tmp_path / 'target'} exists already; choose another folder, or overwrite=True (--overwrite)\n"
    )
    assert files_of(tmp_path / "target") == before
    code, out, _ = run_in_place(monkeypatch, capsys, DECODER, "target", "--overwrite", "--layout", "diffusers")
    assert (code, out) == (0, "wrote target\n")
    assert_same_tensors(tensors_of(tmp_path / "target"), tensors_of(DECODER))
    assert os.listdir(tmp_path) == ["target"]


# Kills and full disks ----------------------------------------------------------------------------------------------


def run_until(pattern: str, target: Path, *options: str) -> int:
    """Kill a conversion when its scratch folder has a file of this pattern; returns the exit code."""
    with subprocess.Popen(
        [*COMMAND, str(DECODER), str(target), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as run:
        deadline = time.monotonic() + 120
        while run.poll() is None and time.monotonic() < deadline:
            if any(target.parent.glob(f"{SCRATCH}/{pattern}")):
                break
            time.sleep(0.001)
        run.send_signal(signal.SIGKILL)
    return run.returncode


@pytest.mark.parametrize(
    ("pattern", "overwrite"),
    [("movq/params*/*", True), ("*", False), ("unet/config.json", False), ("unet/config.json", True)],
)
@pytest.mark.slow
def test_killed_conversion_leaves_nothing_half_done(pattern: str, overwrite: bool, tmp_path):
    target = tmp_path / "target"
    if overwrite:
        target.mkdir()
        (target / "model_index.json").touch()
        (target / "old").touch()
    options = ["--overwrite"] if overwrite else []
    assert run_until(pattern, target, *options) == -signal.SIGKILL
    assert len(list(tmp_path.glob(SCRATCH))) == 1
    if overwrite:
        assert {path.name for path in target.iterdir()} == {"old", "model_index.json"}
    else:
        assert not target.exists()
    convert(DECODER, target, overwrite=overwrite, progress=False)
    assert is_complete_orbax(target)
    assert os.listdir(tmp_path) == ["target"]


def test_kill_between_the_two_renames_of_overwriting(tmp_path):
    # The state that it leaves: the old folder put aside, the new one not yet in its place.
    for name in (".target.old", ".target.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / ".target.old/old").touch()
    with pytest.raises(FileExistsError, match="target exists already"):
        convert(PRIOR, tmp_path / "target", progress=False)
    assert (tmp_path / "target/old").exists()
    with complete_or_absent(tmp_path / "target", overwrite=True) as scratch:
        (scratch / "new").touch()
    assert os.listdir(tmp_path) == ["target"]
    assert os.listdir(tmp_path / "target") == ["new"]


def test_kill_before_the_replaced_folder_is_removed(tmp_path):
    for name in (".target.old", "target"):
        (tmp_path / name).mkdir()
    with complete_or_absent(tmp_path / "target", overwrite=True) as scratch:
        (scratch / "new").touch()
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failure_in_the_middle_leaves_nothing(error, overwrite: bool, tmp_path):
    if overwrite:
        (tmp_path / "target").mkdir()
    with contextlib.suppress(error), complete_or_absent(tmp_path / "target", overwrite=overwrite) as scratch:
        (scratch / "sub").mkdir()
        raise error
    assert os.listdir(tmp_path) == ["target"] * overwrite


def test_targets_that_are_no_plain_new_name(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "file").touch()
    for target in (tmp_path / "link", tmp_path / "file", Path(".")):
        monkeypatch.chdir(tmp_path / "real")
        with complete_or_absent(target, overwrite=True) as scratch:
            (scratch / "new").write_text(str(target))
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "real"]
    assert (tmp_path / "link/new").read_text() == "."
    assert (tmp_path / "file/new").exists()
    with complete_or_absent(tmp_path / "a/b/c") as scratch:
        (scratch / "new").touch()
    assert (tmp_path / "a/b/c/new").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_too_little_room_is_found_before_anything_is_written(overwrite: bool, tmp_path):
    if overwrite:
        (tmp_path / "target").mkdir()
    needed = shutil.disk_usage(tmp_path).free + 10**12
    with (
        pytest.raises(OSError, match=r"has [\d,]+ bytes free, target needs about [\d,]+$"),
        complete_or_absent(tmp_path / "target", needed, overwrite),
    ):
        raise AssertionError("not reached")
    assert os.listdir(tmp_path) == ["target"] * overwrite


@pytest.mark.parametrize(
    ("layout", "most", "component"),
    [("orbax", 30_000, "movq"), ("orbax", 2_000, "movq"), ("diffusers", 2_500_000, "unet")],
)
@pytest.mark.slow
def test_disk_that_is_full_in_the_middle(layout: str, most: int, component: str, tmp_path):
    # A file that may not grow further fails as one on a full disk does.
    limited = (
        f"import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, ({most}, {most}))\n"
        "runpy.run_module('convert_weights', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", limited, str(DECODER), str(tmp_path / "target"), "--layout", layout]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    errors = [line for line in run.stderr.splitlines() if line and "B/s" not in line]  # the others are the progress bar
    assert len(errors) == 1, run.stderr
    assert re.match(rf"error: {tmp_path}/\.target\.[0-9a-f]{{16}}\.partial/{component}/", errors[0])
    assert "could not be written" in errors[0]
    assert "File too large" in errors[0]
    assert os.listdir(tmp_path) == []


def test_one_conversion_needs_room_for_the_dtype_it_writes(tmp_path):
    from kandinsky_jax.checkpoint.conversion import _target_bytes

    for name, path in (("VQModel", "movq"), ("UNet2DConditionModel", "unet")):
        stored = sum(tensor.nbytes for tensor in tensors_of(DECODER / path).values())
        assert _target_bytes(NETWORKS[name], DECODER / path, stored, None) == stored
        assert _target_bytes(NETWORKS[name], DECODER / path, stored, "float32") == 2 * stored


def test_source_that_turns_bad_late_leaves_nothing(tmp_path):
    source = Path(shutil.copytree(DECODER, tmp_path / "source"))
    config = source / "unet/config.json"
    config.write_text(config.read_text().replace('"positional"', '"fourier"'))
    with pytest.raises(ConfigError, match="time_embedding_type='fourier'"):
        convert(source, tmp_path / "target", progress=False)
    shutil.rmtree(source / "unet")
    with pytest.raises(CheckpointError, match="has no folder unet"):
        convert(source, tmp_path / "target", progress=False)
    assert os.listdir(tmp_path) == ["source"]


def test_overwriting_spares_what_is_no_model(tmp_path):
    (tmp_path / "diary.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="not a model"):
        convert(DECODER, tmp_path, overwrite=True)
    assert (tmp_path / "diary.txt").read_text() == "dear"
