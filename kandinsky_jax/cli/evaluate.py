"""`kandinsky-jax evaluate`: measure a batch job's pictures, a folder of pictures, or what a model generates."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from kandinsky_jax.batch import Job
from kandinsky_jax.checkpoint.recommended_settings import default_text
from kandinsky_jax.cli.options import GUIDER_HELP, PRIOR_GUIDER_HELP, mesh_of_option
from kandinsky_jax.common.reading import ReadError, of_file, read_text
from kandinsky_jax.evaluation import METRICS, Resampling, evaluate
from kandinsky_jax.evaluation.runner import BATCH, PICTURES, is_rows

EXAMPLE = (
    'Example: printf "purple heart\\nslice of pizza\\n" > p.txt && kandinsky-jax evaluate p.txt -o out --model tiny'
)
SOURCE = Annotated[
    str,
    typer.Argument(
        metavar="PICTURES|PROMPTS",
        help="A batch job's folder, a folder of pictures with captions (also .tar, .parquet), or a file of rows to "
        "generate first: .jsonl, .csv or .txt. A path, or a URL.",
    ),
]
_GENERATING = "Generating"


def evaluate_command(
    source: SOURCE,
    output: Annotated[str, typer.Option("--output", "-o", help="Folder for the results; a path, or a URL.")],
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help=f"One of {', '.join(METRICS)}; once for each. Default: clip-score, and those that --reference and "
            "--inception make possible."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help='"tiny", a folder, or a Hub repository: generates, and its CLIP judges.'),
    ] = None,
    prior: Annotated[str | None, typer.Option(help="Folder or Hub repository of the prior.")] = None,
    clip: Annotated[
        str | None, typer.Option(help="Another model, whose CLIP judges instead: the same for all that are compared.")
    ] = None,
    inception: Annotated[
        Path | None,
        typer.Option(help="Weights of the Inception network of fid and kid: .safetensors, or .pth with torch."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Pictures to compare with: a folder, as above, or a file of --save-features, or .npz of FID."
        ),
    ] = None,
    names: Annotated[
        Path | None, typer.Option(help="Further candidates of nearest-name: a text file, one in each line.")
    ] = None,
    save_features: Annotated[
        Path | None,
        typer.Option(help="Write the pictures' features into this .safetensors, to be a reference later."),
    ] = None,
    resamples: Annotated[int, typer.Option(help="Of bootstrap intervals; 0 makes none.")] = Resampling.resamples,
    level: Annotated[float, typer.Option(help="Of bootstrap intervals.")] = Resampling.level,
    batch: Annotated[int, typer.Option(help="Pictures on each device.")] = BATCH,
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="DATA,GUIDANCE,ROWS", help="Devices for the networks that judge; default: the batch over all."
        ),
    ] = None,
    incomplete: Annotated[
        bool, typer.Option("--incomplete", help="Evaluate a job of which shards are missing.")
    ] = False,
    num_images: Annotated[
        int | None, typer.Option(help="Pictures of a row without this column.", rich_help_panel=_GENERATING)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help=f"Of the decoder; {default_text('steps')}.", rich_help_panel=_GENERATING)
    ] = None,
    prior_steps: Annotated[
        int | None, typer.Option(help=f"Of the prior; {default_text('prior_steps')}.", rich_help_panel=_GENERATING)
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help=f"Of the decoder; {default_text('guidance_scale')}.", rich_help_panel=_GENERATING),
    ] = None,
    prior_guidance_scale: Annotated[
        float | None,
        typer.Option(help=f"Of the prior; {default_text('prior_guidance_scale')}.", rich_help_panel=_GENERATING),
    ] = None,
    guider: Annotated[str | None, typer.Option(metavar="NAME", help=GUIDER_HELP, rich_help_panel=_GENERATING)] = None,
    prior_guider: Annotated[
        str | None, typer.Option(metavar="NAME", help=PRIOR_GUIDER_HELP, rich_help_panel=_GENERATING)
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Use the model's fast adapter.", rich_help_panel=_GENERATING)
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(help="Of row 0, one higher for each later row; default: 0.", rich_help_panel=_GENERATING),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Measure pictures: how well they fit their prompts, how far they are from a reference, with bootstrap intervals.

    Writes evaluation.json, evaluation.md and the numbers of each picture into the output; pictures that could not be
    evaluated are listed in errors.jsonl. A run that was stopped or killed goes on when it is started again. For more
    settings of generation, run `kandinsky-jax batch` first and evaluate its folder.
    """
    defaults: dict[str, Any] = {
        "num_images": num_images,
        "steps": steps,
        "prior_steps": prior_steps,
        "guidance_scale": guidance_scale,
        "prior_guidance_scale": prior_guidance_scale,
    }
    given = {name: value for name, value in defaults.items() if value is not None}
    guiders: dict[str, Any] = {"guider": guider, "prior_guider": prior_guider}
    guiders = {name: value for name, value in guiders.items() if value is not None}
    generating = given | guiders | ({"fast": True} if fast else {}) | ({} if seed is None else {"seed": seed})
    found: str | Job = source
    faults = []
    if is_rows(source):
        pictures = f"{output.rstrip('/')}/{PICTURES}"
        found = Job(source, pictures, model=model, prior=prior, fast=fast, seed=seed or 0, defaults=given, **guiders)
    elif generating:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in generating)
        faults.append(
            f"{options}: these pictures are there already; for generating, give a .jsonl, .csv or .txt of rows"
        )
    further: list[str] = []
    devices = None
    try:
        further = [] if names is None else _lines_of(names)
    except ValueError as error:
        faults.append(str(error))
    try:
        devices = mesh_of_option(mesh)
    except ValueError as error:
        faults.append(str(error))
    result = evaluate(
        found,
        output,
        metrics=metric or None,
        model=model,
        prior=prior,
        clip=clip,
        inception=inception,
        reference=reference,
        names=further,
        save=save_features,
        mesh=devices,
        batch=batch,
        resampling=Resampling(level, resamples),
        incomplete=incomplete,
        quiet=quiet,
        further_faults=faults,
    )
    print(json.dumps(result.as_json(), indent=1) if as_json else result.table())
    if result.faults:
        reasons = "; ".join(f"{name} {fault}" for name, fault in result.faults.items())
        raise ValueError(f"not everything could be measured: {reasons}")


def _lines_of(path: Path) -> list[str]:
    """Return the lines of a text file that are not blank."""
    try:
        return [line.strip() for line in read_text(path).splitlines() if line.strip()]
    except FileNotFoundError:
        raise ValueError(f"--names: there is no file {os.fspath(path)}") from None
    except ReadError as error:
        raise ValueError(f"--names: {of_file(path, error)}") from None
