"""Readers of models: configurations, tensors, tokenizers, schedulers, LoRA."""

from __future__ import annotations

import functools
import json
import os
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from kandinsky_jax.checkpoint import CheckpointError, check_network, hub, load_network, orbax, tensor_files, zero_embed
from kandinsky_jax.checkpoint.tokenizer import load_tokenizer
from kandinsky_jax.common.storage import read_json
from kandinsky_jax.images import CLIPImageProcessor
from kandinsky_jax.models import NETWORKS
from kandinsky_jax.models.config import ConfigError
from kandinsky_jax.pipelines.modes import repository_of
from kandinsky_jax.schedulers import SCHEDULERS, SchedulerError, scheduler_from_config
from tests.conftest import OFFICIAL, SHAPES_MODEL
from tests.fuzz.harness import Reader, lasting_folder

PRIOR, DECODER = SHAPES_MODEL / hub.PRIOR, SHAPES_MODEL / hub.DECODER
CONTROLNET, INPAINT = SHAPES_MODEL / hub.CONTROLNET, SHAPES_MODEL / hub.INPAINT
COMPONENTS = {
    "UNet2DConditionModel": DECODER / "unet",
    "VQModel": DECODER / "movq",
    "PriorTransformer": PRIOR / "prior",
    "CLIPTextModelWithProjection": PRIOR / "text_encoder",
    "CLIPVisionModelWithProjection": PRIOR / "image_encoder",
}


def copy(source: Path, target: Path, *names: str, link: tuple[str, ...] = ()) -> list[Path]:
    """Copy files (all, where none is named) and link others, which stay intact."""
    target.mkdir(parents=True, exist_ok=True)
    for name in link:
        (target / name).symlink_to(source / name)
    found = [source / name for name in names] or [p for p in source.iterdir() if p.is_file() and p.name not in link]
    return [Path(shutil.copy(path, target)) for path in found]


def _index(folder: Path) -> list[Path]:
    for part in COMPONENTS.values():
        (folder / part.name).mkdir(exist_ok=True)
    return copy(PRIOR, folder, "model_index.json")


def _read_index(folder: Path) -> None:
    hub.resolve(folder, hub.PRIOR)
    hub.components(folder)
    repository_of(hub.pipeline_class(folder))


def _readme(folder: Path) -> list[Path]:
    (folder / "README.md").write_text("---\nprior:\n- tiny\ntags:\n- text-to-image\n---\n# A decoder\n")
    return [folder / "README.md"]


# Networks ---------------------------------------------------------------------------------------------------------


def _config(name: str) -> Reader:
    source = COMPONENTS[name]
    tensors = next(path.name for path in source.glob("*.safetensors") if path.name != tensor_files.ZERO_EMBED)
    return Reader(
        f"config.json of {name}",
        lambda folder: copy(source, folder, "config.json", link=(tensors,)),
        lambda folder: check_network(NETWORKS[name], folder),
        (ConfigError, CheckpointError),
    )


def _official_configs(folder: Path) -> list[Path]:
    found = []
    for path in OFFICIAL.glob("*/*/config.json"):
        target = folder / path.parent.parent.name / path.parent.name
        found += copy(path.parent, target, "config.json")
    return found


def _read_official_configs(folder: Path) -> None:
    kinds = {path.name: name for name, path in COMPONENTS.items()}
    for path in sorted(folder.glob("*/*/")):
        NETWORKS[kinds[path.name]].CONFIG.from_dict(read_json(path / "config.json"), str(path))


def _tensors(name: str) -> Reader:
    source = COMPONENTS[name]
    tensors = next(path.name for path in source.glob("*.safetensors") if path.name != tensor_files.ZERO_EMBED)
    return Reader(
        f"safetensors of {name}",
        lambda folder: copy(source, folder, tensors, link=("config.json",)),
        lambda folder: load_network(NETWORKS[name], folder, jnp.float32),
        (CheckpointError,),
    )


def _few_tensors() -> dict[str, np.ndarray]:
    return {
        "conv_in.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
        "conv_in.bias": np.ones(2, np.float16),
        "empty": np.zeros((0, 3), np.float32),
    }


def _shards(folder: Path) -> list[Path]:
    tensors = _few_tensors()
    names, weight_map = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), {}
    for i, shard in enumerate(names):
        part = dict(list(tensors.items())[i::2])
        save_file(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 100}, "weight_map": weight_map}))
    return [index, index, *(folder / shard for shard in names)]


def _read_shards(folder: Path) -> None:
    for tensor in tensor_files.open_tensors(folder / "model.safetensors.index.json").values():
        tensor.read()


class _Malicious:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"echo run > {self.path}",)


MARKER = Path(tempfile.gettempdir()) / f"kandinsky-jax-fuzz-{os.getpid()}-was-run"


def _pickles(folder: Path) -> list[Path]:
    import torch

    tensors = {name: torch.from_numpy(array) for name, array in _few_tensors().items()}
    torch.save(tensors, folder / "model.bin")
    torch.save(tensors, folder / "old.bin", _use_new_zipfile_serialization=False)
    (folder / "malicious.bin").write_bytes(pickle.dumps({"a": _Malicious(MARKER)}))
    torch.save({"a": _Malicious(MARKER)}, folder / "malicious2.bin")
    return list(folder.iterdir())


def _read_pickles(folder: Path) -> None:
    refused = []
    for path in sorted(folder.iterdir()):
        try:
            for tensor in tensor_files.open_tensors(path).values():
                tensor.read()
        except CheckpointError as error:
            if not path.name.startswith("malicious"):
                raise
            refused.append(error)
        assert not MARKER.exists(), "a pickle ran code"


@functools.cache
def _orbax_checkpoint() -> Path:
    folder = lasting_folder() / "params"
    orbax.save(folder, {name: jnp.asarray(array) for name, array in _few_tensors().items() if array.size})
    return folder


def _orbax(folder: Path) -> list[Path]:
    shutil.copytree(_orbax_checkpoint(), folder, dirs_exist_ok=True)
    return [path for path in folder.rglob("*") if path.is_file()]


def _read_orbax(folder: Path) -> None:
    orbax.restore(
        folder, {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in orbax.list_arrays(folder).items()}
    )
    orbax.read(folder, ["conv_in.bias"])


def _zero_embed(folder: Path) -> list[Path]:
    source = PRIOR / "image_encoder"
    return copy(source, folder, tensor_files.ZERO_EMBED, link=("config.json", "model.safetensors"))


@functools.cache
def _fingerprint() -> str:
    source = PRIOR / "image_encoder"
    return zero_embed.fingerprint(source, check_network(NETWORKS["CLIPVisionModelWithProjection"], source))


# Small components -------------------------------------------------------------------------------------------------


def _scheduler(name: str) -> Reader:
    def build(folder: Path) -> list[Path]:
        SCHEDULERS[name]().save_pretrained(folder)
        return [folder / "scheduler_config.json"]

    def read(folder: Path) -> None:
        path = folder / "scheduler_config.json"
        scheduler = scheduler_from_config(read_json(path), str(path))
        repr(scheduler)
        try:
            scheduler.steps(20)
            scheduler.schedule(20)
            _ = scheduler.alphas_cumprod
            scheduler.save_pretrained(folder / "again")
        except SchedulerError as error:  # of a call, which does not know of the file any more
            raise SchedulerError(f"{path}: {error}") from error

    return Reader(f"scheduler_config.json of {name}", build, read, (CheckpointError, SchedulerError))


def _read_processor(folder: Path) -> None:
    CLIPImageProcessor.from_pretrained(folder)(Image.new("RGB", (40, 30)))


def _tokenizer(folder: Path) -> list[Path]:
    return copy(PRIOR / "tokenizer", folder)


def _slow_tokenizer(folder: Path) -> list[Path]:
    return copy(
        PRIOR / "tokenizer", folder, "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"
    )


READERS = (
    Reader("model_index.json", _index, _read_index, (CheckpointError,)),
    Reader("README.md", _readme, hub.find_prior, (CheckpointError,)),
    *(_config(name) for name in NETWORKS),
    Reader("official config.json", _official_configs, _read_official_configs, (ConfigError, CheckpointError)),
    *(_tensors(name) for name in ("CLIPTextModelWithProjection", "PriorTransformer")),
    Reader("safetensors index", _shards, _read_shards, (CheckpointError,)),
    Reader("pickles", _pickles, _read_pickles, (CheckpointError,)),
    Reader("Orbax", _orbax, _read_orbax, (CheckpointError,)),
    Reader(
        "zero_embed",
        _zero_embed,
        lambda folder: zero_embed._find(folder, _fingerprint()),
        (CheckpointError,),
    ),
    *(_scheduler(name) for name in SCHEDULERS),
    Reader(
        "preprocessor_config.json",
        lambda folder: copy(PRIOR / "image_processor", folder),
        _read_processor,
        (CheckpointError,),
    ),
    Reader("tokenizer.json", _tokenizer, load_tokenizer, (CheckpointError,)),
    Reader("vocab.json and merges.txt", _slow_tokenizer, load_tokenizer, (CheckpointError,)),
)
