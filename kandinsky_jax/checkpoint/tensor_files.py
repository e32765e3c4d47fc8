"""Tensor files of PyTorch, read one tensor at a time: safetensors and tensors-only pickles, whole or in shards."""

from __future__ import annotations

import functools
import json
import math
import re
import threading
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from kandinsky_jax.common.atomic import fill_file
from kandinsky_jax.common.errors import CheckpointError, shorten, summarize
from kandinsky_jax.common.reading import read_json


@dataclass(frozen=True)
class Tensor:
    """A tensor that has not been read yet."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    dtype: Any = None  # a NumPy dtype where it is to be written, else the file's own name for it


@dataclass(frozen=True)
class WeightSelection:
    """Which tensor files of a folder to read, if there are several.

    Attributes:
        variant: "fp16" reads files such as `*.fp16.safetensors`, or plain files if there are none.
        use_safetensors: True refuses `.bin` files, False reads nothing else; None prefers safetensors.
    """

    variant: str | None = None
    use_safetensors: bool | None = None

    def __post_init__(self) -> None:
        if self.variant is not None and not (isinstance(self.variant, str) and _VARIANT.fullmatch(self.variant)):
            raise ValueError(f"variant must be a name such as 'fp16', got {shorten(self.variant)}")
        if self.use_safetensors not in (None, True, False):
            raise ValueError(f"use_safetensors must be True, False or None, got {shorten(self.use_safetensors)}")


_VARIANT = re.compile(r"[A-Za-z0-9_-]+")
PREFERRED = WeightSelection()

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # diffusers, transformers, transformers' .bin
# In all forms: whole, in shards, index of shards; each plain or of a variant. "model-00001-of-00002.fp16.safetensors"
# is what older releases called a shard of a variant.
WEIGHT_FILE = re.compile(
    rf"(?P<stem>{'|'.join(STEMS)})(\.(?P<variant>[\w-]+?))?(-\d+-of-\d+(\.(?P<variant2>[\w-]+))?)?"
    r"\.(?P<format>safetensors|bin)(\.(?P<variant3>[\w-]+)(?=\.index))?(\.index(\.(?P<variant4>[\w-]+))?\.json)?"
)

MAPPED_BYTES = 64 << 20  # of a file, at most, besides one tensor

PREVIEW_MAP = "preview_map.json"  # in MoVQ's folder, see `kandinsky_jax.checkpoint.preview_map`
ZERO_EMBED = "zero_embed.safetensors"  # in a vision tower's folder, see `kandinsky_jax.checkpoint.zero_embed`

# What JAX holds without loss: safetensors' and PyTorch's names of the dtypes that weights may have. Float64 is among
# them because networks saved as such were float32 before; a number that float32 does not hold is an error.
WEIGHT_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_UNREAD = {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)}  # dtypes that safetensors does not read into NumPy
QUANTIZED_DTYPES = {"I8": "int8", "F8_E4M3": "float8_e4m3fn", "I32": "int32"}  # of quantized weights and their sums


def variant_of(name: str) -> str | None:
    """Return the variant in the name of a tensor file; None for plain files and files of other kinds."""
    match = WEIGHT_FILE.fullmatch(name)
    if match is None:
        return None
    return next((v for key, v in match.groupdict().items() if key.startswith("variant") and v is not None), None)


def stored_variants(folder: Path) -> list[str]:
    """Return the variants of a folder's tensor files, sorted."""
    return sorted({v for path in folder.iterdir() if (v := variant_of(path.name)) is not None})


def find(folder: Path, selection: WeightSelection = PREFERRED) -> Path | None:
    """Find the tensor file to read in a component's folder: safetensors, `.bin`, or an index of shards.

    The order is that of the library that reads such files: diffusers reads shards before a single file, transformers
    a single file before shards, both safetensors before `.bin`. A folder with files of one variant only holds that.

    Raises:
        CheckpointError: where it is not clear which files count.
    """
    if not folder.is_dir():
        return None
    if selection.variant is not None and (path := _find(folder, selection.variant, selection.use_safetensors)):
        return path
    if path := _find(folder, None, selection.use_safetensors):
        return path
    variants = stored_variants(folder)
    if selection.variant is None and len(variants) > 1:
        raise CheckpointError(
            f"{folder} has files of the variants {shorten(', '.join(variants))} only; choose one with variant=..."
        )
    return _find(folder, variants[0], selection.use_safetensors) if len(variants) == 1 else None


def _find(folder: Path, variant: str | None, use_safetensors: bool | None) -> Path | None:
    formats = {None: ("safetensors", "bin"), True: ("safetensors",), False: ("bin",)}[use_safetensors]
    for form in formats:
        for stem in STEMS:
            whole, indices = _names(stem, form, variant)
            single = [folder / whole] if (folder / whole).is_file() else []
            sharded = [folder / name for name in indices if (folder / name).is_file()]
            if single and sharded and form == "bin" and use_safetensors is None:
                raise CheckpointError(  # diffusers looks for an index of `.bin` only where it is asked for `.bin`
                    f"{folder} has both {whole} and {sharded[0].name}, of which one is out of date: remove it"
                )
            if found := (sharded + single if stem == STEMS[0] else single + sharded):
                return found[0]
    return None


def _names(stem: str, form: str, variant: str | None) -> tuple[str, tuple[str, ...]]:
    """Return the name of a tensor file, and possible names of its index of shards."""
    if variant is None:
        return f"{stem}.{form}", (f"{stem}.{form}.index.json",)
    return f"{stem}.{variant}.{form}", (f"{stem}.{form}.index.{variant}.json", f"{stem}.{form}.{variant}.index.json")


def open_tensors(path: Path) -> dict[str, Tensor]:
    """Open the tensors of a file from `find`, by their names in the file.

    Raises:
        CheckpointError: where the file is truncated, is not what its name says, or would need code to be run.
    """
    if path.suffix != ".json":
        return _open(path)
    tensors: dict[str, Tensor] = {}
    for shard in shards(path):
        if not shard.is_file():
            raise CheckpointError(f"{shard} is named by the index {path.name} but is not there")
        stored = _open(shard)
        if twice := sorted(tensors.keys() & stored.keys()):
            raise CheckpointError(f"{path} names shards that hold the same tensors: {summarize(twice, 200)}")
        tensors |= stored
    return tensors


def _open(path: Path) -> dict[str, Tensor]:
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)


def shards(index: Path) -> list[Path]:
    """Return the shards that an index names, sorted; they are in its folder.

    Raises:
        CheckpointError: where it is not an index, or names something else.
    """
    form = ".safetensors" if ".safetensors." in index.name else ".bin"
    try:
        content: Any = read_json(index)  # whatever it is, the errors below tell
        named = set(content["weight_map"].values())
    except (ValueError, TypeError, LookupError, AttributeError, OSError) as error:
        raise CheckpointError(f"{index} is not an index of {form[1:]} files: {shorten(error)}") from None
    for shard in named:
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(form) or "\0" in shard:
            raise CheckpointError(f"{index} names a shard outside its folder, or no {form} file: {shorten(shard)}")
    return [index.parent / shard for shard in sorted(named)]


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: (tuple(part.get_shape()), str(part.get_dtype())) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        size = f"{path.stat().st_size:,} bytes" if path.is_file() else "no file"
        raise CheckpointError(
            f"{path} ({size}) is truncated or no safetensors file: {shorten(error)}. Fetch it again."
        ) from None

    file = _SafetensorsFile(path)
    return {
        name: Tensor(shape, functools.partial(file.read, name, _UNREAD.get(dtype)), dtype)
        for name, (shape, dtype) in found.items()
    }


class _SafetensorsFile(threading.local):
    """A file that tensors are read from one by one; each thread opens it for itself.

    An open file keeps everything read from it mapped into memory, so it is opened anew after `MAPPED_BYTES`: not for
    each tensor, because opening reads the names of all. It is opened anew, too, when it is not as it was:
    reading on where it was cut would end the process.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file: safe_open | None = None
        self._bytes = 0  # read since it was opened
        self._state: tuple[int, ...] = ()  # of the file when it was opened

    def read(self, name: str, dtype: np.dtype | None = None) -> np.ndarray:
        """Read a tensor; `dtype` is of one that the library does not read."""
        about = self._path.stat()
        state = (about.st_ino, about.st_size, about.st_mtime_ns)
        if self._file is None or self._bytes >= MAPPED_BYTES or state != self._state:
            self._file, self._bytes, self._state = safe_open(self._path, framework="numpy"), 0, state
        array: np.ndarray = self._file.get_tensor(name) if dtype is None else self._stored(name, dtype)
        self._bytes += array.nbytes
        return array

    def _stored(self, name: str, dtype: np.dtype) -> np.ndarray:
        """Read a tensor of bytes where the header says it is; the library has checked the header."""
        with self._path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(length))[name]
            begin, end = entry["data_offsets"]
            file.seek(8 + length + begin)
            return np.frombuffer(file.read(end - begin), dtype).reshape(entry["shape"])


def _open_pickle(path: Path) -> dict[str, Tensor]:
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{path} is a PyTorch pickle, which only PyTorch reads safely. Install torch, or use the repository's "
            "safetensors files."
        ) from None
    try:
        with open(path, "rb") as file:
            if (start := file.read(1)) and start not in b"P\x80":  # of a zip file, of a pickle
                raise CheckpointError(f"{path} holds no tensors; needed is .safetensors or what torch.save writes")
        # Memory-mapped where the format allows it, so that tensors are read on demand.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except CheckpointError:
        raise
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError and more, by the kind of damage
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} is damaged or holds more than tensors, and is refused because reading it could run code: "
            f"{shorten(reason)}"
        ) from None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(t, torch.Tensor) for name, t in state.items()
    ):
        raise CheckpointError(f"{path} holds something else than a dictionary of tensors")
    if odd := [name for name, t in state.items() if t.layout != torch.strided or t.is_quantized or t.is_meta]:
        raise CheckpointError(f"{path} holds tensors that are sparse, quantized or without data: {summarize(odd, 200)}")

    def reader(tensor: torch.Tensor) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            plain = tensor.detach().resolve_neg()
            if plain.dtype == torch.bfloat16:
                return plain.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
            if plain.dtype == torch.float8_e4m3fn:
                return plain.contiguous().view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
            return plain.numpy()

        return read

    own_names = {f"torch.{name}": stored for stored, name in (WEIGHT_DTYPES | QUANTIZED_DTYPES).items()}
    return {
        name: Tensor(tuple(t.shape), reader(t), own_names.get(str(t.dtype), str(t.dtype))) for name, t in state.items()
    }


_SAFETENSORS_DTYPES = {name: stored for stored, name in (WEIGHT_DTYPES | QUANTIZED_DTYPES).items()}


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, one tensor in memory at a time, with the "pt" mark that diffusers asks for.

    The library's own writer wants all tensors at once, which is a second copy of a network, and orders the metadata
    differently in each process.

    Args:
        tensors: by name, each with its dtype.
        metadata: of the header, beside the mark.
    Raises:
        OSError: where the disk is full, or the like.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
        dtype = _SAFETENSORS_DTYPES[np.dtype(tensor.dtype).name]
        header[name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8

    def fill(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            array = np.ascontiguousarray(tensor.read())
            file.write(array.reshape(-1).view(np.uint8).data)

    fill_file(path, fill)
