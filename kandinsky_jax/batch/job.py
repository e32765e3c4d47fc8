"""Jobs: rows, settings and output folder. Faults are reported before a model is loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from kandinsky_jax import images
from kandinsky_jax.batch import model_files
from kandinsky_jax.batch.requests import MAX_IMAGES, MAX_SIDE, STRENGTH, check_pixels, text
from kandinsky_jax.batch.rows import USUAL_DEFAULTS, JobError, RowFile, parquet, scan
from kandinsky_jax.batch.shards import OUTPUT_FORMATS, Output
from kandinsky_jax.checkpoint import fast_adapters, hub
from kandinsky_jax.checkpoint.networks import network_dtype
from kandinsky_jax.checkpoint.recommended_settings import BY_OPTION, FALLBACK, RecommendedSettings
from kandinsky_jax.common import reading
from kandinsky_jax.common.errors import MAX_MESSAGE, quote, shorten
from kandinsky_jax.common.remote import connect
from kandinsky_jax.common.storage import read_json
from kandinsky_jax.diffusion import Autoguidance, guider_named
from kandinsky_jax.models import PriorTransformer, UNet2DConditionModel
from kandinsky_jax.pipelines import CombinedPipeline, checks
from kandinsky_jax.pipelines.guidance import Guidance, weak_folder
from kandinsky_jax.pipelines.modes import MODES, PICTURE_COLUMNS, class_names, repository_of
from kandinsky_jax.schedulers import Scheduler, scheduler_from_config, scheduler_named

CHECKED_STEPS = 20  # of a schedule that is asked whether a guider can serve it
SCALES = {"guider": "guidance_scale", "prior_guider": "prior_guidance_scale"}


@dataclasses.dataclass(frozen=True)
class Job:
    """Settings of a job; rows may override some of them.

    Args:
        rows: path or URL of the file of rows: .jsonl, .csv, .parquet or .txt.
        output: path or URL of the folder to fill.
        model, prior: see `Pipeline.from_pretrained`; None is the official one for the mode.
        mode: one of `pipelines.modes.MODES`; None is derived from the columns of a CSV or Parquet file, or from the
            first row of another.
        form: "webdataset" or "folder".
        pictures: "png", "jpg" or "webp".
        rows_per_shard: rows of one unit of work, the most that a preemption can lose.
        batch: batch size on each device. A picture does not depend on the others or on the number of devices; its last
            bits may depend on the batch size.
        seed: default of row 0; that of each later row is one higher.
        scheduler: by a short name; None is the one that the model recommends, or its own.
        dtype: of the networks; None is float32 on a CPU, else bfloat16.
        root: folder or URL of the rows' pictures; None is the folder of the job's file.
        defaults: by column, for rows without a value; those that are not given are the model's own, see
            `checkpoint.recommended_settings`.
        fast: use the model's fast adapter, see `Pipeline.load_fast`; its settings come before others of the model.
        cache_interval: the UNet's deep blocks run in one of so many steps, see `CacheIntervalOption`.
        guider, prior_guider: of the decoder and the prior, by name, see `GuiderOption`; None is classifier-free.
        guidance_interval, prior_guidance_interval: guidance in a part of the steps, see `GuidanceIntervalOption`.
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
    fast: bool = False
    cache_interval: int = 1
    guider: str | None = None
    prior_guider: str | None = None
    guidance_interval: tuple[float, float] | None = None
    prior_guidance_interval: tuple[float, float] | None = None

    def faults(self) -> list[str]:
        """Return all faults of the settings, without reading the rows."""
        found = []
        for name, value, allowed in (
            ("mode", self.mode, (None, *MODES)),
            ("format", self.form, OUTPUT_FORMATS),
            ("pictures", self.pictures, tuple(images.ENCODINGS)),
        ):
            if value not in allowed:
                found.append(f"{name}={quote(value)} is not supported, only {', '.join(repr(x) for x in allowed if x)}")
        for name in ("rows_per_shard", "batch", "cache_interval"):
            with _listed(found):
                checks.count(getattr(self, name), name)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**62:
            found.append(f"seed must be a whole number from 0 to 2**62 - 1, got {quote(self.seed)}")
        if not isinstance(self.fast, bool):
            found.append(f"fast must be True or False, got {quote(self.fast)}")
        if self.fast and (guiders := [name for name in SCALES if getattr(self, name) is not None]):
            found.append(f"{' and '.join(guiders)}: fast adapters have been distilled for no guidance; leave fast out")
        with _listed(found):
            network_dtype(self.dtype)
        if self.scheduler is not None:
            with _listed(found):
                scheduler_named(self.scheduler, {})
        for name in ("guider", "prior_guider"):
            if getattr(self, name) is not None:
                with _listed(found, name):
                    guider_named(text(getattr(self, name)), self.defaults.get(SCALES[name]))
        for name in ("guidance_interval", "prior_guidance_interval"):
            with _listed(found):
                checks.interval(getattr(self, name), checks.LARGEST, name)
        found += _default_faults(self.defaults)
        if self.root is not None:
            with _listed(found):
                _check_folder(self.root)
        if self.form == "folder":
            with _listed(found):
                parquet()
        return found

    @property
    def extensions(self) -> dict[str, bool | int | str]:
        """Settings of the whole job that diffusers does not have; nothing for those that are off."""
        found: dict[str, bool | int | str] = {"fast": True} if self.fast else {}
        found |= {"cache_interval": self.cache_interval} if self.cache_interval > 1 else {}
        for name in ("guider", "prior_guider"):
            found |= {} if getattr(self, name) is None else {name: getattr(self, name)}
        for name in ("guidance_interval", "prior_guidance_interval"):
            if (ends := getattr(self, name)) is not None:
                found[name] = ",".join(f"{float(end):g}" for end in ends)
        return found

    @property
    def folder(self) -> str:
        """Folder or URL of the rows' pictures."""
        if self.root is not None:
            return self.root
        return posixpath.dirname(self.rows) if "://" in self.rows else os.fspath(Path(self.rows).absolute().parent)


def _default_faults(defaults: Mapping[str, Any]) -> list[str]:
    """List faults of the defaults for rows."""
    found = [
        f"there is no column {quote(name)} to give a default for; there are {', '.join(_DEFAULT_CHECKS)}"
        for name in defaults
        if name not in _DEFAULT_CHECKS
    ]
    good = {}
    for name, check in _DEFAULT_CHECKS.items():
        if defaults.get(name) is not None:
            before = len(found)
            with _listed(found, name):
                check(defaults[name], name)
            if len(found) == before:
                good[name] = defaults[name]
    if "height" in good and "width" in good:
        with _listed(found):
            check_pixels(good["height"], good["width"], good.get("num_images", 1))
    return found


def _at_most(check: Callable[[object, str], int], most: int) -> Callable[[object, str], int]:
    def checked(value: Any, name: str) -> int:
        if check(value, name) > most:
            raise ValueError(f"{name} must be at most {most}, got {quote(value)}")
        return int(value)

    return checked


# Checks of default values by column, independent of the model.
_DEFAULT_CHECKS: dict[str, Callable[[object, str], object]] = {
    "negative_prompt": lambda value, _: text(value),
    "num_images": _at_most(checks.count, MAX_IMAGES),
    "height": _at_most(checks.side, MAX_SIDE),
    "width": _at_most(checks.side, MAX_SIDE),
    "steps": checks.count,
    "prior_steps": checks.count,
    "guidance_scale": checks.guidance,
    "prior_guidance_scale": checks.guidance,
    "strength": lambda value, _: checks.strength(value, checks.LARGEST),
}


def _check_folder(root: str) -> None:
    """Raise ValueError for a local path that is not a folder, or a URL that cannot be opened."""
    try:
        fs, path = connect(root)
    except reading.ReadError as error:
        raise ValueError(f"files: {reading.of_file(root, error)}") from None
    if isinstance(fs, LocalFileSystem) and not os.path.isdir(path or "/"):
        raise ValueError(f"files: there is no folder {shorten(root, 240)}")


@contextlib.contextmanager
def _listed(faults: list[str], name: str = "") -> Iterator[None]:
    """Add errors raised in the block to `faults`, prefixed with the name of the setting."""
    try:
        yield
    except JobError as error:
        faults += error.faults
    except (ValueError, TypeError, ImportError) as error:
        fault = shorten(error, MAX_MESSAGE)
        faults.append(fault if fault.startswith(name) else f"{name}: {fault}")


@dataclasses.dataclass(frozen=True)
class OpenJob:
    """A job after its rows were scanned and its mode was determined."""

    job: Job
    mode: str
    rows: RowFile
    output: Output
    model: str

    @property
    def pipeline(self) -> type[CombinedPipeline]:
        """Pipeline class of the mode."""
        return MODES[self.mode].combined_class

    @functools.cached_property  # it reads the model's folder
    def recommended(self) -> RecommendedSettings:
        """Settings that the model recommends; in a fast job, first those of its fast adapter."""
        folders = model_files.folders(self.pipeline, self.model, self.job.prior)
        return fast_adapters.settings_of_model(folders, self.job.fast)

    @property
    def usual(self) -> dict[str, Any]:
        """Defaults of the model, or the usual ones, by column."""
        found = {}
        for column, name in BY_OPTION.items():
            own = getattr(self.recommended, name)
            found[column] = getattr(FALLBACK, name) if own is None else own
        return found

    @property
    def settings(self) -> dict[str, Any]:
        """Defaults for rows without a value: as given, else recommended by the model, else the usual ones."""
        given = {name: value for name, value in self.job.defaults.items() if value is not None}
        return USUAL_DEFAULTS | self.usual | given

    @property
    def scheduler(self) -> str | None:
        """Short name of the decoder's scheduler; None is the model's own."""
        return self.job.scheduler or self.recommended.scheduler

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows.count // self.job.rows_per_shard)

    def incomplete(self) -> list[int]:
        """Return the numbers of the shards that are not complete, ascending; see `run`.

        Raises:
            OSError: where the output cannot be read.
        """
        complete = self.output.complete(self.shards)
        return [number for number in range(self.shards) if number not in complete]

    @functools.cached_property  # it reads the model's folder
    def identity(self) -> dict[str, object]:
        """Everything that determines the result, which must be the same in every run of the job.

        Paths of the rows and the model are not part of it, nor are processes and devices.
        """
        versions = {name: importlib.metadata.version(name) for name in ("kandinsky_jax", "jax", "Pillow")}
        job, own = self.job, self.recommended
        size = [job.defaults.get("height") or own.height, job.defaults.get("width") or own.width]
        return {
            "rows": {"sha256": self.rows.sha256, "count": self.rows.count},
            "model": model_files.digests(self.pipeline, self.model, job.prior, job.fast),
            "mode": self.mode,
            "format": job.form,
            "pictures": job.pictures,
            "rows_per_shard": job.rows_per_shard,
            "batch": job.batch,
            "seed": job.seed,
            "scheduler": self.scheduler,
            "dtype": job.dtype,
            "defaults": {name: self.settings[name] for name in sorted(self.settings)},
            "versions": versions,
            **({"size": size} if own.height or own.width else {}),
            **job.extensions,
            **self._weak_models(),
        }

    def _weak_models(self) -> dict[str, dict[str, str]]:
        """Compute the digests of the weak models that guide, by the setting that names them."""
        found = {}
        for name, cls in (("guider", UNet2DConditionModel), ("prior_guider", PriorTransformer)):
            if getattr(self.job, name) is not None:
                guider = guider_named(getattr(self.job, name))
                if isinstance(guider, Autoguidance):
                    found[f"{name}_model"] = model_files.network_digests(weak_folder(cls, guider.model))
        return found

    def begin(self) -> None:
        """Start the job in the output folder, or check that it was started there.

        Raises:
            JobError: for the folder of another job (see `Output.begin`), a model of another mode, or a number of steps
                that its schedulers do not take; nothing is written then.
            CheckpointError: for a model that does not exist, or of a fast job that has no fast adapter.
        """
        if faults := self._model_faults():
            raise JobError(faults)
        self.output.begin(self.identity, lambda: model_files.names_and_sizes(self.pipeline, self.model, self.job.prior))

    def _model_faults(self) -> list[str]:
        """List settings that do not fit the model, with which no row could be generated."""
        folder, *prior = model_files.folders(self.pipeline, self.model, self.job.prior)
        found, mode = hub.pipeline_class(folder), MODES[self.mode]
        if repository_of(found) != mode.repository:
            needed = " or ".join(class_names(mode.repository))
            return [
                f"{shorten(str(folder), 150)} holds a {shorten(found, 60)}, which the mode "
                f"{self.mode} cannot use; it needs a {needed}"
            ]
        decoder_scheduler = _scheduler(folder, "scheduler")
        if self.scheduler is not None:
            decoder_scheduler = scheduler_named(self.scheduler, decoder_scheduler.config)
        prior_scheduler = _scheduler(prior[0], "scheduler") if prior else _scheduler(folder, "prior_scheduler")
        faults: list[str] = []
        for name, scheduler in (("steps", decoder_scheduler), ("prior_steps", prior_scheduler)):
            if self._may_be_unused(name):
                continue
            self._check_guider("guider" if name == "steps" else "prior_guider", scheduler, faults)
            steps, strength = self.settings[name], None
            if name == "steps" and mode.takes_strength and not self._may_be_unused("strength"):
                strength = self.settings["strength"]
            with _listed(faults, name):
                scheduler.schedule(steps, checks.skipped(strength, scheduler.steps(steps)))
        return faults

    def _check_guider(self, name: str, scheduler: Scheduler, faults: list[str]) -> None:
        """Add what is wrong with a guider beside the job's scale and the scheduler."""
        text = getattr(self.job, name)
        if text is not None and not self._may_be_unused(SCALES[name]):
            with _listed(faults, name):
                Guidance(guider_named(text, self.settings[SCALES[name]])).check(scheduler.schedule(CHECKED_STEPS))

    def _may_be_unused(self, name: str) -> bool:
        """Return whether rows may override a setting that has its default value."""
        by_row = self.rows.kind == "jsonl" or name in self.rows.columns
        usual = self.usual.get(name, STRENGTH)
        return by_row and self.settings[name] == usual


def _scheduler(folder: Path, name: str) -> Scheduler:
    path = hub.component_folder(folder, name) / "scheduler_config.json"
    return scheduler_from_config(read_json(path), str(path))


def open_job(job: Job) -> OpenJob:
    """Check a job and scan its rows.

    Raises:
        JobError: listing all faults.
    """
    faults = job.faults()
    rows = output = None
    with _listed(faults):
        rows = scan(job.rows)
    if job.form in OUTPUT_FORMATS:
        try:
            output = Output(job.output, job.form, job.pictures, job.extensions)
        except reading.ReadError as error:
            faults.append(f"output: {reading.of_file(job.output, error)}")
        except OSError as error:
            faults.append(f"output: {shorten(error, MAX_MESSAGE)}")
    if faults or rows is None or output is None:
        raise JobError(faults)
    mode = job.mode or _mode_of(rows)
    if faults := _mode_faults(rows, mode):
        raise JobError(faults)
    repository = MODES[mode].repository
    return OpenJob(job, mode, rows, output, job.model or f"{hub.OFFICIAL}/{repository}")


def _mode_faults(rows: RowFile, mode: str) -> list[str]:
    """List reasons why no row fits a mode; rows are read up to the first that fits, usually the first one."""
    path, columns = shorten(rows.path, 240), set(rows.columns)
    lacking = set(MODES[mode].columns)  # in all rows so far
    surplus = set(PICTURE_COLUMNS.values()) - lacking  # likewise
    if rows.kind != "jsonl":
        if missing := lacking - columns:
            return [f"the mode {mode} needs {_and(missing)} of a row, for which {path} has no column"]
        surplus &= columns
    seen = False
    for raw in rows.read(0, rows.count) if lacking or surplus else ():
        if raw.fault is None:
            seen = True
            names = {name for name, value in raw.values.items() if value is not None}
            lacking, surplus = lacking - names, surplus & names
            if not lacking and not surplus:
                return []
    if seen and lacking:
        return [f"the mode {mode} needs {_and(lacking)} of a row, which no row of {path} has"]
    if seen and surplus:
        return [f"the mode {mode} does not use {_and(surplus)}, which every row of {path} has"]
    return []


def _and(names: Iterable[str]) -> str:
    return " and ".join(name for name in PICTURE_COLUMNS.values() if name in names)


def _mode_of(rows: RowFile) -> str:
    """Return the mode that takes the columns."""
    names = set(rows.columns) or set(next(rows.read(0, 1)).values)
    files = names & set(PICTURE_COLUMNS.values())
    modes = [name for name, mode in MODES.items() if set(mode.columns) == files]
    if not modes:
        raise JobError([f"{rows.path}: no mode takes {' and '.join(sorted(files))} alone; say which one is meant"])
    return modes[0]
