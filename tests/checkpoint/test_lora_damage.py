"""Damaged LoRA files and configurations load, or raise one CheckpointError that names the file."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from kandinsky_jax.checkpoint import CheckpointError, lora_files
from kandinsky_jax.lora import FILE
from tests.checkpoint.test_lora_names import NETWORKS, SPELLINGS, UNET, arrays
from tests.conftest import note
from tests.fuzz.mutations import change_value, damage, to_json, wild_value

CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "use_rslora": False,
    "rank_pattern": {"conv_in": 2, r"down_blocks\.\d+.*to_q": 2},
    "alpha_pattern": {"^time_embedding.linear_1": 1, "to_out.0": 3.5},
    "target_modules": ["conv_in", "to_q"],
    "bias": "none",
    "init_lora_weights": True,
    "loftq_config": {},
}


def of_diffusers(folder: Path, rng: random.Random) -> Path:
    """A configuration in the header that says something else."""
    text = to_json(change_value(CONFIG, rng), rng).encode("utf-8", "replace").decode()
    save_file(SPELLINGS["diffusers"](arrays(UNET)), folder / FILE, {lora_files.METADATA: text})
    return folder / FILE


def of_kohya(folder: Path, rng: random.Random) -> Path:
    """Alphas of any value, dtype and shape."""
    tensors = SPELLINGS["kohya"](arrays(UNET))
    for name in rng.sample(list(UNET), rng.choice((1, 1, 2))):
        value, dtype = (
            wild_value(rng),
            rng.choice(("float32", "float16", "float64", "int64", "uint8", "bool", "complex64")),
        )
        number = value if isinstance(value, int | float) and abs(value) < 2**62 else rng.choice((0.0, np.nan, np.inf))
        shape = rng.choice(((), (), (), (1,), (2,), (0,), (1, 1)))
        with np.errstate(all="ignore"):
            tensors[f"lora_unet_{name.replace('.', '_')}.alpha"] = np.full(shape, np.array(number).astype(dtype))
    if rng.random() < 0.3:
        name = rng.choice(list(tensors))
        tensors[rng.choice((name + ".x", name.replace("unet", "te"), name.replace("lora_down", "hada_w1_a"), ""))] = (
            tensors.pop(name)
        )
    save_file(tensors, folder / FILE)
    return folder / FILE


def of_peft(folder: Path, rng: random.Random) -> Path:
    """peft's folder, one of its files damaged in any way."""
    tensors = SPELLINGS["PeftModel"](arrays(UNET))
    if rng.random() < 0.7:
        save_file(tensors, folder / "adapter_model.safetensors")
    else:
        torch.save({name: torch.from_numpy(a) for name, a in tensors.items()}, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    damage(rng.choice(sorted(folder.iterdir())), rng)
    return folder


def of_training(folder: Path, rng: random.Random) -> Path:
    """A safetensors file damaged in any way."""
    save_file(SPELLINGS["peft"](arrays(UNET)), folder / FILE, {lora_files.METADATA: json.dumps(CONFIG)})
    damage(folder / FILE, rng)
    return folder


KINDS = (of_diffusers, of_kohya, of_peft, of_training)


def trial(folder: Path, seed: int) -> bool:
    """Whether a damaged file was refused; it fails where anything else than a CheckpointError comes out."""
    folder.mkdir()
    rng = random.Random(seed)
    path = KINDS[seed % len(KINDS)](folder, rng)
    refused = None
    try:
        found, _ = lora_files.read(lora_files.open_file(lora_files.find(path)), NETWORKS)
        for change in (change for adapter in found.values() for change in adapter.values()):
            with np.errstate(over="ignore", invalid="ignore"):
                change.delta()
    except CheckpointError as error:
        refused = error
    finally:
        shutil.rmtree(folder)
    if refused is not None:
        assert type(refused) is CheckpointError, seed
        assert str(folder) in str(refused), seed
        assert len(str(refused)) < 500, seed
    return refused is not None


@pytest.mark.parametrize("count", [160, pytest.param(4000, marks=pytest.mark.campaign)])
def test_damaged_files(tmp_path, count):
    refused = sum(trial(tmp_path / "f", seed) for seed in range(count))
    assert 0.3 * count < refused < count
    note(refused / count, "part of the damaged files that is refused")
