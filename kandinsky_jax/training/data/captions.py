"""Captions from text and JSON files of any encoding."""

from __future__ import annotations

import codecs

from kandinsky_jax.common import reading
from kandinsky_jax.common.errors import shorten
from kandinsky_jax.training.data.items import CAPTION_KEYS

# UTF-32 before UTF-16, whose little-endian mark is a prefix.
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def decode(data: bytes) -> str:
    """Decode UTF-8, or the encoding of a byte order mark, which is removed.

    Raises:
        ValueError: for any other encoding.
    """
    mark, encoding = next((pair for pair in MARKS if data.startswith(pair[0])), (b"", "utf-8"))
    try:
        return data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        byte = data[len(mark) + error.start]
        position = len(mark) + error.start
        raise ValueError(
            f"the text is not {encoding.upper()} (0x{byte:02x} at byte {position}); save it as UTF-8"
        ) from None


def clean(text: str) -> str:
    """Strip a caption, and replace unpaired surrogates, which tokenizers refuse, by U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").strip("\ufeff \t\r\n\f\v")


def parse_json(data: bytes | str) -> dict[str, object]:
    """Parse a JSON object in any of these encodings; ValueError for anything else."""
    try:
        parsed = reading.parse_json(decode(data) if isinstance(data, bytes) else data)
    except reading.ReadError as error:
        raise ValueError(f"it {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"needed is a JSON object, got {shorten(parsed, 60)}")
    return parsed


def caption_of(about: dict[str, object]) -> str:
    """Return the caption of an object: its `text`, `caption` or `prompt`; ValueError if there is none."""
    for key in CAPTION_KEYS:
        if isinstance(caption := about.get(key), str):
            return clean(caption)
    given = {key: about[key] for key in CAPTION_KEYS if key in about}
    if given:
        raise ValueError(f"its caption is not text: {shorten(given, 80)}")
    raise ValueError(f"there is no caption; needed is one of {', '.join(CAPTION_KEYS)}")


def caption_from(data: bytes, suffix: str) -> str:
    """Read the caption from a file's bytes: JSON for the suffix `.json`, else plain text."""
    return caption_of(parse_json(data)) if suffix == ".json" else clean(decode(data))
