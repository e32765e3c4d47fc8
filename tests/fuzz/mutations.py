"""Ways to damage a file: its bytes, its content, and its kind in the file system.

Every function takes a `random.Random`, so that a seed gives the same damage again. `damage` picks one by the file's
ending and does it in place.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What no configuration means: each in the place of any value. Text in `Raw` goes into the file as it is.
HUGE_DIGITS, DEEP = "9" * 5000, "[" * 50_000 + "]" * 50_000


class Raw(str):
    """Text that stands in a JSON file without quotes."""


WILD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 1.5, -0.5, 10**30, -(10**30), 2**31, 2**63, 2**64),
    *(1e308, 1e-320, float("nan"), float("inf"), float("-inf"), Raw(HUGE_DIGITS), Raw(DEEP), Raw("1e99999"), Raw("-0")),
    *("", " ", "x" * 10_000, "\ud800", "\u2028", "\x00", "\x1b[31m", "../../etc/passwd", "/dev/zero"),
    *("1e999", "\uff11\uff12"),
    *([], {}, [None], [[]], [1, "a"], {"": None}, [0] * 1000, {"a": {"b": []}}, list(range(3))),
)
WILD_TEXT = (
    *(
        "\ufeff",
        "\u2028",
        "\u2029",
        "\x00",
        "\x85",
        "\x1b[2J",
        "\r",
        "\n\n",
        '"',
        "\\",
        ",",
        "{",
        "[",
        "]" * 99,
        "'" * 3,
    ),
    *("NaN", "Infinity", "-1", "1e99999", HUGE_DIGITS, "x" * 100_000, "../" * 20, "%s{0}", "\u202e", "🎈", "null"),
)
NOT_UTF8 = (b"\xff\xfe", b"\xed\xa0\x80", b"\xc3(", b"\x80", b"\xf5\x80\x80\x80", b"\x00\x00\x00\x00")


# Bytes ------------------------------------------------------------------------------------------------------------


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    """One to twenty bytes changed, half of the time near the beginning, where headers are."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        if changed:
            place = rng.randrange(len(changed) if rng.random() < 0.5 else min(len(changed), 256))
            changed[place] ^= 1 << rng.randrange(8) if rng.random() < 0.5 else rng.randrange(1, 256)
    return bytes(changed)


def truncate(data: bytes, rng: random.Random) -> bytes:
    """Cut at any place, often near an end."""
    return data[: rng.choice((0, 1, rng.randrange(16), max(0, len(data) - rng.randrange(1, 16)), _place(data, rng)))]


def insert(data: bytes, rng: random.Random) -> bytes:
    """Bytes put in between: not UTF-8, odd characters, or at random."""
    piece = rng.choice((*NOT_UTF8, rng.choice(WILD_TEXT).encode(), rng.randbytes(rng.randrange(1, 64))))
    place = rng.choice((0, len(data), _place(data, rng)))
    return data[:place] + piece + data[place:]


def remove(data: bytes, rng: random.Random) -> bytes:
    """A piece left out."""
    place = _place(data, rng)
    return data[:place] + data[place + rng.choice((1, 2, 8, 512, 5000)) :]


def repeat(data: bytes, rng: random.Random) -> bytes:
    """A piece, or all of it, twice."""
    first, second = sorted((_place(data, rng), _place(data, rng)))
    return rng.choice((data + data, data[:second] + data[first:]))


def huge_number(data: bytes, rng: random.Random) -> bytes:
    """A field of 4 or 8 bytes, as headers have for sizes, with all bits set or the sign alone."""
    width = rng.choice((2, 4, 8))
    place = rng.choice((0, _place(data, rng), max(0, len(data) - width), _place(data[:512], rng)))
    return (
        data[:place]
        + rng.choice((b"\xff" * width, b"\x7f" + b"\xff" * (width - 1), b"\x80" + b"\0" * (width - 1)))
        + (data[place + width :])
    )


def other_encoding(data: bytes, rng: random.Random) -> bytes:
    """A text in another encoding than UTF-8, or with a byte-order mark."""
    text = data.decode("utf-8", "replace")
    return rng.choice(
        (b"\xef\xbb\xbf" + data, text.encode("utf-16"), text.encode("utf-32-be"), text.encode("latin-1", "replace"))
    )


def replace_all(data: bytes, rng: random.Random) -> bytes:
    """Something else entirely."""
    return rng.choice(
        (
            *(b"", b"\0" * 4096, b"null", b"[]", b"{}", b'""', b"0", b"\n", b"\xef\xbb\xbf", HUGE_DIGITS.encode()),
            *(
                DEEP.encode(),
                b'{"a":' * 50_000,
                b"<html><body>404</body></html>",
                b"version https://git-lfs.github.com/spec/v1\n",
            ),
            *(rng.randbytes(rng.randrange(1, 5000)), b"PK\x03\x04" + data[4:], b"\x89PNG\r\n\x1a\n" + data[8:]),
        )
    )


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(flip_bits, flip_bits, truncate, insert, remove, repeat, huge_number, replace_all),
)
TEXT = (*BYTES, insert, other_encoding)


def _place(data: bytes, rng: random.Random) -> int:
    return rng.randrange(len(data) + 1)


# What a file says -------------------------------------------------------------------------------------------------


def wild_value(rng: random.Random) -> Any:
    """One of `WILD`, or a number of any size."""
    value = rng.choice((rng.choice(WILD), rng.choice(WILD), rng.randrange(-(10**6), 10**6), rng.uniform(-2, 2)))
    return copy.deepcopy(value)  # it may be changed in its turn


def change_value(value: Any, rng: random.Random) -> Any:
    """A parsed JSON (or TOML) value with one to three of its parts changed, renamed, removed or added."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return wild_value(rng)
        holder, key = rng.choice(places)
        what = rng.randrange(8)
        if what == 0:
            del holder[key]
        elif what == 1 and isinstance(holder, dict):
            holder[rng.choice(("", "\ud800", "a\u2028b", "x" * 2000, "__class__", f"{key} ", str(key).upper()))] = (
                holder[key]
            )
        elif what == 2:
            holder[key] = [holder[key]]
        elif what == 3 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = rng.choice(
                (-holder[key], holder[key] + 1, holder[key] * 1000, float(holder[key]), str(holder[key]))
            )
        else:
            holder[key] = wild_value(rng)
    return value


def _places(value: Any) -> Any:
    """All (holder, key) of a tree."""
    stack = [value]
    while stack:
        holder = stack.pop()
        for key in list(holder if isinstance(holder, dict) else range(len(holder))):
            yield holder, key
            if isinstance(holder[key], dict | list):
                stack.append(holder[key])


def to_json(value: Any, rng: random.Random) -> str:
    """JSON text, with `Raw` as it is, and sometimes with a key twice."""
    raw: list[str] = []

    def marked(part: Any) -> Any:
        if isinstance(part, Raw):
            raw.append(part)
            return f"@@{len(raw) - 1}@@"
        if isinstance(part, dict):
            return {key: marked(item) for key, item in part.items()}
        return [marked(item) for item in part] if isinstance(part, list) else part

    text = json.dumps(marked(value), ensure_ascii=rng.random() < 0.8)
    for number, piece in enumerate(raw):
        text = text.replace(f'"@@{number}@@"', piece)
    if isinstance(value, dict) and value and rng.random() < 0.1:
        text = f"{text[:-1]}, {json.dumps(rng.choice(list(value)))}: {json.dumps(rng.choice((None, -1, 'twice')))}}}"
    return text


def change_json(data: bytes, rng: random.Random) -> bytes:
    """A JSON file that says something else."""
    try:
        value = json.loads(data)
    except ValueError:
        return flip_bits(data, rng)
    return to_json(change_value(value, rng), rng).encode("utf-8", "surrogatepass")


def change_lines(data: bytes, rng: random.Random) -> bytes:
    """A file of lines: one of them damaged, removed, repeated, out of order, or JSON that says something else."""
    lines = data.split(b"\n")
    place = rng.randrange(len(lines))
    what = rng.randrange(6)
    if what == 0:
        del lines[place]
    elif what == 1:
        lines.insert(place, rng.choice(lines))
    elif what == 2:
        rng.shuffle(lines)
    elif what == 3 and lines[place].lstrip().startswith(b"{"):
        lines[place] = change_json(lines[place], rng)
    elif what == 4 and (cells := lines[place].split(b",")):
        cells[rng.randrange(len(cells))] = str(wild_value(rng)).encode("utf-8", "surrogatepass")
        lines[place] = b",".join(cells)
    else:
        lines[place] = rng.choice(TEXT)(lines[place], rng)
    return b"\n".join(lines)


def change_safetensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header lies: lengths, dtypes, shapes, offsets, metadata."""
    size = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    if rng.random() < 0.2:
        return rng.choice((0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1)).to_bytes(8, "little") + data[8:]
    names = [name for name in header if name != "__metadata__"]
    if names and rng.random() < 0.7:
        name = rng.choice(names)
        entry = header[name]
        what = rng.randrange(5)
        if what == 0:
            entry["dtype"] = rng.choice(("F64", "F16", "I64", "BOOL", "F8_E4M3", "C64", "U8", "f32", "", None, 5))
        elif what == 1:
            entry["shape"] = rng.choice(([], [0], [2**62, 4], [-1], [1.5], [10**30], entry["shape"][::-1], None, "3"))
        elif what == 2:
            begin, end = entry["data_offsets"]
            entry["data_offsets"] = rng.choice(([end, begin], [begin, end + 4], [0, 2**63], [-1, end], [begin], None))
        elif what == 3:
            header[rng.choice(("x" * 5000, "", "\ud800", "../" + name))] = header.pop(name)
        else:
            header[name] = dict(header[rng.choice(names)])  # two tensors at one place
    elif texts := [key for key, text in header.get("__metadata__", {}).items() if text.startswith("{")]:
        about = json.loads(header["__metadata__"][texts[0]])
        header["__metadata__"][texts[0]] = to_json(change_value(about, rng), rng)
    else:
        header = change_value(header, rng)
    text = to_json(header, rng).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + rest


def change_png(data: bytes, rng: random.Random) -> bytes:
    """A PNG file whose chunks lie with right checksums: sizes, modes, lengths, order."""
    chunks, place = [], 8
    while place + 12 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + size]))
        place += 12 + size
    which = rng.randrange(len(chunks))
    kind, content = chunks[which]
    what = rng.randrange(5)
    if what <= 1:
        sizes = (0, 1, 2, 7, 1000, 10**6, 2**31 - 1, 2**32 - 1)
        width, height = (rng.choice(sizes).to_bytes(4, "big") for _ in range(2))
        modes = rng.choice(
            (chunks[0][1][8:], bytes((rng.choice((1, 2, 4, 8, 16, 3)), rng.choice((0, 2, 3, 4, 6)), 0, 0, 0)))
        )
        chunks[0] = (b"IHDR", width + height + modes)
    elif what == 2:
        chunks[which] = (kind, flip_bits(content, rng))
    elif what == 3:
        chunks.insert(
            which,
            rng.choice(((b"iTXt", b"kandinsky_jax\0" + rng.randbytes(50)), (b"eXIf", rng.randbytes(30)), chunks[-1])),
        )
    else:
        rng.shuffle(chunks)
    parts = [data[:8]]
    for kind, content in chunks:
        parts.append(len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big"))
    return b"".join(parts)


TOML_VALUES = (
    *("-1", "0", "1.5", "10000000", "1e400", "nan", "inf", "-inf", "true", '""', '"x"', "[]", "{}", "[[]]"),
    *("1979-05-27T07:32:00Z", "0x7fffffffffffffffff", "{a = {b = 1}}", '["a", 1]', '"\\ud800"', HUGE_DIGITS),
    *("'" + "x" * 5000 + "'", "[" * 5000 + "]" * 5000),
)


def change_toml(data: bytes, rng: random.Random) -> bytes:
    """A TOML file with another value, name or table."""
    lines = data.decode().split("\n")
    place = rng.choice([i for i, line in enumerate(lines) if "=" in line])
    name = lines[place].split("=")[0].strip()
    what = rng.randrange(4)
    if what == 0:
        lines[place] = f"{rng.choice((name.upper(), 'no.such.name', f'{name}_', '__class__', repr(name)))} = 1"
    elif what == 1:
        lines.insert(place, rng.choice(("[a.b]", "[[lora]]", "[optimizer]", lines[place], '"" = 1', "[" * 3)))
    else:
        lines[place] = f"{name} = {rng.choice(TOML_VALUES)}"
    return "\n".join(lines).encode()


# What a file is ---------------------------------------------------------------------------------------------------


def replace_file(path: Path, rng: random.Random) -> str:
    """Put something else in the file's place; says what."""
    what = rng.choice(("nothing", "folder", "full folder", "loop", "dangling", "outside", "device", "endless", "pipe"))
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "full folder":
        path.mkdir()
        (path / "config.json").write_text("{}")
    elif what == "loop":
        path.symlink_to(path.name)
    elif what in ("dangling", "outside", "device", "endless"):
        targets = {"dangling": "nowhere", "outside": "/etc/passwd", "device": os.devnull, "endless": "/dev/zero"}
        path.symlink_to(targets[what])
    elif what == "pipe":
        os.mkfifo(path)
    return what


def odd_neighbour(path: Path, rng: random.Random) -> str:
    """Put a file with an odd name beside; says which kind."""
    name = rng.choice((b"\xff\xfe", b"a\nb", b"\xe2\x80\xa8", b"\x1b[31m", b"x" * 200, b".hidden", b"%s{}", b"-rf"))
    beside = os.fsencode(path.parent) + b"/" + name + os.fsencode(path.suffix)
    shutil.copyfile(path, beside)
    return "odd neighbour"


FORMS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".safetensors": change_safetensors,
    ".png": change_png,
    ".toml": change_toml,
}


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file in place; the name of what was done."""
    chance = rng.random()
    if chance < 0.1:
        return replace_file(path, rng)
    if chance < 0.13:
        return odd_neighbour(path, rng)
    data = path.read_bytes()
    kinds: tuple[Callable[[bytes, random.Random], bytes], ...] = BYTES
    if path.suffix in (".json", ".jsonl", ".csv", ".txt", ".md", "") and chance < 0.6:
        kinds = (change_lines,) if path.suffix != ".json" and b"\n" in data.strip() else (change_json,)
    elif path.suffix in FORMS and chance < 0.6:
        kinds = (FORMS[path.suffix],)
    elif path.suffix in (".json", ".jsonl", ".csv", ".txt", ".toml", ".md"):
        kinds = TEXT
    change = rng.choice(kinds)
    path.write_bytes(change(data, rng))
    return change.__name__
