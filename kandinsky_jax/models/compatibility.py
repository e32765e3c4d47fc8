"""Members of PyTorch's modules: `to`, `device`, `dtype`, and switches that save memory there.

Shared by networks and pipelines, so that programs written for diffusers run as they are.
"""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from kandinsky_jax.common.errors import shorten
from kandinsky_jax.models.layers import dtype_of
from kandinsky_jax.models.quantization_config import has_own_dtype
from kandinsky_jax.parallel.mesh import make_mesh
from kandinsky_jax.parallel.sharding import REPLICATED, in_memory

# PyTorch's names of devices, and JAX's platform where it has one.
PLATFORMS = {"cpu": "cpu", "cuda": "gpu", "gpu": "gpu", "tpu": "tpu", "xla": "tpu", "mps": "METAL"}
FOREIGN = ("cuda", "xla", "mps", "xpu", "npu", "hpu", "mlu")  # where there is no such device, another accelerator does
DTYPES = {"half": "float16", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

_warned: weakref.WeakKeyDictionary[object, set[str]] = weakref.WeakKeyDictionary()


def warn_once(owner: object, what: str, message: str, stacklevel: int = 3) -> None:
    """Warn once per object and subject."""
    seen = _warned.setdefault(owner, set())
    if what not in seen:
        seen.add(what)
        warnings.warn(message, stacklevel=stacklevel)


def without_effect(name: str, instead: str = "") -> Callable[..., None]:
    """Return a method that only warns once, for a member that saves memory or time in PyTorch.

    Args:
        instead: what to write for what else the member can do.
    """

    def method(self: object, *_: object, **__: object) -> None:
        warn_once(
            self,
            name,
            f"{type(self).__name__}.{name}() has no effect here: XLA plans memory and attention by itself; to use less "
            f"memory, load with dtype='bfloat16', or shard with mesh= and shard_rules={instead and f'; {instead}'}",
        )

    method.__name__ = name
    method.__doc__ = "Do nothing but warn once: XLA plans memory and attention by itself."
    return method


def nothing_to_do(self: object, *_: object, **__: object) -> None:
    """Do nothing: there is nothing to undo."""


def refused(name: str, instead: str) -> staticmethod[..., NoReturn]:
    """Return a method that raises NotImplementedError, saying what to write instead."""

    def method(*_: object, **__: object) -> NoReturn:
        raise NotImplementedError(f"{name} is not supported: {instead}")

    method.__name__ = name
    method.__doc__ = f"Not supported: {instead}."
    return staticmethod(method)


def _by_the_pipeline(name: str, instead: str = "") -> staticmethod[..., NoReturn]:
    """Return a method of diffusers' networks for LoRA, which pipelines handle here."""
    return refused(f"{name} of a network", f"LoRA is the pipeline's here; call pipe.{instead or name}(...)")


# Devices and dtypes -----------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """Target device and dtype of networks; None leaves them unchanged."""

    devices: Sequence[jax.Device] | None = None
    exact: bool = False  # on these devices, not just on some of their platform
    dtype: jnp.dtype | None = None

    def apply(self, network: nnx.Module) -> None:
        """Convert and move a network's parameters in place."""
        state = nnx.state(network, nnx.Param)
        if self.dtype is not None:
            flat = nnx.to_flat_state(state)
            changed = [(path, x.replace(_converted(str(path[-1]), x.get_value(), self.dtype))) for path, x in flat]
            state = nnx.from_flat_state(dict(changed))
        if self.devices is not None and not self._holds(jax.tree.leaves(state)[0]):
            place = NamedSharding(make_mesh(devices=self.devices), REPLICATED)
            state = jax.tree.map(lambda leaf: jax.device_put(leaf, in_memory(place, leaf.shape)), state)
        nnx.update(network, state)

    def _holds(self, leaf: jax.Array) -> bool:
        assert self.devices is not None
        if self.exact:
            return leaf.devices() == set(self.devices)
        return {device.platform for device in leaf.devices()} == {self.devices[0].platform}


def _converted(name: str, leaf: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Convert a parameter's dtype on the host, keeping its sharding, so that no program is compiled for every shape.

    Quantized weights and their scales keep their dtypes.
    """
    if has_own_dtype(name, leaf.dtype):
        return leaf
    with np.errstate(over="ignore"):  # overflow of float16 gives infinity, as in PyTorch
        array = np.asarray(leaf).astype(dtype)
    return jax.device_put(array, in_memory(leaf.sharding, leaf.shape) if leaf.committed else None)


def read_target(owner: object, arguments: Sequence[object], named: Mapping[str, object]) -> Target:
    """Read the arguments of PyTorch's `to`: a device, a dtype or both, positional or by name.

    Raises:
        TypeError, ValueError: for other values; the message lists what is supported.
    """
    devices: list[object] = []
    dtypes: list[object] = []
    rest = dict(named)
    for name in ("non_blocking", "copy", "memory_format", "silence_dtype_warnings"):  # without effect on the result
        rest.pop(name, None)
    for names, found in ((("device", "torch_device"), devices), (("dtype", "torch_dtype"), dtypes)):
        found += [value for name in names if (value := rest.pop(name, None)) is not None]
    if rest:
        raise TypeError(f"to() takes a device and a dtype, not {shorten(sorted(rest))}")
    for value in arguments:
        if value is not None:
            (dtypes if _is_dtype(value) else devices).append(value)
    if len(devices) > 1 or len(dtypes) > 1:
        raise TypeError(f"to() takes one device and one dtype, got {shorten(arguments)} {shorten(named)}")
    dtype = read_dtype(dtypes[0]) if dtypes else None
    return _read_devices(owner, devices[0])._replace(dtype=dtype) if devices else Target(dtype=dtype)


def _is_dtype(value: object) -> bool:
    if isinstance(value, str):
        return value in DTYPES or "float" in value or "int" in value
    return isinstance(value, np.dtype | type | jnp.dtype) or type(value).__name__ in ("dtype", "_ScalarMeta")


def read_dtype(value: Any) -> jnp.dtype:
    """Return a dtype of networks from its name or an object of NumPy, JAX or PyTorch."""
    text = str(value).removeprefix("torch.")
    try:
        found = jnp.dtype(DTYPES.get(text, text) if isinstance(value, str) or text != str(value) else value)
    except TypeError:
        found = None
    if found not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"dtype {shorten(value)} is not supported, only float32, bfloat16 and float16")
    return found


def _read_devices(owner: object, value: object) -> Target:
    if isinstance(value, jax.Device):
        return Target([value], exact=True)
    text = f"cuda:{shorten(value)}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    parsed = re.fullmatch(r"([a-z]+)(?::([0-9]{1,9}))?", text)
    if parsed is None or parsed[1] not in {*PLATFORMS, *FOREIGN}:
        raise ValueError(f"{shorten(value)} is not a device; give {_devices_here()}, or a dtype")
    kind, index = parsed[1], parsed[2]
    try:
        there = jax.local_devices(backend=PLATFORMS[kind]) if kind in PLATFORMS else []
    except RuntimeError:
        there = []
    if not there and kind in FOREIGN:
        warn_once(
            owner,
            f"to {kind}",
            f"there is no {kind} device here; {type(owner).__name__} stays on JAX's, {_devices_here()}",
            stacklevel=5,
        )
        return Target()
    if not there:
        raise ValueError(f"there is no {kind} device here; there are {_devices_here()}")
    if index is None:
        return Target(there)
    if int(index) >= len(there):
        raise ValueError(f"{text} is not here; there are {len(there)} {kind} devices, counted from 0")
    return Target([there[int(index)]], exact=True)


def _devices_here() -> str:
    return ", ".join(dict.fromkeys(device.platform for device in jax.local_devices()))


_ARRAYS = "flax.nnx.state(network, flax.nnx.Param) has the arrays, and num_parameters() counts them"
_PARTS = "parts are attributes, and flax.nnx.iter_graph(network) walks over all of them"
_HOOKS = "kandinsky_jax.models.capture(network, names) returns what its modules compute"
_NUMBERS = "networks are float32, bfloat16 or float16: call to(dtype)"
_XLA = "kandinsky_jax.models.with_attention(network, function) gives it an attention function of your own"
# Members of modules of PyTorch, diffusers and transformers that have no use here, and what to write instead.
INSTEAD: dict[str, str] = {
    "forward": "call the network itself",
    "state_dict": f"{_ARRAYS}; save_pretrained(FOLDER) writes them by diffusers' names",
    "load_state_dict": "from_pretrained reads diffusers' files, and flax.nnx.update(network, state) sets arrays",
    "zero_grad": "jax.grad returns gradients and keeps none",
    "apply": _PARTS,
    "push_to_hub": "call save_pretrained(FOLDER), then `hf upload OWNER/NAME FOLDER`",
    "from_single_file": "from_pretrained reads a folder with config.json and safetensors",
    "enable_parallelism": "give mesh= and shard_rules= to the pipeline's from_pretrained, or call pipe.shard",
    "get_config_dict": "load_config reads config.json, and network.config holds it",
    "extract_init_dict": "load_config reads config.json, and network.config holds it",
    "dummy_inputs": "pipe.warmup() compiles without inputs",
    **dict.fromkeys(
        "get_time_embed get_class_embed get_aug_embed process_encoder_hidden_states".split(),
        "unet.condition(...) computes what does not change from step to step, and the unet's parts are attributes",
    ),
    **dict.fromkeys("parameters named_parameters get_parameter buffers named_buffers get_buffer".split(), _ARRAYS),
    **dict.fromkeys("modules named_modules children named_children get_submodule set_submodule".split(), _PARTS),
    **dict.fromkeys("add_module get_extra_state set_extra_state share_memory to_empty extra_repr".split(), _PARTS),
    **dict.fromkeys("double type dequantize".split(), _NUMBERS),
    **dict.fromkeys("ipu xpu mtia".split(), "call to(device), which knows cpu, cuda and tpu"),
    **dict.fromkeys("attn_processors set_attention_backend reset_attention_backend".split(), _XLA),
    **dict.fromkeys("active_adapters enable_lora_hotswap".split(), "LoRA is the pipeline's here"),
    **dict.fromkeys("get_input_embeddings set_input_embeddings resize_token_embeddings".split(), _PARTS),
    **dict.fromkeys(
        "set_attn_implementation tie_weights init_weights post_init".split(), "nothing has to be done here"
    ),
}


class TorchModuleMixin:
    """Methods of PyTorch's and diffusers' modules, for networks."""

    @property
    def device(self) -> jax.Device:
        """The device of the parameters; of a mesh, the first one."""
        leaf = jax.tree.leaves(nnx.state(self, nnx.Param))[0]
        return min(leaf.devices(), key=lambda device: device.id)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the first parameter, in which the network computes; quantized weights do not count."""
        return jnp.dtype(dtype_of(self))

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of parameters.

        Args:
            only_trainable: has no effect, every parameter can be trained.
            exclude_embeddings: whether to exclude tables of token and position embeddings.
        """
        count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self, nnx.Param)))
        if exclude_embeddings:
            tables = [part for _, part in nnx.iter_graph(self) if isinstance(part, nnx.Embed)]
            count -= sum(table.embedding[...].size for table in tables)
        return count

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the parameters; there are no buffers."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(self, nnx.Param)))

    def to(self, *arguments: object, **named: object) -> Self:
        """Move or convert the parameters, in place; see `kandinsky_jax.DiffusionPipeline.to`."""
        read_target(self, arguments, named).apply(self)
        return self

    def train(self, mode: bool = True, **attributes: object) -> Self:
        """As Flax's, which nothing here depends on. Returns the network."""
        (super().train if mode else super().eval)(**attributes)  # type: ignore[misc]
        return self

    def eval(self, **attributes: object) -> Self:
        """As Flax's, which nothing here depends on. Returns the network."""
        return self.train(False, **attributes)

    def half(self) -> Self:
        """`to("float16")`."""
        return self.to("float16")

    def float(self) -> Self:
        """`to("float32")`."""
        return self.to("float32")

    def bfloat16(self) -> Self:
        """`to("bfloat16")`."""
        return self.to("bfloat16")

    def cpu(self) -> Self:
        """`to("cpu")`."""
        return self.to("cpu")

    def cuda(self, device: int | None = None) -> Self:
        """`to("cuda")`, or to the device of this number."""
        return self.to("cuda" if device is None else device)

    def __getattr__(self, name: str) -> Any:
        instead = INSTEAD.get(name) or (_HOOKS if name.startswith("register_") else "")
        raise AttributeError(
            f"{type(self).__name__} has no {shorten(name, 80)!r}" + (f": {instead}" if instead else "")
        )

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Do nothing: in JAX, `jax.grad` says what is differentiated. Returns the network."""
        return self

    is_gradient_checkpointing = False

    compile = without_effect("compile")
    compile_repeated_blocks = without_effect("compile_repeated_blocks")
    enable_attention_slicing = without_effect("enable_attention_slicing")
    enable_forward_chunking = without_effect("enable_forward_chunking")
    enable_gradient_checkpointing = without_effect("enable_gradient_checkpointing")
    enable_group_offload = without_effect("enable_group_offload")
    enable_layerwise_casting = without_effect("enable_layerwise_casting")
    enable_npu_flash_attention = without_effect("enable_npu_flash_attention")
    enable_slicing = without_effect("enable_slicing")
    enable_tiling = without_effect("enable_tiling")
    enable_xformers_memory_efficient_attention = without_effect("enable_xformers_memory_efficient_attention")
    enable_xla_flash_attention = without_effect("enable_xla_flash_attention")
    fuse_qkv_projections = without_effect("fuse_qkv_projections")
    gradient_checkpointing_enable = without_effect("gradient_checkpointing_enable")
    set_attention_slice = without_effect("set_attention_slice")
    set_attn_processor = without_effect("set_attn_processor", _XLA)
    set_default_attn_processor = without_effect("set_default_attn_processor")
    set_use_memory_efficient_attention_xformers = without_effect("set_use_memory_efficient_attention_xformers")
    set_use_npu_flash_attention = without_effect("set_use_npu_flash_attention")
    set_use_xla_flash_attention = without_effect("set_use_xla_flash_attention")

    disable_npu_flash_attention = disable_xla_flash_attention = gradient_checkpointing_disable = nothing_to_do
    disable_forward_chunking = disable_freeu = disable_gradient_checkpointing = disable_slicing = nothing_to_do
    disable_tiling = disable_xformers_memory_efficient_attention = unfuse_qkv_projections = nothing_to_do

    enable_freeu = refused("enable_freeu", "it changes the images, and diffusers' Kandinsky 2.2 has none either")

    add_adapter = refused("add_adapter of a network", "train with `kandinsky-jax train lora-decoder` or lora-prior")
    delete_adapters = _by_the_pipeline("delete_adapters")
    disable_adapters = _by_the_pipeline("disable_adapters", "disable_lora")
    disable_lora = _by_the_pipeline("disable_lora")
    enable_adapters = _by_the_pipeline("enable_adapters", "enable_lora")
    enable_lora = _by_the_pipeline("enable_lora")
    fuse_lora = _by_the_pipeline("fuse_lora")
    load_attn_procs = _by_the_pipeline("load_attn_procs", "load_lora_weights")
    load_lora_adapter = _by_the_pipeline("load_lora_adapter", "load_lora_weights")
    save_attn_procs = _by_the_pipeline("save_attn_procs", "save_lora_weights")
    save_lora_adapter = _by_the_pipeline("save_lora_adapter", "save_lora_weights")
    set_adapter = _by_the_pipeline("set_adapter", "set_adapters")
    set_adapters = _by_the_pipeline("set_adapters")
    unfuse_lora = _by_the_pipeline("unfuse_lora")
    unload_lora = _by_the_pipeline("unload_lora", "unload_lora_weights")
