"""`python -m convert_weights SRC DST`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kandinsky_jax.common.terminal import run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

EXAMPLE = """\
Example: python -m convert_weights kandinsky-community/kandinsky-2-2-decoder decoder-orbax --dtype bfloat16

python -m convert_weights tiny/kandinsky-2-2-decoder decoder-int8 --quantize int8
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
    quantize: Annotated[
        str | None, typer.Option(help="int8 or float8_e4m3fn: of the UNet, the prior and MoVQ's decoder.")
    ] = None,
    prior: Annotated[
        str | None, typer.Option(help="Folder or Hub repository whose embeddings calibrate a decoder; with --quantize.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file of prompts for calibration, one a line; with --quantize.")
    ] = None,
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="Scale inputs at run time, without calibration; with --quantize.")
    ] = False,
    component: Annotated[
        list[str] | None,
        typer.Option(help="unet, prior or movq: this network alone; may be repeated; with --quantize."),
    ] = None,
) -> None:
    """Convert a Kandinsky 2.2 model between diffusers' layout and an Orbax checkpoint, or quantize it.

    The default layout is the one that SRC does not have; with --quantize the one that it has.
    """
    checked_dtype: Any = _one_of("--dtype", dtype, ("float32", "bfloat16", "float16"))
    checked_layout: Any = _one_of("--layout", layout, ("orbax", "diffusers"))
    _one_of("--quantize", quantize, ("int8", "float8_e4m3fn"))
    options: dict[str, Any] = {"layout": checked_layout, "revision": revision, "overwrite": overwrite}
    # After the checks: what follows takes seconds to import.
    if quantize is None:
        if prior is not None or prompts is not None or dynamic or component:
            raise ValueError("--prior, --prompts, --dynamic and --component need --quantize int8 too")
        from kandinsky_jax.checkpoint.conversion import convert

        convert(src, dst, dtype=checked_dtype, **options)
    else:
        from kandinsky_jax.pipelines.quantization import convert_quantized, read_prompts

        texts = None if prompts is None else read_prompts(prompts)
        calibration: dict[str, Any] = {"prior": prior, "prompts": texts, "dynamic": dynamic}
        options |= {"components": component or None, "weights_dtype": checked_dtype}
        convert_quantized(src, dst, quantize, **calibration, **options)
    print(f"wrote {dst}")


def _one_of(option: str, value: str | None, allowed: tuple[str, ...]) -> str | None:
    if value is not None and value not in allowed:
        raise ValueError(f"{option}={value} is not supported, only {', '.join(allowed)}")
    return value


if __name__ == "__main__":
    run(app)
