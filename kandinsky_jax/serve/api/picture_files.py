"""Files of pictures before they are decoded: few bytes can ask for much work, and metadata for much memory.

Pillow reads every segment of a JPEG and every chunk of a PNG, all EXIF, texts and profiles, and libjpeg goes through
the whole picture once for each scan. Of these files, only what the pixels need is passed on, and its parts are counted.
WebP's first frame and its metadata are cheap.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import Any

from PIL import ExifTags, Image

MAX_SCANS = 100  # of a JPEG; encoders write up to about 20
MAX_SEGMENTS = 1000  # of a JPEG
MAX_CHUNKS = 2**15  # of a PNG; encoders write 8 KiB of data or more into each
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf", b"IEND")
_ORIENTATION_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # in which a PNG may say how it is turned
_ORIENTATION_KEYS = ("XML:com.adobe.xmp", "xmp")  # the same of `Image.info`, besides EXIF
_MARKER = re.compile(rb"\xff([^\x00\xff])")
_MARKER_AFTER_SCAN = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")  # restart markers belong to the scan's data
_FILL = re.compile(rb"\xff{2,}")  # Pillow begins anew for each block of a long run
_EOI, _SOS, _APP0, _APP1, _APP14, _APP15, _COM = 0xD9, 0xDA, 0xE0, 0xE1, 0xEE, 0xEF, 0xFE
_ALONE = (0x01, *range(0xD0, 0xD9))  # markers without a length
_SHORT = 3  # EXIF's type of 16 bits
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"


class FileFault(ValueError):
    """What is wrong with a file; the message goes on after the picture's name."""


def essential_file(data: bytes) -> bytes:
    """Return a picture's file without the metadata that its pixels do not need; its orientation stays.

    Raises:
        FileFault: for a file of so many parts that decoding it takes long.
    """
    if data.startswith(_JPEG):
        return _essential_jpeg(data)
    if data.startswith(_PNG):
        return _essential_png(data)
    return data


def essential_info(info: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return of `Image.info` what makes the picture upright and transparent; of EXIF the orientation alone."""
    found = {key: info[key] for key in ("transparency", *_ORIENTATION_KEYS) if key in info}
    exif = info.get("exif")
    if exif is None and "Raw profile type exif" in info:  # of ImageMagick
        try:
            exif = bytes.fromhex("".join(info["Raw profile type exif"].split("\n")[3:]))
        except (AttributeError, ValueError):
            exif = None
    if isinstance(exif, bytes) and (orientation := _orientation(exif)) is not None:
        found["exif"] = _exif_of(orientation)
    return found


def _essential_jpeg(data: bytes) -> bytes:
    """Drop a JPEG's comments and application segments, except those of its colours and orientation."""
    kept, position, scans, pattern, oriented = [data[:2]], 2, 0, _MARKER, False
    for _ in range(MAX_SEGMENTS):
        match = pattern.search(data, position)
        start = len(data) if match is None else match.start()
        if pattern is _MARKER_AFTER_SCAN:
            kept.append(_FILL.sub(b"\xff", data[position:start]))
        if match is None or match[1][0] == _EOI:
            return b"".join(kept) + data[start : start + 2]
        code, end = match[1][0], match.end()
        if code not in _ALONE:
            length = int.from_bytes(data[end : end + 2])
            if length < 2:
                raise FileFault("is damaged: a segment has no length")
            end += length
        payload = data[start + 4 : end] if code == _APP1 else b""
        if payload.startswith(_EXIF) and not oriented:
            oriented = True
            kept.append(_exif_segment(payload))
        elif code in (_APP0, _APP14) or payload.startswith(_XMP) or not (_APP0 <= code <= _APP15 or code == _COM):
            kept.append(data[start:end])
        scans += code == _SOS
        if scans > MAX_SCANS:
            raise FileFault(f"has more than {MAX_SCANS} scans; needed is a JPEG of at most {MAX_SCANS}")
        position, pattern = end, _MARKER_AFTER_SCAN if code == _SOS else _MARKER
    raise FileFault(f"has more than {MAX_SEGMENTS:,} segments; needed is a JPEG of at most {MAX_SEGMENTS:,}")


def _essential_png(data: bytes) -> bytes:
    """Drop a PNG's texts, profiles and further frames."""
    kept, position, seen = [_PNG], len(_PNG), set()
    for _ in range(MAX_CHUNKS):
        if position + 8 > len(data):
            return b"".join(kept)
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        what = next((text for text in _ORIENTATION_TEXTS if data.startswith(text, position + 8)), kind)
        if (kind in _CHUNKS or what != kind) and (kind == b"IDAT" or what not in seen):
            kept.append(data[position:end])
            seen.add(what)
        if kind == b"IEND":
            return b"".join(kept)
        position = end
    raise FileFault(f"has more than {MAX_CHUNKS:,} chunks; needed is a PNG of at most {MAX_CHUNKS:,}")


def _orientation(exif: bytes) -> int | None:
    """Return the orientation in EXIF, None where there is none.

    Pillow would read all entries, each of which may be as large as the whole.
    """
    tiff = exif.removeprefix(_EXIF)
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return None
    try:
        [position] = struct.unpack_from(f"{order}I", tiff, 4)
        [entries] = struct.unpack_from(f"{order}H", tiff, position)
        for i in range(entries):
            tag, kind = struct.unpack_from(f"{order}HH", tiff, position + 2 + 12 * i)
            if tag == ExifTags.Base.Orientation:
                [value] = struct.unpack_from(f"{order}{'H' if kind == _SHORT else 'I'}", tiff, position + 10 + 12 * i)
                return value if value in range(1, 9) else None
    except struct.error:
        pass
    return None


def _exif_of(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes()


def _exif_segment(payload: bytes) -> bytes:
    """Return a JPEG's EXIF segment with its orientation alone; empty where there is none."""
    orientation = _orientation(payload)
    if orientation is None:
        return b""
    small = _exif_of(orientation)
    return struct.pack(">BBH", 0xFF, _APP1, len(small) + 2) + small
