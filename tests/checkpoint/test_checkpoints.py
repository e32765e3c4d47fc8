"""Valid checkpoints load; invalid ones raise one error that lists all faults."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch

from kandinsky_jax import (
    CheckpointError,
    ConfigError,
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    SchedulerError,
    load_network,
    save_network,
)
from kandinsky_jax.checkpoint import flat_params, hub
from kandinsky_jax.models import CLIPTextModelWithProjection, CLIPVisionModelWithProjection, VQModel
from tests.conftest import SHAPES_MODEL, quick_and_slow

TEXT_ENCODER = SHAPES_MODEL / hub.PRIOR / "text_encoder"  # the smallest network
WEIGHTS = "model.safetensors"


def same_params(one, other) -> bool:
    """Same names, dtypes and bits."""
    one, other = flat_params(one), flat_params(other)
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and np.array_equal(np.asarray(one[name]), np.asarray(other[name]))
        for name in one
    )


@pytest.fixture(scope="module")
def text_encoder():
    return load_network(CLIPTextModelWithProjection, TEXT_ENCODER)


@pytest.fixture(scope="module")
def orbax(text_encoder, tmp_path_factory) -> Path:
    """The text encoder in our layout."""
    folder = tmp_path_factory.mktemp("orbax") / "text_encoder"
    save_network(text_encoder, folder, "orbax")
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the text encoder, in diffusers' layout, to spoil."""
    return Path(shutil.copytree(TEXT_ENCODER, tmp_path / "text_encoder"))


def load_text_encoder(folder: Path, dtype: Any = None):
    return load_network(CLIPTextModelWithProjection, folder, dtype)


def edit_json(path: Path, edit: Callable[[dict], object]) -> None:
    parsed = json.loads(path.read_text())
    edit(parsed)
    path.write_text(json.dumps(parsed))


# model_index.json --------------------------------------------------------------------------------------------------


def in_index(**entries: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "model_index.json", lambda index: index.update(entries))


BAD_MODELS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no index": (lambda f: (f / "model_index.json").unlink(), ["has no model_index.json"]),
    "no JSON": (lambda f: (f / "model_index.json").write_text('{"_class_name":'), ["model_index.json is not JSON"]),
    "no text": (lambda f: (f / "model_index.json").write_bytes(b"\xff\xfe{}"), ["model_index.json is not JSON"]),
    "a list": (lambda f: (f / "model_index.json").write_text("[]"), ["model_index.json holds list"]),
    "no class": (lambda f: (f / "model_index.json").write_text("{}"), ["holds a None, which"]),
    "another pipeline": (
        in_index(_class_name="KandinskyV22PriorPipeline"),
        ["KandinskyV22Pipeline cannot use", "load it with KandinskyV22PriorPipeline"],
    ),
    "another network": (
        in_index(unet=["diffusers", "UNet2DModel"]),
        ["unet is a UNet2DModel, supported: UNet2DConditionModel"],
    ),
    "several wrong classes": (
        in_index(
            unet=["diffusers", "UNet2DModel"], scheduler=["diffusers", "DPMSolverSDEScheduler"], movq=[None, None]
        ),
        ["unet is a UNet2DModel", "scheduler is a DPMSolverSDEScheduler, did you mean SASolver", "movq is missing"],
    ),
    "no component": (
        lambda f: edit_json(f / "model_index.json", lambda index: index.pop("movq")),
        ["movq is missing"],
    ),
    "a component outside": (
        in_index(**{"../unet": ["diffusers", "UNet2DConditionModel"]}),
        ["'../unet' is not a name"],
    ),
    "an absolute component": (in_index(**{"/unet": ["diffusers", "UNet2DConditionModel"]}), ["'/unet' is not a name"]),
    "a component without class": (in_index(unet="UNet2DConditionModel"), ["unet should be [library, class]"]),
    "no folder": (lambda f: shutil.rmtree(f / "unet"), ["has no folder unet"]),
    "no tensors": (lambda f: None, ["has no tensors"]),
    "no config": (lambda f: (f / "unet/config.json").unlink(), ["unet/config.json is missing"]),
    "config is no JSON": (lambda f: (f / "unet/config.json").write_text("{"), ["unet/config.json is not JSON"]),
    "no scheduler's config": (
        lambda f: (f / "scheduler/scheduler_config.json").unlink(),
        ["scheduler_config.json is missing"],
    ),
    "another scheduler": (
        lambda f: (f / "scheduler/scheduler_config.json").write_text('{"_class_name": "DPMSolverSDEScheduler"}'),
        ["names the scheduler 'DPMSolverSDEScheduler', which is not supported; did you mean", "DPMSolver"],
    ),
}


@pytest.mark.parametrize("fault", BAD_MODELS)
def test_bad_model_gives_one_error(fault: str, tmp_path):
    spoil, messages = BAD_MODELS[fault]
    without_tensors = shutil.ignore_patterns("*.safetensors")  # the error comes before any is read
    folder = Path(shutil.copytree(SHAPES_MODEL / hub.DECODER, tmp_path / "model", ignore=without_tensors))
    spoil(folder)
    with pytest.raises((CheckpointError, SchedulerError)) as raised:
        KandinskyV22Pipeline.from_pretrained(folder)
    for message in [*messages, str(folder)]:
        assert message in str(raised.value)


def test_decoder_in_place_of_the_prior_is_an_error():
    with pytest.raises(CheckpointError, match="holds a KandinskyV22Pipeline, which KandinskyV22PriorPipeline cannot"):
        KandinskyV22CombinedPipeline.from_pretrained(SHAPES_MODEL, prior=SHAPES_MODEL / hub.DECODER)


# Tensors -----------------------------------------------------------------------------------------------------------


def write_tensors(folder: Path, tensors: dict[str, np.ndarray], layout: str) -> None:
    if layout == "orbax":
        shutil.rmtree(folder / "params", ignore_errors=True)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / "params", tensors)
    else:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture(params=["diffusers", "orbax"])
def spoilable(request, tmp_path, orbax) -> tuple[Path, dict[str, np.ndarray], str]:
    """(a component's folder, its tensors, its layout)."""
    source = orbax if request.param == "orbax" else TEXT_ENCODER
    folder = Path(shutil.copytree(source, tmp_path / "text_encoder"))
    if request.param == "orbax":
        tensors = {name: np.array(a) for name, a in flat_params(load_text_encoder(orbax)).items()}
    else:
        tensors = load_file(folder / WEIGHTS)
    return folder, tensors, request.param


def test_all_faults_of_the_tensors_are_in_one_error(spoilable, capfd):
    folder, tensors, layout = spoilable
    names = sorted(tensors)
    missing, misshaped, not_finite = names[:2], names[2:4], names[4:6]
    for name in missing:
        del tensors[name]
    for name in misshaped:
        tensors[name] = np.concatenate([tensors[name]] * 2)
    for name, bad in zip(not_finite, (np.nan, -np.inf), strict=True):
        tensors[name] = tensors[name].copy()
        tensors[name].flat[-2:] = bad
    tensors["extra.weight"] = np.zeros((2, 3), np.float16)
    write_tensors(folder, tensors, layout)
    capfd.readouterr()
    with pytest.raises(CheckpointError) as raised:
        load_text_encoder(folder)
    message = str(raised.value)
    assert len(message) < 500
    assert f"{folder} is not what its config.json describes, 7 tensors differ: " in message
    for kind, name in {
        "missing": missing[0],
        "unexpected": "extra.weight",
        "shape": misshaped[0],
        "not finite as float16": not_finite[0],
    }.items():
        assert f"{kind}: {name[:20]}" in message  # and as much of the rest as fits
    assert capfd.readouterr().err == ""


def test_numbers_too_large_for_the_dtype_asked_for(spoilable):
    folder, tensors, layout = spoilable
    name = min(tensors)
    tensors = {n: t.astype(np.float32) for n, t in tensors.items()}
    tensors[name].flat[0] = 1e6
    write_tensors(folder, tensors, layout)
    loaded = flat_params(load_text_encoder(folder, "float32")).values()
    assert max(float(array.max()) for array in loaded) == 1e6
    with pytest.raises(CheckpointError, match=f"not finite as float16: {name} in 1 of"):
        load_text_encoder(folder, "float16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 32}, r"shape: text_model\.[\w.]+ is \[.*64\], config.json asks for \[.*32\]"),
        ({"num_hidden_layers": 4}, r"missing: text_model\.encoder\.layers\.3\."),
        ({"num_hidden_layers": 2}, r"unexpected: text_model\.encoder\.layers\.2\."),
    ],
    ids=str,
)
def test_config_that_contradicts_its_tensors(spoilable, change: dict, message: str):
    folder, _, _ = spoilable
    edit_json(folder / "config.json", lambda config: config.update(change))
    with pytest.raises(CheckpointError, match=message):
        load_text_encoder(folder)


# Damaged files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 5, 300, 0.5, -1])
def test_truncated_safetensors(folder: Path, keep: float):
    size = (folder / WEIGHTS).stat().st_size
    os.truncate(folder / WEIGHTS, int(size * keep) if isinstance(keep, float) else keep % size)
    with pytest.raises(CheckpointError, match="is truncated or no safetensors file"):
        load_text_encoder(folder)


def test_git_lfs_pointer_in_place_of_the_tensors(folder: Path):
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 340000\n")
    with pytest.raises(CheckpointError, match=r"model.safetensors \(\d+ bytes\) is truncated or no safetensors file"):
        load_text_encoder(folder)


def orbax_files(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "params").rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", quick_and_slow(("delete", "cut", "empty"), "cut"))
def test_damaged_orbax_checkpoint_is_refused_or_read_right(damage: str, text_encoder, orbax, tmp_path, capfd):
    def spoil(folder: Path, files: list[str]) -> Path:
        shutil.copytree(orbax, folder)
        for path in (folder / "params" / file for file in files):
            if damage == "delete":
                path.unlink()
            else:
                os.truncate(path, path.stat().st_size // 2 if damage == "cut" else 0)
        return folder

    files = [path.relative_to(orbax / "params").as_posix() for path in orbax_files(orbax)]
    refused: dict[str, str] = {}
    for i, file in enumerate(files):
        folder = spoil(tmp_path / str(i), [file])
        try:
            # Orbax leaves files behind that it never reads again, so that some damage does no harm.
            assert same_params(load_text_encoder(folder), text_encoder), file
        except CheckpointError as error:
            refused[file] = str(error)
    assert all(str(tmp_path) in message for message in refused.values())
    assert {"_METADATA", "manifest.ocdbt"} <= refused.keys()
    # All files of numbers at once: the error counts those that were refused one by one, and names the first.
    numbers = [file for file in files if file.startswith("ocdbt.process_0/d/")]
    wrong = sorted(file for file in numbers if file in refused)
    folder = spoil(tmp_path / "all", numbers)
    with pytest.raises(CheckpointError, match=f"{len(wrong)} of its files are missing or cut short: {wrong[0]}: "):
        load_text_encoder(folder)
    assert "Traceback" not in capfd.readouterr().err


def test_overwritten_orbax_checkpoint(orbax, tmp_path, capfd):
    folder = Path(shutil.copytree(orbax, tmp_path / "copy"))
    for file in (folder / "params").glob("ocdbt.process_0/d/*"):
        file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(CheckpointError, match="params is damaged") as raised:
        load_text_encoder(folder)
    assert len(str(raised.value).splitlines()) == 1
    assert "Traceback" not in capfd.readouterr().err


def test_params_that_are_no_checkpoint(folder: Path):
    (folder / "params").mkdir()
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="params/_METADATA is missing"):
        load_text_encoder(folder)


def test_both_layouts_hold_the_same(text_encoder, orbax, tmp_path):
    assert same_params(load_text_encoder(orbax), text_encoder)
    save_network(text_encoder, tmp_path, "diffusers")
    assert same_params(load_text_encoder(tmp_path), text_encoder)
    for folder in (orbax, tmp_path):
        for dtype in (np.float32, ml_dtypes.bfloat16):
            loaded = flat_params(load_text_encoder(folder, dtype))
            for name, array in flat_params(text_encoder).items():
                assert loaded[name].dtype == dtype
                assert np.array_equal(np.asarray(loaded[name]), np.asarray(array).astype(dtype))


# Shards ------------------------------------------------------------------------------------------------------------


def shard(folder: Path) -> Path:
    """Replace the file of tensors by two shards and an index, which is returned."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return index


def test_sharded_safetensors(folder: Path, text_encoder):
    index = shard(folder)
    assert same_params(load_text_encoder(folder), text_encoder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"model-00002-of-00002.safetensors is named by the index .* but is not",
    ):
        load_text_encoder(folder)
    edit_json(index, lambda i: i.update(weight_map={"a": "model-00001-of-00002.safetensors"}))
    with pytest.raises(CheckpointError, match="missing: ") as raised:
        load_text_encoder(folder)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors", "a/model.safetensors", "..", "", 3])
def test_shard_outside_the_folder_is_refused(folder: Path, name: Any):
    save_file({"a": np.zeros(1, np.float32)}, folder.parent / "model.safetensors")
    edit_json(shard(folder), lambda index: index["weight_map"].update(a=name))
    with pytest.raises(CheckpointError, match="names a shard outside its folder"):
        load_text_encoder(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": ["a"]}'])
def test_damaged_index_of_shards(folder: Path, text: str):
    shard(folder).write_text(text)
    with pytest.raises(CheckpointError, match=r"model.safetensors.index.json is not an index of safetensors files"):
        load_text_encoder(folder)


# Pickles -----------------------------------------------------------------------------------------------------------


def to_pickle(folder: Path, write: Callable[[Path], object]) -> Path:
    """Replace the tensors by a pickle."""
    (folder / WEIGHTS).unlink()
    write(folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["zip", "legacy", "parameters"])
def test_pickle_of_tensors(folder: Path, text_encoder, dtype: torch.dtype, form: str):
    state = {name: tensor.to(dtype) for name, tensor in load_torch(folder / WEIGHTS).items()}
    if form == "parameters":
        state = {name: torch.nn.Parameter(tensor) for name, tensor in state.items()}
    to_pickle(folder, lambda path: torch.save(state, path, _use_new_zipfile_serialization=form != "legacy"))
    loaded = flat_params(load_text_encoder(folder))
    expected = np.dtype(str(dtype).removeprefix("torch."))
    for name, array in flat_params(text_encoder).items():
        assert loaded[name].dtype == expected
        assert np.array_equal(np.asarray(loaded[name]), np.asarray(array).astype(expected))


def test_safetensors_go_before_pickles(folder: Path, text_encoder):
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    assert same_params(load_text_encoder(folder), text_encoder)


class Trap:
    """A pickle of it creates a file when it is read without care."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("save", [torch.save, lambda state, path: path.write_bytes(pickle.dumps(state))])
def test_pickle_with_code_is_refused(folder: Path, tmp_path, save: Callable):
    marker = tmp_path / "ran"
    tensors = load_torch(folder / WEIGHTS)
    path = to_pickle(folder, lambda path: save({**tensors, "x": Trap(marker)}, path))
    with pytest.raises(CheckpointError, match="refused because reading it could run code"):
        load_text_encoder(folder)
    assert not marker.exists()
    # ... and the trap would have sprung.
    if save is torch.save:
        torch.load(path, weights_only=False)["x"].close()
    else:
        pickle.loads(path.read_bytes())["x"].close()
    assert marker.exists()


@pytest.mark.parametrize(
    "content",
    [{"state_dict": {"a": torch.zeros(1)}}, [torch.zeros(1)], {"a": torch.zeros(1), "epoch": 3}, torch.zeros(1)],
    ids=["nested", "list", "number", "tensor"],
)
def test_pickle_of_other_things(folder: Path, content: Any):
    to_pickle(folder, lambda path: torch.save(content, path))
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin holds something else than a dictionary of tensors"):
        load_text_encoder(folder)


@pytest.mark.parametrize("keep", [0, 100, 0.5, -1])
def test_truncated_pickle(folder: Path, keep: float):
    state = load_torch(folder / WEIGHTS)
    path = to_pickle(folder, lambda path: torch.save(state, path))
    size = path.stat().st_size
    os.truncate(path, int(size * keep) if isinstance(keep, float) else keep % size)
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is damaged"):
        load_text_encoder(folder)


def test_pickle_where_torch_is_not_installed(folder: Path):
    state = load_torch(folder / WEIGHTS)
    to_pickle(folder, lambda path: torch.save(state, path))
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from kandinsky_jax import CheckpointError, CLIPTextModelWithProjection, load_network\n"
        "try: load_network(CLIPTextModelWithProjection, sys.argv[1])\n"
        "except CheckpointError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "pytorch_model.bin is a PyTorch pickle" in run.stdout
    assert "Install torch" in run.stdout


# Old files ---------------------------------------------------------------------------------------------------------


def test_old_names_of_attention(tmp_path):
    source = SHAPES_MODEL / hub.DECODER / "movq"
    folder = Path(shutil.copytree(source, tmp_path / "movq"))
    [path] = folder.glob("*.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed, count = {}, 0
    for name, tensor in load_file(path).items():
        for new_part, old_part in old.items():
            count += f".{new_part}." in name
            name = name.replace(f".{new_part}.", f".{old_part}.")
        renamed[name] = tensor
    assert count >= 16  # two attentions in the mid blocks, and those of the outer blocks
    save_file(renamed, path)
    assert same_params(load_network(VQModel, folder), load_network(VQModel, source))


@pytest.mark.parametrize(
    ("cls", "component", "name"),
    [
        (CLIPTextModelWithProjection, "text_encoder", "text_model.embeddings.position_ids"),
        (CLIPVisionModelWithProjection, "image_encoder", "vision_model.embeddings.position_ids"),
    ],
)
def test_saved_position_ids_are_left_out(cls, component: str, name: str, tmp_path):
    source = SHAPES_MODEL / hub.PRIOR / component
    folder = Path(shutil.copytree(source, tmp_path / component))
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, name: np.arange(77)[None]}, folder / WEIGHTS)
    assert same_params(load_network(cls, folder), load_network(cls, source))


def test_unsupported_config_names_its_file(folder: Path):
    edit_json(folder / "config.json", lambda config: config.update(new_field=1, hidden_act="tanh"))
    with pytest.raises(ConfigError, match=f"^{folder}/config.json .*new_field=1 is a field this version does not know"):
        load_text_encoder(folder)
    edit_json(folder / "config.json", lambda config: config.update(new_field=None))
    with pytest.raises(ConfigError, match="built here: hidden_act='tanh' is not supported"):
        load_text_encoder(folder)
