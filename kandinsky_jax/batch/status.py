"""How far a batch job is, from its output folder alone: names, sizes and times of its files, and errors/.

The job itself records no times. A shard's time is that of its file, which is written once, and the beginning is the
time of job.json. So times are those of a folder in which the job ran; a copy has the times of copying.
"""

from __future__ import annotations

import dataclasses
import datetime
import io
import itertools
from dataclasses import dataclass
from typing import NamedTuple

from kandinsky_jax.batch.failures import FailureReason, read_failures
from kandinsky_jax.batch.rows import parquet
from kandinsky_jax.batch.shards import OUTPUT_FORMATS, FoundShards, JobFileError, Output, read_identity, tar_members
from kandinsky_jax.common import reading
from kandinsky_jax.common.errors import quote, shorten
from kandinsky_jax.common.files import FileInfo, Files, open_files

RECENT_SECONDS = 900.0  # length of the window of the recent rate
RECENT_SHARDS = 5  # the least number of shards in it
STALL_SECONDS = 600.0  # without a shard, at least, before a job counts as stalled
STALL_GAPS = 3  # times the longest recent wait for a shard, likewise
_FOOTER = 1 << 16  # bytes at the end of a manifest that hold its footer
_MANIFESTS = 256  # whose ends are in memory at a time


@dataclass(frozen=True)
class Status:
    """State of a job. Times are in UTC, lengths of time in seconds; None stands for what cannot be known.

    Args:
        output: path or URL of the job's folder, without secrets.
        format_version: of its job.json.
        mode: of the pipeline, such as "generate".
        format: "webdataset" or "folder".
        encoding: of the pictures, such as "png".
        rows, rows_per_shard, shards: of the whole job.
        shards_complete, rows_done: how many of these are done, with the rows that failed.
        damaged: names of files that are no complete shards, and are made again when the job goes on.
        rows_failed: of those that are done; a row of several pictures of which some failed is one of them.
        failures: their reasons, the most frequent first.
        pictures: in the complete shards.
        pictures_exact: whether they were counted. Otherwise they are those of the job's default of pictures a row,
            which a column of the rows may override.
        started: when job.json was written.
        last_shard: when the last shard was completed.
        finished: the same, for a complete job.
        idle_seconds: since the last shard, or since the start where there is none; None for a complete job.
        stalled: whether that is much longer than the waits for shards before; None without times.
        recent_seconds: length of the window of the recent rate, which ends with the last shard.
        rows_per_second, pictures_per_second: in that window.
        overall_rows_per_second, overall_pictures_per_second: from the start, or the first shard, to the last one.
        seconds_left: at the recent rate; None for a job that is stalled.
        checked: when this was found out.
    """

    output: str
    format_version: int
    mode: str | None
    format: str
    encoding: str
    rows: int
    rows_per_shard: int
    shards: int
    shards_complete: int
    rows_done: int
    damaged: list[str]
    rows_failed: int
    failures: list[FailureReason]
    pictures: int
    pictures_exact: bool
    started: datetime.datetime | None
    last_shard: datetime.datetime | None
    finished: datetime.datetime | None
    idle_seconds: float | None
    stalled: bool | None
    recent_seconds: float | None
    rows_per_second: float | None
    pictures_per_second: float | None
    overall_rows_per_second: float | None
    overall_pictures_per_second: float | None
    seconds_left: float | None
    checked: datetime.datetime

    @property
    def complete(self) -> bool:
        """Whether all shards are complete."""
        return self.shards_complete == self.shards

    def as_json(self) -> dict[str, object]:
        """Return the fields, and `complete`, as values of JSON; times as ISO 8601 text."""
        fields = {"complete": self.complete} | dataclasses.asdict(self)
        return {
            name: value.isoformat(timespec="seconds") if isinstance(value, datetime.datetime) else value
            for name, value in fields.items()
        }


class JobFacts(NamedTuple):
    """What job.json says that its folder can be read with."""

    format_version: int
    mode: str | None
    form: str
    encoding: str
    rows: int
    rows_per_shard: int
    images_per_row: int

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.rows_per_shard)

    def rows_of(self, shard: int) -> int:
        """Return the number of rows of a shard."""
        return min(self.rows_per_shard, self.rows - shard * self.rows_per_shard)


def open_job_folder(output: str) -> tuple[Files, JobFacts]:
    """Open the folder of a job and read its job.json, of this format version or an older one.

    Raises:
        ValueError: where it holds no job, or one that this release does not know.
        OSError: where it cannot be read.
    """
    shown = shorten(output, 240)
    try:
        files = open_files(output)
    except reading.ReadError as error:
        raise ValueError(reading.of_file(shown, error)) from None
    try:
        version, identity = read_identity(shown, files)
    except FileNotFoundError:
        raise ValueError(
            f"{shown} holds no job.json; needed is the folder that `kandinsky-jax batch` fills, a path or a URL"
        ) from None
    except JobFileError as error:
        raise ValueError(str(error)) from None
    return files, _facts(shown, version, identity)


def _facts(output: str, version: int, identity: dict[str, object]) -> JobFacts:
    rows, defaults, mode = (identity.get(name) for name in ("rows", "defaults", "mode"))
    count = _number(output, "rows.count", rows.get("count") if isinstance(rows, dict) else None)
    rows_per_shard = _number(output, "rows_per_shard", identity.get("rows_per_shard"))
    images = _number(output, "defaults.num_images", defaults.get("num_images", 1) if isinstance(defaults, dict) else 1)
    form, encoding = identity.get("format"), identity.get("pictures")
    if form not in OUTPUT_FORMATS or not isinstance(encoding, str):
        raise ValueError(
            f"{output}/job.json is no batch job's: format is {quote(form, 60)} and pictures {quote(encoding, 60)}, "
            f"needed is a format of {', '.join(OUTPUT_FORMATS)} and an encoding"
        )
    return JobFacts(
        version, mode if isinstance(mode, str) else None, str(form), encoding, count, rows_per_shard, images
    )


def _number(output: str, name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**63:
        raise ValueError(
            f"{output}/job.json is no batch job's: {name} is {quote(value, 60)}, needed is a whole number above 0"
        )
    return value


def status(output: str, *, count: bool = False, now: datetime.datetime | None = None) -> Status:
    """Find out how far a job is; nothing is written, and no model or device is needed.

    Args:
        output: path or URL of the job's folder.
        count: whether to count the pictures in tar files, which are read for that; those of manifests always are.
        now: the time of the call, with a time zone; None is the clock's.
    Raises:
        ValueError: where it holds no job, or one that this release does not know.
        OSError: where it cannot be read.
    """
    files, job = open_job_folder(output)
    out = Output(output, job.form, job.encoding)
    found = out.find(job.shards)
    failures = read_failures(files, found.complete)
    rows_done = sum(job.rows_of(shard) for shard in found.complete)
    counted = None
    if job.form == "folder":
        counted = _count_in_manifests(files, {out.file_name(shard): info for shard, info in found.complete.items()})
    elif count:
        counted = sum(_count_in_tar(files, out.file_name(shard), job.encoding) for shard in found.complete)
    expected = (rows_done - failures.rows) * job.images_per_row
    pictures = max(0, expected) if counted is None else counted
    now = datetime.datetime.now(datetime.UTC) if now is None else now.astimezone(datetime.UTC)
    complete = len(found.complete) == job.shards
    job_file = files.details("").get("job.json")
    progress = _progress(found, job, None if job_file is None else job_file.modified, now)
    each = pictures / rows_done if rows_done else 0.0
    recent, overall = progress.rows_per_second, progress.overall_rows_per_second
    left = (job.rows - rows_done) / recent if recent and not progress.stalled else None
    return Status(
        output=shorten(output, 2000),
        format_version=job.format_version,
        mode=job.mode,
        format=job.form,
        encoding=job.encoding,
        rows=job.rows,
        rows_per_shard=job.rows_per_shard,
        shards=job.shards,
        shards_complete=len(found.complete),
        rows_done=rows_done,
        damaged=found.damaged,
        rows_failed=failures.rows,
        failures=failures.reasons,
        pictures=pictures,
        pictures_exact=counted is not None or not rows_done,
        started=progress.started,
        last_shard=progress.last_shard,
        finished=progress.last_shard if complete else None,
        idle_seconds=None if complete else progress.idle_seconds,
        stalled=False if complete else progress.stalled,
        recent_seconds=progress.recent_seconds,
        rows_per_second=recent,
        pictures_per_second=None if recent is None else recent * each,
        overall_rows_per_second=overall,
        overall_pictures_per_second=None if overall is None else overall * each,
        seconds_left=0.0 if complete else left,
        checked=now,
    )


# Times ------------------------------------------------------------------------------------------------------------


class _Progress(NamedTuple):
    started: datetime.datetime | None = None
    last_shard: datetime.datetime | None = None
    idle_seconds: float | None = None
    stalled: bool | None = None
    recent_seconds: float | None = None
    rows_per_second: float | None = None
    overall_rows_per_second: float | None = None


def _progress(
    found: FoundShards, job: JobFacts, started: datetime.datetime | None, now: datetime.datetime
) -> _Progress:
    """Return what the times of job.json and of the complete shards tell.

    The recent window ends with the last shard and begins when one was completed, or with the job: between two shards
    of a host, work is done that no file shows yet.
    """
    done = [(info.modified, job.rows_of(shard)) for shard, info in found.complete.items()]
    events = sorted((time.timestamp(), rows) for time, rows in done if time is not None)
    if len(events) < len(done):  # a file system without times
        return _Progress(started)
    began = None if started is None else started.timestamp()
    if not events:
        idle = None if began is None else max(0.0, now.timestamp() - began)
        return _Progress(started, idle_seconds=idle)
    if began is None or began > events[0][0]:  # a copy of the folder, or another job.json than that of the start
        started = None
    else:
        events.insert(0, (began, 0))
    last = events[-1][0]
    before = max(len(events) - 1 - RECENT_SHARDS, 0)
    while before and last - events[before][0] < RECENT_SECONDS:
        before -= 1
    window = events[before:]
    longest = max((b - a for (a, _), (b, _) in itertools.pairwise(window)), default=0.0)
    idle = max(0.0, now.timestamp() - last)
    return _Progress(
        started,
        datetime.datetime.fromtimestamp(last, datetime.UTC),
        idle,
        idle > max(STALL_SECONDS, STALL_GAPS * longest),
        last - window[0][0] or None,
        _rate(window),
        _rate(events),
    )


def _rate(events: list[tuple[float, int]]) -> float | None:
    """Return the rows per second after the first of these events, up to the last."""
    seconds = events[-1][0] - events[0][0]
    return sum(rows for _, rows in events[1:]) / seconds if seconds > 0 else None


# Pictures ---------------------------------------------------------------------------------------------------------


def _count_in_manifests(files: Files, manifests: dict[str, FileInfo]) -> int | None:
    """Count the rows of manifests, from their footers; None where one cannot be read."""
    names, total = list(manifests), 0
    for start in range(0, len(names), _MANIFESTS):
        part = {name: manifests[name].size or 0 for name in names[start : start + _MANIFESTS]}
        for _, tail in files.ends(part, 4, _FOOTER):
            try:
                total += parquet().read_metadata(io.BytesIO(tail)).num_rows
            except (OSError, ValueError):  # pyarrow's errors for damaged files are ValueErrors
                return None
    return total


def _count_in_tar(files: Files, name: str, encoding: str) -> int:
    return sum(member.name.endswith(f".{encoding}") for _, member in tar_members(files, name))
