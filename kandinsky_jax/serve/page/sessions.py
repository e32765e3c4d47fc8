"""What the server keeps of each browser tab, in memory: its pictures, and the requests that run."""

from __future__ import annotations

import io
import secrets
import threading
import time
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from kandinsky_jax.serve.tickets import Ticket

MAX_PICTURES = 100  # of a session
MAX_BYTES = 2**26  # of a session's pictures
MAX_SESSIONS = 32
MAX_ALT = 300  # characters of what a picture shows: the gallery has it of each
KEPT_SECONDS = 900.0  # after its tab was closed: a phone that sleeps closes it for a while
THUMBNAIL = 192  # pixels


@dataclass(frozen=True)
class KeptPicture:
    """A picture of the gallery.

    Args:
        number: in its session, from 1.
        png: the file, with its settings in it.
        thumbnail: a WebP.
        record: its settings, None for a grid.
        alt: what it shows, for those who do not see it.
        about: its settings as text.
        size: width and height in pixels.
    """

    number: int
    png: bytes
    thumbnail: bytes
    record: dict[str, Any] | None
    alt: str
    about: str
    size: tuple[int, int]

    @property
    def name(self) -> str:
        """Name of the file when it is downloaded."""
        return f"kandinsky-{self.number:04d}.png"

    def picture(self) -> Image.Image:
        """Decode the picture."""
        with Image.open(io.BytesIO(self.png), formats=["PNG"]) as image:
            return image.convert("RGB")


@dataclass
class Session:
    """A browser tab; several threads add pictures.

    Args:
        key: a secret part of the addresses of its pictures.
    """

    key: str = field(default_factory=lambda: secrets.token_urlsafe(18))
    pictures: dict[int, KeptPicture] = field(default_factory=dict)
    selected: int | None = None
    tickets: set[Ticket] = field(default_factory=set)
    busy: bool = False
    cancelled: bool = False
    failed: bool = False  # whether the last run's error is shown
    left: float | None = None  # when its tab was closed
    _made: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reserve(self, count: int) -> int:
        """Return the first of some numbers for pictures that come in any order."""
        with self._lock:
            first = self._made + 1
            self._made += count
        return first

    def add(
        self,
        picture: Image.Image,
        png: bytes,
        record: dict[str, Any] | None,
        alt: str,
        about: str,
        number: int | None = None,
    ) -> KeptPicture:
        """Keep a picture; the oldest ones are dropped where there are too many.

        Args:
            picture: to be shown.
            png, record, alt, about: see `KeptPicture`.
            number: that was reserved; None is the next one.
        """
        small = picture.copy()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        thumbnail = io.BytesIO()
        small.save(thumbnail, "WEBP", quality=80)
        with self._lock:
            if number is None:
                number = self._made = self._made + 1
            kept = KeptPicture(number, png, thumbnail.getvalue(), record, alt[:MAX_ALT], about, picture.size)
            self.pictures[kept.number] = kept
            while len(self.pictures) > 1 and (
                len(self.pictures) > MAX_PICTURES or sum(len(one.png) for one in self.pictures.values()) > MAX_BYTES
            ):
                dropped = min(self.pictures)
                del self.pictures[dropped]
                self.selected = None if self.selected == dropped else self.selected
        return kept

    def listed(self) -> list[KeptPicture]:
        """The pictures now, by their numbers."""
        with self._lock:
            return [self.pictures[number] for number in sorted(self.pictures)]

    @property
    def selection(self) -> KeptPicture | None:
        """The selected picture, else the newest."""
        pictures, selected = self.listed(), self.selected
        return next((one for one in pictures if one.number == selected), pictures[-1] if pictures else None)

    def cancel(self) -> bool:
        """Stop what runs; return whether anything did."""
        self.cancelled = self.busy
        for ticket in list(self.tickets):
            ticket.cancel()
        return self.busy

    def zipped(self) -> bytes:
        """Return all pictures as a ZIP file."""
        target = io.BytesIO()
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
            for kept in self.listed():
                archive.writestr(kept.name, kept.png)
        return target.getvalue()


class Sessions:
    """The sessions of a server, by the names that Gradio gives them."""

    def __init__(self) -> None:
        self._by_name: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str | None) -> Session:
        """Return a session; a new one where there is none. The one that was used longest ago makes room."""
        with self._lock:
            session = self._by_name.setdefault(name or "", Session())
            self._by_name.move_to_end(name or "")
            session.left = None
            self._make_room()
            return session

    def _make_room(self) -> None:
        now = time.monotonic()
        gone = [name for name, one in self._by_name.items() if one.left is not None and now - one.left > KEPT_SECONDS]
        idle = [name for name, one in self._by_name.items() if not one.busy and name not in gone]
        surplus = len(self._by_name) - len(gone) - MAX_SESSIONS
        for name in gone + idle[: max(0, min(surplus, len(idle) - 1))]:
            del self._by_name[name]

    def resume(self, name: str | None, key: str) -> Session:
        """Return the session of a tab that was loaded again, under its new name; what it had running is cancelled.

        Args:
            name: of the tab now.
            key: of the session that it had; where there is none, it gets a new one.
        """
        with self._lock:
            old = next((own for own, one in self._by_name.items() if secrets.compare_digest(one.key, key)), None)
            session = self._by_name.pop(old) if old is not None else None
            if session is not None:
                self._by_name[name or ""] = session
        if session is not None:
            session.cancel()
        return self.get(name)

    def with_key(self, key: str) -> Session | None:
        """Return the session with a secret key."""
        with self._lock:
            return next((one for one in self._by_name.values() if secrets.compare_digest(one.key, key)), None)

    def leave(self, name: str | None) -> None:
        """Cancel what a tab that was closed has left running; its pictures are dropped after `KEPT_SECONDS`."""
        with self._lock:
            session = self._by_name.get(name or "")
        if session is not None:
            session.left = time.monotonic()
            session.cancel()

    def __iter__(self) -> Iterator[Session]:
        with self._lock:
            return iter(list(self._by_name.values()))
