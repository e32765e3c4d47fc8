"""Batch jobs of several cold processes with one cache at a URL: each program is compiled once, by JAX's own count."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from kandinsky_jax.compilation.local_cache import are_whole
from tests.batch.store import object_store
from tests.conftest import note
from tpu_scripts.batch.shared_cache import Hosts, compiled, dead_holder, figures, finish


@pytest.fixture(scope="module", autouse=True)
def store():
    with object_store("bucket") as store:
        yield store


def stored(prefix: str) -> dict[str, bytes]:
    fs = fsspec.filesystem("gs")
    fs.invalidate_cache()
    return {path: fs.cat_file(path) for path in fs.find(f"bucket/{prefix}")}


def check_entries(folder: Path, prefix: str) -> None:
    """Check that nothing is half-written, here or in the store."""
    entries = {path.name: path.read_bytes() for path in folder.rglob("*-cache")}
    entries |= {path: data for path, data in stored(prefix).items() if path.endswith("-cache")}
    assert len(entries) > 20
    assert all(map(are_whole, entries.values()))


@pytest.mark.slow
def test_four_cold_processes_compile_each_program_once(tmp_path):
    job = Hosts(tmp_path, "gs://bucket/cold")
    hosts = [job.start(index, 4) for index in range(4)]
    finish(hosts)
    found = figures(hosts)
    assert found["programs"] > 20
    assert set(compiled(hosts).values()) == {1}
    assert found["compiled"] == found["programs"]
    assert found["asked_for"] == 4 * found["programs"]  # by JAX's count of requests
    assert len([path for path in stored("cold") if path.endswith("-cache")]) == found["programs"]
    assert not [path for path in stored("cold") if "/claims/" in path]
    assert len(list((tmp_path / "output").glob("*.tar"))) == 8
    check_entries(tmp_path, "cold")


@pytest.mark.campaign
def test_a_killed_holder_blocks_nobody_for_longer_than_the_bound(tmp_path):
    found = dead_holder(tmp_path, "gs://bucket/killed", 3, wait=120)
    assert note(found["seconds_after_the_kill"], "seconds after the kill") < 120
    assert found["compiled_more_than_once"] == 0
    assert found["compiled"] < found["programs"] == found["asked_for"] / 2  # the killed one had sent some
    paths = stored("killed")
    claimed = {path.rpartition("/")[2].rpartition(".")[0] for path in paths if "/claims/" in path}
    assert claimed <= {path.rpartition("/")[2].removesuffix("-cache") for path in paths}  # sent just before the kill
    check_entries(tmp_path, "killed")


DISTRIBUTED = """
import os, sys
import jax, jax.numpy as jnp
from kandinsky_jax import set_compilation_cache
from kandinsky_jax.parallel.process import this_process
index, address = int(sys.argv[1]), sys.argv[2]
os.environ["XDG_CACHE_HOME"] = f"{sys.argv[3]}/home-{index}"
this_process(index, 2, True, address)
set_compilation_cache(f"file://{sys.argv[3]}/shared")
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
print(float(jax.jit(lambda x: jnp.sin(x) * 3)(jnp.float32(0.5))), len(hits))
"""


@pytest.mark.slow
def test_hosts_of_a_slice_claim_nothing_and_process_0_sends(tmp_path):
    """As after `batch --distributed`, where JAX keeps programs of process 0 alone."""
    outputs = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        commands = [[sys.executable, "-c", DISTRIBUTED, str(i), address, str(tmp_path)] for i in range(2)]
        both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
        outputs.append([process.communicate(timeout=120)[0].split() for process in both])
    assert not list((tmp_path / "shared").rglob("claims/*"))
    assert list((tmp_path / "shared").rglob("*-cache"))
    assert len({values[0] for output in outputs for values in output}) == 1
    assert int(outputs[0][0][1]) == 0
    assert int(outputs[1][0][1]) > 0
