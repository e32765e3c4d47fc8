"""Pictures of requests: decoded as in the pipelines, and never with much work or memory for few bytes."""

from __future__ import annotations

import io
import struct
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

from kandinsky_jax import images
from kandinsky_jax.serve.api.bodies import Budget
from kandinsky_jax.serve.api.errors import ApiError
from kandinsky_jax.serve.api.picture_files import MAX_CHUNKS, MAX_SCANS, MAX_SEGMENTS
from kandinsky_jax.serve.api.pictures import PictureReader
from tests.serve.servers import encoded, server

SIDE = 24
END_OF_IMAGE = b"\xff\xd9"


def decode(data: bytes) -> Image.Image:
    return PictureReader(2**25, Budget(2**25, "the pictures")).decode(data, "image")


def refusal(data: bytes) -> str:
    with pytest.raises(ApiError) as caught:
        decode(data)
    assert (caught.value.status, caught.value.param) == (400, "image")
    return caught.value.message


def file_of(mode: str, kind: str, **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE + 8, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(data, kind, **options)
    return data.getvalue()


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def segment(code: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, code, len(data) + 2) + data


def in_png(*chunks: bytes) -> bytes:
    """A PNG with further chunks before its data."""
    data = file_of("RGB", "PNG")
    at = data.index(b"IDAT") - 4
    return data[:at] + b"".join(chunks) + data[at:]


def in_jpeg(*segments: bytes) -> bytes:
    data = file_of("RGB", "JPEG")
    return data[:2] + b"".join(segments) + data[2:]


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[ExifTags.Base.Orientation] = orientation
    made[ExifTags.Base.Software] = "the tests"
    return made


def overlapping_exif(entries: int, size: int) -> bytes:
    """EXIF whose entries all have the same large data."""
    listed = b"".join(struct.pack("<HHII", i, 7, size, 0) for i in range(entries))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", entries) + listed.ljust(size, b"\0")


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
PROFILE = b"\nexif\n 60\n" + exif(8).tobytes().hex().encode()
FILES = {
    **{f"{kind} turned by {i}": file_of("RGB", kind, exif=exif(i)) for i in (3, 6, 7) for kind in ("PNG", "WEBP")},
    **{f"JPEG turned by {i}": file_of("RGB", "JPEG", exif=exif(i)) for i in range(1, 9)},
    "JPEG turned by XMP": in_jpeg(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP)),
    "PNG turned by XMP": in_png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)),
    "PNG turned by ImageMagick": in_png(
        chunk(
            b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n 60\n" + exif(8).tobytes().hex().encode())
        )
    ),
    "progressive": file_of("RGB", "JPEG", progressive=True),
    "restart markers": file_of("RGB", "JPEG", restart_marker_blocks=1),
    "comment and profile": file_of("RGB", "JPEG", comment=b"x", icc_profile=b"x" * 200_000),
    "filled": in_jpeg(b"\xff" * 100),
    "several pictures": file_of("RGB", "MPO", save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE))]),
    "after the end": file_of("L", "JPEG") + b"\xff\xda\0\2" * 1000,
    "CMYK": file_of("CMYK", "JPEG"),
    "animated PNG": file_of("RGB", "PNG", save_all=True, append_images=[Image.new("RGB", (SIDE + 8, SIDE))]),
    "animated WebP": file_of("RGB", "WEBP", save_all=True, append_images=[Image.new("RGB", (SIDE + 8, SIDE))]),
    "profile in a PNG": file_of("RGB", "PNG", icc_profile=b"x" * 2000),
    "transparent palette": file_of("P", "PNG", transparency=3),
    "transparent colour": file_of("L", "PNG", transparency=3),
    "transparent": file_of("RGBA", "WEBP", lossless=True),
    "bits": file_of("1", "PNG"),
}


@pytest.mark.parametrize("data", FILES.values(), ids=FILES)
def test_pictures_are_decoded_as_in_the_pipelines(data):
    found, expected = decode(data), images.read(io.BytesIO(data))
    assert (found.mode, found.size) == (expected.mode, expected.size)
    np.testing.assert_array_equal(np.asarray(found.convert("RGBA")), np.asarray(expected.convert("RGBA")))
    assert found.info.keys() <= {"transparency"}
    assert found.info.get("transparency") == expected.info.get("transparency")


def test_a_jpeg_of_many_scans_is_refused():
    data = file_of("RGB", "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    assert decode(data[:-2] + scan * 50 + END_OF_IMAGE).size == (SIDE + 8, SIDE)
    assert f"more than {MAX_SCANS} scans" in refusal(data[:-2] + scan * MAX_SCANS + END_OF_IMAGE)


def test_files_of_many_parts_are_refused_at_once():
    began = time.monotonic()
    assert f"{MAX_SEGMENTS:,} segments" in refusal(in_jpeg(segment(0xE1, b"Exif\0\0ab") * 1_000_000))
    assert f"{MAX_CHUNKS:,} chunks" in refusal(in_png(chunk(b"IDAT") * 1_000_000))
    assert f"{MAX_CHUNKS:,} chunks" in refusal(in_png(chunk(b"teXt") * 1_000_000))
    assert "a segment has no length" in refusal(in_jpeg(b"\xff\xe1\0\0"))
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_run_of_fill_bytes_is_read_once(where):
    data = file_of("RGB", "JPEG")
    at = (2, data.rindex(b"\xff\xda") + 14, len(data) - 2)[where]
    began = time.monotonic()
    try:
        decode(data[:at] + b"\xff" * 2**23 + b"\0" * (where == 1) + data[at:])
    except ApiError as error:
        assert where == 1, error  # noqa: PT017 - the scan's data are damaged
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_metadata_take_no_memory(kind):
    text = zlib.compress(b"a" * (PngImagePlugin.MAX_TEXT_CHUNK - 1))
    size = 60_000 if kind == "jpeg" else 2**22
    bomb = overlapping_exif(4000, size)
    if kind == "png":
        texts = [chunk(b"zTXt", b"k%d\0\0" % i + text) for i in range(20)]
        data = in_png(*texts, chunk(b"iCCP", b"k\0\0" + text), chunk(b"eXIf", bomb), chunk(b"prIv", bytes(2**20)))
    elif kind == "jpeg":
        data = in_jpeg(segment(0xE1, b"Exif\0\0" + bomb), *[segment(0xE1, b"Exif\0\0" + bytes(60_000))] * 100)
    else:
        data = file_of("RGB", "WEBP", exif=bomb, icc_profile=bytes(2**20))
    decode(file_of("RGB", kind))  # what is imported late is there
    tracemalloc.start()
    try:
        picture = decode(data)
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert picture.size == (SIDE + 8, SIDE)
    assert held < 200_000
    assert most < 6 * len(data) + 2**20


def test_a_text_that_is_too_large_is_no_fault_of_the_server():
    text = zlib.compress(b"a" * (2 * PngImagePlugin.MAX_TEXT_CHUNK))
    assert decode(in_png(chunk(b"zTXt", b"k\0\0" + text))).size == (SIDE + 8, SIDE)
    message = refusal(in_png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + text)))
    assert message.startswith("image cannot be read as a picture: Decompressed data too large")


def test_bodies_are_not_held_while_requests_wait():
    large, few = encoded(Image.new("RGB", (64, 64))) + bytes(2**22), 4
    with server(generates=False, time_limit=2.0) as running, ThreadPoolExecutor(few) as pool:
        running.send("POST", "/v1/images/edits", files={"image": b"x"}, data={"prompt": "x"})
        tracemalloc.start()
        try:
            files = [("image", large)]
            sent = [
                pool.submit(running.send, "POST", "/v1/images/edits", files=files, data={"prompt": "x"})
                for _ in range(few)
            ]
            until = time.monotonic() + 20
            while running.service.state.waiting < few and time.monotonic() < until:
                time.sleep(0.05)
            time.sleep(0.3)
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert held < 2 * 2**22
        assert {one.result().status_code for one in sent} == {504}


@pytest.mark.slow
def test_requests_without_pictures_do_not_wait_for_decoding():
    data = io.BytesIO()
    Image.new("RGB", (5700, 5700), 90).save(data, "JPEG", progressive=True)
    data = data.getvalue()
    slow = data[:-2] + data[data.rindex(b"\xff\xda") : -2] * 80 + END_OF_IMAGE  # seconds
    with server(generates=False, time_limit=4.0) as running, ThreadPoolExecutor(7) as pool:
        edit = {"files": {"image": slow}, "data": {"prompt": "x"}}
        sent = [pool.submit(running.send, "POST", "/v1/images/edits", **edit) for _ in range(6)]
        time.sleep(0.7)  # all have arrived
        assert running.service.state.waiting == 0
        sent.append(pool.submit(running.send, "POST", "/v1/images/generations", json={"prompt": "x"}))
        while not (tickets := list(running.service._tickets)):
            time.sleep(0.01)
        assert [ticket.request.mode for ticket in tickets] == ["generate"]
