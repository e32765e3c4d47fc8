"""Saving into existing folders, in shards and variants; and unsupported arguments."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import diffusers
import numpy as np
import pytest

from kandinsky_jax import CheckpointError, KandinskyV22Pipeline, PriorTransformer, load_network, save_network
from kandinsky_jax.checkpoint import WeightSelection, flat_params, hub
from kandinsky_jax.checkpoint.manifest import MANIFEST, verify
from tests.conftest import SHAPES_MODEL


@pytest.fixture(scope="module")
def prior():
    return load_network(PriorTransformer, SHAPES_MODEL / hub.PRIOR / "prior")


def weights(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "config.json")


def test_a_pipeline_is_saved_into_an_empty_folder_and_again(shapes_pipe, tmp_path):
    pipe, folder = shapes_pipe.decoder_pipe, tmp_path / "decoder"
    folder.mkdir()
    pipe.save_pretrained(folder)
    (folder / "README.md").write_text("mine")
    (folder / "samples").mkdir()
    (folder / "samples/a.png").write_bytes(b"picture")
    (folder / "unet/old.txt").write_text("of an older save")
    pipe.save_pretrained(folder, max_shard_size="1MB")
    assert (folder / "README.md").read_text() == "mine"
    assert (folder / "samples/a.png").read_bytes() == b"picture"
    assert not (folder / "unet/old.txt").exists()
    assert "diffusion_pytorch_model.safetensors.index.json" in weights(folder / "unet")
    assert "diffusion_pytorch_model.safetensors" not in weights(folder / "unet")
    extra = {report.path for report in verify(folder) if report.status == "extra"}
    assert extra == {"README.md", "samples/a.png"}
    with pytest.raises(FileExistsError, match="exists already"):
        pipe.save_pretrained(folder, overwrite=False)
    assert diffusers.KandinskyV22Pipeline.from_pretrained(folder)  # the shards too


def test_saving_into_the_working_directory(shapes_pipe, tmp_path, monkeypatch):
    """It is filled, not exchanged for another: a shell that stands there sees the files."""
    monkeypatch.chdir(tmp_path)
    there = os.open(".", os.O_RDONLY)
    (tmp_path / f".{tmp_path.name}.{'0' * 16}.partial").mkdir()  # of a run that was killed
    shapes_pipe.decoder_pipe.save_pretrained(".")
    assert "model_index.json" in os.listdir(there)
    os.close(there)
    shapes_pipe.decoder_pipe.save_pretrained(".")
    assert sorted(os.listdir(".")) == [MANIFEST, "model_index.json", "movq", "scheduler", "unet"]
    assert {report.status for report in verify(Path())} == {"ok"}


@contextlib.contextmanager
def permissions_count() -> Iterator[None]:
    """For root too, to whom the kernel gives every file: this thread goes without CAP_DAC_OVERRIDE meanwhile."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, of 32 capabilities and of 32 more
    assert libc.capget(header, sets) == 0
    effective = sets[0]
    sets[0] = effective & ~(1 << 1)
    assert libc.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = effective
        assert libc.capset(header, sets) == 0


def test_saving_into_an_empty_folder_whose_parent_cannot_be_written(shapes_pipe, tmp_path):
    folder = tmp_path / "shared/model"
    folder.mkdir(parents=True)
    folder.parent.chmod(0o555)
    with permissions_count():
        with pytest.raises(PermissionError):
            (folder.parent / "file").touch()
        shapes_pipe.decoder_pipe.save_pretrained(folder)
    assert {report.status for report in verify(folder)} == {"ok"}


def test_what_saving_would_lose_is_kept(shapes_pipe, tmp_path):
    pipe = shapes_pipe.decoder_pipe
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not a model"):
        pipe.save_pretrained(tmp_path / "notes")
    with pytest.raises(FileExistsError, match="is not a model"):
        pipe.save_pretrained(tmp_path / "notes/a.txt", overwrite=True)
    prior = tmp_path / "prior"
    prior.mkdir()
    (prior / "model_index.json").write_text('{"_class_name": "KandinskyV22PriorPipeline"}')
    with pytest.raises(FileExistsError, match=r"holds a KandinskyV22PriorPipeline; .*overwrite=True to replace it"):
        pipe.save_pretrained(prior)
    assert os.listdir(prior) == ["model_index.json"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"safe_serialization": False}, "leave safe_serialization=False out"),
        ({"push_to_hub": True}, "run `hf upload"),
        ({"repo_id": "a/b"}, "run `hf upload"),
        ({"stuff": 1}, "has no argument 'stuff'"),
        ({"variant": "a/b"}, "variant must be a name"),
        ({"layout": "flax"}, "layout='flax' is not supported"),
        ({"layout": "orbax", "variant": "fp16"}, "are for layout='diffusers'"),
    ],
    ids=str,
)
def test_what_saving_does_not_do(arguments, says, shapes_pipe, tmp_path):
    with pytest.raises((TypeError, ValueError), match=says):
        shapes_pipe.decoder_pipe.save_pretrained(tmp_path / "decoder", **arguments)
    assert not any(tmp_path.iterdir())
    shapes_pipe.decoder_pipe.save_config(tmp_path / "decoder", push_to_hub=False)
    assert hub.pipeline_class(tmp_path / "decoder") == "KandinskyV22Pipeline"


def test_diffusers_reads_a_variant_in_shards(prior, tmp_path):
    save_network(prior, tmp_path, variant="fp16", max_shard_size=200_000)
    assert "diffusion_pytorch_model.safetensors.index.fp16.json" in weights(tmp_path)
    theirs = diffusers.PriorTransformer.from_pretrained(tmp_path, variant="fp16").state_dict()
    ours = flat_params(load_network(PriorTransformer, tmp_path, selection=WeightSelection("fp16")))
    assert np.array_equal(ours["proj_in.bias"], theirs["proj_in.bias"].numpy())
    assert all(np.array_equal(ours[name], array) for name, array in flat_params(prior).items())


def test_stale_files_are_removed_by_a_new_save(prior, tmp_path):
    for arguments in (
        {"max_shard_size": "200KB"},
        {},
        {"layout": "orbax"},
        {"max_shard_size": "200KB"},
        {"max_shard_size": "500KB"},
        {"layout": "orbax"},
        {},
    ):
        save_network(prior, tmp_path, **arguments)
        loaded = flat_params(load_network(PriorTransformer, tmp_path))
        assert all(np.array_equal(loaded[name], array) for name, array in flat_params(prior).items())
    save_network(prior, tmp_path, variant="fp16")
    assert weights(tmp_path) == ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"]


def test_loading_needs_no_manifest(shapes_pipe, tmp_path):
    shapes_pipe.decoder_pipe.save_pretrained(tmp_path / "decoder")
    (tmp_path / "decoder" / MANIFEST).write_text("{")
    parts = {"unet": shapes_pipe.unet, "movq": shapes_pipe.movq}
    assert KandinskyV22Pipeline.from_pretrained(tmp_path / "decoder", **parts)
    with pytest.raises(CheckpointError, match=f"{MANIFEST} is not JSON"):
        verify(tmp_path / "decoder")
