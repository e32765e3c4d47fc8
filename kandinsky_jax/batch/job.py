"""A job: which rows, drawn how, into which folder. What is wrong with it is said before a model is loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import os
import posixpath
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kandinsky_jax import hub, images
from kandinsky_jax.batch import model_files
from kandinsky_jax.batch.output import FORMATS, Output
from kandinsky_jax.batch.rows import COLUMNS, JobError, RowFile, parquet, scan
from kandinsky_jax.batch.tasks import MODES
from kandinsky_jax.errors import quote
from kandinsky_jax.pipelines import (
    CombinedPipeline,
    KandinskyV22CombinedPipeline,
    KandinskyV22ControlnetCombinedPipeline,
    KandinskyV22ControlnetImg2ImgCombinedPipeline,
    KandinskyV22Img2ImgCombinedPipeline,
    KandinskyV22InpaintCombinedPipeline,
    checks,
)

PIPELINES: dict[str, type[CombinedPipeline]] = {
    "generate": KandinskyV22CombinedPipeline,
    "img2img": KandinskyV22Img2ImgCombinedPipeline,
    "inpaint": KandinskyV22InpaintCombinedPipeline,
    "controlnet": KandinskyV22ControlnetCombinedPipeline,
    "controlnet-img2img": KandinskyV22ControlnetImg2ImgCombinedPipeline,
}
DEFAULTS: dict[str, Any] = {"steps": 50, "guidance_scale": 4.0, "prior_steps": 25, "prior_guidance_scale": 4.0}


@dataclasses.dataclass(frozen=True)
class Job:
    """A job's settings. Rows say the rest.

    Args:
        rows: path or URL of the file of rows: .jsonl, .csv, .parquet or .txt.
        output: path or URL of the folder to fill.
        model, prior: see `Pipeline.from_pretrained`; None is the official one for the mode.
        mode: one of `kandinsky_jax.batch.tasks.MODES`; None is what the columns of a CSV or Parquet file, or the first
            row of another, ask for.
        form: "webdataset" or "folder".
        pictures: "png", "jpg" or "webp".
        rows_per_shard: how many rows are one unit of work: what a preemption can cost.
        batch: pictures drawn at once on each device. A picture does not depend on the others or on the number of
            devices; it may depend, in its last bits, on this number.
        seed: of the first row, where rows have none; each later row's is one higher.
        scheduler: by a short name; None is the model's own.
        dtype: of the networks; None is float32 on a CPU, else bfloat16.
        root: folder or URL below which the rows' pictures lie; None is that of the file of rows.
        defaults: by column, for rows that say nothing.
    """

    rows: str
    output: str
    model: str | None = None
    prior: str | None = None
    mode: str | None = None
    form: str = "webdataset"
    pictures: str = "png"
    rows_per_shard: int = 256
    batch: int = 4
    seed: int = 0
    scheduler: str | None = None
    dtype: str | None = None
    root: str | None = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def faults(self) -> list[str]:
        """Everything that is wrong with the settings by themselves."""
        found = []
        for name, value, allowed in (
            ("mode", self.mode, (None, *MODES)),
            ("format", self.form, FORMATS),
            ("pictures", self.pictures, tuple(images.ENCODINGS)),
        ):
            if value not in allowed:
                found.append(f"{name}={quote(value)} is not supported, only {', '.join(repr(x) for x in allowed if x)}")
        for name in ("rows_per_shard", "batch"):
            with _listed(found):
                checks.count(getattr(self, name), name)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**62:
            found.append(f"seed must be a whole number from 0 to 2**62 - 1, got {quote(self.seed)}")
        found += [
            f"there is no column {quote(name)} to give a default for" for name in self.defaults if name not in COLUMNS
        ]
        for name, check in (("height", checks.side), ("width", checks.side), ("num_images", checks.count)):
            if self.defaults.get(name) is not None:
                with _listed(found):
                    check(self.defaults[name], name)
        for name in ("guidance_scale", "prior_guidance_scale"):
            if name in self.defaults:
                with _listed(found):
                    checks.guidance(self.defaults[name], name)
        if self.form == "folder":
            with _listed(found):
                parquet()
        return found

    @property
    def settings(self) -> dict[str, Any]:
        """What rows are drawn with that say nothing."""
        return DEFAULTS | {name: value for name, value in self.defaults.items() if value is not None}

    @property
    def folder(self) -> str:
        """Where the rows' pictures are looked for."""
        if self.root is not None:
            return self.root
        return posixpath.dirname(self.rows) if "://" in self.rows else os.fspath(Path(self.rows).absolute().parent)


@contextlib.contextmanager
def _listed(faults: list[str]) -> Any:
    try:
        yield
    except JobError as error:
        faults += error.faults
    except (ValueError, TypeError) as error:
        faults.append(str(error))


@dataclasses.dataclass(frozen=True)
class OpenJob:
    """A job that has been looked at: its rows counted, its mode known."""

    job: Job
    mode: str
    rows: RowFile
    output: Output
    model: str

    @property
    def pipeline(self) -> type[CombinedPipeline]:
        """What draws it."""
        return PIPELINES[self.mode]

    @property
    def shards(self) -> int:
        """How many units of work there are."""
        return -(-self.rows.count // self.job.rows_per_shard)

    @functools.cached_property  # it reads the model's folder
    def identity(self) -> dict[str, Any]:
        """What has to be the same in every run of the job, for the result to be that of one run.

        Where the rows and the model lie is not part of it, and neither are processes and devices.
        """
        versions = {name: importlib.metadata.version(name) for name in ("kandinsky_jax", "jax", "Pillow")}
        job = self.job
        return {
            "rows": {"sha256": self.rows.sha256, "count": self.rows.count},
            "model": model_files.digests(self.pipeline, self.model, job.prior),
            "mode": self.mode,
            "format": job.form,
            "pictures": job.pictures,
            "rows_per_shard": job.rows_per_shard,
            "batch": job.batch,
            "seed": job.seed,
            "scheduler": job.scheduler,
            "dtype": job.dtype,
            "defaults": {name: job.settings[name] for name in sorted(job.settings)},
            "versions": versions,
        }

    def begin(self) -> None:
        """Make the output folder the job's, or see that it is; see `Output.begin`."""
        self.output.begin(self.identity, lambda: model_files.names_and_sizes(self.pipeline, self.model, self.job.prior))


def open_job(job: Job) -> OpenJob:
    """Look at a job.

    Raises:
        JobError: listing everything that is wrong with it.
    """
    faults = job.faults()
    rows = output = None
    with _listed(faults):
        rows = scan(job.rows)
    if job.form in FORMATS:
        try:
            output = Output(job.output, job.form, job.pictures)
        except (ImportError, ValueError, OSError) as error:  # no such kind of URL, or its package is not installed
            faults.append(f"{job.output} cannot be written to: {error}")
    if faults or rows is None or output is None:
        raise JobError(faults)
    mode = job.mode or _mode_of(rows)
    repository = PIPELINES[mode].REPOSITORY
    return OpenJob(job, mode, rows, output, job.model or f"{hub.OFFICIAL}/{repository}")


def _mode_of(rows: RowFile) -> str:
    """What the columns ask for."""
    names = set(rows.columns) or set(next(rows.read(0, 1)).values)
    files = names & {"image", "mask", "hint"}
    modes = [mode for mode, needed in MODES.items() if set(needed) == files]
    if not modes:
        raise JobError([f"{rows.path}: no mode takes {' and '.join(sorted(files))} alone; say which one is meant"])
    return modes[0]
