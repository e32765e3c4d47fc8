"""The command line, `kandinsky-jax`: one command per mode."""

from __future__ import annotations

import importlib.metadata
import os
from typing import Annotated

import typer

from kandinsky_jax.cli import (
    batch,
    batch_status,
    controlnet,
    evaluate,
    generate,
    img2img,
    inpaint,
    mix,
    serve,
    train,
    vary,
    verify,
)
from kandinsky_jax.cli.batch_group import BatchGroup
from kandinsky_jax.cli.mode_command import command_of
from kandinsky_jax.common.terminal import report, run
from kandinsky_jax.compilation.quick import leave
from kandinsky_jax.pipelines.modes import MODES

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Kandinsky 2.2 for JAX: generate pictures from prompts, pictures, masks and depth maps.",
)


def _print_version(asked: bool) -> None:
    if asked:
        print("\n".join(f"{name} {importlib.metadata.version(name)}" for name in ("kandinsky_jax", "jax", "flax")))
        raise typer.Exit()


@app.callback()
def start(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the versions, and exit.")
    ] = False,
) -> None:
    """Handle options before a command's name."""


app.command(epilog=generate.EXAMPLE)(generate.generate)
app.command(epilog=img2img.EXAMPLE)(img2img.img2img)
app.command(epilog=inpaint.EXAMPLE)(inpaint.inpaint)
app.command(epilog=controlnet.EXAMPLE)(controlnet.controlnet)
_WITH_FILES = {info.callback.__name__ for info in app.registered_commands if info.callback is not None}
for mode in MODES.values():
    if (mode.command or mode.name) not in _WITH_FILES:
        example = f"Example: kandinsky-jax {mode.example}" if mode.example else None
        app.command(mode.name, epilog=example)(command_of(mode))
app.command(epilog=mix.EXAMPLE)(mix.mix)
app.command(epilog=vary.EXAMPLE)(vary.vary)
batch_app = typer.Typer(cls=BatchGroup, subcommand_metavar="", invoke_without_command=True, epilog=batch.EXAMPLE)
batch_app.callback()(batch.batch)
batch_app.command("status", epilog=batch_status.EXAMPLE)(batch_status.batch_status)
app.add_typer(batch_app, name="batch")
app.command("evaluate", epilog=evaluate.EXAMPLE)(evaluate.evaluate_command)
app.command(epilog=serve.EXAMPLE)(serve.serve)
app.command(epilog=train.EXAMPLE)(train.train)
app.command(epilog=verify.EXAMPLE)(verify.verify)


def main() -> None:
    """Run the `kandinsky-jax` command."""
    # Only the tokenizer of transformers is used, which otherwise warns on every run that PyTorch is missing.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        run(app)
    except SystemExit as ended:
        leave(report(ended))  # the pictures are written
        raise
