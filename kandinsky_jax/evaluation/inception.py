# ruff: noqa: F722 (shapes of jaxtyping are no forward references)
"""The Inception-v3 network of FID and KID.

Reference: torch-fidelity's `FeatureExtractorInceptionV3` and pytorch-fid's `fid_inception_v3`, which are TensorFlow's
graph of 2015: average pools that leave out the padding, a maximum pool in the last block, and TensorFlow 1's bilinear
resizing, whose pixels have no centres. Both libraries' files of weights (pt_inception-2015-12-05-6726825d.pth and
weights-inception-2015-12-05-6726825d.pth) have the tensors that are read here; the attributes bear their names. torch
is needed to read a .pth, not to read the same tensors from a .safetensors.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kandinsky_jax.checkpoint import flat_params, move_network, set_params, tensor_names
from kandinsky_jax.checkpoint.tensor_checks import bad_values, by_torch_names
from kandinsky_jax.checkpoint.tensor_files import WEIGHT_DTYPES, Tensor, open_tensors
from kandinsky_jax.common.errors import CheckpointError, shorten, summarize
from kandinsky_jax.common.types import Array, Float
from kandinsky_jax.models.convolution import Conv
from kandinsky_jax.models.layers import Rngs, Shapes
from kandinsky_jax.parallel.mesh import Mesh

SIDE = 299  # pixels of the network's input
FEATURES = 2048
# Counters of training, the classifier, and what torchvision's network has for training alone.
_UNUSED = re.compile(r"num_batches_tracked$|^fc\.|^AuxLogits\.")


class BasicConv2d(nnx.Module):
    """Convolution, batch normalisation by stored statistics, ReLU."""

    def __init__(
        self, cin: int, cout: int, kernel: int | tuple[int, int], stride: int = 1, pad: bool = False, *, rngs: Rngs
    ):
        size = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = tuple((side // 2, side // 2) for side in size) if pad else "VALID"
        self.conv = _convolution(cin, cout, size, stride, padding, rngs)
        self.bn = BatchNorm(cout, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h2 w2 D"]:
        return jax.nn.relu(self.bn(self.conv(x)))


class BatchNorm(nnx.Module):
    """Batch normalisation with the statistics of training."""

    EPSILON = 1e-3

    def __init__(self, channels: int, *, rngs: Rngs):
        self.scale, self.running_var = (nnx.Param(_constant(1.0, (channels,), rngs)) for _ in range(2))
        self.bias, self.running_mean = (nnx.Param(_constant(0.0, (channels,), rngs)) for _ in range(2))

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        factor = jax.lax.rsqrt(self.running_var[...] + self.EPSILON) * self.scale[...]
        return (x - self.running_mean[...]) * factor + self.bias[...]


def _constant(value: float, shape: tuple[int, ...], rngs: Rngs) -> jax.Array | jax.ShapeDtypeStruct:
    if isinstance(rngs, Shapes):
        return jax.ShapeDtypeStruct(shape, jnp.float32)
    return jnp.full(shape, value, jnp.float32)


def _convolution(cin: int, cout: int, size: tuple[int, int], stride: int, padding: object, rngs: Rngs) -> Conv:
    """Return a convolution without bias; its kernel is a shape for `Shapes`."""

    def initial(key: jax.Array | None, shape: tuple[int, ...], dtype: object) -> jax.Array | jax.ShapeDtypeStruct:
        if key is None:
            return jax.ShapeDtypeStruct(shape, jnp.float32)
        return nnx.initializers.he_normal()(key, shape, jnp.float32)

    return Conv(
        cin, cout, size, strides=(stride, stride), padding=padding, use_bias=False, kernel_init=initial, rngs=rngs
    )


def average_pool(x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
    """Average 3x3 pixels, at the border the fewer that there are."""
    ones = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
    window = ((1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    total, count = (jax.lax.reduce_window(part, jnp.zeros((), x.dtype), jax.lax.add, *window) for part in (x, ones))
    return total / count


def max_pool(x: Float[Array, "B h w C"], stride: int = 2, padding: str = "VALID") -> Float[Array, "B h2 w2 C"]:
    """Take the maximum of 3x3 pixels."""
    return nnx.max_pool(x, (3, 3), (stride, stride), padding)


class InceptionA(nnx.Module):
    def __init__(self, cin: int, pool: int, *, rngs: Rngs):
        self.branch1x1 = BasicConv2d(cin, 64, 1, rngs=rngs)
        self.branch5x5_1 = BasicConv2d(cin, 48, 1, rngs=rngs)
        self.branch5x5_2 = BasicConv2d(48, 64, 5, pad=True, rngs=rngs)
        self.branch3x3dbl_1 = BasicConv2d(cin, 64, 1, rngs=rngs)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, pad=True, rngs=rngs)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, pad=True, rngs=rngs)
        self.branch_pool = BasicConv2d(cin, pool, 1, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w D"]:
        wide = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return _joined(self.branch1x1(x), wide, double, self.branch_pool(average_pool(x)))


class InceptionB(nnx.Module):
    def __init__(self, cin: int, *, rngs: Rngs):
        self.branch3x3 = BasicConv2d(cin, 384, 3, stride=2, rngs=rngs)
        self.branch3x3dbl_1 = BasicConv2d(cin, 64, 1, rngs=rngs)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, pad=True, rngs=rngs)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, stride=2, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h2 w2 D"]:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return _joined(self.branch3x3(x), double, max_pool(x))


class InceptionC(nnx.Module):
    def __init__(self, cin: int, width: int, *, rngs: Rngs):
        across, down = (1, 7), (7, 1)
        self.branch1x1 = BasicConv2d(cin, 192, 1, rngs=rngs)
        self.branch7x7_1 = BasicConv2d(cin, width, 1, rngs=rngs)
        self.branch7x7_2 = BasicConv2d(width, width, across, pad=True, rngs=rngs)
        self.branch7x7_3 = BasicConv2d(width, 192, down, pad=True, rngs=rngs)
        self.branch7x7dbl_1 = BasicConv2d(cin, width, 1, rngs=rngs)
        self.branch7x7dbl_2 = BasicConv2d(width, width, down, pad=True, rngs=rngs)
        self.branch7x7dbl_3 = BasicConv2d(width, width, across, pad=True, rngs=rngs)
        self.branch7x7dbl_4 = BasicConv2d(width, width, down, pad=True, rngs=rngs)
        self.branch7x7dbl_5 = BasicConv2d(width, 192, across, pad=True, rngs=rngs)
        self.branch_pool = BasicConv2d(cin, 192, 1, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w D"]:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return _joined(self.branch1x1(x), single, double, self.branch_pool(average_pool(x)))


class InceptionD(nnx.Module):
    def __init__(self, cin: int, *, rngs: Rngs):
        self.branch3x3_1 = BasicConv2d(cin, 192, 1, rngs=rngs)
        self.branch3x3_2 = BasicConv2d(192, 320, 3, stride=2, rngs=rngs)
        self.branch7x7x3_1 = BasicConv2d(cin, 192, 1, rngs=rngs)
        self.branch7x7x3_2 = BasicConv2d(192, 192, (1, 7), pad=True, rngs=rngs)
        self.branch7x7x3_3 = BasicConv2d(192, 192, (7, 1), pad=True, rngs=rngs)
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, stride=2, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h2 w2 D"]:
        long = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return _joined(self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(long), max_pool(x))


class InceptionE(nnx.Module):
    """The last two blocks.

    Args:
        pools_maximum: whether the pooled branch takes maxima, as in the very last one.
    """

    def __init__(self, cin: int, pools_maximum: bool, *, rngs: Rngs):
        self.pools_maximum = pools_maximum
        self.branch1x1 = BasicConv2d(cin, 320, 1, rngs=rngs)
        self.branch3x3_1 = BasicConv2d(cin, 384, 1, rngs=rngs)
        self.branch3x3_2a = BasicConv2d(384, 384, (1, 3), pad=True, rngs=rngs)
        self.branch3x3_2b = BasicConv2d(384, 384, (3, 1), pad=True, rngs=rngs)
        self.branch3x3dbl_1 = BasicConv2d(cin, 448, 1, rngs=rngs)
        self.branch3x3dbl_2 = BasicConv2d(448, 384, 3, pad=True, rngs=rngs)
        self.branch3x3dbl_3a = BasicConv2d(384, 384, (1, 3), pad=True, rngs=rngs)
        self.branch3x3dbl_3b = BasicConv2d(384, 384, (3, 1), pad=True, rngs=rngs)
        self.branch_pool = BasicConv2d(cin, 192, 1, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w D"]:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = max_pool(x, 1, "SAME") if self.pools_maximum else average_pool(x)
        return _joined(
            self.branch1x1(x),
            *(self.branch3x3_2a(single), self.branch3x3_2b(single)),
            *(self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)),
            self.branch_pool(pooled),
        )


def _joined(*branches: jax.Array) -> jax.Array:
    return jnp.concatenate(branches, axis=-1)


class InceptionV3(nnx.Module):
    """Inception-v3 up to the features that FID and KID compare."""

    def __init__(self, *, rngs: Rngs):
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2, rngs=rngs)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3, rngs=rngs)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, pad=True, rngs=rngs)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1, rngs=rngs)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3, rngs=rngs)
        self.Mixed_5b = InceptionA(192, 32, rngs=rngs)
        self.Mixed_5c = InceptionA(256, 64, rngs=rngs)
        self.Mixed_5d = InceptionA(288, 64, rngs=rngs)
        self.Mixed_6a = InceptionB(288, rngs=rngs)
        self.Mixed_6b = InceptionC(768, 128, rngs=rngs)
        self.Mixed_6c = InceptionC(768, 160, rngs=rngs)
        self.Mixed_6d = InceptionC(768, 160, rngs=rngs)
        self.Mixed_6e = InceptionC(768, 192, rngs=rngs)
        self.Mixed_7a = InceptionD(768, rngs=rngs)
        self.Mixed_7b = InceptionE(1280, False, rngs=rngs)
        self.Mixed_7c = InceptionE(2048, True, rngs=rngs)

    def __call__(self, pixels: Float[Array, "B 299 299 3"]) -> Float[Array, "B 2048"]:
        """Compute the features of pictures.

        Args:
            pixels: float32 `[B, 299, 299, 3]`, levels of 0..255, from `resize_like_tensorflow`.
        Returns:
            float32 `[B, 2048]`, the means over the last pixels.
        """
        x = (pixels - 128) / 128
        x = max_pool(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))  # [B, 73, 73, 64]
        x = max_pool(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))  # [B, 35, 35, 192]
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # [B, 17, 17, 768]
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # [B, 8, 8, 2048]
        return x.mean((1, 2))


def resize_like_tensorflow(levels: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Resize a picture bilinearly as TensorFlow 1's `resize_bilinear` does, without `align_corners`.

    Args:
        levels: uint8 or float `[H, W, 3]`.
    Returns:
        float32 `[side, side, 3]`, in the units of `levels`.
    """
    pixels = np.asarray(levels, np.float32)
    (top, bottom, down), (left, right, across) = (_neighbours(old, side) for old in pixels.shape[:2])
    # In the reference's order, so that the result is its to the bit.
    upper = pixels[top][:, left] + (pixels[top][:, right] - pixels[top][:, left]) * across[:, None]
    lower = pixels[bottom][:, left] + (pixels[bottom][:, right] - pixels[bottom][:, left]) * across[:, None]
    return cast(np.ndarray, upper + (lower - upper) * down[:, None, None])


def _neighbours(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the two old positions between which each new one lies, and how far it is from the first."""
    places = np.arange(new, dtype=np.float32) * np.float32(old / new)
    first = places.astype(np.int64)
    return first, np.minimum(first + 1, old - 1), places - first.astype(np.float32)


# Weights ----------------------------------------------------------------------------------------------------------


def check_inception(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Open a file of weights and return the tensors that are used, by their names in it; none is read yet.

    Args:
        path: .safetensors, or a .pth of tensors alone, which needs torch.
    Raises:
        CheckpointError: where it is not there, cannot be read safely, or lacks tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"there is no file {shorten(str(path), 240)}; needed are the weights of FID's Inception network, such as "
            "pt_inception-2015-12-05-6726825d.pth of pytorch-fid, or the same tensors as .safetensors"
        )
    stored = {name: tensor for name, tensor in open_tensors(path).items() if not _UNUSED.search(name)}
    wanted = by_torch_names(flat_params(InceptionV3(rngs=Shapes())))
    faults = [f"missing {name}" for name in sorted(wanted.keys() - stored.keys())]
    faults += [f"unknown {name}" for name in sorted(stored.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & stored.keys()):
        if stored[name].shape != wanted[name].shape:
            faults.append(f"{name} is {list(stored[name].shape)}, not {list(wanted[name].shape)}")
        elif stored[name].dtype not in WEIGHT_DTYPES:
            faults.append(f"{name} is {stored[name].dtype}, no floating-point numbers")
    if faults:
        raise CheckpointError(
            f"{shorten(str(path), 240)} does not hold FID's Inception network, {len(faults)} tensors differ: "
            f"{summarize(faults, 240)}"
        )
    return stored


def inception_fingerprint(path: str | os.PathLike[str]) -> str:
    """Compute SHA-256 of all tensors that are used, in float32: the same for every format of file."""
    found = hashlib.sha256()
    for name, tensor in sorted(check_inception(path).items()):
        found.update(f"{name} {tensor.shape} ".encode() + np.ascontiguousarray(tensor.read(), np.float32).tobytes())
    return found.hexdigest()


def load_inception(path: str | os.PathLike[str], mesh: Mesh | None = None) -> InceptionV3:
    """Load the network from a file of weights, float32.

    Args:
        path: see `check_inception`, whose errors are raised.
        mesh: of devices over which pictures are sharded; None is JAX's default device.
    Raises:
        CheckpointError: also for numbers that are not finite.
    """
    stored = check_inception(path)
    network = InceptionV3(rngs=Shapes())
    faults: list[str] = []
    params = {}
    for name in flat_params(network):
        array = tensor_names.to_flax(name, stored[tensor_names.torch_name(name)].read()).astype(np.float32)
        faults += bad_values(name, array)
        params[name] = jnp.asarray(array)
    if faults:
        raise CheckpointError(f"{shorten(str(path), 240)}: {summarize(faults, 240)}")
    set_params(network, params)
    move_network(network, mesh)
    return network


def inception_tensors(network: InceptionV3) -> dict[str, np.ndarray]:
    """Return a network's tensors by their names in PyTorch's files, float32, to be saved as safetensors."""
    return {
        tensor_names.torch_name(name): np.ascontiguousarray(tensor_names.to_torch(name, np.asarray(value)))
        for name, value in flat_params(network).items()
    }


__all__ = [
    "FEATURES",
    "SIDE",
    "InceptionV3",
    "check_inception",
    "inception_fingerprint",
    "inception_tensors",
    "load_inception",
    "resize_like_tensorflow",
]
