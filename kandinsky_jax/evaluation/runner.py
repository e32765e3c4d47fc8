"""Evaluate pictures: find them or generate them, compute their features, measure.

    source -> parts -> features of each part, kept in OUT/features -> measurements -> OUT/evaluation.json, .md

Everything wrong with the arguments is reported at once, before a network is read. A run that was stopped or killed goes
on when it is started again, with the same numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from kandinsky_jax.batch import Job, JobError, OpenJob, load_pipeline, open_job, run
from kandinsky_jax.batch.rows import ROW_FORMATS
from kandinsky_jax.batch.shards import json_line
from kandinsky_jax.checkpoint import CheckpointError
from kandinsky_jax.common import atomic
from kandinsky_jax.common.errors import MAX_MESSAGE, quote, shorten, summarize
from kandinsky_jax.common.files import Files, open_files
from kandinsky_jax.common.reading import ReadError, of_file
from kandinsky_jax.common.remote import connect
from kandinsky_jax.evaluation.bootstrap import Resampling
from kandinsky_jax.evaluation.extractors import CLIPTowers, Extractor, InceptionFeatures
from kandinsky_jax.evaluation.feature_store import FeatureSet, FeatureStore, PictureFault
from kandinsky_jax.evaluation.metrics import (
    CLIPMaximumMeanDiscrepancy,
    CLIPScore,
    FrechetInceptionDistance,
    KernelInceptionDistance,
    Measurement,
    Metric,
    NearestName,
    needed_extractors,
)
from kandinsky_jax.evaluation.references import SavedFeatures, is_saved, save_features
from kandinsky_jax.evaluation.report import Evaluation
from kandinsky_jax.evaluation.sources import PictureSource, open_source
from kandinsky_jax.parallel.mesh import Mesh
from kandinsky_jax.pipelines import checks

CLIP_SCORE, CLIP_MMD, FID, KID, NEAREST_NAME = METRICS = (
    *("clip-score", "kandinsky-clip-mmd", "fid", "kid"),
    "nearest-name",
)
OF_CLIP, OF_INCEPTION = (CLIP_SCORE, CLIP_MMD, NEAREST_NAME), (FID, KID)
BATCH = 16  # pictures on each device
PICTURES = "pictures"  # folder of generated ones


class EvaluationError(ValueError):
    """An evaluation is invalid as a whole; `faults` lists all faults, one per line of the message."""

    def __init__(self, faults: Sequence[str]):
        self.faults = list(faults)
        super().__init__("this cannot be evaluated:\n  " + summarize(self.faults, 2 * MAX_MESSAGE, separator="\n  "))


def evaluate(
    source: str | os.PathLike[str] | Job,
    output: str | os.PathLike[str],
    *,
    metrics: Sequence[str | Metric] | None = None,
    model: str | None = None,
    prior: str | None = None,
    clip: str | None = None,
    inception: str | os.PathLike[str] | None = None,
    reference: str | os.PathLike[str] | None = None,
    names: Sequence[str] = (),
    save: str | os.PathLike[str] | None = None,
    mesh: Mesh | None = None,
    batch: int = BATCH,
    resampling: Resampling | None = None,
    incomplete: bool = False,
    quiet: bool = False,
    further_faults: Sequence[str] = (),
) -> Evaluation:
    """Measure a set of pictures, and write the result.

    Writes `evaluation.json`, `evaluation.md` and `pictures.jsonl` (the numbers of each picture), `errors.jsonl` where
    pictures could not be evaluated, and `features/`, from which a later run goes on.

    Args:
        source: the folder of a batch job; a folder, .tar or .parquet file of pictures in one of training's formats; or
            what to generate first into OUT/pictures: a file of rows (.jsonl, .csv, .txt) or a `Job`, which has its own
            output. A path, or an fsspec URL.
        output: the folder to write into, a path or URL.
        metrics: names of `METRICS`, and objects with the methods of `Metric`. None is clip-score, with a reference also
            kandinsky-clip-mmd, and with `inception` fid and kid too; with `save` alone it is none.
        model, prior: what generates the pictures of a file of rows, see `Job`.
        clip: the model whose prior has the CLIP towers, see `CLIPTowers.from_pretrained`; None is `prior` or `model`.
        inception: file of the Inception network's weights, see `evaluation.inception`.
        reference: the set to compare with: as `source`, but not to be generated; or a file of saved features.
        names: further candidates of nearest-name.
        save: a .safetensors file to write the features of the pictures into, to be a reference later.
        mesh: of devices over which the networks' batches are sharded; None is all of this process.
        batch: pictures on each device.
        resampling: how intervals are made.
        incomplete: evaluate the shards that a job has, though others are missing.
        quiet: no progress bars.
        further_faults: what the caller has found to be wrong, to be raised with what is found here.
    Raises:
        EvaluationError: listing everything that is wrong with the arguments.
        ValueError: where no picture can be evaluated.
        OSError: where the output cannot be written; what was computed stays.
    """
    plan = _Plan(
        metrics=metrics,
        model=model,
        prior=prior,
        clip=clip,
        inception=inception,
        names=names,
        reference=reference,
        save=save,
        mesh=mesh,
        batch=batch,
        resampling=Resampling() if resampling is None else resampling,
        incomplete=incomplete,
    )
    prepared = plan.check(source, os.fspath(output), further_faults)
    if prepared.job is not None:
        _generate(prepared.job, quiet)
    return _evaluate(plan, prepared, quiet)


@dataclasses.dataclass
class _Prepared:
    """What the arguments have been found to mean."""

    files: Files
    folder: Path | None  # of the output, if it is local
    metrics: list[Metric]
    saved: list[Extractor]  # whose features are saved
    job: OpenJob | None  # to be run first
    source: PictureSource | None  # None until a job has run
    reference: PictureSource | SavedFeatures | None


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The arguments of `evaluate`."""

    metrics: Sequence[str | Metric] | None
    model: str | None
    prior: str | None
    clip: str | None
    inception: str | os.PathLike[str] | None
    names: Sequence[str]
    reference: str | os.PathLike[str] | None
    save: str | os.PathLike[str] | None
    mesh: Mesh | None
    batch: int
    resampling: Resampling
    incomplete: bool

    def check(self, source: str | os.PathLike[str] | Job, output: str, further: Sequence[str]) -> _Prepared:
        """Check everything, and open what is there.

        Raises:
            EvaluationError: listing all faults.
        """
        faults = list(further)
        with _listed(faults):
            checks.count(self.batch, "batch")
        faults += self.resampling.faults()
        files, folder = _open_output(output, faults)
        for name in ("metrics", "names"):
            if isinstance(getattr(self, name), str):
                raise EvaluationError([*faults, f"{name} must be a list of them, got {quote(getattr(self, name))}"])
        metrics, saved = self._metrics(faults)
        names = [one.name for one in metrics]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            faults.append(f"two metrics are named {', '.join(twice)}; give each a name of its own")
        needs_prompts = any(one.needs_prompt for one in [*needed_extractors(metrics), *saved])
        job, found = self._source(source, output, needs_prompts, faults)
        reference = self._reference(metrics, faults)
        if self.save is not None:
            faults += _saving_faults(self.save)
        if not metrics and not saved and not faults:
            faults.append("there is nothing to measure: name a metric, or a file to save features in")
        if faults or files is None:
            raise EvaluationError(faults)
        return _Prepared(files, folder, metrics, saved, job, found, reference)

    def _metrics(self, faults: list[str]) -> tuple[list[Metric], list[Extractor]]:
        """Return the metrics, and the extractors whose features are to be saved."""
        chosen: list[str | Metric] = list(self._usual() if self.metrics is None else self.metrics)
        named = [one for one in chosen if isinstance(one, str)]
        faults += [
            f"there is no metric {quote(name, 60)}; there are {', '.join(METRICS)}"
            for name in named
            if name not in METRICS
        ]
        towers = inception = None
        needs_clip = any(name in OF_CLIP for name in named) or (self.save is not None and self._has_clip)
        if needs_clip:
            with _listed(faults):
                towers = self._towers()
        needs_inception = [name for name in named if name in OF_INCEPTION]
        if self.inception is not None:
            with _listed(faults):
                inception = InceptionFeatures(self.inception, self.mesh)
        elif needs_inception:
            faults.append(
                f"{' and '.join(needs_inception)}: needed are the weights of FID's Inception network; name a file of "
                "them (--inception), such as pt_inception-2015-12-05-6726825d.pth of pytorch-fid"
            )
        metrics: list[Metric] = []
        for one in chosen:
            if not isinstance(one, str):
                if not hasattr(one, "extractors"):
                    faults.append(f"{quote(one, 60)} is no metric; for a function, PictureMetric(name, function)")
                    continue
                metrics.append(one)
            elif one in OF_CLIP and towers is not None:
                metrics.append(_of_clip(one, towers, self.names))
            elif one in OF_INCEPTION and inception is not None:
                metrics.append((FrechetInceptionDistance if one == FID else KernelInceptionDistance)(inception))
        saved: list[Extractor] = []
        if self.save is not None:
            saved += [towers.images] if towers is not None else []
            saved += [inception] if inception is not None else []
        if self.names and NEAREST_NAME not in named:
            faults.append(f"names are candidates of {NEAREST_NAME}, which is not among the metrics")
        return metrics, saved

    @property
    def _has_clip(self) -> bool:
        return any(name is not None for name in (self.clip, self.model, self.prior))

    def _usual(self) -> list[str]:
        if self.save is not None and self.reference is None:
            return []
        with_reference = [CLIP_MMD, *(OF_INCEPTION if self.inception is not None else ())]
        return [CLIP_SCORE, *(with_reference if self.reference is not None else [])]

    def _towers(self) -> CLIPTowers:
        if self.clip is not None:
            return CLIPTowers.from_pretrained(self.clip, mesh=self.mesh)
        try:
            return CLIPTowers.from_pretrained(self.model, self.prior, mesh=self.mesh)
        except CheckpointError as error:
            if self._has_clip:
                raise
            raise CheckpointError(f"{error}; name another model whose CLIP shall judge: clip (--clip)") from None

    def _source(
        self, source: str | os.PathLike[str] | Job, output: str, needs_prompts: bool, faults: list[str]
    ) -> tuple[OpenJob | None, PictureSource | None]:
        """Open the pictures, or the job that generates them."""
        if not isinstance(source, Job) and is_rows(os.fspath(source)):
            pictures = f"{output.rstrip('/')}/{PICTURES}"
            source = Job(rows=os.fspath(source), output=pictures, model=self.model, prior=self.prior)
        with _listed(faults):
            if isinstance(source, Job):
                return open_job(source), None
            return None, open_source(source, needs_prompts=needs_prompts, incomplete=self.incomplete)
        return None, None

    def _reference(self, metrics: Sequence[Metric], faults: list[str]) -> PictureSource | SavedFeatures | None:
        chosen = self._usual() if self.metrics is None else self.metrics
        needing = [one if isinstance(one, str) else one.name for one in chosen if _needs_reference(one)]
        if self.reference is None:
            if needing:
                faults.append(f"{' and '.join(needing)} needs a reference set to compare with (--reference)")
            return None
        if not needing:
            faults.append(
                "no metric compares with a reference set; leave it out, or name one such as kandinsky-clip-mmd"
            )
            return None
        with _listed(faults):
            if not is_saved(self.reference):
                return open_source(self.reference, needs_prompts=False, incomplete=self.incomplete)
            saved = SavedFeatures(self.reference)
            faults += saved.faults(needed_extractors(metrics, of_reference=True))
            return saved
        return None


def _needs_reference(metric: str | Metric) -> bool:
    return metric in (CLIP_MMD, FID, KID) if isinstance(metric, str) else getattr(metric, "needs_reference", False)


def _of_clip(name: str, towers: CLIPTowers, names: Sequence[str]) -> Metric:
    if name == CLIP_MMD:
        return CLIPMaximumMeanDiscrepancy(towers.images)
    if name == CLIP_SCORE:
        return CLIPScore(towers.images, towers.texts)
    return NearestName(towers.images, towers.texts, tuple(names))


def is_rows(source: str) -> bool:
    """Whether a source is a file of rows to generate, by its suffix; a .parquet is one of pictures."""
    suffix = os.path.splitext(source)[1].lower()
    return suffix in ROW_FORMATS and suffix != ".parquet" and not os.path.isdir(source)


def _open_output(output: str, faults: list[str]) -> tuple[Files | None, Path | None]:
    """Return the files of the output folder, and its path if it is local."""
    with _listed(faults):
        if not output:
            raise ValueError("the output is empty; needed is a folder to write into")
        fs, path = connect(output)
        files = open_files(output)
        if files.size("job.json") is not None:
            raise ValueError(f"{shorten(output, 240)} is a batch job's folder, whose errors.jsonl would be replaced")
        return files, Path(path) if isinstance(fs, LocalFileSystem) else None
    return None, None


def _saving_faults(path: str | os.PathLike[str]) -> list[str]:
    target = Path(path)
    if target.suffix.lower() != ".safetensors":
        return [f"{shorten(str(path), 240)} should end in .safetensors, to save features in"]
    if not target.absolute().parent.is_dir():
        return [f"the folder {shorten(str(target.absolute().parent), 240)} does not exist, to save features in"]
    return []


@contextlib.contextmanager
def _listed(faults: list[str]) -> Iterator[None]:
    """Add errors raised in the block to `faults`."""
    try:
        yield
    except (JobError, EvaluationError) as error:
        faults += error.faults
    except ReadError as error:
        faults.append(of_file("the folder", error))
    except OSError as error:
        faults.append(shorten(f"{error.filename or ''} {error.strerror or error}".strip(), MAX_MESSAGE))
    except (ValueError, TypeError, ImportError) as error:
        faults.append(shorten(error, MAX_MESSAGE))


# The run ----------------------------------------------------------------------------------------------------------


def _generate(job: OpenJob, quiet: bool) -> None:
    """Run a job, or what is left of it."""
    job.begin()
    if job.incomplete():
        run(job, load_pipeline(job), quiet=quiet)


def _evaluate(plan: _Plan, prepared: _Prepared, quiet: bool) -> Evaluation:
    source, extractors = prepared.source, needed_extractors(prepared.metrics)
    extractors += [one for one in prepared.saved if one.name not in {other.name for other in extractors}]
    if source is None:
        assert prepared.job is not None
        needs_prompts = any(one.needs_prompt for one in extractors)
        source = open_source(prepared.job.job.output, needs_prompts=needs_prompts)
    store = FeatureStore(prepared.files, "features", source, extractors)
    store.compute(plan.batch, quiet)
    of_reference = None
    if prepared.reference is not None and not isinstance(prepared.reference, SavedFeatures):
        needed = needed_extractors(prepared.metrics, of_reference=True)
        of_reference = FeatureStore(prepared.files, "reference", prepared.reference, needed)
        of_reference.compute(plan.batch, quiet, "reference")
    with _scratch(prepared.folder) as scratch:
        pictures, faults = store.collect(scratch, "")
        reference: FeatureSet | None = None
        of_other: list[PictureFault] = []
        if of_reference is not None:
            reference, of_other = of_reference.collect(scratch, "reference-")
        elif isinstance(prepared.reference, SavedFeatures):
            names = [one.name for one in needed_extractors(prepared.metrics, of_reference=True)]
            reference = prepared.reference.collect(scratch, "reference-", names)
        _write_errors(prepared.files, [*faults, *of_other], source.skipped)
        if not len(pictures):
            raise ValueError(f"none of {len(faults)} pictures could be evaluated; see errors.jsonl in the output")
        if plan.save is not None:
            save_features(plan.save, pictures, prepared.saved)
        found, unmeasured = _measure(prepared.metrics, pictures, reference, plan.resampling)
        about = None if prepared.reference is None else prepared.reference.about
        result = Evaluation(
            pictures=len(pictures),
            reference_pictures=0 if reference is None else len(reference),
            failed=len(faults),
            reference_failed=len(of_other),
            measurements=found,
            faults=unmeasured,
            source=source.about,
            reference=about,
            settings=_settings(plan, extractors),
        )
        _write(prepared.files, result, pictures)
    return result


@contextlib.contextmanager
def _scratch(folder: Path | None) -> Iterator[Path]:
    """Make a folder for features in one piece: in the output where that is local, for its disk has the space."""
    if folder is None:
        with tempfile.TemporaryDirectory() as made:
            yield Path(made)
        return
    atomic.sweep(folder, "measuring")
    with atomic.scratch_folder(folder / "measuring") as scratch:
        yield scratch


def _measure(
    metrics: Sequence[Metric], pictures: FeatureSet, reference: FeatureSet | None, resampling: Resampling
) -> tuple[list[Measurement], dict[str, str]]:
    """Return all measurements, and the reasons why metrics could not be measured."""
    found: list[Measurement] = []
    faults: dict[str, str] = {}
    for metric in metrics:
        try:
            if metric.needs_reference and reference is not None and not (len(reference) or reference.moments):
                raise ValueError("no picture of the reference could be evaluated")
            for one in metric.measure(pictures, reference, resampling):
                if not math.isfinite(one.value):
                    raise ValueError("the number is not finite; look at the features of the set and of the reference")
                found.append(one.with_finite_interval())
        except ValueError as error:
            faults[metric.name] = shorten(error, 300)
    return found, faults


def _settings(plan: _Plan, extractors: Sequence[Extractor]) -> dict[str, Any]:
    return {
        "model": plan.model,
        "prior": plan.prior,
        "clip": plan.clip,
        "inception": None if plan.inception is None else os.fspath(plan.inception),
        "fingerprints": {one.name: one.fingerprint() for one in extractors},
        "batch": plan.batch,
        **dataclasses.asdict(plan.resampling),
        "versions": {name: importlib.metadata.version(name) for name in ("kandinsky_jax", "jax", "Pillow", "numpy")},
    }


def _write_errors(files: Files, faults: Sequence[PictureFault], skipped: Sequence[str]) -> None:
    lines = [json_line({"picture": fault.picture or None, "error": fault.reason}) for fault in faults]
    lines += [json_line({"picture": None, "error": fault}) for fault in skipped]
    if lines:
        _put(files, "errors.jsonl", b"".join(lines))
    else:
        files.remove("errors.jsonl")


def _write(files: Files, result: Evaluation, pictures: FeatureSet) -> None:
    _put(files, "evaluation.json", (json.dumps(result.as_json(), indent=1) + "\n").encode())
    _put(files, "evaluation.md", (result.table() + "\n").encode())
    columns: Mapping[str, np.ndarray] = {
        found.name: found.values for found in result.measurements if found.values is not None
    }
    if columns:
        files.write("pictures.jsonl", lambda file: file.writelines(_lines(pictures, columns)), overwrite=True)
    else:
        files.remove("pictures.jsonl")


def _lines(pictures: FeatureSet, columns: Mapping[str, np.ndarray]) -> Iterator[bytes]:
    for i, (name, prompt) in enumerate(zip(pictures.names, pictures.prompts, strict=True)):
        numbers = {key: float(values[i]) for key, values in columns.items()}
        yield json_line({"picture": name, "prompt": prompt, **numbers})


def _put(files: Files, name: str, data: bytes) -> None:
    files.write(name, lambda file: file.write(data), overwrite=True)
