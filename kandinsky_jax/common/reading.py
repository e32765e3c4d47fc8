"""Bounded reading of small files: returns their content, or raises `ReadError` with a short reason.

Configurations, tokenizers, indices and the like come from anywhere. Each reader turns a `ReadError` into its own kind
of error, with the path; `of_file` words the two together.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from kandinsky_jax.common.errors import MAX_MESSAGE, shorten

MAX_FILE_BYTES = 64 << 20  # of a file that is read whole: the official tokenizer's largest is 2 MB
MAX_DEPTH = 64  # of JSON; what walks through it afterwards may recurse


class ReadError(ValueError):
    """A file cannot be read or parsed; the message does not contain the path."""


def of_file(path: str | os.PathLike[str], reason: object) -> str:
    """Return a message about a file, of at most `MAX_MESSAGE` characters unless the path is very long."""
    where = shorten(os.fspath(path), 240)
    return f"{where} {shorten(reason, max(200, MAX_MESSAGE - len(where)))}"


def read_bytes(path: str | os.PathLike[str], limit: int = MAX_FILE_BYTES) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
        FileNotFoundError: where there is none.
        ReadError: for whatever else: a folder, a pipe or device (which might never end), no permission, too large.
    """
    try:
        check_regular(path)
        with Path(path).open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        if isinstance(error, ReadError):
            raise
        raise ReadError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    check_size(len(data), limit)
    return data


def check_size(size: int, limit: int) -> None:
    """Raise ReadError for a file, or what was read of it, of more than `limit` bytes."""
    if size > limit:
        raise ReadError(f"is larger than {limit:,} bytes, which no such file is")


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise ReadError if a path is a folder, a pipe or a device, OSError if it cannot be accessed."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise ReadError("is a folder, needed is a file" if stat.S_ISDIR(mode) else "is not a regular file")


def read_text(path: str | os.PathLike[str], limit: int = MAX_FILE_BYTES) -> str:
    """Read a regular UTF-8 file, without its byte order mark; errors as in `read_bytes`."""
    return decode(read_bytes(path, limit))


def decode(data: bytes) -> str:
    """Decode UTF-8, without a byte order mark; ReadError for other encodings."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ReadError(f"is not UTF-8 text: byte {data[error.start]:#04x} at {error.start}") from None


def parse_json(data: bytes | str) -> object:
    """Parse JSON.

    Raises:
        ReadError: where it is none, is nested too deeply, or has an integer of thousands of digits.
    """
    try:
        text = decode(data) if isinstance(data, bytes) else data.removeprefix("\ufeff")
        parsed = json.loads(text)
    except RecursionError:
        raise ReadError("is not usable JSON: it is nested too deeply") from None
    except (json.JSONDecodeError, ReadError) as error:
        raise ReadError(f"is not JSON: {error}") from None
    except ValueError:  # Python converts no integer of more than 4,300 digits
        raise ReadError("is not usable JSON: it has an integer of too many digits") from None
    level = [parsed]
    for _ in range(MAX_DEPTH):
        level = [item for value in level for item in _items(value) if isinstance(item, dict | list)]
        if not level:
            return parsed
    raise ReadError(f"is not usable JSON: it is nested more than {MAX_DEPTH} deep")


def _items(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def read_json(path: str | os.PathLike[str], limit: int = MAX_FILE_BYTES) -> object:
    """Read a JSON file; errors as in `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path, limit))


def read_json_object(path: str | os.PathLike[str], limit: int = MAX_FILE_BYTES) -> dict[str, object]:
    """Read the object in a JSON file; errors as in `read_json`, and ReadError for any other value."""
    parsed = read_json(path, limit)
    if not isinstance(parsed, dict):
        raise ReadError(f"holds {type(parsed).__name__}, needed is an object")
    return parsed
