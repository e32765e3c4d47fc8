"""Files of PyTorch tensors, read one tensor at a time: safetensors, sharded safetensors, tensors-only pickles."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, and why."""


@dataclass(frozen=True)
class Tensor:
    """A tensor that is not read yet."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # diffusers, transformers, transformers' .bin


def find(folder: Path) -> Path | None:
    """The file of tensors in a component's folder: safetensors, a safetensors index, or else a `.bin`."""
    for suffix in (".safetensors", ".safetensors.index.json", ".bin"):
        for stem in STEMS:
            if (folder / (stem + suffix)).is_file():
                return folder / (stem + suffix)
    return None


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Mapping[str, Tensor]]:
    """The tensors of a file that `find` named, by their names in the file.

    Raises:
        CheckpointError: where the file is truncated, is not what its name says, or would need code to be run.
    """
    with contextlib.ExitStack() as stack:
        if path.name.endswith(".index.json"):
            tensors: dict[str, Tensor] = {}
            for shard in _shards(path):
                tensors |= _open_safetensors(shard, stack)
            yield tensors
        elif path.suffix == ".safetensors":
            yield _open_safetensors(path, stack)
        else:
            yield _open_pickle(path)


def _shards(index: Path) -> list[Path]:
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of safetensors files: {error!r}") from None
    for shard in named:
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index} names a shard outside its folder, or no safetensors file: {shard!r}")
    return [index.parent / shard for shard in sorted(named)]


def _open_safetensors(path: Path, stack: contextlib.ExitStack) -> dict[str, Tensor]:
    try:
        file = stack.enter_context(safe_open(path, framework="numpy"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is named by the index but is not there") from None
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is truncated or no safetensors file: {error}. Fetch it again."
        ) from None

    def reader(name: str) -> Callable[[], np.ndarray]:
        return lambda: file.get_tensor(name)

    return {name: Tensor(tuple(file.get_slice(name).get_shape()), reader(name)) for name in file.keys()}  # noqa: SIM118


def _open_pickle(path: Path) -> dict[str, Tensor]:
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{path} is a PyTorch pickle, which only PyTorch reads safely. Install torch, or use the repository's "
            "safetensors files."
        ) from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
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


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file as diffusers does (it asks for the "pt" mark).

    Raises:
        OSError: where the disk is full, or the like.
    """
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from None
