"""Validation of rows: every value is checked and every picture read before anything runs on a device."""

from __future__ import annotations

import base64
import contextlib
import datetime
import functools
import io
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypedDict

import fsspec
from PIL import Image

from kandinsky_jax import images
from kandinsky_jax.batch.rows import ROW_COLUMNS, USUAL_DEFAULTS, Raw, default_id
from kandinsky_jax.checkpoint.recommended_settings import NO_SETTINGS, RecommendedSettings
from kandinsky_jax.common.errors import MAX_MESSAGE, quote, shorten, summarize
from kandinsky_jax.diffusion import guider_named
from kandinsky_jax.diffusion.inpainting import latent_repaint_mask
from kandinsky_jax.pipelines import CombinedPipeline, checks
from kandinsky_jax.pipelines.modes import MODES, PICTURE_COLUMNS

# Larger values would not fit into memory, and their failure would end the job.
MAX_SIDE = 4096
MAX_PIXELS = 2**22  # of one picture: 2048 x 2048
MAX_IMAGES = 1000
MAX_ROW_PIXELS = 2**28  # of all pictures of a row: 1000 of 512 x 512
MAX_FILE = 2**28  # bytes of a picture that a row names
STRENGTH = USUAL_DEFAULTS["strength"]  # default for rows and jobs
MAX_METADATA_NESTING = 50  # of metadata
ATTEMPTS = 4  # to read a picture from a URL
MAX_KEY = 95  # characters before the ending: a name in a tar file has at most 100
_ID = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_KEY}}}")  # a dot would end a WebDataset key, a slash leave the folder
_TEXTS = ("id", "prompt", "negative_prompt", "image", "mask", "hint")


class ErrorRecord(TypedDict):
    """A line of errors.jsonl."""

    row: int
    id: object
    error: str


class RowError(ValueError):
    """A row is invalid; the message lists all its faults."""

    def __init__(self, faults: Sequence[str]):
        super().__init__(summarize(faults, MAX_MESSAGE))

    def record(self, raw: Raw) -> ErrorRecord:
        """Return the entry for errors.jsonl, always valid JSON and the same in every run."""
        name = raw.values.get("id")
        plain = name is None or (isinstance(name, str) and _ID.fullmatch(name)) or type(name) is int
        if not plain or (isinstance(name, int) and abs(name) >= 2**63):
            name = shorten(name, 200)
        return {"row": raw.number, "id": name, "error": str(self)}


class Shape(NamedTuple):
    """Settings that rows of one batch share."""

    height: int  # of the generated picture, a multiple of 64
    width: int
    steps: int
    guidance_scale: float
    prior_steps: int
    prior_guidance_scale: float
    strength: float | None
    negative: bool  # whether there is a negative prompt, for which the prior runs too


@dataclass(frozen=True)
class RowRequest:
    """A validated row."""

    number: int
    id: str
    prompt: str
    negative_prompt: str | None
    seed: int
    num_images: int
    shape: Shape
    files: dict[str, str]  # paths as the row has them
    pictures: dict[str, Image.Image]  # by the pipeline's argument names
    metadata: object

    def about(self) -> dict[str, object]:
        """Return the settings that reproduce the row's pictures."""
        facts = {"id": self.id, "prompt": self.prompt, "negative_prompt": self.negative_prompt, "seed": self.seed}
        shape = {name: value for name, value in self.shape._asdict().items() if name != "negative"}
        facts |= {name: value for name, value in shape.items() if value is not None}
        facts |= self.files
        return facts | ({} if self.metadata is None else {"metadata": self.metadata})


@dataclass(frozen=True)
class Checker:
    """Validates rows.

    Args:
        pipe: the pipeline that will run them.
        mode: one of `MODES`.
        root: folder or URL of the rows' pictures.
        defaults: by column, for rows without a value.
        seed: default of row 0; that of each later row is one higher.
        taken: numbers of rows that repeat an identifier.
        recommended: the model's own settings, for the size.
        guiders: the job's, by the columns of their scales.
    """

    pipe: CombinedPipeline
    mode: str
    root: str
    defaults: Mapping[str, Any]
    seed: int = 0
    taken: Set[int] = frozenset()
    recommended: RecommendedSettings = NO_SETTINGS
    guiders: Mapping[str, str | None] = field(default_factory=dict)
    _schedulable: set[tuple[str, int, float | None]] = field(default_factory=set, repr=False)

    def check(self, raw: Raw) -> RowRequest:
        """Check a row and read its pictures.

        Raises:
            RowError: listing all faults.
        """
        if raw.fault is not None:
            raise RowError([raw.fault])
        row = _Row({k: v for k, v in raw.values.items() if v is not None})
        name = row.get("id", _identifier, default_id(raw.number))
        if raw.number in self.taken:
            row.faults.append(f"id {name!r} is an earlier row's")
        negative = row.get("negative_prompt", text, self.defaults.get("negative_prompt"))
        prompt = row.get("prompt", _prompt, None)
        if "prompt" not in row.values:
            row.faults.append("prompt is missing or empty")
        seed = row.get("seed", _seed, self.seed + raw.number)
        count = row.get("num_images", _count, self.defaults.get("num_images", 1))
        files = self._files(row)
        metadata = row.get("metadata", json_value, None)
        row.faults += [f"there is no column {quote(key)}" for key in row.values if key not in ROW_COLUMNS]
        read = {kind: row.get(kind, functools.partial(_read, self.root, kind), None) for kind in files}
        shape = self._shape(row, read.get("image"), negative)
        _check_size(row, name, count, shape)
        pictures = {} if row.faults else self._pictures(row, read, shape)
        if row.faults:
            raise RowError(row.faults)
        return RowRequest(raw.number, name, prompt, negative, seed, count, shape, files, pictures, metadata)

    def _files(self, row: _Row) -> dict[str, str]:
        needed = MODES[self.mode].columns
        for kind in PICTURE_COLUMNS.values():
            if kind in needed and kind not in row.values:
                row.faults.append(f"{kind} is missing, which the mode {self.mode} needs")
            if kind in row.values and kind not in needed:
                row.faults.append(f"{kind} is not used by the mode {self.mode}")
        return {kind: str(row.values[kind]) for kind in needed if kind in row.values}

    def _shape(self, row: _Row, image: Image.Image | None, negative: str | None) -> Shape:
        pipe, given = self.pipe, self.defaults
        native = pipe.decoder_pipe.native_side
        fitting = (self.recommended.height or native, self.recommended.width or native)
        if image is not None and not all(name in row.values or given.get(name) for name in ("height", "width")):
            fitting = row.checked("image", functools.partial(images.fitting_size, image, native), fitting)
        side = pipe.movq.config.scale_factor**2
        height, width = (
            -(-row.get(name, functools.partial(_side, name=name), given.get(name) or size) // side) * side
            for name, size in zip(("height", "width"), fitting, strict=True)
        )
        from_image = MODES[self.mode].takes_strength
        strength = row.get("strength", _number, given.get("strength", STRENGTH)) if from_image else None
        if not from_image and "strength" in row.values:
            row.faults.append(f"strength is not used by the mode {self.mode}")
        steps = {name: row.get(name, _whole, given[name]) for name in ("steps", "prior_steps")}
        for (name, count), part in zip(steps.items(), (strength, None), strict=True):
            row.checked(name, functools.partial(self._schedule, name, count, part))
        scales = {
            name: row.get(name, functools.partial(_guidance, name=name), given[name])
            for name in ("guidance_scale", "prior_guidance_scale")
        }
        for name, guider in self.guiders.items():
            if guider is not None:
                row.checked(name, functools.partial(guider_named, guider, scales[name]))
        return Shape(
            height,
            width,
            steps["steps"],
            scales["guidance_scale"],
            steps["prior_steps"],
            scales["prior_guidance_scale"],
            strength,
            negative is not None,
        )

    def _schedule(self, name: str, steps: int, strength: float | None) -> None:
        """Raise where the scheduler does not take this number of steps; results are cached, since rows mostly agree."""
        if (name, steps, strength) not in self._schedulable:
            scheduler = self.pipe.scheduler if name == "steps" else self.pipe.prior_scheduler
            scheduler.schedule(steps, checks.skipped(strength, scheduler.steps(steps)))
            self._schedulable.add((name, steps, strength))

    def _pictures(self, row: _Row, read: dict[str, Image.Image], shape: Shape) -> dict[str, Image.Image]:
        """Resize pictures to the generated size, so that the pipelines do not resize them again."""
        size, found = (shape.height, shape.width), {}
        try:
            for kind, picture in read.items():
                if kind == "image":
                    resized = images.rgb(picture).resize(size[::-1], Image.Resampling.BICUBIC, reducing_gap=1)
                    found["image"] = resized
                elif kind == "mask":
                    mask = images.masks(picture, "mask", *size, warn=False)[0]
                    found["mask_image"] = mask
                    factor = self.pipe.movq.config.scale_factor
                    if not mask.any():
                        row.faults.append("mask repaints nothing; white is repainted")
                    elif not latent_repaint_mask(mask[None], shape.height // factor, shape.width // factor).any():
                        row.faults.append(f"mask repaints nothing: its white parts are smaller than {factor} pixels")
                else:
                    found["hint"] = images.hints(picture, "hint", *size)[0]
        except (ValueError, TypeError, ArithmeticError, OSError, MemoryError) as error:
            row.faults.append(shorten(error, 300) or type(error).__name__)
        return found


def _check_size(row: _Row, name: str, count: int, shape: Shape) -> None:
    """Add faults for names too long for a tar, and pictures too large for memory."""
    if len(name) <= MAX_KEY < len(f"{name}+{count - 1}") and count > 1:
        row.faults.append(f"id: with num_images={count}, at most {MAX_KEY - len(f'+{count - 1}')} characters")
    try:
        check_pixels(shape.height, shape.width, count)
    except ValueError as error:
        row.faults.append(str(error))


def check_pixels(height: int, width: int, count: int) -> None:
    """Raise ValueError where `count` pictures of this size exceed a job's limits."""
    if height * width > MAX_PIXELS:
        raise ValueError(f"height and width: {height} x {width} is more than {MAX_PIXELS:,} pixels")
    if count * height * width > MAX_ROW_PIXELS:
        raise ValueError(
            f"num_images: {count} of {height} x {width} are more than {MAX_ROW_PIXELS:,} pixels in all; use more rows"
        )


class _Row:
    """A row's values and faults."""

    def __init__(self, values: dict[str, object]):
        self.values, self.faults = values, []
        for name in _TEXTS:  # Parquet files of some writers have bytes for text
            if isinstance(value := values.get(name), bytes):
                values[name] = value.decode("utf-8", errors="surrogateescape")

    faults: list[str]

    def get(self, name: str, check: Callable[[object], object], default: Any) -> Any:
        """Return a checked value, or the default."""
        if name not in self.values:
            return default
        return self.checked(name, lambda: check(self.values[name]), default)

    def checked(self, name: str, check: Callable[[], object], default: Any = None) -> Any:
        """Return the result of a check; where it raises, note a fault of the column and return the default."""
        try:
            return check()
        except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
            text = shorten(error, 300)
            self.faults.append(text if text.startswith(name) else f"{name}: {text}")
            return default


# One value --------------------------------------------------------------------------------------------------------


def text(value: object) -> str:
    """Check a text that UTF-8 can encode; TypeError or ValueError for anything else."""
    if not isinstance(value, str):
        raise TypeError(f"must be text, got {quote(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("is not UTF-8") from None
    return value


def _prompt(value: object) -> str:
    prompt = text(value)
    if not prompt.strip():
        raise ValueError("is empty")
    return prompt


def _identifier(value: object) -> str:
    name = str(value) if isinstance(value, int) and not isinstance(value, bool) else text(value)
    if not _ID.fullmatch(name):
        raise ValueError(f"may hold letters, digits, - and _, at most {MAX_KEY} of them; got {quote(name)}")
    return name


def _number(value: object) -> float:
    """Convert a number, or a text with one as in a CSV file."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError(f"must be a number, got {quote(value)}")
    try:
        return float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"must be a number, got {quote(value)}") from None


def _whole(value: object) -> int:
    """Convert an integer; pandas stores columns with gaps as floats."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return int(value)
    number = value if isinstance(value, int) and not isinstance(value, bool) else _number(value)
    if isinstance(number, float) and (not math.isfinite(number) or number != int(number)):
        raise ValueError(f"must be a whole number, got {quote(value)}")
    return int(number)


def _seed(value: object) -> int:
    seed = _whole(value)
    if not 0 <= seed < 2**63:
        raise ValueError(f"must be from 0 to 2**63 - 1, got {shorten(seed)}")
    return seed


def _count(value: object) -> int:
    count = _whole(value)
    if count > MAX_IMAGES:
        raise ValueError(f"must be at most {MAX_IMAGES}, got {shorten(count)}; use more rows")
    return checks.count(count, "num_images")


def _side(value: object, name: str) -> int:
    side = _whole(value)
    if side > MAX_SIDE:
        raise ValueError(f"must be at most {MAX_SIDE} pixels, got {shorten(side)}")
    return checks.side(side, name)


def _guidance(value: object, name: str) -> float:
    return checks.guidance(_number(value), name)


def json_value(value: object, depth: int = 0) -> object:
    """Convert metadata to JSON values.

    Values without a JSON form are written as in protobuf's JSON: NaN and infinities as strings, bytes in base64, times
    in ISO 8601. Decimal numbers, and anything else, become text.

    Raises:
        ValueError: for text that UTF-8 cannot encode, and for values nested too deeply.
    """
    if depth > MAX_METADATA_NESTING:
        raise ValueError(f"is nested deeper than {MAX_METADATA_NESTING} levels")
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")
    if isinstance(value, str):
        return text(value)
    if isinstance(value, dict):
        return {text(str(key)): json_value(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item, depth + 1) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    return text(shorten(str(value), 1000))


# Files ------------------------------------------------------------------------------------------------------------


def _read(root: str, kind: str, value: Any) -> Image.Image:
    """Read the picture at a path below the root."""
    name, path = shorten(text(value), 200), below(root, value)
    for attempt in range(ATTEMPTS):
        try:
            data = _read_bytes(path)
            break
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise ValueError(f"{kind}: there is no file {name}") from None
        except Exception as error:  # of a remote file system, possibly temporary
            if "://" not in path or attempt == ATTEMPTS - 1:
                fault = getattr(error, "strerror", None) or shorten(error, 200)
                raise ValueError(f"{kind}: {name} cannot be read: {fault or type(error).__name__}") from None
            time.sleep(2**attempt)
    if len(data) > MAX_FILE:
        raise ValueError(f"{kind}: {name} has more than {MAX_FILE:,} bytes")
    return images.read(io.BytesIO(data), f"{kind} {name}")


def _read_bytes(path: str) -> bytes:
    """Read a file, at most `MAX_FILE` + 1 bytes."""
    if "://" not in path and os.path.exists(path) and not os.path.isfile(path):  # reading a pipe would block
        raise FileNotFoundError(path)
    with fsspec.open(path, "rb") as file:
        return file.read(MAX_FILE + 1)


def below(root: str, path: str) -> str:
    """Resolve a relative path below the root, following links.

    Raises:
        ValueError: for a path that leads out of the root.
    """
    parts = PurePosixPath(path.replace("\\", "/")).parts
    if "://" in path or "::" in path or not parts or parts[0].endswith(":") or parts[0] == "/" or ".." in parts:
        raise ValueError(f"{quote(path)} leads out of the job's folder; needed is a relative path below it")
    if "://" in root:
        return f"{root.rstrip('/')}/{'/'.join(parts)}"
    base = Path(root).resolve()
    found = base.joinpath(*parts).resolve()
    if not found.is_relative_to(base):
        raise ValueError(f"{quote(path)} leads out of the job's folder by a link; needed is a path below it")
    return os.fspath(found)
