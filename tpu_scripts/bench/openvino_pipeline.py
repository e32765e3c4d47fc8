"""diffusers' pipelines with their networks run by OpenVINO, as people speed them up on a CPU.

Each network is converted once, in a process of its own, for the shapes of its first call, and kept in a folder as
OpenVINO's files. The pipelines get modules without weights that call the compiled files, in float32, for one request at
a time (the hint LATENCY). Not for use by hand; a side of `benchmark.py`.

    python tpu_scripts/bench/openvino_pipeline.py CALL.pt TARGET.xml   # what `Compiled` runs to convert a network
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.utils import _pytree

OPTIONS = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
# What a pipeline calls of its components, by the names of their folders.
METHODS = {
    "unet": "forward",
    "movq": "decode",
    "prior": "forward",
    "text_encoder": "forward",
    "image_encoder": "forward",
}
KEPT = {"clip_mean", "clip_std"}  # parameters that pipelines use outside these methods


def without_weights(cls: Any, folder: Path, programs: Path) -> Any:
    """Return a network without weights, of which OpenVINO runs the method that pipelines call.

    Args:
        cls: its class, diffusers' or transformers'.
        folder: its configuration and weights.
        programs: where converted networks are kept.
    """
    with torch.device("meta"):
        if hasattr(cls, "load_config"):  # diffusers'
            module = cls.from_config(cls.load_config(folder))
        else:
            module = cls(cls.config_class.from_pretrained(folder))
    # Of the right shape, dtype and device, which pipelines ask for, but one number in memory.
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    one = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
                    tensors[name] = one if tensors is part._buffers else torch.nn.Parameter(one, requires_grad=False)
    for name in KEPT & dict(module.named_parameters()).keys():
        with safe_open(folder / "diffusion_pytorch_model.safetensors", "pt") as file:
            setattr(module, name, torch.nn.Parameter(file.get_tensor(name), requires_grad=False))
    method = METHODS[folder.name]
    setattr(module, method, Compiled(cls, folder, method, programs))
    return module.eval()


class Compiled:
    """A method of a network, converted and compiled once for each kind of arguments.

    Args:
        cls, folder: of the network.
        method: takes tensors and constants in any structure, and returns a mapping or a tuple of tensors.
        programs: where converted networks are kept.
    """

    def __init__(self, cls: Any, folder: Path, method: str, programs: Path):
        self._network = (f"{cls.__module__}.{cls.__qualname__}", str(folder.resolve()), method)
        self._programs = programs
        self._compiled: dict[str, tuple[Any, Any]] = {}

    @torch.inference_mode()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, tree = _pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        kinds = [(tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else repr(x) for x in leaves]
        key = hashlib.sha256(repr((self._network, str(tree), kinds)).encode()).hexdigest()[:16]
        if key not in self._compiled:
            self._compiled[key] = self._compile(key, args, kwargs)
        program, result = self._compiled[key]
        found = program([tensor.numpy() for tensor in tensors])
        return _pytree.tree_unflatten([torch.from_numpy(found[output]) for output in program.outputs], result)

    def _compile(self, key: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        import openvino

        self._programs.mkdir(parents=True, exist_ok=True)
        target = self._programs / f"{Path(self._network[1]).name}-{key}.xml"
        result = target.with_suffix(".result")
        if not result.exists():
            call = target.with_suffix(".call")
            torch.save({"network": self._network, "args": args, "kwargs": dict(kwargs)}, call)
            # In a process of its own, so that the memory of converting is not that of running.
            subprocess.run([sys.executable, "-W", "ignore", __file__, str(call), str(target)], check=True)
        program = openvino.Core().compile_model(str(target), "CPU", OPTIONS)
        return program, _pytree.treespec_loads(result.read_text())


def convert(call: Path, target: Path) -> None:
    """Write a network as OpenVINO's files, for the arguments of one call; the result's structure beside it."""
    import importlib

    import openvino

    given = torch.load(call, weights_only=True)
    name, folder, method = given["network"]
    module, _, attribute = name.rpartition(".")
    network = getattr(importlib.import_module(module), attribute).from_pretrained(folder, dtype=torch.float32)
    torch.nn.GroupNorm.forward = _group_norm
    leaves, tree = _pytree.tree_flatten((tuple(given["args"]), given["kwargs"]))
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    flat = _Flat(network.eval(), method, leaves, tree)
    with torch.inference_mode():
        model = openvino.convert_model(flat, example_input=tensors)
    model.reshape({given: list(tensor.shape) for given, tensor in zip(model.inputs, tensors, strict=True)})
    openvino.save_model(model, target, compress_to_fp16=False)
    target.with_suffix(".result").write_text(_pytree.treespec_dumps(flat.result))


class _Flat(torch.nn.Module):
    """A call of a network that takes and returns tensors alone; `result` is the structure of what it returned last."""

    def __init__(self, network: torch.nn.Module, method: str, leaves: list[Any], tree: Any):
        super().__init__()
        self.network, self._method, self._leaves, self._tree = network, method, leaves, tree
        self.result: Any = None

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = iter(tensors)
        filled = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in self._leaves]
        args, kwargs = _pytree.tree_unflatten(filled, self._tree)
        found = getattr(self.network, self._method)(*args, **kwargs)
        leaves, self.result = _pytree.tree_flatten(found)
        return tuple(leaves)


def _group_norm(self: torch.nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    """GroupNorm as a norm of each group's row: OpenVINO 2025.4.1 to 2026.4.1 crash compiling its own GroupNormalization
    in this UNet, where a CPU has AVX-512."""
    groups = x.reshape(len(x), self.num_groups, -1)
    normed = torch.nn.functional.layer_norm(groups, groups.shape[-1:], eps=self.eps).reshape(x.shape)
    shape = (1, -1, *[1] * (x.ndim - 2))
    return normed * self.weight.reshape(shape) + self.bias.reshape(shape)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
