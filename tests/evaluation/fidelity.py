"""torch-fidelity's modules, without what its package imports besides: torchvision, which none of them needs."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
import warnings


def module(name: str) -> types.ModuleType:
    """Import a module of torch-fidelity, such as "metric_kid"."""
    if "torch_fidelity" not in sys.modules:
        package = types.ModuleType("torch_fidelity")
        package.__path__ = list(importlib.util.find_spec("torch_fidelity").submodule_search_locations)
        sys.modules["torch_fidelity"] = package
        utils = types.ModuleType("torch_fidelity.utils")  # what reads pictures
        utils.__getattr__ = lambda name: None
        sys.modules["torch_fidelity.utils"] = utils
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"torch_fidelity.{name}")
