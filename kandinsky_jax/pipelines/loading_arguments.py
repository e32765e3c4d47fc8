"""Arguments of `from_pretrained`: dtypes by component, and the treatment of diffusers' other arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax.numpy as jnp

from kandinsky_jax.checkpoint import default_dtype, network_dtype
from kandinsky_jax.common.errors import shorten

_PLACEMENT = "give mesh=kandinsky_jax.make_mesh(...) and shard_rules=, or leave it out to use every device"
_MEMORY = "networks lie on JAX's devices as a whole; leave it out, or shard them with mesh= and shard_rules="
_QUANTIZATION = "call pipe.quantize() once it is loaded, or load what `convert_weights --quantize int8` has written"
_CODE = "no code of a repository is run here: import the class and give it the components"

# Arguments of diffusers' from_pretrained that have no use here, and what to write instead.
INSTEAD: dict[str, str] = {
    "device_map": _PLACEMENT,
    "device": _PLACEMENT,
    "max_memory": _MEMORY,
    "offload_folder": _MEMORY,
    "offload_state_dict": _MEMORY,
    "quantization_config": _QUANTIZATION,
    "load_in_8bit": _QUANTIZATION,
    "load_in_4bit": _QUANTIZATION,
    "custom_pipeline": _CODE,
    "custom_revision": _CODE,
    "trust_remote_code": _CODE,
    "proxies": "set the environment variables HTTPS_PROXY and NO_PROXY",
    "mirror": "set the environment variable HF_ENDPOINT",
    "use_auth_token": "give token=",
    "from_flax": "leave it out: PyTorch's files and Orbax checkpoints are read",
    "from_tf": "leave it out: PyTorch's files and Orbax checkpoints are read",
    "use_onnx": "leave it out: there are no ONNX models here",
    "provider": "leave it out: there are no ONNX models here",
    "sess_options": "leave it out: there are no ONNX models here",
    "output_loading_info": "leave it out: whatever does not fit in a checkpoint is an error",
    "ignore_mismatched_sizes": "leave it out: a tensor of another shape is an error",
    "load_connected_pipeline": "load a combined pipeline, which finds its prior, or give it prior=",
    "use_flashpack": "leave it out: safetensors, .bin and Orbax checkpoints are read",
    "attn_implementation": "leave it out: attention is chosen by platform and shape",
    "feature_extractor": "leave it out, Kandinsky 2.2 has none; the prior's image_processor prepares pictures",
    "safety_checker": "leave it out, Kandinsky 2.2 has none",
    "requires_safety_checker": "leave it out, Kandinsky 2.2 has no safety checker",
}
# How PyTorch reads files; these change no result.
_WITHOUT_EFFECT = frozenset({"low_cpu_mem_usage", "resume_download", "disable_mmap", "keep_in_fp32_modules"})
# Ignored where they are None or False, which is the behaviour here.
_MAY_BE_OFF = frozenset(INSTEAD) - {"custom_revision"}


def without_diffusers_arguments(arguments: Mapping[str, object], function: str) -> dict[str, Any]:
    """Drop the arguments of diffusers that change nothing here.

    Raises:
        TypeError: for one that is not supported; the message says what to write instead.
    """
    kept = {}
    for name, value in arguments.items():
        if name in _WITHOUT_EFFECT or (name in _MAY_BE_OFF and (value is None or value is False)):
            continue
        if name in INSTEAD:
            raise TypeError(f"{function} takes no {name}={shorten(value, 60)}: {INSTEAD[name]}")
        kept[name] = value
    return kept


@dataclasses.dataclass(frozen=True)
class Dtypes:
    """The dtype of each network of a pipeline."""

    default: jnp.dtype
    by_name: Mapping[str, jnp.dtype] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, dtype: object, torch_dtype: object, components: Sequence[str]) -> Self:
        """Read the arguments `dtype` and `torch_dtype` of a pipeline with these components."""
        if dtype is not None and torch_dtype is not None:
            raise TypeError("dtype and torch_dtype are two names of one argument: give one of them")
        given = torch_dtype if dtype is None else dtype
        if not isinstance(given, Mapping):
            return cls(network_dtype(given) or default_dtype())
        if unknown := [name for name in given if name not in components and name != "default"]:
            raise ValueError(
                f"dtype has no component {shorten(unknown)}; there are default, {shorten(', '.join(components), 250)}"
            )
        chosen: dict[str, Any] = {name: network_dtype(value) or default_dtype() for name, value in given.items()}
        return cls(chosen.pop("default", None) or default_dtype(), chosen)

    def of(self, name: str) -> jnp.dtype:
        """Return the dtype of a component, by its name in the constructor."""
        return self.by_name.get(name, self.default)
