"""`kandinsky-jax serve`: the web page and the HTTP API."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kandinsky_jax.cli.options import Dtype, ModelName, PriorName, mesh_of_option
from kandinsky_jax.common.errors import counted, quote
from kandinsky_jax.compilation import CACHE, OFF, set_compilation_cache

if TYPE_CHECKING:
    from fastapi import FastAPI

    from kandinsky_jax.serve.server_settings import ServerSettings
    from kandinsky_jax.serve.service import Service

EXAMPLE = "Example: kandinsky-jax serve --model tiny, and open http://127.0.0.1:7860"
KEY = "KANDINSKY_JAX_API_KEY"
SAID_SECONDS = 10.0  # between two lines while programs compile
_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
_LIMITS, _ACCESS = "Limits", "Access"


def serve(
    model: ModelName = None,
    prior: PriorName = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Of what is served, such as generate or inpaint; once for each. Default: all that the model has, and "
            "of official weights those of the text-to-image decoder.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any that is free.")] = 7860,
    page: Annotated[bool, typer.Option("--page/--no-page", help="With the web page, or the API alone.")] = True,
    lora_folder: Annotated[Path | None, typer.Option(help="LoRA files that requests may use by name.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the networks; default: float32 on a CPU, else bfloat16.")] = (
        None
    ),
    mesh: Annotated[str | None, typer.Option(metavar="DATA,GUIDANCE,ROWS", help="Sharding over devices.")] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WIDTHxHEIGHT",
            help="A size that is served, compiled before the server is ready; once for each. Default: the model's.",
        ),
    ] = None,
    any_size: Annotated[
        bool, typer.Option("--any-size", help="Serve other sizes too, compiled when first asked for.")
    ] = False,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Images of a device that share a step; once for each program. Default: 1 and 8."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=KEY,
            help="Key that clients need; better in the environment, where other users of the machine do not see it.",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with the key.", rich_help_panel=_ACCESS)] = None,
    without_key: Annotated[
        bool,
        typer.Option("--without-key", help="Listen beyond this machine without a key.", rich_help_panel=_ACCESS),
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A further name under which the server is reached; once for each, * for any.",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Another site whose pages may use the server, such as https://example.org; once for each.",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    behind_proxy: Annotated[
        bool,
        typer.Option(
            "--behind-proxy",
            help="Heed X-Forwarded-Host and -Proto, which a proxy in front sets.",
            rich_help_panel=_ACCESS,
        ),
    ] = False,
    max_body: Annotated[int, typer.Option(min=1, help="MiB of a request.", rich_help_panel=_LIMITS)] = 32,
    max_pixels: Annotated[
        int,
        typer.Option(
            min=64 * 64,
            help="Of a generated picture; uploaded ones may have 16 times as many together.",
            rich_help_panel=_LIMITS,
        ),
    ] = 2**21,
    max_images: Annotated[int, typer.Option(min=1, help="Pictures of a request.", rich_help_panel=_LIMITS)] = 10,
    max_steps: Annotated[int, typer.Option(min=1, help="Of decoder and prior.", rich_help_panel=_LIMITS)] = 200,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Requests that wait or run; more get 429.", rich_help_panel=_LIMITS)
    ] = 64,
    time_limit: Annotated[
        float, typer.Option(min=1, help="Seconds of a request, waiting included.", rich_help_panel=_LIMITS)
    ] = 600.0,
    grace: Annotated[
        float,
        typer.Option(min=0, help="Seconds to finish what runs after SIGTERM.", rich_help_panel=_LIMITS),
    ] = 30.0,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Prompts in the log lines.")] = False,
    compilation_cache: Annotated[
        str | None,
        typer.Option(
            metavar=f"FOLDER|URL|{OFF}",
            help=f"Cache of compiled programs; hosts share a URL's; default: ${CACHE}, else the user's folder.",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No log lines of requests.")] = False,
) -> None:
    """Serve a web page, and an HTTP API for OpenAI's clients; Ctrl-C or SIGTERM finishes what runs."""
    _check_installed(page)
    from kandinsky_jax.serve import api
    from kandinsky_jax.serve.server_settings import ServerSettings

    api.no_telemetry()
    settings = ServerSettings(
        host=host,
        port=port,
        api_key=_key(api_key, api_key_file),
        sizes=tuple(_size(one) for one in size or ()),
        any_size=any_size,
        batch_sizes=tuple(batch_size or (1, 8)),
        max_body=max_body * 2**20,
        max_pixels=max_pixels,
        max_images=max_images,
        max_steps=max_steps,
        max_queue=max_queue,
        time_limit=time_limit,
        log_prompts=log_prompts,
        grace=grace,
        hosts=tuple(name.lower() for name in allow_host or ()),
        origins=tuple(origin.rstrip("/") for origin in allow_origin or ()),
        behind_proxy=behind_proxy,
    )
    _check_access(settings, without_key)
    devices = mesh_of_option(mesh)
    listening = api.bind(settings)  # a port that is in use is said before a model is loaded
    if compilation_cache is not None:
        set_compilation_cache(None if compilation_cache == OFF else compilation_cache)

    from kandinsky_jax.serve.served_model import ServedModel
    from kandinsky_jax.serve.service import Service

    served = ServedModel.load(
        model, prior=prior, modes=mode, dtype=dtype and dtype.value, mesh=devices, lora_folder=lora_folder
    )
    service = Service(served, settings)
    app = api.make_app(service, settings, _page() if page else None)
    _log_to_stderr(quiet)
    service.start()
    url = api.address_of(listening)
    print(f"listening at {url}{'' if page else '/v1'}; about the API: {url}/docs", flush=True)
    threading.Thread(target=_say_when_ready, args=(service,), daemon=True).start()
    api.run_server(service, settings, app, listening)
    if page:
        from kandinsky_jax.serve.page import remove_folders

        remove_folders()
    print("stopped", flush=True)
    sys.stderr.flush()
    os._exit(0)  # without waiting for programs that are still being compiled


def _check_installed(page: bool) -> None:
    """Raise ValueError where the libraries of the extra are missing."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401

        if page:
            os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
            import gradio  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"serve needs {error.name}; install it by pip install -e '.[serve]' in a clone of the repository"
        ) from None


def _page() -> Callable[[FastAPI, Service, ServerSettings], object]:
    from kandinsky_jax.serve.page import mount_page  # takes seconds

    return mount_page


def _check_access(settings: ServerSettings, without_key: bool) -> None:
    """Raise ValueError for a server that others reach without a key, unless that is wanted."""
    from kandinsky_jax.serve.api.guard import is_loopback

    if settings.api_key is None and not without_key and not is_loopback(settings.host):
        raise ValueError(
            f"--host {settings.host} is reached from other machines: give a key by ${KEY}, --api-key-file or "
            "--api-key, or say --without-key"
        )
    for origin in settings.origins:
        if not re.fullmatch(r"https?://[^/\s;,]+", origin):
            raise ValueError(f"--allow-origin {quote(origin)} is no origin; needed is one such as https://example.org")


def _key(key: str | None, file: Path | None) -> str | None:
    """Return the key of the options or the environment, None for none."""
    if file is not None:
        try:
            key = file.read_text("utf-8-sig")  # an editor may have put a byte order mark there
        except UnicodeDecodeError:
            raise ValueError(
                f"--api-key-file {file} is no text in UTF-8; needed is a file with the key alone"
            ) from None
    return None if key is None else key.strip()


def _size(text: str) -> tuple[int, int]:
    """Return height and width of an option."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"--size is {quote(text)}; needed is WIDTHxHEIGHT, such as 512x768")
    width, height = int(match[1]), int(match[2])
    for side in (width, height):
        if side < 64 or side % 64:
            raise ValueError(f"--size is {text}; needed are multiples of 64")
    return height, width


def _log_to_stderr(quiet: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
    logger = logging.getLogger("kandinsky_jax.serve")
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False


def _say_when_ready(service: Service) -> None:
    began = said = time.monotonic()
    while not (state := service.state).ready:
        if service.warmup.is_useless:  # each failure has been a warning
            print("nothing can be generated: no program can be compiled", flush=True)
            return
        if time.monotonic() - said > SAID_SECONDS:
            said = time.monotonic()
            print(f"compiling: {state.compiled} of {counted(state.programs, 'program')}", flush=True)
        time.sleep(0.2)
    print(f"ready: {counted(state.compiled, 'program')} in {time.monotonic() - began:.1f} s", flush=True)
