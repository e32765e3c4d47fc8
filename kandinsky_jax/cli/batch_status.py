"""`kandinsky-jax batch status`: how far a batch job is, and contact sheets of its shards."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from kandinsky_jax import images
from kandinsky_jax.batch.contact_sheet import contact_sheet
from kandinsky_jax.batch.status import Status, status
from kandinsky_jax.common.errors import counted, quote, shorten, summarize

EXAMPLE = "Example: kandinsky-jax batch status gs://BUCKET/pictures --sheet last --sheet-file sheet.png"
LAST = "last"
MAX_SHOWN = 10  # reasons
MIN_WATCH, MAX_WATCH = 0.01, 86_400.0  # seconds

FOLDER = Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder of the job; a path, or a URL such as gs://...")]
SHEET = Annotated[
    str | None, typer.Option(metavar=f"NUMBER|{LAST}", help="Write a contact sheet of this shard instead.")
]


def batch_status(
    output: FOLDER,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object; on one line with --watch.")] = False,
    watch: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Repeat it, until the job is complete or Ctrl-C.")
    ] = None,
    count: Annotated[
        bool, typer.Option("--count", help="Count the pictures in tar files, which reads all of them.")
    ] = False,
    sheet: SHEET = None,
    sheet_file: Annotated[Path, typer.Option(help="File of the contact sheet.")] = Path("sheet.png"),
) -> None:
    """Show how far a batch job is: shards, rows that failed and why, pictures a second, time left.

    It reads the output folder alone, while the job runs or not, on any machine. Times are those of the files. With
    --sheet it writes the pictures of a shard as thumbnails, with their ids and prompts. The keys of --json are the
    fields of kandinsky_jax.batch.status.Status; times are in UTC, lengths of time in seconds.
    """
    if sheet is not None:
        if as_json or watch is not None:
            raise ValueError("--sheet writes a contact sheet and shows no status: leave out --json and --watch")
        _write_sheet(output, sheet, sheet_file)
        return
    if watch is not None and not MIN_WATCH <= watch <= MAX_WATCH:
        raise ValueError(f"--watch must be a number of seconds from {MIN_WATCH} to {MAX_WATCH:.0f}, got {watch}")
    while True:
        found = status(output, count=count)
        if as_json:
            print(json.dumps(found.as_json(), indent=None if watch else 1), flush=True)
        else:
            text = "\n".join(lines(found))
            print(f"\x1b[H\x1b[2J{text}" if watch and sys.stdout.isatty() else text, flush=True)
        if watch is None or found.complete:
            return
        if not as_json and not sys.stdout.isatty():
            print(flush=True)
        time.sleep(watch)


def _write_sheet(output: str, which: str, path: Path) -> None:
    if which != LAST and not (which.isascii() and which.isdigit() and len(which) < 19):
        raise ValueError(f"--sheet is {quote(which, 60)}; needed is the number of a shard, or {LAST}")
    images.check_writable(path)
    sheet = contact_sheet(output, None if which == LAST else int(which))
    images.write(path, sheet.image)
    shown = f"the first {sheet.pictures} pictures" if sheet.more else counted(sheet.pictures, "picture")
    print(f"{path}: {shown} of shard {sheet.shard}")


def lines(found: Status) -> list[str]:
    """Return a status as lines of text."""
    text = [
        f"{shorten(found.output, 240)}: {shorten(found.mode or 'unknown mode', 40)}, "
        f"{counted(found.rows, 'row')} in {counted(found.shards, 'shard')} of {found.rows_per_shard:,}, "
        f"{found.format} of {shorten(found.encoding, 40)}",
        _done(found),
        _pictures(found),
    ]
    text += _failures(found)
    if found.damaged:
        text.append(f"damaged: {summarize(found.damaged, 200, ', ')}; made again when the job goes on")
    text += _times(found)
    return text


def _done(found: Status) -> str:
    if found.complete:
        all_of_many = "all " if found.shards > 1 else ""
        return f"complete: {all_of_many}{counted(found.shards, 'shard')}, {counted(found.rows_done, 'row')}"
    share = math.floor(1000 * found.shards_complete / found.shards) / 10  # 100 % only where it is complete
    return (
        f"done: {found.shards_complete:,} of {counted(found.shards, 'shard')} ({share:.1f} %), "
        f"{found.rows_done:,} of {counted(found.rows, 'row')}"
    )


def _pictures(found: Status) -> str:
    if found.pictures_exact:
        return f"pictures: {found.pictures:,}"
    return f"pictures: {found.pictures:,}, if no row asks for another number than the job's default"


def _failures(found: Status) -> list[str]:
    if not found.rows_failed:
        return ["failed: no rows"] if found.shards_complete else []
    text = [f"failed: {counted(found.rows_failed, 'row')}"]
    for reason in found.failures[:MAX_SHOWN]:
        example = (
            "" if reason.example_row is None else f" (row {reason.example_row}, id {quote(reason.example_id, 60)})"
        )
        more = "" if reason.example_error == reason.reason else "such as "
        text.append(f"  {reason.rows:>9,}  {more}{shorten(reason.example_error, 160)}{example}")
    if len(found.failures) > MAX_SHOWN:
        others = found.failures[MAX_SHOWN:]
        text.append(f"  {sum(reason.rows for reason in others):>9,}  for {len(others):,} other reasons, see --json")
    return text


def _times(found: Status) -> list[str]:
    if found.last_shard is None and found.shards_complete:
        return ["rate, start and end: unknown, the file system does not say when files were written"]
    started = "unknown" if found.started is None else _time(found.started)
    text = [f"started: {started}"]
    if found.last_shard is None:
        waited = "" if found.idle_seconds is None else f", {length(found.idle_seconds)} after the start"
        return [*text, f"no shard is complete yet{waited}; rate and time left are unknown"]
    if found.overall_pictures_per_second is None or found.pictures_per_second is None:
        text.append("rate: unknown, no two files were written at different times")
    else:
        recent = (
            f"{_rate(found.pictures_per_second)} pictures/s in the last {length(found.recent_seconds or 0)} of work"
        )
        text.append(f"rate: {recent}, {_rate(found.overall_pictures_per_second)} overall")
    if found.finished is not None:
        took = "" if found.started is None else f", {length((found.finished - found.started).total_seconds())} later"
        return [*text, f"finished: {_time(found.finished)}{took}"]
    idle = length(found.idle_seconds or 0)
    if found.stalled:
        return [*text, f"stalled: nothing was written for {idle}; time left is unknown"]
    left = "unknown" if found.seconds_left is None else f"about {length(found.seconds_left)}"
    return [*text, f"last shard: {idle} ago", f"left: {left}"]


def _rate(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _time(moment: object) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def length(seconds: float) -> str:
    """Return a length of time in its two largest units."""
    whole = round(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"
