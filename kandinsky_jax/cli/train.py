"""`kandinsky-jax train`: the prior or the decoder, fully or with LoRA; MoVQ and CLIP."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from kandinsky_jax.common.terminal import TRACEBACK
from kandinsky_jax.preemption import STOPPED, Stop
from kandinsky_jax.training.kinds import Kind

EXAMPLE = "Example: kandinsky-jax train lora-decoder lora.toml"


def train(
    kind: Annotated[Kind, typer.Argument(help="What is trained.")],
    config: Annotated[Path, typer.Argument(help="A TOML file; its fields are in kandinsky_jax/training/config.py.")],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
    accept_changes: Annotated[
        bool,
        typer.Option(
            "--accept-changes", help="Continue from checkpoints of other settings, data or weights, with the new ones."
        ),
    ] = False,
) -> None:
    """Train on captioned pictures.

    Continues from the last checkpoint when it is started again. diffusers can load the result too.
    """
    from kandinsky_jax.training.config import load  # takes a second to import
    from kandinsky_jax.training.errors import TrainingError
    from kandinsky_jax.training.loop import Run

    try:
        run = Run(kind, load(config), quiet=quiet, accept_changes=accept_changes)
        with Stop().listening() as stop:
            result = run.train(stop=stop)
    except TrainingError as error:
        if os.environ.get(TRACEBACK):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    if result is None:
        print(f"stopped; start it again to continue: {config}")
        sys.exit(STOPPED)
    print(result)
