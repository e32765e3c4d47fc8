"""The rest of diffusers' `DiffusionPipeline`, so that programs written for it run unchanged.

Each of its public members is here. It does the same as there; or, where it only saves memory or time there, it warns
once and does nothing; or it raises an error that says what to write instead.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import numpy as np
from flax import nnx
from PIL import Image
from tqdm.auto import tqdm

from kandinsky_jax.checkpoint import LazyNetwork, hub
from kandinsky_jax.common.attribute_dict import AttributeDict
from kandinsky_jax.common.errors import quote
from kandinsky_jax.common.storage import read_json
from kandinsky_jax.models.compatibility import Target, nothing_to_do, read_target, refused, without_effect
from kandinsky_jax.parallel.mesh import make_mesh
from kandinsky_jax.schedulers import Scheduler


class DiffusionPipeline:
    """Base of the pipelines; `DiffusionPipeline.from_pretrained` chooses the class by the model."""

    config_name: ClassVar[str] = "model_index.json"
    has_compatibles: ClassVar[bool] = False
    ignore_for_config: ClassVar[tuple[str, ...]] = ()
    model_cpu_offload_seq: ClassVar[str | None] = None
    hf_device_map: ClassVar[None] = None

    _held: Callable[[], dict[str, Any]]
    _progress_bar_config: dict[str, object]
    _name_or_path: str | None = None

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **arguments: Any) -> Any:
        """Load a model with the class that its `model_index.json` names.

        Args:
            name: "tiny" or one of its family, a folder, or a Hub repository.
            arguments: of the class's own `from_pretrained`, such as `dtype` and `revision`.
        """
        from kandinsky_jax.pipelines.auto import pipeline_for

        return pipeline_for(name, arguments)

    @classmethod
    def download(cls, name: str | os.PathLike[str], **arguments: object) -> Path:
        """Download a model without loading it, and return its folder. Arguments: see `checkpoint.hub.resolve`."""
        return hub.resolve(name, getattr(cls, "REPOSITORY", hub.DECODER), **arguments)

    @classmethod
    def load_config(cls, name: str | os.PathLike[str], **arguments: object) -> dict[str, object]:
        """Return a model's `model_index.json`, downloaded if needed. Arguments: see `download`."""
        return dict(read_json(cls.download(name, **arguments) / cls.config_name))

    # Configuration ------------------------------------------------------------------------------------------------

    @property
    def config(self) -> AttributeDict:
        """The content of `model_index.json`, [library, class] by component; also as attributes."""
        found: dict[str, object] = {"_class_name": type(self).__name__, "_name_or_path": self._name_or_path}
        for name, part in self._held().items():
            cls = part.cls if isinstance(part, LazyNetwork) else type(part)
            ours = issubclass(cls, nnx.Module) and not cls.__name__.startswith("CLIP")
            library = "diffusers" if ours or issubclass(cls, Scheduler) else "transformers"
            found[name] = (library, cls.__name__)
        return AttributeDict(found)

    @property
    def name_or_path(self) -> str | None:
        """The folder or repository that the pipeline was loaded from."""
        return self._name_or_path

    @property
    def parameters(self) -> dict[str, object]:
        """Arguments of the constructor that are not components; always empty."""
        return {}

    @property
    def device(self) -> jax.Device:
        """The device of the networks; of a mesh, the first one."""
        return _device_and_dtype(self)[0]

    _execution_device = device

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the first network, in the constructor's order."""
        return _device_and_dtype(self)[1]

    @property
    def movq_scale_factor(self) -> int:
        """Downsampling factor of MoVQ: pixels per latent along a side."""
        movq = self._held().get("movq")
        if movq is None:
            raise AttributeError(f"{type(self).__name__} has no movq")
        return 2 ** (len(self.movq.config.block_out_channels) - 1)  # type: ignore[attr-defined]

    def num_parameters(self) -> int:
        """Return the number of parameters of all networks; lazy ones are loaded."""
        parts = [part.load() if isinstance(part, LazyNetwork) else part for part in self._held().values()]
        return sum(part.num_parameters() for part in parts if isinstance(part, nnx.Module))

    def __repr__(self) -> str:
        lines = [type(self).__name__ + (f" of {self._name_or_path}" if self._name_or_path else "")]
        for name, part in self._held().items():
            lines.append(f"  {name}: {_described(part)}")
        return "\n".join(lines)

    def to_json_string(self) -> str:
        """Return the configuration as it is written to `model_index.json`."""
        shown = {name: value for name, value in self.config.items() if name != "_name_or_path"}
        return json.dumps(shown, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, path: str | os.PathLike[str]) -> None:
        """Write the configuration to a file."""
        Path(path).write_text(self.to_json_string())

    def save_config(self, folder: str | os.PathLike[str]) -> None:
        """Write only `model_index.json` into a folder, which is created if missing."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.to_json_file(Path(folder) / self.config_name)

    def register_modules(self, **components: object) -> None:
        """Replace components by name."""
        for name, part in components.items():
            if name not in self._held():
                raise TypeError(f"{type(self).__name__} has no component {quote(name)}; it has {list(self._held())}")
            setattr(self, name, part)

    # Devices and dtypes -------------------------------------------------------------------------------------------

    def to(self, *arguments: object, **named: object) -> Self:
        """Move the networks, which other pipelines may share, or convert their dtype; returns the pipeline.

        Args:
            arguments, named: a device, a dtype or both, also as `device=` and `dtype=`. A device is one of JAX's, or
                a name as in PyTorch ("cpu", "cuda", "cuda:1", "tpu"). Without a number, networks on devices of this
                kind stay there. A name without a device here changes nothing and gives a warning.
        """
        target = read_target(self, arguments, named)
        if target.dtype is not None and any(self.get_list_adapters().values()):  # type: ignore[attr-defined]
            raise ValueError(
                "the dtype cannot change while LoRA is loaded: call unload_lora_weights() before, or load the pipeline "
                f"with dtype={target.dtype.name!r}"
            )
        for part in self._held().values():
            if isinstance(part, LazyNetwork):
                _convert_lazy(part, target)
            elif isinstance(part, nnx.Module):
                target.apply(part)
        return self

    # Progress and pictures ----------------------------------------------------------------------------------------

    def progress_bar(self, iterable: Iterable[object] | None = None, total: int | None = None) -> tqdm:
        """Return a `tqdm` bar over an iterable or of a given length, configured as the pipeline's own bars."""
        if (iterable is None) == (total is None):
            raise ValueError("give progress_bar an iterable or a total")
        return tqdm(iterable, total=total, **self._progress_bar_config)

    @staticmethod
    def numpy_to_pil(images: object) -> list[Image.Image]:
        """Convert `[B, H, W, C]` or `[H, W, C]` in 0..1 to PIL pictures."""
        pixels = (np.asarray(images, np.float32) * 255).round().clip(0, 255).astype(np.uint8)
        pixels = pixels[None] if pixels.ndim == 3 else pixels
        return [Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x) for x in pixels]

    # Without effect, or not supported -----------------------------------------------------------------------------

    enable_attention_slicing = without_effect("enable_attention_slicing")
    enable_group_offload = without_effect("enable_group_offload")
    enable_layerwise_casting = without_effect("enable_layerwise_casting")
    enable_model_cpu_offload = without_effect("enable_model_cpu_offload")
    enable_sequential_cpu_offload = without_effect("enable_sequential_cpu_offload")
    enable_vae_slicing = without_effect("enable_vae_slicing")
    enable_vae_tiling = without_effect("enable_vae_tiling")
    enable_xformers_memory_efficient_attention = without_effect("enable_xformers_memory_efficient_attention")
    fuse_qkv_projections = without_effect("fuse_qkv_projections")
    set_attention_slice = without_effect("set_attention_slice")
    set_lora_device = without_effect("set_lora_device")
    set_use_memory_efficient_attention_xformers = without_effect("set_use_memory_efficient_attention_xformers")

    disable_attention_slicing = disable_freeu = disable_vae_slicing = disable_vae_tiling = nothing_to_do
    disable_xformers_memory_efficient_attention = unfuse_qkv_projections = nothing_to_do
    maybe_free_model_hooks = remove_all_hooks = reset_device_map = nothing_to_do

    _WITHOUT_CHANGE = "it changes the images, and Kandinsky 2.2 has none in diffusers either"
    _OF_THE_CLASS = "construct the class with its components, or load it with from_pretrained"
    enable_freeu = refused("enable_freeu", _WITHOUT_CHANGE)
    load_ip_adapter = refused("load_ip_adapter", "give an image to the prior's interpolate, or to the Emb2Emb prior")
    lora_state_dict = refused("lora_state_dict", "load_lora_weights reads files and dictionaries of any of these names")
    load_textual_inversion = refused("load_textual_inversion", _WITHOUT_CHANGE)
    from_config = refused("from_config", _OF_THE_CLASS)
    extract_init_dict = refused("extract_init_dict", _OF_THE_CLASS)
    get_config_dict = refused("get_config_dict", "load_config reads a model's model_index.json")
    register_to_config = refused("register_to_config", "the configuration is that of the components")
    register_for_auto_class = refused("register_for_auto_class", "import your class, no code of a repository is run")
    push_to_hub = refused("push_to_hub", "call save_pretrained(FOLDER), then `hf upload OWNER/NAME FOLDER`")
    prepare_latents = refused("prepare_latents", "give latents= to the call")
    get_timesteps = refused("get_timesteps", "pipe.scheduler.schedule(num_inference_steps).timesteps has them")


def _networks(pipe: DiffusionPipeline) -> list[object]:
    return [part for part in pipe._held().values() if isinstance(part, nnx.Module)]


def _device_and_dtype(pipe: DiffusionPipeline) -> tuple[jax.Device, np.dtype]:
    network: Any = _networks(pipe)[0]
    return network.device, np.dtype(network.dtype)


def _described(part: object) -> str:
    """Describe a component in one line."""
    if isinstance(part, LazyNetwork):
        state = "loaded" if part.loaded else "read when it is first needed"
        return f"{part.cls.__name__}, {state}"
    if not isinstance(part, nnx.Module):
        return type(part).__name__
    leaves = jax.tree.leaves(nnx.state(part, nnx.Param))
    dtypes = sorted({np.dtype(leaf.dtype).name for leaf in leaves})
    devices = sorted({str(device) for leaf in leaves if isinstance(leaf, jax.Array) for device in leaf.devices()})
    count = sum(leaf.size for leaf in leaves)
    where = f" on {devices[0]}" + (f" and {len(devices) - 1} more" if len(devices) > 1 else "") if devices else ""
    return f"{type(part).__name__}, {count:,} parameters, {' and '.join(dtypes)}{where}"


def _convert_lazy(part: LazyNetwork, target: Target) -> None:
    """Do what `Target.apply` does: at once for a loaded network, otherwise when it is loaded."""
    if part.loaded:
        target.apply(part.load())
        return
    if target.dtype is not None:
        part.dtype = target.dtype
    if target.exact:
        part.move(make_mesh(devices=target.devices))
