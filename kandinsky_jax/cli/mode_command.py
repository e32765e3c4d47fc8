"""The command of a mode that has no file of its own here, made from its entry in the registry of modes."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from kandinsky_jax.cli.options import Options, Prompt, takes_options
from kandinsky_jax.cli.running import generate_pictures
from kandinsky_jax.pipelines.modes import PICTURE_COLUMNS, Mode
from kandinsky_jax.pipelines.options import option_docs
from kandinsky_jax.pipelines.text2img import CombinedOptions

_SCALARS = {"bool": bool, "int": int, "float": float, "str": str}


def command_of(mode: Mode) -> Callable[..., None]:
    """Make the command of a mode: its pictures are paths, its further numbers and flags are options.

    Args:
        mode: whose combined class names its `OPTIONS`.
    """
    fields = {field.name: field for field in dataclasses.fields(mode.combined_class.OPTIONS)}  # type: ignore[arg-type]
    shared = {field.name for field in dataclasses.fields(CombinedOptions)}
    own = [
        field
        for name, field in fields.items()
        if name not in shared and name not in mode.pictures and field.type in _SCALARS
    ]
    docs = option_docs(mode.combined_class.OPTIONS)

    def command(prompt: list[str], options: Options, **given: Any) -> None:
        files = {name: given.pop(PICTURE_COLUMNS[name]) for name in mode.pictures}
        generate_pictures(prompt, options, mode, files, **given)

    def parameter(name: str, annotation: object, default: object = inspect.Parameter.empty) -> inspect.Parameter:
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    parameters = [parameter("prompt", Prompt)]
    for name in mode.pictures:
        help_text = "One for all prompts, or one for each."
        option = typer.Option(f"--{PICTURE_COLUMNS[name]}", help=help_text)
        parameters.append(parameter(PICTURE_COLUMNS[name], Annotated[list[Path], option]))
    parameters.append(parameter("options", Options))
    for field in own:
        kind, help_text = _SCALARS[str(field.type)], docs.get(field.name, "")
        flag = f"--{field.name.replace('_', '-')}"
        option = typer.Option(flag, help=f"{help_text[:1].upper()}{help_text[1:]}")
        parameters.append(parameter(field.name, Annotated[kind, option], field.default))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    command.__name__ = mode.name
    command.__doc__ = inspect.getdoc(mode.combined_class.__call__).partition("\n\n")[0]  # type: ignore[union-attr]
    return takes_options(command)
