"""What is written and read again: exports in every form, Orbax, conversion both ways."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

from digest_cases import Case, inputs
from digest_cases.commands import convert
from digest_cases.modes import GUIDED, call
from digest_cases.values import folder_bytes

NAME = "KandinskyV22CombinedPipeline"
DECODER, PRIOR = "kandinsky-2-2-decoder", "kandinsky-2-2-prior"
# Orbax's own files hold times and random names, and the manifest their checksums; what is in them is compared by
# loading it.
JSON = (".json", ".txt", ".model", ".safetensors")


def cases() -> list[Case]:
    """All cases of the module."""
    exports: dict[str, dict[str, Any]] = {
        "diffusers": {},
        "variant fp16": {"variant": "fp16"},
        "shards of 1 MB": {"max_shard_size": "1MB"},
    }
    found = []
    for name, options in exports.items():
        found.append(Case(f"export/{name}", functools.partial(_exported, NAME, options), quick=not options))
    for name in ("KandinskyV22PriorPipeline", "KandinskyV22InpaintPipeline", "KandinskyV22ControlnetPipeline"):
        found.append(Case(f"export/{name}", functools.partial(_exported, name, {})))
    found += [
        Case("export/bfloat16", _exported_bfloat16),
        Case("export/Orbax and loaded again", _orbax, quick=True),
        Case("export/one network", _network),
        Case("convert_weights/to Orbax and back", functools.partial(_converted, None), quick=True),
        Case("convert_weights/bfloat16", functools.partial(_converted, "bfloat16")),
        Case("convert_weights/float16", functools.partial(_converted, "float16")),
        Case("loaded as/float16", functools.partial(_loaded, "float16")),
        Case("loaded as/bfloat16", functools.partial(_loaded, "bfloat16")),
        Case("auto pipelines", _auto),
    ]
    return found


def _exported(name: str, options: dict[str, Any], folder: Path) -> Any:
    inputs.pipeline(name, "shapes").save_pretrained(folder / "model", **options)
    return folder_bytes(folder / "model")


def _exported_bfloat16(folder: Path) -> Any:
    inputs.pipeline(NAME, "shapes", "bfloat16").save_pretrained(folder / "model")
    return folder_bytes(folder / "model")


def _orbax(folder: Path) -> Any:
    import kandinsky_jax as kj

    pipe = inputs.pipeline(NAME, "shapes")
    pipe.save_pretrained(folder / "orbax", layout="orbax")
    again = kj.KandinskyV22CombinedPipeline.from_pretrained(folder / "orbax", dtype="float32")
    again.set_progress_bar_config(disable=True)
    again.save_pretrained(folder / "again")
    text = {name: data for name, data in folder_bytes(folder / "orbax").items() if _is_ours(name)}
    return {"images": call(again, **GUIDED), "again": folder_bytes(folder / "again"), "configurations": text}


def _is_ours(name: str) -> bool:
    """Whether a file of an Orbax folder is a configuration or a tokenizer's, and not Orbax's own."""
    parts = name.split("/")
    return len(parts) <= 2 and parts[-1].endswith(JSON) and not parts[-1].startswith(("_", "kandinsky_jax_manifest"))


def _network(folder: Path) -> Any:
    import kandinsky_jax as kj

    pipe = inputs.pipeline(NAME, "shapes")
    kj.save_network(pipe.movq, folder / "movq")
    again = kj.load_network(kj.VQModel, folder / "movq")
    kj.save_network(again, folder / "again")
    return {"first": folder_bytes(folder / "movq"), "again": folder_bytes(folder / "again")}


def _converted(dtype: str | None, folder: Path) -> Any:
    shutil.copytree(inputs.SHAPES_MODEL / DECODER, folder / DECODER)
    shutil.copytree(inputs.SHAPES_MODEL / PRIOR, folder / PRIOR)
    options = [] if dtype is None else ["--dtype", dtype]
    for name in (DECODER, PRIOR):
        convert(folder, name, f"orbax/{name}", *options)
        convert(folder, f"orbax/{name}", f"back/{name}")
    return folder_bytes(folder / "back")


def _loaded(dtype: str, folder: Path) -> Any:
    import kandinsky_jax as kj

    pipe = kj.KandinskyV22Pipeline.from_pretrained(inputs.SHAPES_MODEL / DECODER, dtype=dtype)
    pipe.save_pretrained(folder / "model")
    return folder_bytes(folder / "model")


def _auto(_: Path) -> Any:
    import kandinsky_jax as kj

    classes = (kj.AutoPipelineForText2Image, kj.AutoPipelineForImage2Image, kj.AutoPipelineForInpainting)
    whole = inputs.pipeline(NAME, "shapes")
    found = {}
    for cls in classes:
        for folder in sorted(inputs.SHAPES_MODEL.iterdir()):
            try:
                found[f"{cls.__name__} {folder.name}"] = type(cls.from_pretrained(folder)).__name__
            except (ValueError, kj.CheckpointError) as error:
                found[f"{cls.__name__} {folder.name}"] = f"refused: {type(error).__name__}"
        try:
            found[f"{cls.__name__} from_pipe"] = type(cls.from_pipe(whole)).__name__
        except (ValueError, kj.CheckpointError) as error:
            found[f"{cls.__name__} from_pipe"] = f"refused: {type(error).__name__}"
    return found
