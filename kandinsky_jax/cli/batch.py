"""`kandinsky-jax batch`: generate shards of pictures from a file of prompts."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any

import typer

from kandinsky_jax.batch import Job, Process, Report, load_pipeline, open_job, run, this_process
from kandinsky_jax.batch.engines import EngineReport, run_on_ray
from kandinsky_jax.batch.requests import STRENGTH
from kandinsky_jax.batch.rows import ROW_COLUMNS
from kandinsky_jax.batch.shards import OUTPUT_FORMATS
from kandinsky_jax.checkpoint.recommended_settings import default_text
from kandinsky_jax.cli.options import (
    CACHE_INTERVAL_HELP,
    GUIDER_HELP,
    INTERVAL_HELP,
    PRIOR_GUIDER_HELP,
    PRIOR_INTERVAL_HELP,
    numbers,
)
from kandinsky_jax.cli.process_options import Coordinator, ProcessCount, ProcessIndex
from kandinsky_jax.common.errors import counted, quote, shorten, summarize
from kandinsky_jax.compilation import CACHE, OFF, set_compilation_cache
from kandinsky_jax.images import ENCODINGS
from kandinsky_jax.pipelines.modes import MODES
from kandinsky_jax.preemption import STOPPED, Stop
from kandinsky_jax.schedulers import NAMES

Mode, Form, Encoding, Engine = (
    StrEnum(name, {value: value for value in values})
    for name, values in (("Mode", MODES), ("Form", OUTPUT_FORMATS), ("Encoding", ENCODINGS), ("Engine", ("ray",)))
)
_COLUMNS = "  \n".join(f"- `{name}`: {text}" for name, text in ROW_COLUMNS.items())

JOB_FILE = Annotated[str, typer.Argument(metavar="JOB", help="Rows: .jsonl, .csv, .parquet or .txt; a path, or a URL.")]
OUTPUT = Annotated[str, typer.Option("--output", "-o", help="Folder to fill; a path, or a URL such as gs://...")]


def batch(
    job: JOB_FILE,
    output: OUTPUT,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help='"tiny", a folder, or a Hub repository; default: official.')
    ] = None,
    prior: Annotated[str | None, typer.Option(help="Folder or Hub repository of the prior.")] = None,
    mode: Annotated[Mode | None, typer.Option(help="Default: what the columns ask for.")] = None,  # type: ignore[valid-type]
    form: Annotated[
        Form,  # type: ignore[valid-type]
        typer.Option("--format", help="WebDataset tar files, or pictures with a Parquet manifest."),
    ] = "webdataset",
    pictures: Annotated[Encoding, typer.Option(help="Encoding of the pictures.")] = "png",  # type: ignore[valid-type]
    rows_per_shard: Annotated[
        int, typer.Option(help="Rows of one unit of work, which is completed or done again.")
    ] = 256,
    batch: Annotated[int, typer.Option(help="Batch size on each device.")] = 4,
    negative_prompt: Annotated[
        str | None, typer.Option("--negative-prompt", "-n", help="For rows without one.")
    ] = None,
    num_images: Annotated[int, typer.Option(help="Pictures of a row without this column.")] = 1,
    height: Annotated[
        int | None, typer.Option(help="Pixels; default: that of the row's image, else the model's.")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; default: as for the height.")] = None,
    steps: Annotated[int | None, typer.Option(help=f"Denoising steps of the decoder; {default_text('steps')}.")] = None,
    prior_steps: Annotated[
        int | None, typer.Option(help=f"Denoising steps of the prior; {default_text('prior_steps')}.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help=f"Of the decoder; {default_text('guidance_scale')}.")
    ] = None,
    prior_guidance_scale: Annotated[
        float | None, typer.Option(help=f"Of the prior; {default_text('prior_guidance_scale')}.")
    ] = None,
    guider: Annotated[str | None, typer.Option(metavar="NAME", help=GUIDER_HELP)] = None,
    prior_guider: Annotated[str | None, typer.Option(metavar="NAME", help=PRIOR_GUIDER_HELP)] = None,
    guidance_interval: Annotated[str | None, typer.Option(metavar="FROM,TO", help=INTERVAL_HELP)] = None,
    prior_guidance_interval: Annotated[str | None, typer.Option(metavar="FROM,TO", help=PRIOR_INTERVAL_HELP)] = None,
    cache_interval: Annotated[int, typer.Option(help=CACHE_INTERVAL_HELP)] = 1,
    strength: Annotated[
        float, typer.Option(help="How far to depart from a row's image, above 0, at most 1.")
    ] = STRENGTH,
    scheduler: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"The decoder's: {', '.join(NAMES)}; default: the model's own.")
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Use the model's fast adapter, and its settings where nothing is said.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of row 0; one higher for each later row without its own.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    files: Annotated[
        str | None, typer.Option(help="Folder or URL of the rows' pictures; default: the folder of the job's file.")
    ] = None,
    process: ProcessIndex = None,
    processes: ProcessCount = None,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="Initialise jax.distributed, as hosts of a TPU slice must.")
    ] = False,
    coordinator: Coordinator = None,
    engine: Annotated[
        Engine | None,  # type: ignore[valid-type]
        typer.Option(help="Deal out shards one by one: to all hosts of a Ray cluster; default: a fixed part each."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Of the Ray cluster, such as auto or HOST:PORT; default: $RAY_ADDRESS, else this machine."),
    ] = None,
    resources: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=AMOUNT", help="Of one Ray worker, such as TPU=4; default: the host's TPUs and GPUs."
        ),
    ] = None,
    hosts: Annotated[
        int | None, typer.Option(min=1, help="To ask an autoscaling Ray cluster for, each with --resources.")
    ] = None,
    grace: Annotated[float, typer.Option(help="Seconds from SIGTERM until the machine is preempted.")] = 25.0,
    overlap: Annotated[bool, typer.Option(help="Read, generate, encode and write concurrently.")] = True,
    compilation_cache: Annotated[
        str | None,
        typer.Option(
            metavar=f"FOLDER|URL|{OFF}", help=f"Cache of compiled programs; hosts share a URL's; default: ${CACHE}."
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Generate every row of a file, exactly once, on all devices.

    A job that was stopped or killed continues when it is started again, with any number of processes, and ends with the
    same bytes. Rows that fail are reported in errors.jsonl; all others are generated. Columns of a job:
    """
    defaults: dict[str, object] = {
        "negative_prompt": negative_prompt,
        "num_images": num_images,
        "height": height,
        "width": width,
        "steps": steps,
        "prior_steps": prior_steps,
        "guidance_scale": guidance_scale,
        "prior_guidance_scale": prior_guidance_scale,
        "strength": strength,
    }
    stopping = Stop(grace, leave=None if engine else _leave)
    wanted = _engine_resources(
        engine, address, resources, hosts, [process, processes, coordinator], distributed, overlap
    )
    opened = open_job(
        Job(
            rows=job,
            output=output,
            model=model,
            prior=prior,
            mode=mode and str(mode),
            form=str(form),
            pictures=str(pictures),
            rows_per_shard=rows_per_shard,
            batch=batch,
            seed=seed,
            scheduler=scheduler,
            fast=fast,
            cache_interval=cache_interval,
            guider=guider,
            prior_guider=prior_guider,
            guidance_interval=_interval(guidance_interval, "--guidance-interval"),
            prior_guidance_interval=_interval(prior_guidance_interval, "--prior-guidance-interval"),
            dtype=dtype,
            root=files,
            defaults=defaults,
        )
    )
    if compilation_cache is not None:
        set_compilation_cache(None if compilation_cache == OFF else compilation_cache)
    which = Process() if engine else this_process(process, processes, distributed, coordinator)
    with stopping.listening() as stop, _told_how_to_go_on():
        if engine:
            report: Report = run_on_ray(
                opened,
                address=address,
                resources=wanted,
                hosts=hosts,
                cache=compilation_cache,
                quiet=quiet,
                stop=stop,
            )
        else:
            opened.begin()  # reports faults before a model is loaded
            report = run(opened, load_pipeline(opened), which, overlap=overlap, quiet=quiet, stop=stop)
    shown = shorten(output, 240)  # without secrets
    print(summary(report, which, shown))
    if report.failed == opened.rows.count:
        raise ValueError(f"none of the {report.failed} rows could be generated; see {shown}/errors.jsonl")
    if report.stopped:
        sys.stdout.flush()
        os._exit(STOPPED)  # without waiting for threads that read or encode


batch.__doc__ = f"{batch.__doc__}\n\n{_COLUMNS}"
GO_ON = "start it again to continue"
STOPPED_TEXT = f"stopped; {GO_ON}"
EXAMPLE = 'Example: printf "purple heart\\nslice of pizza\\n" > p.txt && kandinsky-jax batch p.txt -o out --model tiny'


def _interval(given: str | None, name: str) -> Any:
    return None if given is None else tuple(numbers(given, name))


def _leave() -> None:
    """End the process without waiting for threads that load, read or encode."""
    os.write(1, f"{STOPPED_TEXT}\n".encode())  # in a signal's handler, while something else may be printed
    os._exit(STOPPED)


@contextlib.contextmanager
def _told_how_to_go_on() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print(f"interrupted; {GO_ON}", file=sys.stderr)
        raise


def _engine_resources(
    engine: str | None,
    address: str | None,
    resources: list[str] | None,
    hosts: int | None,
    ranks: list[object],
    distributed: bool,
    overlap: bool,
) -> dict[str, float] | None:
    """Check the options of engines and of processes against each other; return a worker's resources."""
    if not engine:
        if address is not None or resources or hosts:
            raise ValueError("--address, --resources and --hosts are those of an engine; add --engine ray")
        return None
    if any(rank is not None for rank in ranks) or distributed:
        raise ValueError("--process, --processes, --distributed and --coordinator have no meaning with --engine ray")
    if not overlap:
        raise ValueError("--no-overlap has no meaning with --engine ray")
    found = {}
    for part in resources or []:
        name, _, amount = part.partition("=")
        try:
            found[name] = float(amount)
        except ValueError:
            raise ValueError(f"--resources {quote(part)} should be NAME=AMOUNT, such as TPU=4, once for each") from None
        if not name or not 0 < found[name] < math.inf:
            raise ValueError(f"--resources {quote(part)} should be NAME=AMOUNT, such as TPU=4, with an amount above 0")
    return found or None


def summary(report: Report, process: Process, output: str) -> str:
    """Summarise the result of a process in a few lines."""
    lines = []
    if process.count > 1:
        lines.append(f"process {process.index} of {process.count}")
    rate = report.images / report.seconds if report.seconds else 0.0
    lines.append(
        f"{counted(report.images, 'image')} in {counted(report.shards, 'shard')}, {report.seconds:.1f} s, "
        f"{rate:.2f} images/s; {_were(report.skipped, 'shard')} complete; "
        f"devices waited {report.waited:.1%} of the time"
    )
    if isinstance(report, EngineReport):
        lines.append(_cost(report))
    if report.errors and not report.complete:
        lines.append(f"{counted(report.errors, 'row')} could not be generated; see {output}/errors")
    if report.stopped:
        lines.append(STOPPED_TEXT)
    elif report.complete:
        lines.append(f"the job is complete: {output}")
        if report.failed:
            lines[-1] += f"; {counted(report.failed, 'row')} could not be generated, see {output}/errors.jsonl"
            shards = summarize(report.failed_shards, 100, ", ")
            lines.append(
                f"to try these rows again as they are, remove {shards} in {output} and start the job again; rows that "
                "have to be changed need a job of their own"
            )
    else:
        lines.append("other processes' shards are still to be done")
    return "\n".join(lines)


def _cost(report: EngineReport) -> str:
    """Say what the workers of an engine took."""
    hours = [f"{report.worker_seconds / 3600:.2f} worker-hours"]
    hours += [f"{seconds / 3600:.2f} {name}-hours" for name, seconds in report.resource_seconds.items()]
    return (
        f"{counted(report.workers, 'worker')}, {report.lost:,} lost; {', '.join(hours)}; "
        f"{_were(report.repeated, 'slow shard')} started twice"
    )


def _were(number: int, noun: str) -> str:
    return f"{counted(number, noun)} {'was' if number == 1 else 'were'}"
