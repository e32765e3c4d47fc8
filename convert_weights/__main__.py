"""`python -m convert_weights SRC DST`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kandinsky_jax.common.terminal import run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

EXAMPLE = """\
Example: python -m convert_weights kandinsky-community/kandinsky-2-2-decoder decoder-orbax --dtype bfloat16
"""


@app.command(epilog=EXAMPLE)
def main(
    src: Annotated[str, typer.Argument(help="A folder with model_index.json, or a Hub repository.")],
    dst: Annotated[Path, typer.Argument(help="The folder to make.")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: each tensor's own.")] = None,
    layout: Annotated[
        str | None, typer.Option(help="orbax or diffusers; default: the one that SRC does not have.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag, commit or refs/pr/N of a Hub repository.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST where it exists.")] = False,
) -> None:
    """Convert a Kandinsky 2.2 model between diffusers' layout and an Orbax checkpoint, in either direction."""
    checked_dtype: Any = _one_of("--dtype", dtype, ("float32", "bfloat16", "float16"))
    checked_layout: Any = _one_of("--layout", layout, ("orbax", "diffusers"))
    from kandinsky_jax.checkpoint.conversion import convert  # after the checks: it takes seconds to import

    convert(src, dst, dtype=checked_dtype, layout=checked_layout, revision=revision, overwrite=overwrite)
    print(f"wrote {dst}")


def _one_of(option: str, value: str | None, allowed: tuple[str, ...]) -> str | None:
    if value is not None and value not in allowed:
        raise ValueError(f"{option}={value} is not supported, only {', '.join(allowed)}")
    return value


if __name__ == "__main__":
    run(app)
