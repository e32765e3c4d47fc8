"""A Ray cluster of several nodes on this machine, on loopback, whose processes can be killed and stopped one by one.

Each node is a session of processes: a launcher, a raylet, its agents, and the workers. It ends with the process that
started it, whose end closes the launcher's standard input.

    with RayCluster(2) as cluster:
        driver = subprocess.Popen([..., "--address", cluster.address], env=cluster.environment())
        cluster.nodes[0].send(signal.SIGKILL, cluster.nodes[0].workers())

Unless told otherwise, the head has no CPU and so no worker of a job; drivers connect to it. Each cluster has an
authentication token of its own, so that none takes part in another one of the same machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
WORKER = "ray::RayWorker"  # how the title of a worker's process begins
STORE_BYTES = 80_000_000  # of a node's object store, the least that Ray accepts


class Process(NamedTuple):
    """A process of a node."""

    pid: int
    title: str
    parent: int
    state: str  # a letter, as in ps; T is stopped
    seconds: float  # since it began


class RayNode:
    """A node.

    Args:
        parameters: of Ray's `RayParams`.
        environment: of all its processes.
        log: of its launcher.
    """

    def __init__(self, parameters: dict[str, object], environment: dict[str, str], log: Path):
        with log.open("a") as file:
            self._launcher = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), json.dumps(parameters)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                start_new_session=True,
            )
        assert self._launcher.stdout is not None
        with self._launcher.stdout as printed:
            line = printed.readline()
        assert line, log.read_text()[-2000:]
        started = json.loads(line)
        self.address: str = started["address"]
        self.raylet: int = started["raylet"]

    @property
    def alive(self) -> bool:
        """Whether its raylet runs, or is stopped."""
        return any(process.pid == self.raylet for process in self.processes())

    def processes(self) -> list[Process]:
        """Return all processes that have not ended."""
        return _session(self._launcher.pid)

    def workers(self) -> list[Process]:
        """Return the processes that hold a worker of a job."""
        return [process for process in self.processes() if process.title.startswith(WORKER)]

    def send(self, number: int, processes: list[Process] | None = None) -> None:
        """Send a signal to some processes, or to all of them."""
        for process in self.processes() if processes is None else processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def leave(self, seconds: float = 60) -> None:
        """Let the node leave the cluster gracefully, and wait for it."""
        assert self._launcher.stdin is not None
        self._launcher.stdin.close()
        self._launcher.wait(seconds)
        self.kill()

    def kill(self) -> None:
        """SIGKILL to all processes at once, and wait until they are gone."""
        deadline = time.monotonic() + 30
        while processes := self.processes():
            assert time.monotonic() < deadline, processes
            self.send(signal.SIGKILL, processes)
            time.sleep(0.01)
        assert self._launcher.stdin is not None
        self._launcher.stdin.close()
        self._launcher.wait()


class RayCluster:
    """A head and the nodes that were added.

    Args:
        nodes: how many to begin with.
        environment: variables of all nodes and of `environment()`.
        head_cpus: of the head, which has a worker too if it has one.
        statistics: whether Ray gathers statistics about itself, as it does unless told otherwise.
    """

    def __init__(
        self,
        nodes: int = 0,
        environment: dict[str, str] | None = None,
        head_cpus: int = 0,
        statistics: bool = False,
    ):
        from kandinsky_jax.batch.engines.ray_connection import (  # not in launchers, which are many
            LOOPBACK,
            NO_STATISTICS,
        )

        own = LOOPBACK | ({} if statistics else NO_STATISTICS)
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
        self._variables = {"PYTHONPATH": str(ROOT)} | own | token | (environment or {})
        self._folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: names of sockets have at most 107 characters
        self._count, self._head_cpus = nodes, head_cpus
        self.nodes: list[RayNode] = []
        self._head: RayNode | None = None

    def __enter__(self) -> RayCluster:
        try:
            self._head = self._start({"num_cpus": self._head_cpus, "include_dashboard": False}, {})
            for _ in range(self._count):
                self.add()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def address(self) -> str:
        """HOST:PORT of the head."""
        assert self._head is not None
        return self._head.address

    def environment(self) -> dict[str, str]:
        """Return the variables of processes that connect to the cluster, beside those of this process."""
        return dict(os.environ) | self._variables

    def add(self, cpus: int = 1, environment: dict[str, str] | None = None) -> RayNode:
        """Start a node, with variables of its own."""
        parameters = {"gcs_address": self.address, "num_cpus": cpus, "include_log_monitor": False}
        node = self._start(parameters, environment or {})
        self.nodes.append(node)
        return node

    def _start(self, parameters: dict[str, object], environment: dict[str, str]) -> RayNode:
        common = {
            "node_ip_address": "127.0.0.1",
            "num_gpus": 0,
            "min_worker_port": 0,
            "max_worker_port": 0,
            "object_store_memory": STORE_BYTES,
            "temp_dir": str(self._folder),
            "dashboard_agent_listen_port": None,  # a free one
        }
        return RayNode(common | parameters, self.environment() | environment, self._folder / "launchers.txt")

    def seconds_of_services(self) -> float:
        """Return the processor seconds of all processes that hold no worker, so far."""
        nodes = [node for node in [self._head, *self.nodes] if node is not None]
        return sum(
            _processor_seconds(p.pid) for node in nodes for p in node.processes() if not p.title.startswith(WORKER)
        )

    def close(self) -> None:
        """Kill everything."""
        for node in [*self.nodes, self._head]:
            if node is not None:
                node.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


def _processor_seconds(pid: int) -> float:
    """Return the processor seconds of a process; 0 if it has ended."""
    try:
        fields = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _session(number: int) -> list[Process]:
    """Return the processes of a session, without those that only wait to be collected."""
    found = []
    up = float(Path("/proc/uptime").read_text().split()[0])
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            head, _, tail = (folder / "stat").read_text().rpartition(")")
            fields = tail.split()  # from the third of proc(5)'s on
            if int(fields[3]) == number and fields[0] not in "ZX":
                title = (folder / "cmdline").read_text().replace("\0", " ").strip() or head.partition("(")[2]
                seconds = up - int(fields[19]) / os.sysconf("SC_CLK_TCK")
                found.append(Process(int(folder.name), title, int(fields[1]), fields[0], seconds))
        except (OSError, UnicodeDecodeError):
            continue  # it has just ended
    return found


def _launch(parameters: dict[str, object]) -> None:
    """Be the launcher of a node: start it, and end it with its raylet or with the standard input."""
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    head = "gcs_address" not in parameters
    node = Node(RayParams(**parameters), head=head, shutdown_at_exit=False, spawn_reaper=False)
    [raylet] = node.all_processes["raylet"]
    print(json.dumps({"address": node.gcs_address, "raylet": raylet.process.pid}), flush=True)
    while not select.select([sys.stdin], [], [], 0.2)[0] and raylet.process.poll() is None:
        pass
    node.kill_all_processes(check_alive=False, allow_graceful=True, wait=True)


if __name__ == "__main__":
    _launch(json.loads(sys.argv[1]))
