"""The page in a notebook."""

from __future__ import annotations

import dataclasses
import html
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from kandinsky_jax.pipelines import CombinedPipeline
from kandinsky_jax.serve.server_settings import ServerSettings

# Pages that may show this one in a frame: notebooks on this machine, and Colab's.
LOCAL_FRAMES = ("http://localhost:*", "http://127.0.0.1:*")
COLAB_FRAMES = ("https://colab.research.google.com", "https://*.googleusercontent.com")


_open: list[LaunchedPage] = []  # pages that have not been closed


class LaunchedPage:
    """A server in a thread of this process; a context that ends it.

    Args:
        server: that listens.
        service: that generates.
        height: of the frame in the notebook, in pixels.
    """

    def __init__(self, server: Any, service: Any, height: int):
        self.service, self.height = service, height
        self._server = server
        self._closed = False

    @property
    def url(self) -> str:
        """Address of the page; that of the API is this and `/v1`."""
        return str(self._server.url)

    def close(self) -> None:
        """Finish what runs, and end; a second call does nothing."""
        if not self._closed:
            self._closed = True
            if self in _open:
                _open.remove(self)
            self._server.stop()

    def wait(self) -> None:
        """Stay open until Ctrl-C, in a program that would end."""
        try:
            self._server.wait()
        except KeyboardInterrupt:
            self.close()

    def show(self) -> None:
        """Show the page below the notebook's cell; in Colab, through its proxy (which has not been tried)."""
        if _in_colab():
            output = importlib.import_module("google.colab.output")
            output.serve_kernel_port_as_iframe(int(self.url.rpartition(":")[2]), path="/ui/", height=self.height)
            return
        importlib.import_module("IPython.display").display(self)

    def _repr_html_(self) -> str:
        address = html.escape(self.url, quote=True)
        return (
            f'<iframe src="{address}/ui/" title="kandinsky-jax" width="100%" height="{self.height}" '
            f'style="border: 0" allow="clipboard-read; clipboard-write"></iframe>'
            f'<p><a href="{address}/ui/" target="_blank" rel="noopener">{address}/ui/</a></p>'
        )

    def __repr__(self) -> str:
        return f"LaunchedPage({self.url!r}{', closed' if self._closed else ''})"

    def __enter__(self) -> LaunchedPage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def launch(
    *pipes: CombinedPipeline | Sequence[CombinedPipeline],
    name: str | None = None,
    port: int = 0,
    share: bool = False,
    show: bool | None = None,
    height: int = 900,
    lora_folder: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> LaunchedPage:
    """Serve the page and the API from this process, and show the page where this is a notebook.

    An earlier page of the same pipelines is closed, so a cell may be run again.

        page = kandinsky_jax.serve.launch(pipe)
        page.close()

    Args:
        pipes: combined pipelines or a list of them, one for each UNet; the others by `from_pipe` of the first.
        name: of the model, in records; None is what the first one was loaded from, without its folders.
        port: to listen at, 0 for any that is free.
        share: not possible: a tunnel would lead requests and pictures through machines of others.
        show: whether to show the page; None is where this is a notebook.
        height: of the frame in pixels.
        lora_folder: LoRA files that the page offers.
        settings: further ones of `ServerSettings`, such as `sizes` or `max_queue`.
    Returns:
        the server; it ends with `close`, at the end of a `with`, or with the process.
    Raises:
        ValueError: for settings that do not fit, or `share`.
    """
    if share:
        raise ValueError(
            "share=True is not supported: it would lead your pictures through another company's machines; forward the "
            "port instead, such as by ssh -L 7860:127.0.0.1:7860"
        )
    from kandinsky_jax.serve import api

    api.no_telemetry()
    from kandinsky_jax.serve.page import mount_page
    from kandinsky_jax.serve.served_model import ServedModel
    from kandinsky_jax.serve.service import Service

    listed: list[CombinedPipeline] = []
    for given in pipes:
        listed.extend(given if isinstance(given, Sequence) else [given])
    model = ServedModel(listed, name or _name_of(listed), Path(lora_folder) if lora_folder is not None else None)
    own = server_settings(port, settings)
    service = Service(model, own)
    earlier = [page for page in _open if page.service.shares_networks(service)]
    for page in [page for page in earlier if own.port and page.url.endswith(f":{own.port}")]:
        page.close()
    server = api.ServerThread(service, own, api.make_app(service, own, mount_page))
    for page in earlier:
        page.close()
    service.start()
    server.start()
    page = LaunchedPage(server, service, height)
    _open.append(page)
    if _in_notebook() if show is None else show:
        page.show()
    return page


def server_settings(port: int, given: dict[str, Any]) -> ServerSettings:
    """Return the settings of a server in a notebook, which may show its page in a frame.

    Raises:
        ValueError: for the name of no setting.
    """
    known = {field.name for field in dataclasses.fields(ServerSettings)}
    if unknown := sorted(set(given) - known):
        raise ValueError(f"launch has no setting {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    usual: dict[str, Any] = {"origins": LOCAL_FRAMES}
    if _in_colab():  # its proxy has names of its own, and nobody else reaches the machine's loopback
        usual = {"origins": COLAB_FRAMES, "hosts": ("*",), "behind_proxy": True}
    return ServerSettings(**{**usual, **given, "port": port})


def _name_of(pipes: Sequence[CombinedPipeline]) -> str:
    """Return the last part of what the first pipeline was loaded from: a folder or a Hub repository."""
    parts = Path(getattr(pipes[0], "_name_or_path", None) or "notebook").parts if pipes else ("notebook",)
    cached = [part for part in parts if part.startswith("models--")]  # the Hub's cache, whose folders are hashes
    return cached[-1].rpartition("--")[2] if cached else parts[-1]


def _in_colab() -> bool:
    return "google.colab" in sys.modules


def _in_notebook() -> bool:
    ipython: Any = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and type(shell).__name__ != "TerminalInteractiveShell"
