"""Compiled programs shared at a URL: one host compiles, the others wait, and nothing that fails there stops a job."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.lru_cache import LRUCache

from kandinsky_jax import set_compilation_cache
from kandinsky_jax.compilation import CacheWarning, cache, claims, compiling_ahead, use_compilation_cache
from kandinsky_jax.compilation.local_cache import are_whole
from kandinsky_jax.compilation.shared_cache import SharedCache, Store, processor
from tests.batch.store import object_store
from tests.test_compilation import undecided  # noqa: F401  # restores the suite's own cache

KEY, OTHER = "jit_f-0123", "jit_g-4567"
ENTRY = zlib.compress(np.random.default_rng(0).bytes(500))
URLS = ("file", "gs")


@pytest.fixture(scope="module")
def store():
    with object_store("bucket") as store:
        yield store


@pytest.fixture(params=URLS)
def url(request, tmp_path):
    if request.param == "file":
        return f"file://{tmp_path}/shared"
    request.getfixturevalue("store").heal()
    return f"gs://bucket/{tmp_path.name}"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(claims, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(claims, "STALE_SECONDS", 0.6)
    monkeypatch.setattr(claims, "FIRST_POLL", 0.02)


class Host(SharedCache):
    """A host's cache, as JAX uses it; its calls run in a thread of their own if wanted."""

    def __init__(self, folder: Path, url: str, wait: float = 30.0):
        folder.mkdir()
        super().__init__(LRUCache(str(folder), max_size=-1), folder, Store(url, wait))
        self.folder = folder
        self._thread = ThreadPoolExecutor(1)

    def later(self, key: str = KEY):
        return self._thread.submit(self.get, key)

    def local(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.iterdir()}

    def end(self) -> None:
        """Wait for what is sent in the background."""
        self._store._senders.shutdown()

    def die(self) -> None:
        """As after SIGKILL: no heartbeat any more."""
        self._store._claims._closed.set()


@pytest.fixture
def hosts(tmp_path, url):
    made = [Host(tmp_path / f"host-{i}", url) for i in range(3)]
    yield made
    for host in made:
        host.end()
        if host._store._claims is not None:
            host._store._claims.close()


def objects(url: str) -> dict[str, bytes]:
    """Files at a URL, without the folder of the processor."""
    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    found = {}
    for path in fs.find(root):
        with contextlib.suppress(FileNotFoundError):  # a heartbeat that has just ended
            found[path.removeprefix(f"{root}/cpu-{processor()}/")] = fs.cat_file(path)
    return found


def soon(true) -> bool:
    deadline = time.monotonic() + 20
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    return true()


def test_one_compiles_and_the_others_wait(hosts, url):
    first, second, third = hosts
    assert first.get(KEY) is None
    waiting = [second.later(), third.later()]
    time.sleep(1.0)  # longer than a host without a heartbeat would be waited for
    assert not any(one.done() for one in waiting)
    first.put(KEY, ENTRY)
    assert [one.result(20) for one in waiting] == [ENTRY, ENTRY]
    first.end()
    assert first.local() == second.local() == {f"{KEY}-cache": ENTRY}
    assert soon(lambda: set(objects(url)) == {f"{KEY}-cache"})
    assert second.get(KEY) == ENTRY


def test_what_was_sent_since_the_start_is_found_by_the_host_that_claims_it(hosts, url):
    first, second, _ = hosts
    assert second.get(OTHER) is None  # it has looked what there is
    assert first.get(KEY) is None
    first.put(KEY, ENTRY)
    first.end()
    assert second.get(KEY) == ENTRY
    second.put(OTHER, ENTRY)
    second.end()
    assert soon(lambda: not any(name.startswith("claims/") for name in objects(url)))


def test_a_dead_holder_is_replaced_by_one(hosts, url):
    first, *others = hosts
    assert first.get(KEY) is None
    assert soon(lambda: any(name.startswith("alive/") for name in objects(url)))
    first.die()
    waiting = {host: host.later() for host in others}
    assert soon(lambda: any(one.done() for one in waiting.values()))
    [taker] = [host for host, one in waiting.items() if one.done()]
    assert waiting[taker].result() is None
    [other] = set(others) - {taker}
    time.sleep(1.0)
    assert not waiting[other].done()
    taker.put(KEY, ENTRY)
    assert waiting[other].result(20) == ENTRY
    taker.end()
    assert soon(lambda: set(objects(url)) == {f"{KEY}-cache"})


def plant(url: str, files: dict[str, bytes]) -> None:
    """Write files as another host would."""
    fs, root = fsspec.core.url_to_fs(f"{url}/cpu-{processor()}")
    for name, data in files.items():
        fs.makedirs(f"{root}/{name.partition('/')[0]}", exist_ok=True)
        fs.pipe_file(f"{root}/{name}", data)


@pytest.mark.slow
def test_all_claims_of_a_dead_holder_are_waited_for_once(hosts, url):
    keys = [f"jit_f-{number}" for number in range(20)]
    token = "0123456789abcdef" * 2
    plant(url, {f"claims/{key}.0": token.encode() for key in keys} | {f"alive/{token}": b"7"})
    began = time.monotonic()
    for key in keys:
        assert hosts[0].get(key) is None
        hosts[0].put(key, ENTRY)
    assert claims.STALE_SECONDS <= time.monotonic() - began < 0.7 * len(keys) * claims.STALE_SECONDS
    hosts[0].end()
    assert soon(lambda: set(objects(url)) == {f"{key}-cache" for key in keys})


def test_a_holder_that_was_only_suspended_is_waited_for_again(hosts, url):
    token = "0123456789abcdef" * 2
    plant(url, {f"claims/{KEY}.0": token.encode(), f"claims/{OTHER}.0": token.encode(), f"alive/{token}": b"7"})
    assert hosts[0].later().result(20) is None  # in a thread that goes on compiling it
    plant(url, {f"alive/{token}": b"8"})
    began = time.monotonic()
    assert hosts[0].get(OTHER) is None
    assert time.monotonic() - began >= claims.STALE_SECONDS


def test_nobody_waits_longer_than_the_bound(tmp_path, url):
    first, second = Host(tmp_path / "a", url), Host(tmp_path / "b", url, wait=0.7)
    assert first.get(KEY) is None
    began = time.monotonic()
    assert second.get(KEY) is None
    assert 0.7 <= time.monotonic() - began < 5
    second.put(KEY, ENTRY)
    second.end()
    assert objects(url)[f"{KEY}-cache"] == ENTRY
    first.die()


def test_what_a_thread_could_not_compile_blocks_nobody(hosts, url):
    first, second, third = hosts
    assert first.get(KEY) is None
    waiting = second.later()
    time.sleep(0.3)
    assert not waiting.done()
    assert first.get(OTHER) is None  # so it has finished the other one
    assert waiting.result(20) is None
    assert third.later(KEY).result(20) is None


def test_what_a_thread_that_has_ended_claimed_blocks_nobody(hosts):
    first, second, _ = hosts
    thread = threading.Thread(target=first.get, args=(KEY,))
    thread.start()
    thread.join()
    assert second.later().result(20) is None
    assert soon(lambda: not first._store._claims._held)


def test_two_threads_of_a_host_do_not_wait_for_each_other(hosts):
    first, *_ = hosts
    assert first.get(KEY) is None
    began = time.monotonic()
    assert first.later().result(20) is None
    assert time.monotonic() - began < claims.STALE_SECONDS


@pytest.mark.parametrize("damage", [b"", b"\x78\x9cnothing", ENTRY[:100], ENTRY[:-1]])
def test_a_damaged_entry_counts_as_absent_and_is_replaced(hosts, url, damage):
    first, second, _ = hosts
    fs, root = fsspec.core.url_to_fs(url)
    fs.makedirs(f"{root}/cpu-{processor()}", exist_ok=True)
    fs.pipe_file(f"{root}/cpu-{processor()}/{KEY}-cache", damage)
    assert first.get(KEY) is None
    first.put(KEY, ENTRY)
    first.end()
    assert objects(url)[f"{KEY}-cache"] == ENTRY
    assert second.get(KEY) == ENTRY


def test_an_entry_that_jax_could_not_use_is_replaced_everywhere(hosts, url):
    first, second, third = hosts
    useless = zlib.compress(b"no program")
    assert first.get(KEY) is None
    first.put(KEY, useless)
    first.end()
    assert second.get(KEY) == useless
    second.put(KEY, ENTRY)  # JAX has compiled it in spite of the answer
    second.end()
    assert second.get(KEY) == objects(url)[f"{KEY}-cache"] == third.get(KEY) == ENTRY


def test_names_do_not_lead_out_of_the_folders(hosts, url, tmp_path):
    first, second, _ = hosts
    outside = "../../outside"
    assert first.get(outside) is None
    assert not objects(url)
    (tmp_path / "secret").write_text("1")
    fs, root = fsspec.core.url_to_fs(url)
    folder = f"{root}/cpu-{processor()}"
    fs.makedirs(f"{folder}/claims", exist_ok=True)
    fs.makedirs(f"{folder}/alive", exist_ok=True)
    fs.pipe_file(f"{folder}/claims/{KEY}.0", b"../../../secret")
    assert second.get(KEY) is None  # a holder without a heartbeat
    second.put(KEY, ENTRY)
    second.end()
    assert (tmp_path / "secret").exists()
    assert {name for name in objects(url) if not name.startswith("alive/")} == {f"{KEY}-cache"}


@pytest.mark.parametrize("fault", ["503", "dropped"])
def test_a_store_that_fails_is_one_warning(store, tmp_path, fault):
    store.heal().fault = lambda method, path: fault
    first = Host(tmp_path / "host", "gs://bucket/failing")
    with pytest.warns(CacheWarning, match=r"not shared at gs://bucket/failing.* a local folder alone") as caught:
        assert first.get(KEY) is None
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first.put(KEY, ENTRY)
        assert first.get(KEY) == ENTRY
        assert first.get(OTHER) is None
        first.end()
    store.heal()


def test_a_bucket_that_does_not_exist_is_a_warning(store, tmp_path):
    store.heal()
    first = Host(tmp_path / "host", "gs://nowhere/compiled")
    with pytest.warns(CacheWarning, match=r"not shared at gs://nowhere/compiled.*bucket"):
        assert first.get(KEY) is None


def test_a_store_that_does_not_answer_is_a_warning(store, tmp_path, monkeypatch):
    monkeypatch.setattr("kandinsky_jax.compilation.shared_cache.REQUEST_SECONDS", 0.5)
    answered = threading.Event()
    store.heal().fault = lambda method, path: answered.wait(20) and None
    first = Host(tmp_path / "host", "gs://bucket/silent")
    began = time.monotonic()
    with pytest.warns(CacheWarning, match="no answer within"):
        assert first.get(KEY) is None
    assert time.monotonic() - began < 10
    answered.set()
    store.heal()


def test_temporary_faults_change_nothing(store, tmp_path):
    url = "gs://bucket/faults"
    store.heal().random_faults(5, 0.2)
    first, second = Host(tmp_path / "a", url), Host(tmp_path / "b", url)
    keys = [f"jit_h-{i}" for i in range(8)]
    for key in keys:
        assert first.get(key) is None
        first.put(key, ENTRY)
    first.end()
    assert [second.get(key) for key in keys] == [ENTRY] * len(keys)
    assert sum(store.faults.values()) > 3
    store.heal()
    assert {name for name in objects(url) if "-cache" in name} == {f"{key}-cache" for key in keys}


@pytest.mark.parametrize("folder", ["shared", f"shared/cpu-{processor()}"])
def test_a_folder_that_others_can_fill_is_not_used(tmp_path, folder):
    (tmp_path / folder).mkdir(mode=0o700, parents=True)
    (tmp_path / folder).chmod(0o777)
    first = Host(tmp_path / "host", f"file://{tmp_path}/shared")
    with pytest.warns(CacheWarning, match="others can write to"):
        assert first.get(KEY) is None


# As JAX uses it ---------------------------------------------------------------------------------------------------


def run(scale: float) -> float:
    jax.clear_caches()
    return float(jax.jit(lambda x: jnp.sin(x) * scale)(jnp.float32(0.5)))


def hits() -> list[str]:
    found: list[str] = []
    jax.monitoring.register_event_listener(
        lambda name, **_: found.append(name) if name.endswith("cache_hits") else None
    )
    return found


def test_jax_finds_in_another_folder_what_was_compiled(monkeypatch, tmp_path):
    url = f"file://{tmp_path}/shared"
    found, results = hits(), []
    for home in ("a", "b"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / home))
        set_compilation_cache(url)
        results.append(run(7.25))
        before = len(found)
        assert (before > 0) == (home == "b")
        assert soon(lambda: any("-cache" in name for name in objects(url)))
    assert results[0] == results[1]
    assert soon(lambda: not any(name.startswith("claims/") for name in objects(url)))
    local = [path for home in ("a", "b") for path in (tmp_path / home).rglob("*-cache")]
    assert len(local) >= 2
    assert all(are_whole(path.read_bytes()) for path in local)


def test_a_program_that_cannot_be_compiled_is_claimed_no_longer(tmp_path):
    url = f"file://{tmp_path}/shared"
    set_compilation_cache(url)
    failing = jax.jit(jax.ffi.ffi_call("there_is_no_such_function", jax.ShapeDtypeStruct((3,), jnp.float32)))
    with pytest.raises(Exception, match="there_is_no_such_function"):
        failing(jnp.ones(3))
    assert soon(lambda: not any(name.startswith("claims/") for name in objects(url)))


def test_compiling_ahead_hides_no_warning_of_the_cache():
    def call() -> None:
        warnings.warn("programs are not shared", CacheWarning, stacklevel=1)

    with pytest.warns(CacheWarning, match="not shared"), compiling_ahead(call):
        pass


def test_the_environment_names_a_url(monkeypatch, tmp_path):
    monkeypatch.setenv("KANDINSKY_JAX_CACHE", f"file://{tmp_path}/shared")
    use_compilation_cache()
    folder = Path(jax.config.jax_compilation_cache_dir)
    assert folder.parent == tmp_path / "home" / "kandinsky_jax" / "shared"
    assert run(8.25) == pytest.approx(8.25 * np.sin(0.5))
    assert soon(lambda: objects(f"file://{tmp_path}/shared"))


def test_an_unknown_protocol_is_an_error_and_in_the_environment_a_warning(monkeypatch):
    with pytest.raises(ValueError, match=r"^the cache of compiled programs: gcs3://bucket/compiled cannot be used: "):
        set_compilation_cache("gcs3://bucket/compiled")
    with pytest.raises(ValueError, match=r"^the cache of compiled programs: gs:/bucket has one slash after gs:"):
        set_compilation_cache("gs:/bucket")
    monkeypatch.setattr(cache, "_settled", False)
    monkeypatch.setenv("KANDINSKY_JAX_CACHE", "gcs3://bucket/compiled")
    with pytest.warns(CacheWarning, match="gcs3"):
        use_compilation_cache()


def test_a_missing_package_is_a_warning(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "gs", raising=False)
    with pytest.warns(CacheWarning, match=r"not shared at gs://bucket.*gcsfs") as caught:
        set_compilation_cache("gs://bucket/compiled?sig=TOPSECRET")
    assert "TOPSECRET" not in "".join(str(warning.message) for warning in caught)
    assert Path(jax.config.jax_compilation_cache_dir).is_dir()


@pytest.mark.parametrize("seconds", ["soon", "-1", "inf", "nan", "1e12"])
def test_a_wait_that_is_no_number_of_seconds_is_an_error(monkeypatch, seconds):
    monkeypatch.setenv("KANDINSKY_JAX_CACHE_WAIT", seconds)
    with pytest.raises(ValueError, match="KANDINSKY_JAX_CACHE_WAIT"):
        set_compilation_cache("gs://bucket/compiled")
