"""Batch jobs through the command line: the bytes of shards and manifests, and the job's record."""

from __future__ import annotations

import functools
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from digest_cases import Case, inputs
from digest_cases.commands import STEPS, kandinsky_jax, write_files
from digest_cases.values import folder_bytes

OPTIONS = [*STEPS, "--height", "64", "--width", "64", "--dtype", "float32", "--quiet"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "text2img": ("kandinsky-2-2-decoder", {}),
    "img2img": ("kandinsky-2-2-decoder", {"image": "photo.png", "strength": 0.7}),
    "inpaint": ("kandinsky-2-2-decoder-inpaint", {"image": "photo.png", "mask": "mask.png"}),
    "controlnet": ("kandinsky-2-2-controlnet-depth", {"hint": "depth.png"}),
    "controlnet img2img": (
        "kandinsky-2-2-controlnet-depth",
        {"image": "photo.png", "hint": "depth.png", "strength": 0.7},
    ),
}


def cases() -> list[Case]:
    """All cases of the module."""
    found = [
        Case("batch/text2img/webdataset", functools.partial(job, "text2img", ["--batch", "2"]), quick=True),
        Case("batch/text2img/folder", functools.partial(job, "text2img", ["--batch", "2", "--format", "folder"])),
        Case("batch/text2img/jpeg", functools.partial(job, "text2img", ["--batch", "2", "--pictures", "jpg"])),
        Case(
            "batch/text2img/solver and negative prompt",
            functools.partial(job, "text2img", ["--batch", "2", "--scheduler", "ddim", "-n", "red circle"]),
        ),
    ]
    for kind in KINDS:
        if kind != "text2img":
            found.append(Case(f"batch/{kind}/webdataset", functools.partial(job, kind, ["--batch", "1"])))
    return found


def rows(kind: str, count: int = 5) -> list[dict[str, Any]]:
    """Rows of a job: seeds, ids, steps, two images of one, and one that cannot be generated."""
    prompts = inputs.SHAPE_PROMPTS
    found: list[dict[str, Any]] = [{"prompt": prompts[i % 2], **KINDS[kind][1]} for i in range(count)]
    found[1] |= {"seed": 77, "id": "own-name", "metadata": {"source": ["x", 1]}}
    found[2] |= {"num_images": 2, "steps": 3, "guidance_scale": 3.0}
    found[3] |= {"prompt": ""}
    return found


def job(kind: str, options: list[str], folder: Path) -> Any:
    """Run a job; its files, of which none holds a time."""
    (folder / "models").symlink_to(inputs.SHAPES_MODEL, target_is_directory=True)
    write_job(folder, kind)
    kandinsky_jax(folder, *command(kind, options))
    return result_of(folder / "out")


def result_of(folder: Path) -> dict[str, Any]:
    """A complete job's files, the pixels and texts of its shards, and which rows failed; reasons may be reworded."""
    files = folder_bytes(folder)
    errors = {name: files.pop(name) for name in list(files) if name.startswith("errors")}
    found: dict[str, Any] = {"files": files, "pixels": {}, "texts": {}, "failed rows": _rows_of(errors["errors.jsonl"])}
    for name, data in files.items():
        if name.endswith(".tar"):
            with tarfile.open(fileobj=io.BytesIO(data)) as shard:
                members = {member.name: shard.extractfile(member).read() for member in shard}  # type: ignore[union-attr]
            found["texts"] |= {name: data for name, data in members.items() if name.endswith(".json")}
        else:
            members = {name.rpartition("/")[2]: data}
        for member, content in members.items():
            if member.endswith((".png", ".jpg")):
                found["pixels"][member] = np.asarray(Image.open(io.BytesIO(content)))
    return found


def _rows_of(errors: bytes) -> list[Any]:
    """The numbers and identifiers of rows in errors.jsonl."""
    return [{name: json.loads(line).get(name) for name in ("row", "id")} for line in errors.splitlines()]


def write_job(folder: Path, kind: str, count: int = 5) -> None:
    """rows.jsonl and the pictures that it names."""
    write_files(folder)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(kind, count)))


def command(kind: str, options: list[str]) -> list[str]:
    """The job's arguments of `kandinsky-jax`, in a folder with the job and the model in models/."""
    model = ["--model", f"models/{KINDS[kind][0]}"]
    return ["batch", "rows.jsonl", "--output", "out", *model, "--rows-per-shard", "2", *OPTIONS, *options]
