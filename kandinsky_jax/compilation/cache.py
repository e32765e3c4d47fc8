"""Which cache of compiled programs this process uses: a folder, a URL that hosts share, or none."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from kandinsky_jax.common.errors import quote
from kandinsky_jax.common.reading import ReadError, of_file
from kandinsky_jax.common.remote import check_slashes, is_url
from kandinsky_jax.common.storage import user_cache
from kandinsky_jax.compilation.local_cache import CacheWarning, private, tidy

CACHE, OFF = "KANDINSKY_JAX_CACHE", "off"  # the environment's variable: a folder, a URL, or "off"
WAIT = "KANDINSKY_JAX_CACHE_WAIT"  # seconds that a program is waited for which another host compiles
WAIT_SECONDS, MAX_WAIT_SECONDS = 900.0, 1e6  # if the environment does not say; twelve days
MIN_SECONDS = 0.05  # programs that compile faster are not cached in a folder
JAX_MIN_SECONDS = 1.0  # JAX's default, which means that the user has not set it

_settled = False  # whether the cache was configured


def set_compilation_cache(folder: str | os.PathLike[str] | None) -> None:
    """Cache compiled programs, for this process and later ones, overriding earlier settings.

    Args:
        folder: created if missing. Its content is run, so it must be yours alone; a folder that you
            share with people whom you trust is for JAX's own JAX_COMPILATION_CACHE_DIR. An fsspec URL, such as
            `gs://BUCKET/compiled`, is shared by hosts: one compiles a program, the others wait for it, at most as
            long as the environment's KANDINSKY_JAX_CACHE_WAIT says (900 seconds); whoever may write there runs code
            on all of them. None turns the cache off.

    A folder that cannot be used is a warning, and then nothing is kept. A URL that cannot be used is a warning, and
    then programs are kept in a local folder alone.

    Raises:
        ValueError: for an empty text, a URL of an unknown protocol, and a wait that is no number of seconds.
    """
    if folder == "":  # as a path it would be the current folder
        raise ValueError("the cache of compiled programs is ''; needed is a folder, a URL or \"off\"")
    try:
        check_slashes(os.fspath(folder or ""))
    except ReadError as error:
        raise ValueError(f"the cache of compiled programs: {of_file(folder or '', error)}") from None
    global _settled
    _settled = True
    shared = folder if isinstance(folder, str) and is_url(folder) else None
    wait = _wait_seconds() if shared else 0.0
    usable = None
    if folder is not None:
        try:
            usable = private(_folder_of(shared) if shared else Path(folder).expanduser().absolute())
            tidy(usable)
        except (OSError, RuntimeError) as error:  # without a home, `expanduser` has a RuntimeError
            warnings.warn(f"compiled programs are not cached: {error}", CacheWarning, stacklevel=2)
    if shared and usable is not None:
        from kandinsky_jax.compilation import shared_cache  # it needs fsspec, which takes long to import

        shared_cache.share(usable, shared, wait)
    jax.config.update("jax_compilation_cache_dir", None if usable is None else str(usable))
    compilation_cache.reset_cache()  # another one may be in use already
    if usable is not None and _configured("jax_persistent_cache_min_compile_time_secs") in (
        JAX_MIN_SECONDS,
        MIN_SECONDS,
    ):
        # With a URL all are, however fast: others wait until the one that compiles a program has cached it.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0 if shared else MIN_SECONDS)


def use_compilation_cache() -> None:
    """Turn the cache on, unless something has been said about it; called when a pipeline is made.

    `KANDINSKY_JAX_CACHE` is a folder, a URL or "off"; unset, it is a folder in the user's cache directory. What is
    configured in JAX stays as it is.
    """
    global _settled
    if _settled:
        return
    _settled = True
    home = user_cache()
    choice = os.environ.get(CACHE) or (OFF if home is None else str(home / "compiled"))
    ours = _configured("jax_compilation_cache_dir") is None and _configured("jax_enable_compilation_cache")
    if choice.lower() != OFF and ours:
        try:
            set_compilation_cache(choice)
        except ValueError as error:
            warnings.warn(f"compiled programs are not cached: {error}", CacheWarning, stacklevel=2)


def _folder_of(url: str) -> Path:
    """Return the local folder of what is shared at a URL."""

    home = user_cache()
    if home is None:
        raise RuntimeError("there is no home folder; set XDG_CACHE_HOME")
    return home / "shared" / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]


def _wait_seconds() -> float:
    text = os.environ.get(WAIT)
    try:
        seconds = float(text) if text else WAIT_SECONDS
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= MAX_WAIT_SECONDS:
        raise ValueError(f"{WAIT} must be a number of seconds from 0 to {MAX_WAIT_SECONDS:.0f}, got {quote(text)}")
    return seconds


def _configured(name: str) -> object:
    return getattr(jax.config, name)
