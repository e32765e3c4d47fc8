"""The map from latents to small pictures: read from the model's folder or the cache, or fitted to MoVQ."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from kandinsky_jax import KandinskyV22Pipeline, VQModel, load_network, save_network
from kandinsky_jax.checkpoint import CheckpointError, hub, preview_map
from kandinsky_jax.checkpoint.conversion import convert
from kandinsky_jax.checkpoint.drawn_pictures import drawn_pictures
from kandinsky_jax.checkpoint.manifest import verify
from kandinsky_jax.checkpoint.networks import flat_params, folder_of, set_params
from kandinsky_jax.checkpoint.preview_map import PreviewMap, encoded_and_decoded, fit_to, small_pictures
from kandinsky_jax.checkpoint.quantization import quantize_network
from kandinsky_jax.checkpoint.tensor_files import PREVIEW_MAP
from kandinsky_jax.models.movq import MoVQConfig
from tests.conftest import SHAPES_MODEL
from tests.xla_flags import devices

TINY = hub.EMBEDDED["tiny"] / hub.DECODER
SMALL = MoVQConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1, num_vq_embeddings=64)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A user's cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/kandinsky_jax/preview_maps"


@pytest.fixture(scope="module")
def movq() -> VQModel:
    return load_network(VQModel, TINY / "movq", "float32")


def r_squared(found: PreviewMap, movq: VQModel) -> float:
    """Of drawn pictures that were not fitted."""
    latents, pixels = encoded_and_decoded(movq, drawn_pictures(16, 64, seed=1))
    wanted = small_pictures(pixels, latents.shape[1] * preview_map.SIDE)
    spread = wanted - wanted.mean((0, 1, 2))
    return 1 - float(((found(latents) - wanted) ** 2).sum() / (spread**2).sum())


def same(one: PreviewMap, other: PreviewMap) -> bool:
    return all(np.allclose(getattr(one, name), getattr(other, name), atol=2e-5) for name in ("weights", "bias"))


def random_map(seed: int = 0) -> PreviewMap:
    rng = np.random.default_rng(seed)
    return PreviewMap(rng.normal(size=(3, 3, 4, 2, 2, 3)).astype(np.float32), np.zeros((2, 2, 3), np.float32))


def test_the_embedded_model_has_a_map(movq, cache):
    found = preview_map.of(movq)
    assert not cache.exists()
    assert found.weights.shape == (3, 3, 4, 2, 2, 3)
    assert r_squared(found, movq) > 0.85


@pytest.mark.slow
def test_the_embedded_models_map_is_that_of_the_fit(movq):
    fresh, kept = preview_map.fit(movq), preview_map.of(movq)
    np.testing.assert_allclose(kept.weights, fresh.weights, atol=1e-3)
    np.testing.assert_allclose(kept.bias, fresh.bias, atol=1e-3)


def test_least_squares_find_a_linear_decoder():
    """Of pictures that are linear in the latents, at every pixel, the edges included."""
    truth, latents = random_map(), np.random.default_rng(1).normal(size=(8, 8, 12, 4))
    pixels = truth(latents).repeat(4, axis=1).repeat(4, axis=2)
    found = fit_to(latents, pixels)
    np.testing.assert_allclose(found.weights, truth.weights, atol=1e-3)
    np.testing.assert_allclose(found(latents), truth(latents), atol=5e-3)


def test_a_map_is_a_sum_over_neighbours():
    one, latents = random_map(), np.random.default_rng(2).normal(size=(1, 3, 5, 4))
    found = one(latents)
    assert found.shape == (1, 6, 10, 3)
    for y, x in np.ndindex(6, 10):
        expected = one.bias[y % 2, x % 2].astype(float)
        for i, j in np.ndindex(3, 3):
            latent = latents[0, np.clip(y // 2 + i - 1, 0, 2), np.clip(x // 2 + j - 1, 0, 4)]
            expected = expected + latent @ one.weights[i, j, :, y % 2, x % 2]
        np.testing.assert_allclose(found[0, y, x], expected, atol=1e-5)


@pytest.mark.slow
def test_a_network_in_memory_is_fitted_once(cache):
    """One that was read from no folder; the second time, the map is in the user's cache."""
    movq = VQModel(SMALL, rngs=nnx.Rngs(0))
    assert folder_of(movq) is None
    found = preview_map.of(movq)
    [kept] = cache.iterdir()
    content = json.loads(kept.read_text())
    content["bias"] = np.full((2, 2, 3), 0.5).tolist()
    kept.write_text(json.dumps(content))
    again = preview_map.of(VQModel(SMALL, rngs=nnx.Rngs(0)))
    assert (again.bias == 0.5).all()
    assert np.allclose(again.weights, found.weights, atol=2e-5)


def test_numbers_that_are_not_finite_are_not_fitted():
    latents, pixels = np.zeros((1, 8, 8, 4)), np.zeros((1, 64, 64, 3))
    pixels[0, 3, 3] = np.nan
    for arrays in ((latents, pixels), (latents + np.inf, np.zeros_like(pixels))):
        with pytest.raises(CheckpointError, match="MoVQ encodes or decodes pictures to numbers that are not finite"):
            fit_to(*arrays)


def test_fingerprints_are_those_of_the_weights(movq, tmp_path):
    """For every dtype, layout and quantization of them the same, for others another."""
    mark = preview_map.fingerprint(movq)
    assert preview_map.fingerprint(load_network(VQModel, TINY / "movq", "bfloat16")) == mark
    assert preview_map.fingerprint(quantize_network(movq, None)) == mark
    save_network(movq, tmp_path / "movq", "orbax")
    other = load_network(VQModel, tmp_path / "movq")
    assert preview_map.fingerprint(other) == mark
    name, array = next(item for item in flat_params(other).items() if item[0].startswith("encoder.conv_in"))
    set_params(other, flat_params(other) | {name: array * 1.1})
    assert preview_map.fingerprint(other) != mark
    assert preview_map.fingerprint(load_network(VQModel, SHAPES_MODEL / hub.DECODER / "movq")) != mark


def test_saved_and_converted_models_keep_their_map(tmp_path, cache):
    pipe = KandinskyV22Pipeline.from_pretrained("tiny")
    pipe.save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "converted", layout="orbax", progress=False)
    kept = preview_map.of(pipe.movq)
    for name in ("saved", "converted"):
        assert all(report.status == "ok" for report in verify(tmp_path / name))
        assert same(preview_map.of(load_network(VQModel, tmp_path / name / "movq")), kept)
    assert not cache.exists()
    (tmp_path / "saved" / "movq" / PREVIEW_MAP).write_text("{}")
    assert [r.path for r in verify(tmp_path / "saved") if r.status != "ok"] == [f"movq/{PREVIEW_MAP}"]


def test_diffusers_ignores_the_map():
    import diffusers

    assert diffusers.VQModel.from_pretrained(TINY / "movq").config.latent_channels == 4


WRONG = (
    b"",
    b"{",
    b"[]",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"fingerprint": "m", "bias": 1, "weights": "x"}',
    b'{"fingerprint": "m", "bias": [[1, 2], [3]], "weights": []}',
    b'{"fingerprint": "m"}',
)


@pytest.mark.parametrize("content", WRONG, ids=range(len(WRONG)))
def test_damaged_files_are_skipped_with_a_warning(content, tmp_path):
    (tmp_path / PREVIEW_MAP).write_bytes(content)
    with pytest.warns(UserWarning, match=PREVIEW_MAP):
        assert preview_map._read(tmp_path / PREVIEW_MAP, "m", 4) is None


def test_numbers_that_are_not_finite_are_damage(tmp_path):
    preview_map._write(tmp_path / PREVIEW_MAP, random_map(), "m")
    assert same(preview_map._read(tmp_path / PREVIEW_MAP, "m", 4), random_map())
    assert preview_map._read(tmp_path / PREVIEW_MAP, "other", 4) is None  # of other weights: no damage
    for number in ("NaN", "1e999", '"x"', "null"):
        text = json.dumps({"fingerprint": "m", "bias": [[[0] * 3] * 2] * 2, "weights": random_map().weights.tolist()})
        (tmp_path / PREVIEW_MAP).write_text(text.replace("[0, 0, 0]", f"[0, 0, {number}]"))
        with pytest.warns(UserWarning, match="is damaged and not used"):
            assert preview_map._read(tmp_path / PREVIEW_MAP, "m", 4) is None


@pytest.mark.slow
def test_a_map_of_other_weights_is_not_used(tmp_path, cache):
    """A network that was trained after its map was stored."""
    folder = tmp_path / "movq"
    movq = VQModel(SMALL, rngs=nnx.Rngs(0))
    save_network(movq, folder)
    shutil.copy(TINY / "movq" / PREVIEW_MAP, folder)
    found = preview_map.of(load_network(VQModel, folder))
    assert not same(found, preview_map.of(load_network(VQModel, TINY / "movq")))
    assert len(list(cache.iterdir())) == 1


@pytest.mark.slow
def test_a_network_on_a_mesh_is_fitted(tmp_path):
    """Four devices, over which a picture's rows are sharded."""
    program = """
import sys
import numpy as np
from kandinsky_jax import VQModel, make_mesh, load_network
from kandinsky_jax.checkpoint import preview_map
from kandinsky_jax.checkpoint.drawn_pictures import drawn_pictures
from kandinsky_jax.checkpoint.networks import move_network
movq = load_network(VQModel, sys.argv[1], "float32")
pictures = drawn_pictures(4, 64)
before = preview_map.encoded_and_decoded(movq, pictures), preview_map.fingerprint(movq)
move_network(movq, make_mesh(1, 2, 2))
after = preview_map.encoded_and_decoded(movq, pictures), preview_map.fingerprint(movq)
assert before[1] == after[1]
for one, other in zip(before[0], after[0]):
    np.testing.assert_allclose(one, other, atol=1e-4)
"""
    environment = {"XLA_FLAGS": devices(4), "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", program, str(TINY / "movq")]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
