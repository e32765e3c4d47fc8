"""Error messages of bounded length, whatever they quote."""

from __future__ import annotations

import re
from collections.abc import Sequence

MAX_MESSAGE = 450  # characters of a message; a path of ordinary length before it keeps the whole under 500

_ADDRESS = re.compile(r"(?: object)? at 0x[0-9a-fA-F]+")
_USER = re.compile(r"(?<=://)[^\s/]*@")
_QUERY = re.compile(r"(://[^\s?'\"]*\?)[^\s'\"]+")


def hide_secrets(text: str) -> str:
    """Replace users, passwords and queries in URLs by `***`; a query may be a signature."""
    return _QUERY.sub(r"\1***", _USER.sub("***@", text)) if "://" in text else text


def shorten(value: object, limit: int = 120) -> str:
    """Return printable text of a value on one line, at most `limit` characters; "..." marks omissions.

    Addresses in memory, which differ between equal runs, are left out, and secrets in URLs (see `hide_secrets`).

    Args:
        value: a string or an exception as its text, anything else by its `repr`.
    """
    try:
        text = str(value) if isinstance(value, str | BaseException) else repr(value)
    except (ValueError, RecursionError):  # an integer of more than 4,300 digits, or deep nesting
        text = f"a {type(value).__name__} too large to show"
    text = hide_secrets(_ADDRESS.sub("", text[: 20 * limit]))
    text = " ".join(text[: 10 * limit].split()) + ("..." if len(text) > 10 * limit else "")
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def quote(value: object, limit: int = 120) -> str:
    """Return the shortened `repr` of a value; strings have quotation marks."""
    return shorten(repr(value), limit) if isinstance(value, str) else shorten(value, limit)


def counted(number: int, noun: str) -> str:
    """Return a number and its noun, `1 shard` or `1,200 shards`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def summarize(faults: Sequence[str], limit: int = MAX_MESSAGE - 100, separator: str = "; ") -> str:
    """Join the first faults, as many as fit into `limit` characters, and the number of others."""
    shown: list[str] = []
    for fault in faults:
        fault = shorten(fault, limit)
        if shown and len(separator.join([*shown, fault])) > limit:
            return f"{separator.join(shown)}{separator}and {len(faults) - len(shown)} more"
        shown.append(fault)
    return separator.join(shown)


class CheckpointError(ValueError):
    """A checkpoint cannot be used."""


class RunError(RuntimeError):
    """A long run cannot continue; the message tells its user why, and what to do."""
