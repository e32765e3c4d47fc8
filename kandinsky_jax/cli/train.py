"""`kandinsky-jax train`: the prior or the decoder, fully or with LoRA; MoVQ and CLIP."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from kandinsky_jax.cli.process_options import Coordinator, ProcessCount, ProcessIndex
from kandinsky_jax.common.errors import hide_secrets
from kandinsky_jax.common.terminal import report
from kandinsky_jax.preemption import STOPPED, Stop
from kandinsky_jax.training.kinds import Kind

EXAMPLE = "Example: kandinsky-jax train lora-decoder lora.toml"


def train(
    kind: Annotated[Kind, typer.Argument(help="What is trained.")],
    config: Annotated[
        str, typer.Argument(help="A TOML file or its URL; all fields are in docs/training.md of the repository.")
    ],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
    accept_changes: Annotated[
        bool,
        typer.Option(
            "--accept-changes", help="Continue from checkpoints of other settings, data or weights, with the new ones."
        ),
    ] = False,
    process: ProcessIndex = None,
    processes: ProcessCount = None,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="Train on all hosts, in each of which this command is started.")
    ] = False,
    coordinator: Coordinator = None,
) -> None:
    """Train on captioned pictures.

    Continues from the last checkpoint when it is started again. diffusers can load the result too.
    """
    if not distributed and coordinator is None and process is None and processes is None:
        sys.exit(_train(kind, config, quiet, accept_changes))
    from kandinsky_jax.parallel.liveness import end_now, joined

    try:
        with joined(process, processes, coordinator):
            code = _train(kind, config, quiet, accept_changes)
    except BaseException as error:
        end_now(report(error))
    sys.exit(code)


def _train(kind: Kind, config: str, quiet: bool, accept_changes: bool) -> int:
    """Train, print the folder of the result, and return the exit code."""
    from kandinsky_jax.training.config import load  # takes a second to import
    from kandinsky_jax.training.loop import Run

    run = Run(kind, load(config), quiet=quiet, accept_changes=accept_changes)
    with Stop().listening() as stop:
        result = run.train(stop=stop)
    if run.hosts.first:
        print(f"stopped; start it again to continue: {hide_secrets(config)}" if result is None else result, flush=True)
    return STOPPED if result is None else 0
