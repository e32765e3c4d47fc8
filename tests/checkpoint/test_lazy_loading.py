"""The vision tower is loaded on first use of a picture; its embedding of zeros is known without it."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save, save_file

from kandinsky_jax import (
    CheckpointError,
    ConfigError,
    KandinskyV22CombinedPipeline,
    KandinskyV22Img2ImgCombinedPipeline,
    KandinskyV22PriorEmb2EmbPipeline,
    KandinskyV22PriorPipeline,
    checkpoint,
    load_network,
)
from kandinsky_jax.checkpoint import fingerprint, hub, networks, tensor_files, zero_embed
from kandinsky_jax.checkpoint.conversion import convert
from kandinsky_jax.models import CLIPTextModelWithProjection, CLIPVisionModelWithProjection
from tests.conftest import SHAPES_MODEL, worst

TOWER = SHAPES_MODEL / hub.PRIOR / "image_encoder"
SHORT = {"num_inference_steps": 4, "generator": 0, "output_type": "np"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A user's cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/kandinsky_jax/zero_embed"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the small prior, to spoil."""
    return Path(shutil.copytree(SHAPES_MODEL / hub.PRIOR, tmp_path / "prior"))


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    """The reference's embedding of zeros, `[1, D]`."""
    tower = transformers.CLIPVisionModelWithProjection.from_pretrained(TOWER, dtype=torch.float32)
    side = tower.config.image_size
    with torch.no_grad():
        return tower(torch.zeros(1, 3, side, side)).image_embeds.numpy()


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The folders of the networks that are loaded, and the tensors that are read one by one."""
    seen: list[str] = []
    load, read = checkpoint.load_network, checkpoint.read_params
    monkeypatch.setattr(networks, "load_network", lambda c, f, *a, **k: (seen.append(str(f)), load(c, f, *a, **k))[1])
    monkeypatch.setattr(zero_embed, "read_params", lambda f, n, *s: (seen.extend(n := list(n)), read(f, n, *s))[1])
    return seen


def load_prior(folder: Path = SHAPES_MODEL / hub.PRIOR, **arguments) -> KandinskyV22PriorPipeline:
    pipe = KandinskyV22PriorPipeline.from_pretrained(folder, **{"dtype": "float32"} | arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def config():
    return checkpoint.check_network(CLIPVisionModelWithProjection, TOWER)


# The tower ---------------------------------------------------------------------------------------------------------


def test_a_prompt_does_not_read_the_tower(shapes_pipe, reads):
    pipe = load_prior()
    generated = pipe("a red circle", **SHORT)
    again = KandinskyV22CombinedPipeline.from_pretrained(SHAPES_MODEL, dtype="float32", movq=shapes_pipe.movq)
    shared = KandinskyV22Img2ImgCombinedPipeline.from_pipe(again, pipe)
    emb2emb = KandinskyV22PriorEmb2EmbPipeline.from_pipe(shared)
    emb2emb("a red circle", generated.image_embeds, strength=0.9, **SHORT)  # a ready embedding is not a picture
    with pytest.raises(ValueError, match="has 2 pictures"):
        pipe.interpolate([np.zeros((2, 8, 8, 3), np.uint8)], [1.0])  # nor is the tower read for an error
    assert not pipe._held()["image_encoder"].loaded
    assert not reads  # the embedding of zeros lies beside it

    picture = np.random.default_rng(0).random((40, 50, 3))
    emb2emb("a red circle", picture, strength=0.9, **SHORT)
    assert shared.prior_image_encoder is emb2emb.image_encoder is pipe.image_encoder
    assert isinstance(pipe.image_encoder, CLIPVisionModelWithProjection)
    assert pipe.components["image_encoder"] is pipe.image_encoder
    assert reads.count(str(TOWER)) == 1  # for all that share it


def test_the_loaded_tower_is_the_same(shapes_pipe):
    params = checkpoint.flat_params(shapes_pipe.prior_image_encoder)
    direct = checkpoint.flat_params(load_network(CLIPVisionModelWithProjection, TOWER, "float32"))
    assert params.keys() == direct.keys()
    assert all(params[name].dtype == np.float32 and np.array_equal(params[name], direct[name]) for name in direct)


def test_a_tower_that_is_first_used_in_a_traced_function_is_loaded_for_good():
    tower = networks.LazyNetwork(CLIPVisionModelWithProjection, TOWER)
    side = tower.config.image_size
    jax.jit(lambda x: tower.load()(x))(jnp.zeros((1, side, side, 3)))
    leaf = tower.load().visual_projection.weight[...]
    assert np.isfinite(np.asarray(leaf)).all()


def test_another_tower_may_be_put_in_its_place(shapes_pipe):
    pipe = KandinskyV22PriorPipeline.from_pipe(shapes_pipe)
    own, other = pipe._zero_embed(), load_network(CLIPVisionModelWithProjection, TOWER, "float32")
    other.visual_projection.weight[...] = -other.visual_projection.weight[...]
    pipe.image_encoder = other
    assert pipe.image_encoder is other
    assert worst(pipe._zero_embed(), -own) <= 1e-5
    assert shapes_pipe.prior_image_encoder is not other
    text = checkpoint.LazyNetwork(CLIPTextModelWithProjection, SHAPES_MODEL / hub.PRIOR / "text_encoder")
    with pytest.raises(TypeError, match="must be a CLIPVisionModelWithProjection of kandinsky_jax, got CLIPText"):
        KandinskyV22PriorPipeline.from_pipe(pipe, image_encoder=text)


def edit_config(folder: Path, **changes) -> None:
    path = folder / "image_encoder/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


FAULTS = {
    "no folder": (lambda f: shutil.rmtree(f / "image_encoder"), "has no folder image_encoder"),
    "no tensors": (lambda f: (f / "image_encoder/model.safetensors").unlink(), "has no tensors"),
    "no config": (lambda f: (f / "image_encoder/config.json").unlink(), "config.json is missing"),
    "cut short": (lambda f: os.truncate(f / "image_encoder/model.safetensors", 500_000), "is truncated"),
    "unknown": (lambda f: edit_config(f, hidden_act="tanh"), "hidden_act='tanh' is not supported"),
    "other shapes": (lambda f: edit_config(f, projection_dim=32), r"visual_projection.weight is \[64, .*asks for \[32"),
    "more layers": (lambda f: edit_config(f, num_hidden_layers=9), r"missing: vision_model.encoder.layers"),
}


# Damaged files of Orbax are in test_checkpoints.py.
@pytest.mark.parametrize(
    ("layout", "fault"),
    [("diffusers", fault) for fault in FAULTS]
    + [("orbax", fault) for fault in FAULTS if fault not in ("no tensors", "cut short")],
)
def test_a_bad_tower_is_reported_when_the_pipeline_is_loaded(folder, shapes_pipe, fault, layout, tmp_path):
    spoil, says = FAULTS[fault]
    if layout == "orbax":
        shutil.rmtree(folder / "image_encoder")
        tower = shapes_pipe.prior_image_encoder
        checkpoint.save_network(tower, folder / "image_encoder", "orbax")
    spoil(folder)
    ready = {k: v for k, v in shapes_pipe.prior_pipe._held().items() if k != "image_encoder"}
    with pytest.raises((CheckpointError, ConfigError), match=says):
        KandinskyV22PriorPipeline.from_pretrained(folder, **ready)


def test_values_that_are_not_finite_are_reported_when_the_pipeline_is_loaded(folder, shapes_pipe):
    path = folder / "image_encoder/model.safetensors"
    tensors = load_file(path)
    tensors["vision_model.post_layernorm.bias"][3] = np.nan
    save_file(tensors, path)
    ready = {k: v for k, v in shapes_pipe.prior_pipe._held().items() if k != "image_encoder"}
    with pytest.raises(CheckpointError, match=r"not finite as .*post_layernorm.bias in 1 of"):
        checkpoint.LazyNetwork(CLIPVisionModelWithProjection, folder / "image_encoder").load()
    (folder / "image_encoder" / tensor_files.ZERO_EMBED).unlink()
    with pytest.raises(CheckpointError, match="the embedding of zeros is not finite"):
        KandinskyV22PriorPipeline.from_pretrained(folder, **ready)


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "computed"])
def test_prompts_need_no_folder_after_loading(folder, shapes_pipe, stored):
    ready = {k: v for k, v in shapes_pipe.prior_pipe._held().items() if k != "image_encoder"}
    if not stored:
        (folder / "image_encoder" / tensor_files.ZERO_EMBED).unlink()
    pipe = KandinskyV22PriorPipeline.from_pretrained(folder, **ready)
    shutil.rmtree(folder)
    assert worst(pipe._zero_embed(), shapes_pipe.prior_pipe._zero_embed()) <= 1e-5
    with pytest.raises(CheckpointError, match=r"image_encoder/config.json is missing|image_encoder has no tensors"):
        _ = pipe.image_encoder


# The embedding of zeros --------------------------------------------------------------------------------------------


def test_the_stored_embedding_is_the_references(expected, reads):
    assert worst(load_prior()._zero_embed(), expected) <= 1e-5
    # In a narrower dtype it is the same, where the network would be coarser.
    assert np.array_equal(load_prior(dtype="bfloat16")._zero_embed(), load_prior()._zero_embed())
    assert str(TOWER) not in reads
    assert not reads


def test_it_is_computed_layer_by_layer(expected, reads):
    assert worst(zero_embed._compute(TOWER, config()), expected) <= 1e-5
    assert str(TOWER) not in reads
    layers = {name.split("layers.")[1].split(".")[0] for name in reads if "layers." in name}
    assert len(layers) == config().num_hidden_layers


def test_it_is_kept_in_the_users_cache(folder, cache, reads):
    (folder / "image_encoder" / tensor_files.ZERO_EMBED).unlink()

    def of_a_new_pipeline(dtype: str = "float32") -> np.ndarray:
        return zero_embed.of(checkpoint.LazyNetwork(CLIPVisionModelWithProjection, folder / "image_encoder", dtype))

    first = of_a_new_pipeline("bfloat16")
    [kept] = cache.iterdir()
    assert any("mlp" in name for name in reads)
    reads.clear()
    assert np.array_equal(of_a_new_pipeline(), first)
    assert not reads
    kept.write_bytes(kept.read_bytes()[:-1] + b"\x7f")
    with pytest.warns(UserWarning, match="is not of these weights, or damaged"):
        assert np.array_equal(of_a_new_pipeline(), first)
    assert np.array_equal(of_a_new_pipeline(), first)  # mended, and no warning


def test_a_cache_that_cannot_be_written_is_left_alone(folder, cache, expected):
    (folder / "image_encoder" / tensor_files.ZERO_EMBED).unlink()
    cache.parents[1].write_text("a file where the folder should be")
    tower = checkpoint.LazyNetwork(CLIPVisionModelWithProjection, folder / "image_encoder", "float32")
    assert worst(zero_embed.of(tower), expected) <= 1e-5


def one_number(folder: Path, part: str) -> None:
    """Change one number of the first tensor with this in its name, and keep the file's size and time."""
    path = folder / "model.safetensors"
    tensors, times = load_file(path), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    name = min(name for name in tensors if part in name)
    tensors[name].flat[tensors[name].size // 3] += 1
    save_file(tensors, path)
    os.utime(path, ns=times)


def seal_as_earlier_releases_did(folder: Path) -> None:
    path = folder / tensor_files.ZERO_EMBED
    embed = load_file(path)["zero_embed"]
    path.write_bytes(save({"zero_embed": embed + 1}, metadata={"seal": "0" * 64}))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: one_number(f, "layers.0.mlp.fc1.weight"), "is not of these weights"),
        (lambda f: one_number(f, "layers.1.layer_norm2.bias"), "is not of these weights"),
        (lambda f: one_number(f, "patch_embedding"), "is not of these weights"),
        (lambda f: one_number(f, "visual_projection"), "is not of these weights"),
        (seal_as_earlier_releases_did, "was written by an earlier release"),
        (lambda f: edit_config(f.parent, hidden_act="relu"), "is not of these weights"),
        (lambda f: os.truncate(f / tensor_files.ZERO_EMBED, 100), "is damaged"),
        (lambda f: (f / tensor_files.ZERO_EMBED).write_bytes(b""), "is damaged"),
        (lambda f: save_file({"x": np.zeros(3)}, f / tensor_files.ZERO_EMBED), "is damaged"),
    ],
    ids=["MLP", "norm", "patches", "projection", "release", "settings", "cut", "empty", "another tensor"],
)
def test_a_stale_or_damaged_embedding_is_not_trusted(folder, spoil, says, monkeypatch):
    monkeypatch.setattr(fingerprint, "_SETTLED_S", -1e9)  # fingerprints are kept at once
    zero_embed.store(folder / "image_encoder", config())
    spoil(folder / "image_encoder")
    tower = checkpoint.LazyNetwork(CLIPVisionModelWithProjection, folder / "image_encoder", "float32")
    with pytest.warns(UserWarning, match=says):
        found = zero_embed.of(tower)
    assert worst(found, zero_embed.of(tower.load())) <= 1e-5


def test_a_fingerprint_is_kept_while_no_file_changes(folder, cache, monkeypatch):
    tower, seen = folder / "image_encoder", []
    read = checkpoint.read_params
    monkeypatch.setattr(fingerprint, "read_params", lambda *a: (seen.append(1), read(*a))[1])
    first = zero_embed.fingerprint(tower, config())
    assert not (cache.parent / "fingerprints").exists()  # the file may change again within its time stamp
    monkeypatch.setattr(fingerprint, "_SETTLED_S", -1e9)
    assert zero_embed.fingerprint(tower, config()) == first
    seen.clear()
    assert zero_embed.fingerprint(tower, config()) == first
    assert not seen
    [note] = (cache.parent / "fingerprints").iterdir()
    note.write_text(note.read_text().replace(note.read_text()[0], "x", 1))
    assert zero_embed.fingerprint(tower, config()) == first
    assert seen
    one_number(tower, "layers.0.mlp.fc2.weight")
    assert zero_embed.fingerprint(tower, config()) != first


def test_shards_of_any_name_count_for_a_fingerprint(folder, monkeypatch):
    monkeypatch.setattr(fingerprint, "_SETTLED_S", -1e9)
    tower = folder / "image_encoder"
    before, tensors = zero_embed.fingerprint(tower, config()), load_file(tower / "model.safetensors")
    (tower / "model.safetensors").rename(tower / "part.safetensors")
    weight_map = dict.fromkeys(tensors, "part.safetensors")
    (tower / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert zero_embed.fingerprint(tower, config()) == before
    tensors["vision_model.encoder.layers.0.mlp.fc1.bias"] += 1
    save_file(tensors, tower / "part.safetensors")
    assert zero_embed.fingerprint(tower, config()) != before


def test_its_file_is_fetched_from_the_hub():
    assert tensor_files.ZERO_EMBED in hub._SMALL_FILES


# Copies ------------------------------------------------------------------------------------------------------------


def test_saved_and_converted_copies_have_it(tmp_path, reads):
    pipe = load_prior()
    pipe.save_pretrained(tmp_path / "saved", layout="orbax")
    assert not pipe._held()["image_encoder"].loaded  # read for the copy, and not kept
    convert(tmp_path / "saved", tmp_path / "converted", progress=False)
    original = (TOWER / tensor_files.ZERO_EMBED).read_bytes()
    for copy in ("saved", "converted"):  # float32 of float16 tensors, in both layouts
        assert (tmp_path / copy / "image_encoder" / tensor_files.ZERO_EMBED).read_bytes() == original
    with warnings.catch_warnings(action="error"):
        assert np.array_equal(load_prior(tmp_path / "saved")._zero_embed(), load_prior()._zero_embed())


@pytest.mark.slow
def test_a_conversion_computes_what_is_not_there(folder, tmp_path, cache):
    (folder / "image_encoder" / tensor_files.ZERO_EMBED).unlink()
    for dtype, tolerance in ((None, 1e-5), ("bfloat16", 0.05)):
        target = tmp_path / f"{dtype}" / "image_encoder"
        convert(folder, target.parent, dtype=dtype, progress=False)
        tower = checkpoint.LazyNetwork(CLIPVisionModelWithProjection, target)
        with warnings.catch_warnings(action="error"):
            found = zero_embed._find(target, zero_embed.fingerprint(target, tower.config))
        own = load_network(CLIPVisionModelWithProjection, target, "float32")
        assert worst(found, zero_embed.of(own)) <= 1e-5
        assert worst(found, load_file(TOWER / tensor_files.ZERO_EMBED)["zero_embed"]) <= tolerance
    assert not cache.exists()
