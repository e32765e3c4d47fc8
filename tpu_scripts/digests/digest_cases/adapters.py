"""LoRA: loaded, weighted, fused, taken out and saved."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from digest_cases import Case, inputs
from digest_cases.modes import GUIDED, call
from digest_cases.values import folder_bytes

NAME = "KandinskyV22CombinedPipeline"


def cases() -> list[Case]:
    """All cases of the module."""
    steps: dict[str, Callable[[Any, Path], None]] = {
        "loaded": lambda pipe, folder: pipe.load_lora_weights(folder / "a.safetensors", "a"),
        "weight 0.4": lambda pipe, folder: pipe.load_lora_weights(folder / "a.safetensors", "a", 0.4),
        "kohya's names": lambda pipe, folder: pipe.load_lora_weights(folder / "kohya.safetensors", "k"),
        "two added up": _two,
        "disabled": _disabled,
        "fused": _fused,
        "fused and unfused": _unfused,
        "unloaded": _unloaded,
        "weights by part": _by_part,
    }
    quick = ("loaded", "fused", "two added up")
    found = [Case(f"lora/{name}", functools.partial(_generated, step), name in quick) for name, step in steps.items()]
    return [*found, Case("lora/saved file", _saved, quick=True), Case("lora/exported fused", _exported)]


def _files(folder: Path) -> None:
    """Two adapters of the prior and the UNet by diffusers' names, and one of the UNet by kohya's."""
    for seed, name in ((1, "a"), (2, "b")):
        rng = np.random.default_rng(seed)
        tensors = {}
        for network, layer, (rows, columns) in _layers():
            for part, shape in (("A", (4, columns)), ("B", (rows, 4))):
                values = 0.1 * rng.normal(size=shape)
                tensors[f"{network}.{layer}.lora_{part}.weight"] = values.astype(np.float32)
        save_file(tensors, folder / f"{name}.safetensors")
    rng = np.random.default_rng(3)
    tensors = {}
    for network, layer, (rows, columns) in _layers():
        if network == "unet":
            stem = f"lora_unet_{layer.replace('.', '_')}"
            tensors[f"{stem}.lora_down.weight"] = (0.1 * rng.normal(size=(4, columns))).astype(np.float32)
            tensors[f"{stem}.lora_up.weight"] = (0.1 * rng.normal(size=(rows, 4))).astype(np.float32)
            tensors[f"{stem}.alpha"] = np.full((), 2, np.float32)
    save_file(tensors, folder / "kohya.safetensors")


@functools.cache
def _layers() -> list[tuple[str, str, tuple[int, int]]]:
    """Attention layers by (network, PyTorch's name, shape), from the weights that the model is saved with."""
    import tempfile

    from safetensors.numpy import load_file

    found = []
    with tempfile.TemporaryDirectory() as folder:
        inputs.pipeline(NAME, inputs.TINY).save_pretrained(folder)
        for part, network in (("unet", "unet"), ("prior_prior", "prior")):
            [file] = Path(folder, part).glob("*.safetensors")
            for name, array in sorted(load_file(file).items()):
                layer = name.removesuffix(".weight")
                if name.endswith(".weight") and layer.rpartition(".")[2] in ("to_q", "to_k", "to_v", "add_k_proj"):
                    found.append((network, layer, array.shape))
    return found


def _generated(step: Callable[[Any, Path], None], folder: Path) -> Any:
    pipe = inputs.pipeline(NAME, inputs.TINY)
    _files(folder)
    try:
        step(pipe, folder)
        return {
            "images": call(pipe, **GUIDED),
            "active": pipe.get_active_adapters(),
            "fused": sorted(pipe.fused_loras),
        }
    finally:
        if pipe.num_fused_loras:
            pipe.unfuse_lora()
        pipe.unload_lora_weights()


def _load_both(pipe: Any, folder: Path) -> None:
    pipe.load_lora_weights(folder / "a.safetensors", "a")
    pipe.load_lora_weights(folder / "b.safetensors", "b")


def _two(pipe: Any, folder: Path) -> None:
    _load_both(pipe, folder)
    pipe.set_adapters(["a", "b"], [0.7, -0.3])


def _disabled(pipe: Any, folder: Path) -> None:
    _load_both(pipe, folder)
    pipe.disable_lora()


def _fused(pipe: Any, folder: Path) -> None:
    _load_both(pipe, folder)
    pipe.fuse_lora(lora_scale=0.5, adapter_names=["a"])


def _unfused(pipe: Any, folder: Path) -> None:
    _fused(pipe, folder)
    pipe.unfuse_lora()


def _unloaded(pipe: Any, folder: Path) -> None:
    _load_both(pipe, folder)
    pipe.unload_lora_weights()


def _by_part(pipe: Any, folder: Path) -> None:
    _load_both(pipe, folder)
    pipe.set_adapters(["a"], [{"unet": {"down": 0.5, "up": 1.5}, "prior": 0.3}])


def _saved(folder: Path) -> Any:
    pipe = inputs.pipeline(NAME, inputs.TINY)
    _files(folder)
    _load_both(pipe, folder)
    try:
        return {"lora.safetensors": Path(pipe.save_lora_weights(folder / "saved", "b")).read_bytes()}
    finally:
        pipe.unload_lora_weights()


def _exported(folder: Path) -> Any:
    pipe = inputs.pipeline("KandinskyV22CombinedPipeline", inputs.TINY)
    _files(folder)
    _fused(pipe, folder)
    try:
        pipe.decoder_pipe.save_pretrained(folder / "model")
        return folder_bytes(folder / "model")
    finally:
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
