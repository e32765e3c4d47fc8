"""Hostile requests, made from a seed: fuzzed JSON, multipart and pictures, odd sizes and headers, paths in every field,
slow bodies, clients that leave. Each is bytes, sent as they are.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import random
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

GENERATE, EDIT, VARY = "/v1/images/generations", "/v1/images/edits", "/v1/images/variations"
PATHS = (
    "/etc/passwd",
    "../../../../etc/passwd",
    "..\\..\\x",
    "file:///etc/passwd",
    "http://127.0.0.1:1/x.png",
    "https://example.invalid/x.png",
    "/proc/self/environ",
    "~/.ssh/id_rsa",
    "data:text/plain;base64,aGk=",
    "data:image/png;base64,/etc/passwd",
    "gs://bucket/x",
    "%2e%2e%2fetc%2fpasswd",
    "/dev/zero",
    "\x00/etc/passwd",
)
VALUES: tuple[Any, ...] = (
    *PATHS,
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63) - 1,
    10**300,
    1e308,
    -0.0,
    1e-320,
    "",
    " ",
    "x" * 40_000,
    "\ud7ff\U0001f9ff\u202e",
    [],
    {},
    [[[[[]]]]],
    {"image": "x"},
    {"__class__": "x"},
    ["x"] * 20,
    "NaN",
    "1e999",
    "0x10",
    "null",
    "64x64",
    "0x0",
    "99999x99999",
    "64x128",
    "-1x64",
)
FIELDS = (
    *("model", "prompt", "n", "size", "response_format", "output_format", "output_compression", "background", "style"),
    *("moderation", "quality", "user", "stream", "partial_images", "negative_prompt", "seed", "steps"),
    *("guidance_scale", "prior_steps", "prior_guidance_scale", "scheduler", "loras", "fast", "torch_noise", "hint"),
    *("items", "weights", "strength", "mask", "image", "paste_back", "path", "url", "file", "__proto__"),
)
URLS = (
    *("/", "/docs", "/openapi.json", "/metrics", "/health", "/v1/models", "/v1/models/tiny", "/login", "/favicon.ico"),
    *("/../../etc/passwd", "//etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/models/../../../etc/passwd"),
    *("/v1//images", "/ui/", "/ui/config", "/ui/theme.css", "/ui/own/../mount.py", "/ui/own/%2e%2e%2fmount.py"),
    *("/ui/own/page.js", "/ui/session/x/0.png", "/ui/gradio_api/file=/etc/passwd", "/ui/gradio_api/file/etc/passwd"),
    *("/ui/file=/etc/passwd", "/ui/gradio_api/proxy=http://127.0.0.1:1/", "/ui/gradio_api/upload", "/ui/assets/x"),
    *("/ui/gradio_api/queue/join", "/ui/gradio_api/queue/data?session_hash=x", "/ui/static/../../x", "/ui/monitoring"),
    *("/ui/gradio_api/run/predict", "/ui/gradio_api/heartbeat/../x", "/gradio_api/file=/etc/passwd", "/%00"),
    *("/ui/gradio_api/info", "/ui/?deep_link=/etc/passwd", "/ui/custom_component/x/y/z/../../../etc/passwd"),
    *("/ui/gradio_api/stream/x/y", "/" + "a" * 5000, "*", "x"),
)
MOST = 4 * 2**20  # bytes of a body, twice what the server takes
FEW = {"steps": 1, "prior_steps": 2, "fast": True}


@dataclass(frozen=True)
class Attack:
    """A request and the way to send it.

    Args:
        kind: of the generator.
        parts: bytes, sent one after the other.
        pause: seconds between two parts.
        leaves: whether the connection is closed without reading the answer.
        valid: whether it has to be answered by 200, 429 or 503.
    """

    kind: str
    parts: tuple[bytes, ...]
    pause: float = 0.0
    leaves: bool = False
    valid: bool = False


@dataclass
class Made:
    """Makes attacks from a seed."""

    seed: int
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def attacks(self, count: int) -> Iterator[Attack]:
        """Yield attacks of all kinds."""
        kinds = (self.json_values, self.json_bytes, self.multipart_values, self.multipart_bytes, self.pictures)
        kinds += (self.urls, self.headers, self.bytes, self.slow, self.leaving, self.valid)
        for _ in range(count):
            yield self.random.choice(kinds)()

    # Kinds ----------------------------------------------------------------------------------------------------------

    def json_values(self) -> Attack:
        body = {"prompt": "x", **FEW}
        for _ in range(self.random.randint(1, 4)):
            body[self.random.choice(FIELDS)] = self.value()
        return Attack("JSON values", (self.json_request(json.dumps(body).encode()),))

    def json_bytes(self) -> Attack:
        body = json.dumps({"prompt": "x", "loras": {"a": 1.5}, "items": ["x"], **FEW}).encode()
        r = self.random
        body = r.choice(
            (
                lambda: self.damaged(body),
                lambda: b"[" * r.choice((10, 1000, 100_000)),
                lambda: b'{"a":' * r.choice((10, 100_000)),
                lambda: b'{"seed": ' + b"9" * r.choice((20, 5000, 100_000)) + b"}",
                lambda: b'{"guidance_scale": NaN, "prompt": "x"}',
                lambda: b'{"prompt": "\\ud800"}',
                lambda: b'"x"',
                lambda: b"",
                lambda: r.randbytes(r.randint(1, 2000)),
                lambda: json.dumps({"prompt": "x"}).encode("utf-16"),
            )
        )()
        return Attack("JSON bytes", (self.json_request(body),))

    def multipart_values(self) -> Attack:
        r = self.random
        parts = [("image", self.picture(), "a.png"), ("prompt", b"x", None)]
        parts += [(name, str(value).encode(), None) for name, value in FEW.items()]
        for _ in range(r.randint(1, 4)):
            name = r.choice(FIELDS) + r.choice(("", "", "[]", "[x]", "[/etc/passwd]", "[[]]", "[0][1]"))
            value = str(self.value()).encode("utf-8", "surrogatepass")
            parts.append((name, value, r.choice((None, None, r.choice(PATHS)))))
        if r.random() < 0.1:
            parts += parts[1:] * r.choice((20, 200))
        return Attack("multipart values", (self.multipart_request(r.choice((EDIT, VARY)), parts),))

    def multipart_bytes(self) -> Attack:
        whole = self.multipart_request(EDIT, [("image", self.picture(), "a.png"), ("prompt", b"x", None)])
        _, _, body = whole.partition(b"\r\n\r\n")
        r = self.random
        body = r.choice((lambda: self.damaged(body), lambda: b"\r\n--" * 20_000, lambda: body[: r.randint(0, 200)]))()
        kind = r.choice((b"multipart/form-data; boundary=b", b"multipart/form-data", b"multipart/form-data; boundary="))
        return Attack("multipart bytes", (self.request(b"POST", EDIT, body, kind),))

    def pictures(self) -> Attack:
        r = self.random
        if r.random() < 0.3:
            items = [{"image": base64.b64encode(self.picture()).decode()} for _ in range(r.randint(1, 4))]
            return Attack("pictures", (self.json_request(json.dumps({"items": items, **FEW}).encode()),))
        names = r.choice((["image"], ["image", "mask"], ["image[]", "image[]"], ["image", "hint"], ["mask"], ["hint"]))
        parts = [(name, self.picture(), r.choice(("a.png", *PATHS))) for name in names]
        parts += [("prompt", b"x", None), *((name, str(value).encode(), None) for name, value in FEW.items())]
        if r.random() < 0.5:
            parts.append(("strength", b"1", None))
        return Attack("pictures", (self.multipart_request(r.choice((EDIT, EDIT, VARY)), parts),))

    def urls(self) -> Attack:
        method = self.random.choice((b"GET", b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"TRACE", b"X"))
        url = self.random.choice(URLS) + self.random.choice(("", "", "?path=/etc/passwd", "?x=" + "y" * 2000, "#x"))
        body = self.random.choice((b"", b"{}", b'{"data":[{"path":"/etc/passwd","meta":{"_type":"gradio.FileData"}}]}'))
        return Attack("URLs", (self.request(method, url, body, b"application/json"),))

    def headers(self) -> Attack:
        r = self.random
        name = r.choice(
            (b"host", b"origin", b"cookie", b"authorization", b"content-type", b"x-forwarded-for", b"range")
        )
        value = r.choice((*PATHS, "x" * 9000, "a, b;c=d", "\x01", "null", "http://evil.example", "bytes=0-9999999999"))
        more = name + b": " + value.encode("utf-8", "replace") + b"\r\n"
        more += r.choice(
            (b"", b"", b"content-length: 7\r\n", b"transfer-encoding: chunked\r\n", b"expect: 100-continue\r\n")
        )
        return Attack("headers", (self.request(b"POST", GENERATE, b'{"prompt":""}', b"application/json", more),))

    def bytes(self) -> Attack:
        whole = self.json_request(json.dumps({"prompt": "x", **FEW}).encode())
        return Attack("bytes", (self.damaged(whole),))

    def slow(self) -> Attack:
        whole = self.json_request(json.dumps({"prompt": "x", **FEW}).encode())
        cut = self.random.randint(1, len(whole) - 1)
        stays = self.random.random() < 0.02  # until the server has had enough
        parts = (whole[:cut],) if stays else (whole[:cut], whole[cut:])
        return Attack(
            "slow", parts, self.random.choice((0.01, 0.1, 0.3)), leaves=not stays and self.random.random() < 0.3
        )

    def leaving(self) -> Attack:
        body = {
            "prompt": "x",
            "prior_steps": 1,
            "steps": self.random.choice((1, 8)),
            "stream": self.random.random() < 0.5,
        }
        return Attack("leaving", (self.json_request(json.dumps(body).encode()),), leaves=True)

    def valid(self) -> Attack:
        body = {"prompt": "x", "seed": self.random.randrange(2**63), **FEW, "stream": self.random.random() < 0.3}
        return Attack("valid", (self.json_request(json.dumps(body).encode()),), valid=True)

    # Parts ----------------------------------------------------------------------------------------------------------

    def value(self) -> Any:
        return self.random.choice(VALUES)

    def damaged(self, data: bytes) -> bytes:
        """Change, drop and repeat some bytes."""
        found = bytearray(data)
        for _ in range(self.random.randint(1, 6)):
            if not found:
                break
            at = self.random.randrange(len(found))
            kind = self.random.randrange(4)
            if kind == 0:
                found[at] = self.random.randrange(256)
            elif kind == 1:
                del found[at : at + self.random.randint(1, 30)]
            elif kind == 2:
                found[at:at] = self.random.randbytes(self.random.randint(1, 10))
            else:
                found[at:at] = found[at : at + 40] * self.random.randint(1, 20)
        return bytes(found)

    def picture(self) -> bytes:
        """The bytes of a picture, or of something like one."""
        r = self.random
        mode = r.choice(("RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK"))
        kind = r.choice(("PNG", "PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "ICO"))
        size = r.choice(((64, 64), (64, 64), (1, 1), (3, 500), (640, 20), (9000, 9000), (1, 20_000)))
        if max(size) > 1000:
            mode, kind = "1", "PNG"  # many pixels in few bytes
        found = file_of(mode, kind, size, r.choice((0, 1)))
        choice = r.random()
        if choice < 0.1:
            return r.choice(bombs())
        if choice < 0.3:
            return self.damaged(found)
        if choice < 0.4:
            return found[: r.randrange(len(found) + 1)]
        if choice < 0.5:
            return r.choice(
                (b"", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.4", b"%!PS-Adobe-3.0", b"/etc/passwd")
            )
        return found

    def request(self, method: bytes, url: str, body: bytes, kind: bytes, more: bytes = b"") -> bytes:
        own = (
            b"" if b"content-length" in more or b"transfer-encoding" in more else b"content-length: %d\r\n" % len(body)
        )
        host = b"" if more.startswith(b"host") else b"host: localhost\r\n"
        target = url.encode("utf-8", "replace")
        return b"%s %s HTTP/1.1\r\n%scontent-type: %s\r\n%s%sconnection: close\r\n\r\n%s" % (
            *(method, target, host, kind, own, more, body),
        )

    def json_request(self, body: bytes) -> bytes:
        return self.request(b"POST", GENERATE, body, b"application/json")

    def multipart_request(self, url: str, parts: list[tuple[str, bytes, str | None]]) -> bytes:
        found = []
        for name, value, filename in parts:
            file = b"" if filename is None else b'; filename="%s"' % filename.encode()
            head = b'--b\r\ncontent-disposition: form-data; name="%s"%s' % (name.encode(), file)
            found.append(b"%s\r\n\r\n%s\r\n" % (head, value))
        return self.request(b"POST", url, b"".join(found)[:MOST] + b"--b--\r\n", b"multipart/form-data; boundary=b")


@functools.cache
def file_of(mode: str, kind: str, size: tuple[int, int], colour: int) -> bytes:
    """The file of a picture of one colour, in the format if that takes the mode, else a small PNG."""
    image = Image.new(mode, size, colour)
    data = io.BytesIO()
    try:
        image.save(data, kind)
    except (OSError, ValueError):
        data = io.BytesIO()
        image.convert("RGB").resize((64, 64)).save(data, "PNG")
    return data.getvalue()


@functools.cache
def bombs() -> tuple[bytes, ...]:
    """Files of few bytes that ask for much work or memory: scans, segments, chunks, texts and EXIF."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def segment(data: bytes) -> bytes:
        return struct.pack(">BBH", 0xFF, 0xE1, len(data) + 2) + data

    entries = b"".join(struct.pack("<HHII", i, 7, 60_000, 0) for i in range(4000))
    exif = b"II*\0\x08\0\0\0" + struct.pack("<H", 4000) + entries.ljust(60_000, b"\0")
    image, data = Image.new("L", (2000, 2000), 90), io.BytesIO()
    image.save(data, "JPEG", progressive=True)
    jpeg, png = data.getvalue(), file_of("RGB", "PNG", (64, 64), 1)
    scan, at = jpeg[jpeg.rindex(b"\xff\xda") : -2], png.index(b"IDAT") - 4
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**20 - 1)))
    return (
        *(jpeg[:-2] + scan * count + b"\xff\xd9" for count in (50, 10_000)),
        jpeg[:2] + segment(b"Exif\0\0ab") * 100_000 + jpeg[2:],
        jpeg[:2] + segment(b"Exif\0\0" + exif) + jpeg[2:],
        jpeg[:2] + b"\xff" * 2**20 + jpeg[2:],
        *(png[:at] + part + png[at:] for part in (text * 60, chunk(b"IDAT", b"") * 100_000, chunk(b"eXIf", exif))),
    )


def send(attack: Attack, port: int) -> int | None:
    """Send an attack, and return the status of the answer; None where the connection ended without one."""
    answer = b""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            for i, part in enumerate(attack.parts):
                time.sleep(attack.pause if i else 0.0)
                connection.sendall(part)
            if attack.leaves:
                return None
            while chunk := connection.recv(65536):
                answer += chunk
    except (ConnectionError, TimeoutError) as error:
        if isinstance(error, TimeoutError):
            raise TimeoutError(f"no answer to {attack.kind}: {attack.parts[0][:200]!r}") from None
    statuses = [line for line in answer.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
    return int(statuses[-1].split()[1]) if statuses else None
