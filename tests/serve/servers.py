"""Servers of the tests, on loopback, and what is sent to them."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
from fastapi import FastAPI
from PIL import Image

from kandinsky_jax.serve.api import ServerThread, make_app
from kandinsky_jax.serve.served_model import ServedModel
from kandinsky_jax.serve.server_settings import ServerSettings
from kandinsky_jax.serve.service import Service


def environment_with_temporary_folder(folder: Path) -> dict[str, str]:
    """The environment of a process with its temporary files in a folder, without what pages of this one have set."""
    inherited = {name: value for name, value in os.environ.items() if name != "GRADIO_TEMP_DIR"}
    return inherited | {"TMPDIR": str(folder)}


@functools.cache
def tiny() -> ServedModel:
    """The embedded model, with all its modes."""
    return ServedModel.load("tiny")


@dataclass
class Running:
    """A server that listens."""

    url: str
    service: Service
    clients: contextlib.ExitStack  # are closed with the server

    def client(self, **given: Any) -> openai.OpenAI:
        """OpenAI's client, which does not try again."""
        made = openai.OpenAI(base_url=f"{self.url}/v1", max_retries=0, **({"api_key": "none"} | given))
        return self.clients.enter_context(made)

    def send(self, method: str, path: str, **given: Any) -> httpx.Response:
        """Send a request."""
        return httpx.request(method, self.url + path, timeout=60, **given)

    def connect(self) -> socket.socket:
        """Open a connection, for requests that no client makes."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        return socket.create_connection((host, int(port)), timeout=60)


@contextlib.contextmanager
def server(
    generates: bool = True, add: Callable[[FastAPI, Service, ServerSettings], object] | None = None, **given: Any
) -> Iterator[Running]:
    """Run a server.

    Args:
        generates: False for one whose requests wait for ever; it need not compile.
        add: adds further routes, in the place of the page.
        given: settings.
    """
    settings = ServerSettings(**({"port": 0, "batch_sizes": (1,), "grace": 5.0} | given))
    service = Service(tiny(), settings)
    if generates:
        service.start()
    with ServerThread(service, settings, make_app(service, settings, add)) as thread, contextlib.ExitStack() as clients:
        yield Running(thread.url, service, clients)


def encoded(picture: Image.Image, kind: str = "PNG") -> bytes:
    """The bytes of a picture's file."""
    data = io.BytesIO()
    picture.save(data, kind)
    return data.getvalue()


def half_masked() -> bytes:
    """A mask as OpenAI has it, whose right half is transparent."""
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (32, 0, 64, 64))
    return encoded(mask)
