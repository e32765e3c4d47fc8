"""What all parts of the page share, and a job: a request with what is done to its pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from PIL import Image

from kandinsky_jax.serve.page.sessions import Sessions
from kandinsky_jax.serve.requests import ImageRequest
from kandinsky_jax.serve.served_model import ServedModel
from kandinsky_jax.serve.server_settings import ServerSettings
from kandinsky_jax.serve.service import Service

SENT_PIXELS = 2**22


@dataclass(frozen=True)
class PageContext:
    """What the parts of the page need of the server.

    Args:
        service: takes the requests.
        sessions: of the browser tabs.
    """

    service: Service
    sessions: Sessions = field(default_factory=Sessions)

    @property
    def model(self) -> ServedModel:
        """What is served."""
        return self.service.model

    @property
    def settings(self) -> ServerSettings:
        """Limits."""
        return self.service.settings

    @property
    def most_pixels(self) -> int:
        """Pixels of a picture that a client sends; the page scales larger ones down."""
        return min(self.settings.max_upload_pixels, SENT_PIXELS)


def unchanged(picture: Image.Image) -> Image.Image:
    """Return a picture as it is."""
    return picture


@dataclass(frozen=True)
class Job:
    """A request of the page.

    Args:
        request: for the service.
        finish: done to each of its pictures.
        note: what the user should know about it.
    """

    request: ImageRequest
    finish: Callable[[Image.Image], Image.Image] = unchanged
    note: str = ""
