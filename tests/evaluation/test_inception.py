"""The Inception network of FID and KID, on random weights, beside torch-fidelity's."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

from kandinsky_jax import CheckpointError
from kandinsky_jax.checkpoint import flat_params
from kandinsky_jax.checkpoint.tensor_checks import by_torch_names
from kandinsky_jax.diffusion import Network
from kandinsky_jax.diffusion.calls import call
from kandinsky_jax.evaluation.inception import (
    InceptionV3,
    inception_fingerprint,
    inception_tensors,
    load_inception,
    resize_like_tensorflow,
)
from kandinsky_jax.models.layers import Shapes
from tests.conftest import worst
from tests.evaluation import fidelity


def random_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Random values by the names of PyTorch's file, at scales that keep signals alive through 94 layers."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, leaf in by_torch_names(flat_params(InceptionV3(rngs=Shapes()))).items():
        noise = rng.normal(size=leaf.shape)
        if name.endswith("conv.weight"):
            noise *= np.sqrt(2 / np.prod(leaf.shape[1:]))
        elif name.endswith("running_var"):
            noise = np.exp(0.3 * noise)
        else:
            noise = 0.2 * noise + name.endswith("bn.weight")
        found[name] = noise.astype(np.float32)
    return found


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A file as the references have it, with all that they have and we leave out."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    tensors = {name: torch.from_numpy(array) for name, array in random_tensors().items()}
    counters = {name.replace("running_mean", "num_batches_tracked") for name in tensors if "running_mean" in name}
    tensors |= {name: torch.tensor(7) for name in counters}
    torch.save(tensors | {"fc.weight": torch.randn(1008, 2048), "fc.bias": torch.randn(1008)}, path)
    return path


@pytest.mark.fidelity
@pytest.mark.parametrize("shape", [(64, 64), (299, 299), (37, 500), (512, 300)])
def test_resizing_is_the_references_to_the_bit(shape):
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    module = fidelity.module("interpolate_compat_tensorflow")
    reference = module.interpolate_bilinear_2d_like_tensorflow1x(
        torch.from_numpy(picture.transpose(2, 0, 1)[None].astype(np.float32)), size=(299, 299), align_corners=False
    )
    assert np.array_equal(resize_like_tensorflow(picture), reference[0].numpy().transpose(1, 2, 0))


@pytest.mark.fidelity
def test_features_are_the_references(weights):
    pictures = np.random.default_rng(1).integers(0, 256, (2, 64, 48, 3), dtype=np.uint8)
    pictures[1, :, 20:] //= 4
    extractor = fidelity.module("feature_extractor_inceptionv3").FeatureExtractorInceptionV3(
        "inception", ["2048"], feature_extractor_weights_path=str(weights)
    )
    with torch.no_grad():
        [reference] = extractor(torch.from_numpy(pictures.transpose(0, 3, 1, 2)))
    pixels = np.stack([resize_like_tensorflow(picture) for picture in pictures])
    features = np.asarray(call(*Network.split(load_inception(weights)), jnp.asarray(pixels)))
    assert features.shape == (2, 2048)
    assert worst(features, reference) < 1e-4


@pytest.mark.slow
def test_a_file_of_safetensors_is_the_same_network(weights, tmp_path):
    tensors = inception_tensors(load_inception(weights))
    safetensors.numpy.save_file(tensors, tmp_path / "weights.safetensors")
    for name, array in random_tensors().items():
        np.testing.assert_array_equal(tensors[name], array)
    assert inception_fingerprint(tmp_path / "weights.safetensors") == inception_fingerprint(weights)
    tensors["Mixed_7c.branch_pool.bn.bias"] = tensors["Mixed_7c.branch_pool.bn.bias"] + 1
    safetensors.numpy.save_file(tensors, tmp_path / "other.safetensors")
    assert inception_fingerprint(tmp_path / "other.safetensors") != inception_fingerprint(weights)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no file .*none.pth; needed are the weights"):
        load_inception(tmp_path / "none.pth")
    tensors = random_tensors()
    del tensors["Conv2d_1a_3x3.conv.weight"]
    tensors["Mixed_5b.branch1x1.bn.bias"] = np.zeros(3, np.float32)
    tensors["more"] = np.zeros(3, np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(
        CheckpointError, match=r"3 tensors differ: missing Conv2d_1a.*; unknown more; .*\[3\], not \[64\]"
    ):
        load_inception(tmp_path / "a.safetensors")
    tensors = random_tensors()
    tensors["Mixed_5b.branch1x1.bn.bias"][2] = np.nan
    safetensors.numpy.save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"not finite .*bn.bias in 1 of 64"):
        load_inception(tmp_path / "b.safetensors")


def test_a_file_that_would_run_code_is_refused(tmp_path):
    torch.save({"model": print}, tmp_path / "code.pth")
    with pytest.raises(CheckpointError, match="refused because reading it could run code"):
        load_inception(tmp_path / "code.pth")
