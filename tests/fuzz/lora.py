"""Readers of LoRA: diffusers' file with its header, peft's folder, names of older scripts with alphas."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from kandinsky_jax.checkpoint import CheckpointError, describe_network, flat_params, lora_files
from kandinsky_jax.models import NETWORKS
from tests.fuzz.harness import Reader
from tests.fuzz.models import COMPONENTS

LAYERS = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_out.0", "transformer_blocks.1.ff.net.2")


@functools.cache
def _prior() -> dict[str, tuple[int, ...]]:
    return lora_files.layers_of(
        flat_params(describe_network(NETWORKS["PriorTransformer"], COMPONENTS["PriorTransformer"]))
    )


def _tensors(prefix: str, down: str, up: str) -> dict[str, np.ndarray]:
    rng, found = np.random.default_rng(0), {}
    for layer in LAYERS:
        out, inner = _prior()[layer][:2]
        found[f"{prefix}{layer}.{down}.weight"] = rng.normal(size=(4, inner)).astype(np.float32)
        found[f"{prefix}{layer}.{up}.weight"] = rng.normal(size=(out, 4)).astype(np.float32)
    return found


CONFIG = {"r": 4, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {"ff.net.2": 2}, "use_rslora": True}


def _diffusers(folder: Path) -> list[Path]:
    about = {f"prior.{key}": value for key, value in CONFIG.items()}
    metadata = {"format": "pt", lora_files.METADATA: json.dumps(about)}
    save_file(_tensors("prior.", "lora_A", "lora_B"), folder / "pytorch_lora_weights.safetensors", metadata)
    return list(folder.iterdir())


def _peft(folder: Path) -> list[Path]:
    save_file(_tensors("base_model.model.", "lora_A", "lora_B"), folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "target_modules": ["to_q", "to_out.0", "net.2"], **CONFIG}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return list(folder.iterdir())


def _old(folder: Path) -> list[Path]:
    import torch

    tensors = _tensors("prior.", "lora.down", "lora.up")
    tensors |= {f"prior.{layer}.alpha": np.asarray(2.0, np.float32) for layer in LAYERS}
    path = folder / "pytorch_lora_weights.bin"
    torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, path)
    return [path]


def _read(folder: Path) -> None:
    lora_files.read(lora_files.open_file(lora_files.find(folder)), {"prior": _prior()})


READERS = (
    Reader("LoRA of diffusers", _diffusers, _read, (CheckpointError,)),
    Reader("LoRA of peft", _peft, _read, (CheckpointError,)),
    Reader("LoRA of older scripts", _old, _read, (CheckpointError,)),
)
