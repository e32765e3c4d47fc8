"""Captions as text, whatever the file that they are in."""

from __future__ import annotations

import codecs
from typing import Any

from kandinsky_jax import reading
from kandinsky_jax.errors import shorten
from kandinsky_jax.training.data.items import CAPTION_KEYS

# The longer marks first: UTF-32's little-endian one begins as UTF-16's does.
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def decode(data: bytes) -> str:
    """Text of bytes in UTF-8, or in what a byte order mark says; the mark is left out.

    Raises:
        ValueError: for text in another encoding, which cannot be known.
    """
    mark, encoding = next((pair for pair in MARKS if data.startswith(pair[0])), (b"", "utf-8"))
    try:
        return data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        byte = data[len(mark) + error.start]
        place = len(mark) + error.start
        raise ValueError(
            f"the text is not {encoding.upper()} (0x{byte:02x} at byte {place}); save it as UTF-8"
        ) from None


def clean(text: str) -> str:
    """A caption without the space around it; a surrogate without its other half becomes U+FFFD, as no tokenizer
    takes one."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").strip("\ufeff \t\r\n\f\v")


def parse_json(data: bytes | str) -> dict[str, Any]:
    """The object of a JSON text in any of these encodings; ValueError for anything else."""
    try:
        parsed = reading.parse_json(decode(data) if isinstance(data, bytes) else data)
    except reading.ReadError as error:
        raise ValueError(f"it {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"needed is a JSON object, got {shorten(parsed, 60)}")
    return parsed


def caption_of(about: dict[str, Any]) -> str:
    """The caption of an object: its `text`, `caption` or `prompt`; ValueError where there is none."""
    for key in CAPTION_KEYS:
        if isinstance(about.get(key), str):
            return clean(about[key])
    given = {key: about[key] for key in CAPTION_KEYS if key in about}
    if given:
        raise ValueError(f"its caption is no text: {shorten(given, 80)}")
    raise ValueError(f"there is no caption; needed is one of {', '.join(CAPTION_KEYS)}")


def caption_from(data: bytes, suffix: str) -> str:
    """The caption in a file's bytes; JSON where the suffix is `.json`, else plain text."""
    return caption_of(parse_json(data)) if suffix == ".json" else clean(decode(data))
