"""Options of commands that run in several processes."""

from __future__ import annotations

from typing import Annotated

import typer

ProcessIndex = Annotated[int | None, typer.Option(help="Number of this process, from 0; default: from the launcher.")]
ProcessCount = Annotated[int | None, typer.Option(help="Number of processes; default: from the launcher.")]
Coordinator = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Of process 0; implies --distributed; default: from the launcher."),
]
