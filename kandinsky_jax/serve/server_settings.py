"""What the operator of a server decides: where it listens, who may use it, and how much."""

from __future__ import annotations

from dataclasses import dataclass

from kandinsky_jax.serve.requests import ImageRequest, RequestError

Size = tuple[int, int]  # height, width in pixels
LEAST_KEY = 16  # characters, so that nobody finds it by trying


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of a server.

    Args:
        host, port: where it listens; only this machine unless told otherwise.
        api_key: what clients of API and page have to know, of at least 16 printable ASCII characters; None for none.
        sizes: (height, width) of the pictures that are served, compiled before the server is ready; empty for the
            model's own.
        any_size: whether other sizes are served too, and compiled when first asked for.
        batch_sizes: padded numbers of images per device that share a step; each is a program.
        prior_batch_sizes: the same of the prior; empty for powers of two between the decoder's least and largest.
        max_body: bytes of a request.
        max_pixels: of one generated picture; those of a request's uploaded pictures may have 16 times as many together.
        max_images: pictures of a request.
        max_steps: of decoder and prior.
        max_queue: requests that wait or run.
        time_limit: seconds of a request, waiting included.
        log_prompts: whether log lines have the prompt.
        body_time: seconds in which the body of a request has to arrive.
        grace: seconds in which a server that stops finishes what runs.
        hosts: further names under which it is reached; "*" for any.
        origins: of other sites, such as https://example.org, whose pages may use it.
        behind_proxy: whether a proxy in front says in X-Forwarded-Host and -Proto how clients reach it; these headers
            are ignored otherwise.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    api_key: str | None = None
    sizes: tuple[Size, ...] = ()
    any_size: bool = False
    batch_sizes: tuple[int, ...] = (1, 8)
    prior_batch_sizes: tuple[int, ...] = ()
    max_body: int = 32 * 2**20
    max_pixels: int = 2**21
    max_images: int = 10
    max_steps: int = 200
    max_queue: int = 64
    time_limit: float = 600.0
    log_prompts: bool = False
    body_time: float = 60.0
    grace: float = 30.0
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    behind_proxy: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for settings that no server can have."""
        for name in ("time_limit", "body_time", "grace"):
            seconds = getattr(self, name)
            if not seconds >= 0:  # nan is neither less nor more
                raise ValueError(f"{name} is {seconds}; needed are seconds, 0 or more")
        if self.api_key is not None:
            _check_key(self.api_key)

    @property
    def max_upload_pixels(self) -> int:
        """Pixels of the pictures of a request."""
        return 16 * self.max_pixels

    def check(self, request: ImageRequest) -> None:
        """Raise RequestError for a complete request that exceeds the limits."""
        assert request.height is not None
        assert request.width is not None
        for name, most in (
            ("num_images", self.max_images),
            ("num_inference_steps", self.max_steps),
            ("prior_num_inference_steps", self.max_steps),
        ):
            given = getattr(request, name)
            if isinstance(given, int) and given > most:
                raise RequestError(f"{name} is {given}; this server takes at most {most}", name)
        if request.height * request.width > self.max_pixels:
            raise RequestError(
                f"height x width is {request.height} x {request.width}; this server takes at most {self.max_pixels:,} "
                "pixels",
                "size",
            )


def _check_key(key: str) -> None:
    """Raise ValueError for a key that no client can send, or that is too short."""
    needed = "; such as openssl rand -hex 16 makes"
    if not key.strip():
        raise ValueError("the API key is empty; give one, or none")
    if not (key.isascii() and key.isprintable()) or key != key.strip():
        raise ValueError(
            "the API key has a character that no client can send in a header; needed are printable ASCII characters in "
            f"one line{needed}"
        )
    if len(key) < LEAST_KEY:
        raise ValueError(f"the API key has {len(key)} characters; needed are {LEAST_KEY} or more{needed}")
