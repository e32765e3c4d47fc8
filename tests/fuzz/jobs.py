"""Readers of batch jobs' and calls' inputs: pictures, files of rows, folders of earlier runs."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from kandinsky_jax import KandinskyV22Img2ImgCombinedPipeline, images
from kandinsky_jax.batch import Job, JobError, open_job
from kandinsky_jax.batch.requests import Checker, RowError
from kandinsky_jax.batch.shards import Output
from kandinsky_jax.checkpoint import describe_network
from kandinsky_jax.checkpoint.tokenizer import load_tokenizer
from kandinsky_jax.images import CLIPImageProcessor
from kandinsky_jax.models import NETWORKS
from kandinsky_jax.schedulers import DDPMScheduler, UnCLIPScheduler
from tests.conftest import SHAPES_MODEL
from tests.fuzz.harness import Reader, check_message
from tests.fuzz.models import COMPONENTS, DECODER, PRIOR

# Pictures ---------------------------------------------------------------------------------------------------------

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 4), np.uint8)


def _pictures() -> dict[str, tuple[Image.Image, dict[str, Any]]]:
    """By file name: a picture, and how it is saved."""
    colour, grey = Image.fromarray(PIXELS[..., :3]), Image.fromarray(PIXELS[..., 0])
    palette = colour.convert("P")
    deep = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "upright"
    return {
        "rgb.png": (colour, {}),
        "alpha.png": (Image.fromarray(PIXELS), {}),
        "palette.png": (palette, {"transparency": bytes(range(256))}),
        "deep.png": (deep, {}),
        "grey.jpg": (grey, {"exif": exif}),
        "rgb.jpg": (colour, {"exif": exif, "progressive": True}),
        "moving.gif": (palette, {"save_all": True, "append_images": [palette.rotate(90)]}),
        "rgb.webp": (colour, {"exif": exif}),
        "float.tiff": (Image.fromarray(PIXELS[..., 0].astype(np.float32) / 255), {}),
        "deep.tiff": (deep, {"compression": "tiff_lzw"}),
        "rgb.tiff": (colour, {"compression": "tiff_deflate"}),
        "rgb.bmp": (colour, {}),
        "rgb.ppm": (colour, {}),
        "rgb.jp2": (colour, {}),
        "rgb.avif": (colour, {"speed": 10}),
    }


def _picture(name: str) -> Reader:
    def build(folder: Path) -> list[Path]:
        picture, options = _pictures()[name]
        picture.save(folder / name, **options)
        return [folder / name]

    def read(folder: Path) -> None:
        path = folder / name
        upright = images.read(path, "image")
        try:
            images.pictures(upright, "image", 64, 64)
            images.masks(upright, "mask_image", 64, 64)
            images.hints(upright, "hint", 64, 64)
            CLIPImageProcessor(32, 32)(upright)
        except ValueError as error:  # of a picture in memory, which knows no file
            raise ValueError(f"{path}: {error}") from error

    return Reader(f"picture {name}", build, read, (ValueError,))


# Rows -------------------------------------------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {"id": "first", "prompt": "a red circle", "image": "a.png", "seed": 7, "height": 64, "width": 64, "strength": 0.5},
    {"id": "second", "prompt": "a blue square", "image": "b.jpg", "negative_prompt": "green", "num_images": 2},
    {"id": "third", "prompt": "a green triangle", "image": "a.png", "guidance_scale": 2.5, "steps": 10},
    {"id": "fourth", "prompt": "a circle", "image": "b.jpg", "prior_steps": 5, "prior_guidance_scale": 1.0},
]


def _rows(form: str) -> list[Any]:
    def build(folder: Path) -> list[Path]:
        _pipe()  # not under the limits of an input
        for name in ("a.png", "b.jpg"):
            Image.fromarray(PIXELS[..., :3]).save(folder / name)
        path = folder / f"rows.{form}"
        names = list(dict.fromkeys(name for row in ROWS for name in row))
        if form == "jsonl":
            lines = [json.dumps(row | {"metadata": {"k": [1, None]}}) for row in ROWS]
            path.write_text("\n".join(lines) + "\n")
        elif form == "csv":
            lines = [",".join(names), *(",".join(str(row.get(name, "")) for name in names) for row in ROWS)]
            path.write_text("\n".join(lines) + "\n")
        elif form == "parquet":
            table = pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in ROWS])
            pyarrow.parquet.write_table(table, path, row_group_size=2)
        else:
            path.write_text("\n".join(row["prompt"] for row in ROWS) + "\n")
        return [path, path, folder / "a.png"]

    return build


@functools.cache
def _pipe() -> Any:
    """A pipeline whose networks have no arrays, which the check of rows does not need."""
    networks = {path.name: describe_network(NETWORKS[name], path) for name, path in COMPONENTS.items()}
    prior = {name: networks[name] for name in ("prior", "text_encoder", "image_encoder")} | {
        "tokenizer": load_tokenizer(PRIOR / "tokenizer"),
        "scheduler": UnCLIPScheduler.from_pretrained(PRIOR / "scheduler"),
        "image_processor": CLIPImageProcessor.from_pretrained(PRIOR / "image_processor"),
    }
    return KandinskyV22Img2ImgCombinedPipeline(
        unet=networks["unet"],
        movq=networks["movq"],
        scheduler=DDPMScheduler.from_pretrained(DECODER / "scheduler"),
        **{f"prior_{name}": part for name, part in prior.items()},
    )


def _job(form: str) -> Reader:
    mode = "generate" if form == "txt" else "img2img"

    def read(folder: Path) -> None:
        settings = {"steps": 10, "prior_steps": 5}
        job = Job(str(folder / f"rows.{form}"), str(folder / "out"), str(SHAPES_MODEL), mode=mode, defaults=settings)
        opened = open_job(job)
        checker = Checker(_pipe(), opened.mode, job.folder, opened.settings, taken=opened.rows.taken)
        for raw in opened.rows.read(0, opened.rows.count):
            try:
                checker.check(raw)
            except RowError as error:  # is reported by the row's number in errors.jsonl
                check_message(error)

    return Reader(f"rows in {form}", _rows(form), read, (JobError,))


IDENTITY = {"rows": {"sha256": "0" * 64, "count": 3}, "mode": "generate", "batch": 4, "defaults": {"steps": 50}}


def _output(form: str) -> Reader:
    def build(folder: Path) -> list[Path]:
        Output(str(folder), form, "png").begin(IDENTITY)
        return [folder / "job.json"]

    def read(folder: Path) -> None:
        output = Output(str(folder), form, "png")
        output.begin(IDENTITY)
        output.complete(3)
        output.sweep()
        output.finish(3)

    return Reader(f"job.json of {form}", build, read, (JobError,))


READERS = (
    *(_picture(name) for name in _pictures()),
    *(_job(form) for form in ("jsonl", "csv", "parquet", "txt")),
    *(_output(form) for form in ("webdataset", "folder")),
)
