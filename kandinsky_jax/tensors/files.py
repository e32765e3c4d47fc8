"""Files of PyTorch tensors, read one tensor at a time: safetensors, sharded safetensors, tensors-only pickles."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, and why."""


@dataclass(frozen=True)
class Tensor:
    """A tensor that is not read yet."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    dtype: Any = None  # known where it is to be written


STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # diffusers, transformers, transformers' .bin

ZERO_EMBED = "zero_embed.safetensors"  # may lie beside a vision tower's tensors, see `kandinsky_jax.zero_embed`


def find(folder: Path) -> Path | None:
    """The file of tensors in a component's folder: safetensors, a safetensors index, or else a `.bin`."""
    for suffix in (".safetensors", ".safetensors.index.json", ".bin"):
        for stem in STEMS:
            if (folder / (stem + suffix)).is_file():
                return folder / (stem + suffix)
    return None


def open_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `find` named, by their names in the file.

    Raises:
        CheckpointError: where the file is truncated, is not what its name says, or would need code to be run.
    """
    if path.name.endswith(".index.json"):
        return {name: t for shard in _shards(path) for name, t in _open_safetensors(shard).items()}
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)


def _shards(index: Path) -> list[Path]:
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of safetensors files: {error!r}") from None
    for shard in named:
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index} names a shard outside its folder, or no safetensors file: {shard!r}")
    return [index.parent / shard for shard in sorted(named)]


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"{path} is named by the index but is not there") from None
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is truncated or no safetensors file: {error}. Fetch it again."
        ) from None

    def reader(name: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            # Opened anew each time: a file that stays open keeps all that was read of it mapped into memory.
            with safe_open(path, framework="numpy") as file:
                return file.get_tensor(name)

        return read

    return {name: Tensor(shape, reader(name)) for name, shape in shapes.items()}


def _open_pickle(path: Path) -> dict[str, Tensor]:
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{path} is a PyTorch pickle, which only PyTorch reads safely. Install torch, or use the repository's "
            "safetensors files."
        ) from None
    try:
        # Mapped where the format allows it, so that nothing is read before it is asked for.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError and more, by the kind of damage
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} is damaged or holds more than tensors, and is refused because reading it could run code: {reason}"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise CheckpointError(f"{path} holds something else than a dictionary of tensors")

    def reader(tensor: torch.Tensor) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            if tensor.dtype == torch.bfloat16:
                import ml_dtypes

                return tensor.detach().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
            return tensor.detach().numpy()

        return read

    return {name: Tensor(tuple(tensor.shape), reader(tensor)) for name, tensor in state.items()}


_SAFETENSORS_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, one tensor in memory at a time, with the "pt" mark that diffusers asks for.

    The library's own writer wants all tensors at once, which is a second copy of a network.

    Args:
        tensors: by name, each with its dtype.
    Raises:
        OSError: where the disk is full, or the like.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
        dtype = _SAFETENSORS_DTYPES[np.dtype(tensor.dtype).name]
        header[name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors.values():
                array = np.ascontiguousarray(tensor.read())
                file.write(array.reshape(-1).view(np.uint8).data)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror}") from None
