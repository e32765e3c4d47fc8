"""A row -> what to draw for it: every value checked, every picture read, before a device hears of it."""

from __future__ import annotations

import functools
import io
import math
import os
import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import fsspec
from PIL import Image

from kandinsky_jax import images
from kandinsky_jax.batch.rows import COLUMNS, Raw, default_id
from kandinsky_jax.pipelines import CombinedPipeline, checks

# What a mode needs of a row besides its prompt.
MODES = {
    "generate": (),
    "img2img": ("image",),
    "inpaint": ("image", "mask"),
    "controlnet": ("hint",),
    "controlnet-img2img": ("image", "hint"),
}
FILES = ("image", "mask", "hint")
MAX_SIDE = 4096  # a larger picture would not fit, and its failure would take the job along
MAX_IMAGES = 1000
_ID = re.compile(r"[A-Za-z0-9_-]{1,200}")  # a dot would end a WebDataset key, a slash leave the folder


class RowError(ValueError):
    """What is wrong with a row, everything at once."""


class Shape(NamedTuple):
    """What rows share that are drawn together."""

    height: int  # of what is drawn, a multiple of 64
    width: int
    steps: int
    guidance_scale: float
    prior_steps: int
    prior_guidance_scale: float
    strength: float | None
    negative: bool  # whether there is a negative prompt, which the prior then draws beside the prompt


@dataclass(frozen=True)
class Task:
    """A checked row."""

    number: int
    id: str
    prompt: str
    negative_prompt: str | None
    seed: int
    num_images: int
    shape: Shape
    files: dict[str, str]  # as the row names them
    pictures: dict[str, Any]  # by the pipeline's argument names
    metadata: Any

    def about(self) -> dict[str, Any]:
        """What it takes to draw the row again."""
        facts = {"id": self.id, "prompt": self.prompt, "negative_prompt": self.negative_prompt, "seed": self.seed}
        shape = {name: value for name, value in self.shape._asdict().items() if name != "negative"}
        facts |= {name: value for name, value in shape.items() if value is not None}
        facts |= self.files
        return facts | ({} if self.metadata is None else {"metadata": self.metadata})


@dataclass(frozen=True)
class Checker:
    """Makes tasks of rows.

    Args:
        pipe: what will draw them.
        mode: one of `MODES`.
        root: the folder, local or a URL, below which the rows' pictures lie.
        defaults: by column, of what a row does not say.
        seed: of the first row that has none of its own; each later row's is one higher.
        taken: numbers of rows whose identifier is another row's.
    """

    pipe: CombinedPipeline
    mode: str
    root: str
    defaults: Mapping[str, Any]
    seed: int = 0
    taken: Set[int] = frozenset()
    _schedulable: set[tuple[str, int, float | None]] = field(default_factory=set, repr=False)

    def task(self, raw: Raw) -> Task:
        """Check a row and read its pictures.

        Raises:
            RowError: naming everything that is wrong with it.
        """
        if raw.fault is not None:
            raise RowError(raw.fault)
        row = _Row({k: v for k, v in raw.values.items() if v is not None})
        name = row.get("id", _identifier, default_id(raw.number))
        if raw.number in self.taken:
            row.faults.append(f"id {name!r} is an earlier row's")
        negative = row.get("negative_prompt", _text, self.defaults.get("negative_prompt"))
        prompt = row.get("prompt", _prompt, None)
        if "prompt" not in row.values:
            row.faults.append("prompt is missing or empty")
        seed = row.get("seed", _seed, self.seed + raw.number)
        count = row.get("num_images", _count, self.defaults.get("num_images", 1))
        files = self._files(row)
        read = {kind: row.get(kind, functools.partial(_read, self.root, kind), None) for kind in files}
        shape = self._shape(row, read.get("image"), negative)
        pictures = {} if row.faults else self._pictures(row, read, shape)
        row.faults += [f"there is no column {key!r}" for key in row.values if key not in COLUMNS]
        if row.faults:
            raise RowError("; ".join(row.faults))
        return Task(raw.number, name, prompt, negative, seed, count, shape, files, pictures, row.values.get("metadata"))

    def _files(self, row: _Row) -> dict[str, str]:
        needed = MODES[self.mode]
        for kind in FILES:
            if kind in needed and kind not in row.values:
                row.faults.append(f"{kind} is missing, which the mode {self.mode} needs")
            if kind in row.values and kind not in needed:
                row.faults.append(f"{kind} has no place in the mode {self.mode}")
        return {kind: str(row.values[kind]) for kind in needed if kind in row.values}

    def _shape(self, row: _Row, image: Image.Image | None, negative: str | None) -> Shape:
        pipe, given = self.pipe, self.defaults
        native = (pipe.unet.config.sample_size or 64) * pipe.movq.config.scale_factor
        fitting = (native, native) if image is None else images.fitting_size(image, native)
        side = pipe.movq.config.scale_factor**2
        height, width = (
            -(-row.get(name, functools.partial(_side, name=name), given.get(name) or size) // side) * side
            for name, size in zip(("height", "width"), fitting, strict=True)
        )
        drawn = "image" in MODES[self.mode] and self.mode != "inpaint"
        strength = row.get("strength", _number, given.get("strength", 0.3)) if drawn else None
        if not drawn and "strength" in row.values:
            row.faults.append(f"strength has no place in the mode {self.mode}")
        steps = {name: row.get(name, _whole, given[name]) for name in ("steps", "prior_steps")}
        for (name, count), part in zip(steps.items(), (strength, None), strict=True):
            row.judge(name, functools.partial(self._schedule, name, count, part))
        scales = {
            name: row.get(name, functools.partial(_guidance, name=name), given[name])
            for name in ("guidance_scale", "prior_guidance_scale")
        }
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
        """Raise where the scheduler does not take so many steps; a million rows mostly agree on them."""
        if (name, steps, strength) not in self._schedulable:
            scheduler = self.pipe.scheduler if name == "steps" else self.pipe.prior_scheduler
            scheduler.schedule(steps, checks.skipped(strength, scheduler.steps(steps)))
            self._schedulable.add((name, steps, strength))

    def _pictures(self, row: _Row, read: dict[str, Image.Image], shape: Shape) -> dict[str, Any]:
        """What was read, as large as it will be drawn: what the pipelines then do to it changes nothing."""
        size, found = (shape.height, shape.width), {}
        try:
            for kind, picture in read.items():
                if kind == "image":
                    resized = images.rgb(picture).resize(size[::-1], Image.Resampling.BICUBIC, reducing_gap=1)
                    found["image"] = resized
                elif kind == "mask":
                    found["mask_image"] = images.masks(picture, "mask", *size)[0]
                else:
                    found["hint"] = images.hints(picture, "hint", *size)[0]
        except (ValueError, TypeError, OSError, MemoryError) as error:
            row.faults.append(str(error))
        return found


class _Row:
    """A row's values, and what is wrong with them."""

    def __init__(self, values: dict[str, Any]):
        self.values, self.faults = values, []

    faults: list[str]

    def get(self, name: str, check: Callable[[Any], Any], default: Any) -> Any:
        """A value after its check, or the default."""
        if name not in self.values:
            return default
        return self.judge(name, lambda: check(self.values[name]), default)

    def judge(self, name: str, judge: Callable[[], Any], default: Any = None) -> Any:
        """What a judgement says, or the default where it raises, which is a fault of the column."""
        try:
            return judge()
        except (ValueError, TypeError) as error:
            self.faults.append(str(error) if str(error).startswith(name) else f"{name}: {error}")
            return default


# One value --------------------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"must be text, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("is not UTF-8") from None
    return value


def _prompt(value: Any) -> str:
    if not _text(value).strip():
        raise ValueError("is empty")
    return value


def _identifier(value: Any) -> str:
    name = str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(value)
    if not _ID.fullmatch(name):
        raise ValueError(f"may hold letters, digits, - and _, at most 200 of them; got {name[:200]!r}")
    return name


def _number(value: Any) -> float:
    """A number; text may be one, as in a CSV file."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError(f"must be a number, got {value!r}")
    try:
        return float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"must be a number, got {value!r}") from None


def _whole(value: Any) -> int:
    """A whole number; pandas makes floats of a column with gaps."""
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass
    number = value if isinstance(value, int) and not isinstance(value, bool) else _number(value)
    if not math.isfinite(number) or number != int(number):
        raise ValueError(f"must be a whole number, got {value!r}")
    return int(number)


def _seed(value: Any) -> int:
    seed = _whole(value)
    if not 0 <= seed < 2**63:
        raise ValueError(f"must be from 0 to 2**63 - 1, got {seed}")
    return seed


def _count(value: Any) -> int:
    count = checks.count(_whole(value), "num_images")
    if count > MAX_IMAGES:
        raise ValueError(f"must be at most {MAX_IMAGES}, got {count}; use more rows")
    return count


def _side(value: Any, name: str) -> int:
    side = checks.side(_whole(value), name)
    if side > MAX_SIDE:
        raise ValueError(f"must be at most {MAX_SIDE} pixels, got {side}")
    return side


def _guidance(value: Any, name: str) -> float:
    return checks.guidance(_number(value), name)


# Files ------------------------------------------------------------------------------------------------------------


def _read(root: str, kind: str, value: Any) -> Image.Image:
    """The picture at a path below the root."""
    try:
        with fsspec.open(below(root, _text(value)), "rb") as file:
            data = file.read()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise ValueError(f"{kind}: there is no file {value}") from None
    except OSError as error:
        raise ValueError(f"{kind}: {value} cannot be read: {error.strerror or error}") from None
    return images.read(io.BytesIO(data), f"{kind} {value}")


def below(root: str, path: str) -> str:
    """A relative path as one below the root, also after links are followed.

    Raises:
        ValueError: where it leads out of the root.
    """
    parts = PurePosixPath(path.replace("\\", "/")).parts
    if "://" in path or "::" in path or not parts or parts[0].endswith(":") or parts[0] == "/" or ".." in parts:
        raise ValueError(f"{path!r} leads out of the job's folder; needed is a path below it")
    if "://" in root:
        return f"{root.rstrip('/')}/{'/'.join(parts)}"
    base = Path(root).resolve()
    found = base.joinpath(*parts).resolve()
    if not found.is_relative_to(base):
        raise ValueError(f"{path!r} leads out of the job's folder by a link; needed is a path below it")
    return os.fspath(found)
