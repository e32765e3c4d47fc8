"""diffusers' pipelines with their networks run by OpenVINO, as people speed them up on a CPU.

Each network is traced by PyTorch at its first call, for the shapes of that call, and compiled in float32 for one
request at a time (the hint LATENCY). Not for use by hand; a side of `benchmark.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import openvino
import torch
from torch.utils import _pytree

OPTIONS = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
# What a pipeline calls of its components, by their names without "prior_".
METHODS = {"unet": "forward", "movq": "decode", "prior": "forward", "text_encoder": "forward"}


def use_openvino(pipe: Any) -> None:
    """Have OpenVINO run a pipeline's networks; CLIP's vision tower, which prompts do not need, stays PyTorch's."""
    for name, component in pipe.components.items():
        if (method := METHODS.get(name.removeprefix("prior_"))) and isinstance(component, torch.nn.Module):
            # Over the class's method, so that the module's own attributes stay as they are.
            setattr(component, method, Compiled(component, getattr(component, method)))


class Compiled:
    """A method of a module, compiled once for each kind of arguments.

    Args:
        module: whose method it is.
        method: takes tensors and constants in any structure, and returns tensors in any structure.
    """

    def __init__(self, module: torch.nn.Module, method: Callable[..., Any]):
        self._module, self._method = module, method
        self._programs: dict[Any, tuple[openvino.CompiledModel, Any]] = {}

    @torch.inference_mode()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, tree = _pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        key = (str(tree), *(tuple(x.shape) if isinstance(x, torch.Tensor) else repr(x) for x in leaves))
        if key not in self._programs:
            self._programs[key] = self._compiled(leaves, tree, tensors)
        program, result = self._programs[key]
        found = program([tensor.numpy() for tensor in tensors])
        return _pytree.tree_unflatten([torch.from_numpy(found[output]) for output in program.outputs], result)

    def _compiled(
        self, leaves: list[Any], tree: Any, tensors: list[torch.Tensor]
    ) -> tuple[openvino.CompiledModel, Any]:
        flat = _Flat(self._module, functools.partial(_call, self._method, leaves, tree))
        model = openvino.convert_model(flat, example_input=tuple(tensors))
        model.reshape({given: list(tensor.shape) for given, tensor in zip(model.inputs, tensors, strict=True)})
        return openvino.Core().compile_model(model, "CPU", OPTIONS), flat.result


class _Flat(torch.nn.Module):
    """A module whose call takes and returns tensors alone; `result` is the structure of what it returned last."""

    def __init__(self, module: torch.nn.Module, call: Callable[[tuple[torch.Tensor, ...]], Any]):
        super().__init__()
        self.module, self._call = module, call
        self.result: Any = None

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves, self.result = _pytree.tree_flatten(self._call(tensors))
        return tuple(leaves)


def _call(method: Callable[..., Any], leaves: list[Any], tree: Any, tensors: tuple[torch.Tensor, ...]) -> Any:
    """Call a method with tensors in the places of those it had at first."""
    given = iter(tensors)
    args, kwargs = _pytree.tree_unflatten([next(given) if isinstance(x, torch.Tensor) else x for x in leaves], tree)
    return method(*args, **kwargs)
