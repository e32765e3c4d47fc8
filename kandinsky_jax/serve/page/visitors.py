"""Names of browser tabs, which clients make up; Gradio does not bound what it keeps under them."""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

MAX_NAMES = 128  # beside those with an open connection
MAX_UNDELIVERED = 32  # events of a tab, whose results it has not fetched


class Visitors:
    """Has Gradio forget those tabs that have no open connection and were seen longest ago.

    For the event loop that serves the page. Gradio has no public names for what is done here.

    Args:
        page: complete.
    """

    def __init__(self, page: gr.Blocks):
        self._page = page
        self._names: OrderedDict[str, None] = OrderedDict()
        self._connections: Counter[str] = Counter()

    @property
    def _queue(self) -> Any:
        return self._page._queue

    async def enter(self, name: str) -> None:
        """Note that a tab was seen."""
        self._names[name] = None
        self._names.move_to_end(name)
        surplus = len(self._names) - len(self._connections) - MAX_NAMES
        idle = (one for one in self._names if one not in self._connections and one != name)
        for one in list(itertools.islice(idle, max(0, surplus))):
            await self.forget(one)

    async def forget(self, name: str) -> None:
        """Drop what Gradio keeps of a tab; what it has running is stopped."""
        self._names.pop(name, None)
        await self._queue.clean_events(session_hash=name)
        self._queue.pending_messages_per_session.pop(name, None)
        self._queue.pending_event_ids_session.pop(name, None)
        holder = self._page.state_holder
        holder.session_data.pop(name, None)
        holder.time_last_used.pop(name, None)

    @contextmanager
    def connected(self, name: str) -> Iterator[None]:
        """Keep a tab while a connection of it is open."""
        self._connections[name] += 1
        try:
            yield
        finally:
            self._connections[name] -= 1
            if not self._connections[name]:
                del self._connections[name]

    async def has_room(self, name: str) -> bool:
        """Whether a tab may send an event; a tab that fetches nothing is forgotten for it."""
        undelivered = self._queue.pending_event_ids_session.get(name, set())
        if len(undelivered) < MAX_UNDELIVERED:
            return True
        if not unread(self._page, name):  # those whose connection ended while they ran are never delivered
            undelivered.intersection_update(list(self._queue.event_ids_to_events))
        if len(undelivered) < MAX_UNDELIVERED:
            return True
        if name not in self._connections:
            await self.forget(name)
            return True
        return False


def unread(page: gr.Blocks, name: str | None) -> int:
    """Return how many messages of the page a tab has not fetched."""
    messages = page._queue.pending_messages_per_session.get(name or "")
    return 0 if messages is None else messages.qsize()
