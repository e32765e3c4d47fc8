"""Compiled programs that hosts share at a URL: one compiles a program, the others wait for it.

JAX asks its cache for a program (`get`) before it compiles one, and hands it over (`put`) afterwards. `SharedCache`
stands between JAX and its cache in a local folder: a program that is not there is copied from the store, or else
claimed (`kandinsky_jax.compilation.claims`), compiled and sent. The store holds `KEY-cache`, as JAX names its files,
`claims/` and `alive/`; programs for CPUs, which use the instructions of the processor, lie in a folder `cpu-...` for
each kind of processor. Whatever goes wrong with the store is one warning, and then the local folder alone is used.

Processes of one `jax.distributed` cluster compile programs of their mesh together, and JAX has only process 0 keep
them. Waiting could block all there, so such processes look for programs and send them, and claim none. This includes
hosts of a slice whose `jax.distributed` has been shut down, as in batch jobs.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import platform
import re
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
from fsspec import get_filesystem_class
from fsspec.core import split_protocol
from fsspec.implementations.local import LocalFileSystem

from kandinsky_jax.common import atomic
from kandinsky_jax.common.errors import shorten
from kandinsky_jax.common.files import Files, open_files
from kandinsky_jax.common.remote import connect
from kandinsky_jax.compilation.claims import REQUEST_SECONDS, Claims, Outcome, within
from kandinsky_jax.compilation.local_cache import COMPILED, ENDING, CacheWarning, are_whole, private

KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")  # keys of JAX that can be names of files as they are
SENDERS = 4  # threads
SLOWEST_BYTES = 1 << 20  # a second, of an entry that is sent
AUTOTUNING = "xla_gpu_per_fusion_autotune_cache_dir"  # JAX's default of what XLA keeps in the local folder


class LocalCache(Protocol):
    """JAX's cache in a folder (`jax._src.compilation_cache_interface.CacheInterface`)."""

    def get(self, key: str) -> bytes | None:
        """Return an entry, None if there is none."""

    def put(self, key: str, value: bytes) -> None:
        """Keep an entry."""


class SharedCache:
    """JAX's cache in a local folder, and entries of other hosts at a URL.

    Args:
        base: JAX's cache in `folder`.
        folder: the local folder.
        store: the entries at the URL.
    """

    def __init__(self, base: LocalCache, folder: Path, store: Store):
        self._base, self._path, self._store = base, folder, store
        self._served: set[str] = set()  # keys of entries that JAX got; where it compiles still, they were of no use

    def get(self, key: str) -> bytes | None:
        """Return an entry; None if this process is to compile the program."""
        self._store.give_up_claims()  # of this thread, which has compiled what it claimed before
        found = self._base.get(key)
        if found is None or not are_whole(found):
            found = self._store.fetch(key)
            if found is not None:
                self._keep(key, found)
        if found is not None:
            self._served.add(key)
        return found

    def put(self, key: str, value: bytes) -> None:
        """Keep an entry that this process has compiled, and send it in the background."""
        self._store.send(key, value, replace=key in self._served)
        self._keep(key, value)

    def _keep(self, key: str, value: bytes) -> None:
        if KEY.fullmatch(key) and getattr(jax.config, "jax_compilation_cache_max_size", -1) == -1:
            # JAX writes in place, and a process may be killed meanwhile. What was there did not serve.
            atomic.fill_file(self._path / f"{key}{ENDING}", lambda file: file.write(value))
        else:
            self._base.put(key, value)


class Store:
    """Entries at a URL, until something goes wrong there.

    Args:
        url: of the folder.
        wait: seconds to wait, at most, for a program that another host compiles.
    """

    def __init__(self, url: str, wait: float):
        self._url, self._wait = url, wait
        self._lock = threading.Lock()
        self._files: Files | None = None  # once it is connected
        self._claims: Claims | None = None
        self._known: set[str] = set()  # entries that were there at the start
        self._truncated: set[str] = set()  # keys of entries
        self._usable = True
        self._senders = ThreadPoolExecutor(SENDERS, "cache-sender")  # waited for at the end of the process

    def fetch(self, key: str) -> bytes | None:
        """Return an entry, after another host has compiled it; None if this process is to compile the program."""
        if not KEY.fullmatch(key):
            return None
        return self._tried(lambda: self._fetch(key), None)

    def send(self, key: str, value: bytes, *, replace: bool = False) -> None:
        """Send an entry in the background, and give its claim back.

        Args:
            replace: an entry that may be there.
        """
        if self._claims is not None and KEY.fullmatch(key):
            self._claims.keep(key)
            self._later(lambda: self._send(key, value, replace))

    def give_up_claims(self) -> None:
        """Give back, in the background, what this thread has claimed and not sent: it has failed, or is not cached."""
        if self._claims is not None:
            for key in self._claims.of_this_thread():
                self._claims.keep(key)
                self._later(functools.partial(self._claims.release, key))

    def _later(self, request: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the process is ending
            self._senders.submit(self._tried, request, None)

    def _tried(self, request: Callable[[], Any], otherwise: Any) -> Any:
        """Return the result of requests, or after an error, and ever after, `otherwise`."""
        if not self._usable:
            return otherwise
        try:
            return request()
        except Exception as error:  # file systems raise many kinds
            with self._lock:
                first, self._usable = self._usable, False
            if first:
                reason = shorten(str(error) or type(error).__name__, 300)
                where = shorten(self._url, 240)
                text = f"compiled programs are not shared at {where}, and kept in a local folder alone: {reason}"
                warnings.warn(text, CacheWarning, stacklevel=2)
            return otherwise

    # Requests -----------------------------------------------------------------------------------------------------

    def _fetch(self, key: str) -> bytes | None:
        claims = self._connect()
        if claims is None:
            return self._read(key)
        deadline = time.monotonic() + self._wait
        if f"{key}{ENDING}" in self._known and (found := self._read(key)) is not None:
            return found
        dead: list[str] = []
        while not claims.acquire(key, len(dead), dead):
            outcome, token = claims.wait(key, len(dead), deadline)
            if outcome is Outcome.DEAD:
                dead = [*dead, token]
            elif outcome is Outcome.RELEASED:
                return self._read(key)  # None: its holder could not compile it, or does not cache it
            else:
                return None
        found = self._read(key)  # the last holder may have sent it just before this claim
        if found is not None:
            claims.release(key)
        return found

    def _read(self, key: str) -> bytes | None:
        assert self._files is not None
        try:
            seconds = max(REQUEST_SECONDS, self._wait)
            found = within(seconds, lambda: self._files.read(f"{key}{ENDING}"))  # type: ignore[union-attr]
        except FileNotFoundError:
            return None
        if are_whole(found):
            return found
        self._truncated.add(key)
        return None

    def _send(self, key: str, value: bytes, replace: bool) -> None:
        assert self._files is not None
        assert self._claims is not None
        write = functools.partial(self._files.write, f"{key}{ENDING}", lambda file: file.write(value))
        try:
            seconds = REQUEST_SECONDS + len(value) / SLOWEST_BYTES  # the end of the process may wait for that
            within(seconds, lambda: write(overwrite=replace or key in self._truncated))
        finally:
            self._claims.release(key)

    def _connect(self) -> Claims | None:
        """Connect at the first program; return the claims, None for processes that compile together."""
        with self._lock:
            if self._files is None:
                files = within(REQUEST_SECONDS, self._open)
                self._known = set(within(REQUEST_SECONDS, lambda: files.sizes("")))
                self._claims, self._files = Claims(files), files
        return None if jax.process_count() > 1 else self._claims

    def _open(self) -> Files:
        folder = f"cpu-{processor()}" if jax.default_backend() == "cpu" else ""
        url = f"{self._url.rstrip('/')}/{folder}".rstrip("/")
        fs, root = connect(self._url)
        if isinstance(fs, LocalFileSystem):
            private(Path(root))
            private(Path(root, folder))
        files = open_files(url)
        files.sweep(("", "claims", "alive"))
        return files


def processor() -> str:
    """Return a digest of the instructions that this host's processor has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [f"flags: {platform.processor()}"]
    flags = next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")
    text = " ".join([platform.system(), platform.machine(), *sorted(flags.split())])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# JAX's hook -------------------------------------------------------------------------------------------------------

_shared: dict[str, Store] = {}  # by the local folder


def share(folder: Path, url: str, wait: float) -> None:
    """Let JAX's cache in a local folder share its entries at a URL, from the next time that it is made.

    Args:
        wait: seconds to wait, at most, for a program that another host compiles.
    Raises:
        ValueError: for an unknown protocol.
    """
    _shared.clear()
    try:
        get_filesystem_class(split_protocol(url)[0])
        _install()
    except ValueError as error:
        raise ValueError(f"the cache of compiled programs: {shorten(url, 240)} cannot be used: {error}") from None
    except ImportError as error:  # a package for this protocol is missing, or JAX has changed
        text = f"compiled programs are not shared at {shorten(url, 240)}, and kept in a local folder alone: {error}"
        warnings.warn(text, CacheWarning, stacklevel=3)
        return
    kept = getattr(jax.config, "jax_persistent_cache_enable_xla_caches", None)
    if kept == AUTOTUNING and _keys_contain_the_folder():
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    _shared[str(folder)] = Store(url, wait)


def _keys_contain_the_folder() -> bool:
    """Return whether keys depend on the local folder, because XLA keeps results of autotuning for GPUs in it."""
    from jax._src import cache_key

    return f"--{AUTOTUNING}" not in getattr(cache_key, "xla_flags_to_exclude_from_cache_key", ())


@functools.cache
def _install() -> None:
    """Wrap the function by which JAX makes its cache, as JAX wraps it itself in order to check entries."""
    from jax._src import compilation_cache

    original = getattr(compilation_cache, "get_file_cache", None)
    if original is None:
        raise ImportError(f"JAX {jax.__version__} makes its cache in another way")

    @functools.wraps(original)
    def get_file_cache(path: str) -> tuple[Any, str] | None:
        made = original(path)
        store = _shared.get(str(path))
        return made if made is None or store is None else (SharedCache(made[0], Path(path), store), made[1])

    def compiled(event: str, *_: object, **__: object) -> None:
        if event == COMPILED:
            for store in tuple(_shared.values()):
                store.give_up_claims()

    compilation_cache.get_file_cache = get_file_cache
    jax.monitoring.register_event_duration_secs_listener(compiled)
