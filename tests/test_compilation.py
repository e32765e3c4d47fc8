"""The compilation cache: its folder, its configuration, and damaged entries."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zstandard

from kandinsky_jax import set_compilation_cache
from kandinsky_jax.compilation import cache, local_cache, use_compilation_cache

DIRECTORY, SECONDS = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture(autouse=True)
def undecided(monkeypatch, tmp_path):
    """As in a fresh process of a user without settings; the suite's own cache comes back afterwards."""
    before = {name: getattr(jax.config, name) for name in (DIRECTORY, SECONDS)}
    monkeypatch.setattr(cache, "_settled", False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("KANDINSKY_JAX_CACHE", raising=False)
    set_compilation_cache(None)
    jax.config.update(SECONDS, 1.0)
    monkeypatch.setattr(cache, "_settled", False)
    yield
    set_compilation_cache(None)
    for name, value in before.items():
        jax.config.update(name, value)


def directory() -> str | None:
    return getattr(jax.config, DIRECTORY)


def compile_something(scale: float) -> None:
    """A program that no other test compiles, and that JAX forgets at once."""
    jax.config.update(SECONDS, 0.0)
    assert jax.jit(lambda x: jnp.sin(x) * scale)(jnp.ones(3)).shape == (3,)


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-cache"))


def test_on_by_default_in_the_users_own_folder(tmp_path):
    use_compilation_cache()
    folder = tmp_path / "home" / "kandinsky_jax" / "compiled"
    assert directory() == str(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert getattr(jax.config, SECONDS) == 0.05
    compile_something(1.25)
    assert entries(folder)


def test_a_pipeline_turns_it_on_and_an_import_does_not(shapes_pipe, tmp_path):
    assert directory() is None
    type(shapes_pipe).from_pipe(shapes_pipe)
    assert directory() == str(tmp_path / "home" / "kandinsky_jax" / "compiled")


def test_the_environment_names_a_folder_or_none(monkeypatch, tmp_path):
    monkeypatch.setenv("KANDINSKY_JAX_CACHE", str(tmp_path / "mine"))
    use_compilation_cache()
    assert directory() == str(tmp_path / "mine")
    set_compilation_cache(None)
    monkeypatch.setattr(cache, "_settled", False)
    monkeypatch.setenv("KANDINSKY_JAX_CACHE", "off")
    use_compilation_cache()
    assert directory() is None
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("name", [DIRECTORY, "jax_enable_compilation_cache"])
def test_what_is_configured_in_jax_stays(monkeypatch, tmp_path, name):
    monkeypatch.setenv("KANDINSKY_JAX_CACHE", str(tmp_path / "mine"))
    value = {DIRECTORY: str(tmp_path / "theirs")}.get(name, False)
    try:
        jax.config.update(name, value)
        use_compilation_cache()
        assert getattr(jax.config, name) == value
        assert directory() != str(tmp_path / "mine")
        assert getattr(jax.config, SECONDS) == 1.0
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


def test_a_choice_in_python_comes_before_all(monkeypatch, tmp_path):
    monkeypatch.setenv("KANDINSKY_JAX_CACHE", "off")
    set_compilation_cache(tmp_path / "chosen")
    use_compilation_cache()
    assert directory() == str(tmp_path / "chosen")
    set_compilation_cache(None)
    monkeypatch.delenv("KANDINSKY_JAX_CACHE")
    use_compilation_cache()
    assert directory() is None


def test_a_change_of_folder_takes_effect_at_once(tmp_path):
    set_compilation_cache(tmp_path / "a")
    compile_something(2.5)
    set_compilation_cache(tmp_path / "b")
    compile_something(3.5)
    assert entries(tmp_path / "a")
    assert entries(tmp_path / "b")


def test_a_threshold_of_ones_own_stays(tmp_path):
    jax.config.update(SECONDS, 7.0)
    set_compilation_cache(tmp_path)
    assert getattr(jax.config, SECONDS) == 7.0


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="compiled programs are not cached: .*file"):
        set_compilation_cache(tmp_path / "file" / "folder")
    assert directory() is None
    compile_something(4.5)


@pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX")
def test_a_folder_that_others_can_fill_is_not_used(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.warns(UserWarning, match=r"others can write to .*shared"):
        set_compilation_cache(shared)
    assert directory() is None


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_not_used(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o755)
    os.chown(theirs, 12345, 12345)
    with pytest.warns(UserWarning, match=r"others can write to .*theirs"):
        set_compilation_cache(theirs)
    assert directory() is None


@pytest.mark.parametrize("damage", [b"", b"\x78\x9cnothing", "half"])
def test_a_damaged_entry_is_compiled_again_and_replaced(tmp_path, monkeypatch, damage):
    def run() -> float:
        return float(jax.jit(lambda x: jnp.cos(x) * 5.5)(jnp.float32(0)))

    monkeypatch.setattr(local_cache, "WRITING_SECONDS", 0.0)
    set_compilation_cache(tmp_path)
    jax.config.update(SECONDS, 0.0)
    run()
    whole = {path: path.read_bytes() for path in entries(tmp_path)}
    for path, data in whole.items():
        path.write_bytes(data[: len(data) // 2] if damage == "half" else damage)
    # While it is in use, JAX warns and goes on.
    jax.clear_caches()
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
        assert run() == 5.5
    # A later process removes it, and makes it anew.
    set_compilation_cache(tmp_path)
    assert not any(path.exists() for path in whole)
    jax.clear_caches()
    assert run() == 5.5
    assert any(path.exists() for path in whole)


def entry(name: object) -> str:
    """Return the name of a program's file, as JAX names it."""
    return f"{name}-{'0' * 64}-cache"


def written(path: Path, data: bytes, seconds_ago: float) -> None:
    path.write_bytes(data)
    os.utime(path, (time.time() - seconds_ago,) * 2)


@pytest.mark.parametrize("compress", [zlib.compress, zstandard.compress], ids=["zlib", "zstandard"])
def test_truncated_entries_are_removed_once_nobody_can_be_writing_them(tmp_path, compress):
    whole = compress(np.random.default_rng(0).bytes(300))
    written(tmp_path / entry("whole"), whole, 100)
    for length in range(len(whole)):
        written(tmp_path / entry(length), whole[:length], 100)
    written(tmp_path / entry("young"), whole[:50], 1)
    set_compilation_cache(tmp_path)
    assert [path.name for path in entries(tmp_path)] == [entry("whole"), entry("young")]
    written(tmp_path / entry("young"), whole[:50], local_cache.WRITING_SECONDS)  # a minute later
    set_compilation_cache(tmp_path)
    assert [path.name for path in entries(tmp_path)] == [entry("whole")]


def test_an_entry_that_vanishes_hides_no_other(tmp_path):
    (tmp_path / entry("a")).symlink_to(tmp_path / "nowhere")
    written(tmp_path / entry("b"), b"half", 100)
    set_compilation_cache(tmp_path)
    assert not (tmp_path / entry("b")).exists()


def test_what_jax_has_not_written_stays(tmp_path):
    """In a folder that holds other things too, such as the current one; a pipe is not waited for."""
    written(tmp_path / "important-cache", b"my notes", 1e6)
    os.mkfifo(tmp_path / entry("pipe"))
    os.utime(tmp_path / entry("pipe"), (0, 0))
    (tmp_path / entry("folder")).mkdir()
    set_compilation_cache(tmp_path)
    assert (tmp_path / "important-cache").read_bytes() == b"my notes"
    assert len(entries(tmp_path)) == 3


def test_no_name_is_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='needed is a folder, a URL or "off"'):
        set_compilation_cache("")
    assert not list(tmp_path.iterdir())


def test_the_folder_does_not_grow_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(local_cache, "MAX_CACHE_BYTES", 2500)
    for i in range(4):
        path = tmp_path / entry(i)
        data = zstandard.compress(b"x")
        path.write_bytes(data + b"\0" * (1000 - len(data)))
        os.utime(path, (i, i))
    (tmp_path / "checked").touch()
    set_compilation_cache(tmp_path)
    assert [path.name for path in entries(tmp_path)] == [entry(2), entry(3)]


@pytest.mark.slow
def test_nothing_is_printed_in_normal_use(tmp_path):
    """Not in the run that fills the cache, nor in the one that uses it."""
    program = """
import jax, jax.numpy as jnp
from kandinsky_jax import set_compilation_cache
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
set_compilation_cache("cache")
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
jax.jit(lambda x: jax.lax.dot(x, x) + jnp.sort(x))(jnp.ones((65, 65)))
print(len(hits))
"""
    printed = []
    for _ in range(2):
        command = [sys.executable, "-W", "error", "-c", program]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        printed.append(int(done.stdout))
    assert printed[0] == 0
    assert printed[1] > 0
