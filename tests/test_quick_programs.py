"""A quick program runs first, the good one takes its place; batch jobs and training wait for the good one."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import wait

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kandinsky_jax import set_compilation_cache
from kandinsky_jax.compilation import CompilationWarning, compiling_ahead, only_good_programs, program, quick
from kandinsky_jax.compilation.quick import QUICK_PROGRAMS, quick_programs


@pytest.fixture(autouse=True)
def _quick_at_once(monkeypatch):
    """Quick programs on a CPU, and no moment to wait for the good one."""
    monkeypatch.setenv(QUICK_PROGRAMS, "on")
    monkeypatch.setattr(quick, "GRACE_SECONDS", 0.0)
    yield
    wait(list(quick._pending))  # their entries would come into a later test's cache


def make(rounds: int = 40):
    """A program of its own, which nothing has compiled before."""

    @program(static_argnames="rounds")
    def function(x, rounds):
        for _ in range(rounds):
            x = jnp.sin(x @ x) + x
        return x

    return lambda x: function(x, rounds), function


def wait_for_good(function):
    deadline = time.monotonic() + 60
    while not all(job.done() for job in function.good._jobs.values()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_good_program_takes_the_quick_ones_place():
    call, function = make()
    x = jnp.eye(16) * 0.1
    first = call(x)
    assert function.quick._cache_size() == 1
    wait_for_good(function)
    second = call(x)
    assert function.jitted._cache_size() == 1
    np.testing.assert_allclose(first, second, rtol=1e-6)
    call(jnp.eye(8))  # of another shape: quick again
    assert function.quick._cache_size() == 2
    assert len(function.good._jobs) == 2


def test_only_good_programs_within_the_block_in_all_threads():
    call, function = make()
    with only_good_programs():
        thread = threading.Thread(target=lambda: call(jnp.eye(16)))
        thread.start()
        thread.join()
    assert (function.quick._cache_size(), function.jitted._cache_size()) == (0, 1)
    call(jnp.eye(12))
    assert function.quick._cache_size() == 1


def test_a_good_program_from_the_cache_needs_no_quick_one(monkeypatch, tmp_path):
    monkeypatch.setattr(quick, "GRACE_SECONDS", 60.0)
    before = jax.config.jax_compilation_cache_dir
    try:
        set_compilation_cache(tmp_path)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        call, function = make(80)
        with only_good_programs():
            call(jnp.eye(16))
        jax.clear_caches()
        assert len([*tmp_path.glob("jit_function-*-cache")]) == 1
        again, function = make(80)
        again(jnp.eye(16))
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
        set_compilation_cache(before)
    assert (function.quick._cache_size(), function.jitted._cache_size()) == (0, 1)
    assert len([*tmp_path.glob("jit_function-*-cache")]) == 1


def test_a_good_program_that_fails_is_one_warning():
    call, function = make()
    function.jitted = jax.jit(
        function.__wrapped__, static_argnames="rounds", compiler_options={"xla_no_such_option": True}
    )
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        expected = call(jnp.eye(16))
        wait_for_good(function)
        for _ in range(2):
            assert np.array_equal(call(jnp.eye(16)), expected)
    [warning] = warned
    assert warning.category is CompilationWarning
    assert re.search(r"stays as it was compiled quickly.*xla_no_such_option", str(warning.message))


def test_within_a_transformation_it_is_part_of_the_whole():
    call, function = make()
    x = jnp.eye(16) * 0.1
    with only_good_programs():
        expected = call(x)
    assert np.allclose(jax.jit(call)(x), expected)
    assert np.isfinite(jax.grad(lambda x: call(x).sum())(x)).all()
    assert jax.vmap(call)(x[None]).shape == (1, 16, 16)
    assert not function.good._jobs


def test_faulty_arguments_say_what_is_wrong():
    call, function = make()
    with pytest.raises(TypeError, match="dot_general requires contracting dimensions"):
        call(jnp.zeros((2, 3)))
    assert not function.good._jobs


def test_compiling_ahead_compiles_what_will_run_first():
    call, function = make()
    with compiling_ahead(lambda: call(np.eye(16, dtype=np.float32))):
        pass
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    wait_for_good(function)
    compiled.clear()
    call(np.eye(16, dtype=np.float32))
    assert not [name for name in compiled if "backend_compile" in name]


@pytest.mark.parametrize(("choice", "expected"), [("on", True), ("ON", True), ("off", False), ("", False)])
def test_the_environment_decides(monkeypatch, choice, expected):
    monkeypatch.setenv(QUICK_PROGRAMS, choice)
    assert quick_programs() == expected  # on a CPU


def test_the_environment_is_checked(monkeypatch):
    monkeypatch.setenv(QUICK_PROGRAMS, "yes")
    with pytest.raises(ValueError, match='KANDINSKY_JAX_QUICK_PROGRAMS must be "on", "off" or unset, got \'yes\''):
        quick_programs()


SLOW = """
import signal, sys, threading, time
import jax, jax.numpy as jnp
from kandinsky_jax.compilation import program, quick, set_compilation_cache

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs the tests in the background
set_compilation_cache(None)
quick.GRACE_SECONDS = 0.0

@program()
def function(x):
    for _ in range(500):
        x = jnp.sin(x) * jnp.cos(x[::-1]) + jnp.sort(x)
    return x

lowered = function.jitted.lower(jnp.ones(8))
assert not function.good.ready("slow", lambda: lowered)
time.sleep(0.2)
assert not function.good.ready("slow", lambda: lowered), "compiled too fast for this test"
print("begun", flush=True)
"""
SLOWER = SLOW.replace("range(500)", "range(1500)")  # ten seconds, for tests that end it before
WAITS = "the good programs are still being compiled, for later runs; Ctrl-C ends without them\n"


def test_a_script_waits_for_good_programs_at_its_end():
    done = subprocess.run([sys.executable, "-c", SLOW], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "begun\n", WAITS)


def test_control_c_ends_the_wait():
    with subprocess.Popen([sys.executable, "-c", SLOWER], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr.readline() == WAITS
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr.read() == ""


REFUSED = """
def refused(self):
    raise RuntimeError("can't start new thread")

threading.Thread.start = refused
"""


def test_a_thread_that_cannot_be_started_leaves_the_quick_program():
    """As where a limit of threads is reached: nothing waits for it at the end."""
    code = SLOW.replace("assert not function", f"{REFUSED}assert not function", 1)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "begun\n"), done.stderr
    assert "since the good one failed: can't start new thread" in done.stderr
    assert WAITS not in done.stderr


def test_the_command_does_not_wait():
    ends = f"{SLOWER}\nbegan = time.monotonic()\nquick.leave(3)\n"
    done = subprocess.run([sys.executable, "-c", ends], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "begun\n", "")
