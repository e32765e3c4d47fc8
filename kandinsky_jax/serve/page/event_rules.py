"""What an event of the page may be; anything else would be an error of Gradio's, with a traceback in the log."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import gradio as gr
from gradio.blocks import Block

SESSION = r"[A-Za-z0-9_-]{1,64}"  # the name of a browser tab, which its client makes up
FIELDS = ("data", "event_data", "fn_index", "trigger_id", "session_hash")
MAX_DATA = 10  # values of `event_data`
KINDS: dict[type[Block], tuple[str, tuple[type, ...]]] = {  # None is a value of all
    gr.Textbox: ("a text", (str,)),
    gr.HTML: ("a text", (str,)),
    gr.Dropdown: ("a text", (str,)),
    gr.Radio: ("a text", (str,)),
    gr.Checkbox: ("true or false", (bool,)),
    gr.Slider: ("a finite number", (int, float)),
    gr.State: ("null", ()),
}


class EventError(ValueError):
    """An event that this page cannot have sent."""


@dataclass(frozen=True)
class _Function:
    """What a function of the page takes.

    Args:
        triggers: numbers of the components whose events call it.
        inputs: components whose values it takes.
    """

    triggers: frozenset[int | None]
    inputs: tuple[Block, ...]


class EventRules:
    """Checks events by the functions of a page.

    Args:
        page: complete.
    """

    def __init__(self, page: gr.Blocks):
        self._functions: dict[int, _Function] = {}
        for number, function in page.fns.items():
            kinds = {kind for _, kind in function.targets}
            if function.fn is not None and "unload" not in kinds:  # others are the browser's or Gradio's to call
                triggers = frozenset(trigger for trigger, _ in function.targets)
                self._functions[number] = _Function(triggers, tuple(function.inputs))

    def session_of(self, body: bytes) -> str:
        """Return the name of the tab that an event is of.

        Raises:
            EventError: where the page has no such event.
        """
        event = read_json(body)
        if not isinstance(event, dict) or not isinstance(event.get("data"), list):
            raise EventError("needed is an object with a list in data")
        if unknown := sorted(set(event) - set(FIELDS)):
            raise EventError(f"an event has no {unknown[0][:40]!r}")
        session = event.get("session_hash")
        if not is_session(session):
            raise EventError("session_hash is missing, or not 1 to 64 letters, digits, - and _")
        number = event.get("fn_index")
        function = self._functions.get(number) if type(number) is int else None
        if function is None:
            raise EventError("fn_index is not the number of a function of this page")
        trigger = event.get("trigger_id")
        if type(trigger) not in (int, type(None)) or trigger not in function.triggers | {None}:
            raise EventError("trigger_id is not a component that calls this function")
        _check_inputs(function.inputs, event["data"])
        _check_event_data(event.get("event_data"))
        return str(session)


def read_json(body: bytes) -> Any:
    """Return what is in JSON.

    Raises:
        EventError: where it is none, or has numbers that are none.
    """

    def refuse(name: str) -> NoReturn:
        raise ValueError(name)

    try:
        return json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError):
        raise EventError("the request is not JSON") from None


def is_session(name: object) -> bool:
    """Whether something is a name of a browser tab."""
    return isinstance(name, str) and re.fullmatch(SESSION, name) is not None


def _check_inputs(inputs: Sequence[Block], values: Sequence[object]) -> None:
    """Raise EventError for values that are not those of components."""
    if len(values) != len(inputs):
        raise EventError(f"data has {len(values)} values; this function takes {len(inputs)}")
    for index, (component, value) in enumerate(zip(inputs, values, strict=True)):
        what, kinds = KINDS[type(component)]
        if value is None:
            continue
        if isinstance(value, dict | list):
            raise EventError(f"data[{index}] is an object or a list; needed is {what}")
        if type(value) not in kinds or not _is_plain(value):
            raise EventError(f"data[{index}] is {str(value)[:40]!r}; needed is {what}")


def _check_event_data(given: object) -> None:
    """Raise EventError for what no event of the page says of itself: truth values, or some named values."""
    if given is None or isinstance(given, bool):
        return
    if not isinstance(given, Mapping) or len(given) > MAX_DATA:
        raise EventError("event_data is not an object of few values")
    for value in given.values():
        if type(value) not in (str, int, float, bool, type(None)) or not _is_plain(value):
            raise EventError("event_data holds an object or a list")


def _is_plain(value: object) -> bool:
    """Whether a number is finite, or a text can be sent on as UTF-8."""
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, str) or value.isascii() or not re.search("[\ud800-\udfff]", value)
