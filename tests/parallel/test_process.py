"""Which of several processes this one is, by its options and its launcher."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kandinsky_jax.parallel.hosts import Hosts
from kandinsky_jax.parallel.process import COORDINATOR_VARIABLES, VARIABLES, Process, initialize, this_process

ROOT = Path(__file__).parents[2]
LAUNCHERS = [name for pair in (*VARIABLES, ("TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES")) for name in pair]
LAUNCHERS += COORDINATOR_VARIABLES


@pytest.fixture
def bare(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_launcher_says_which_process_this_is(bare):
    assert this_process() == Process(0, 1)
    bare.setenv("TPU_WORKER_ID", "1")
    bare.setenv("TPU_WORKER_HOSTNAMES", "a,b,c")
    assert this_process() == Process(1, 3)
    bare.setenv("SLURM_PROCID", "2")
    bare.setenv("SLURM_NTASKS", "4")
    assert this_process() == Process(2, 4)
    bare.setenv("JOB_COMPLETION_INDEX", "5")
    with pytest.raises(ValueError, match="JOB_COMPLETION_INDEX=5, but not how many; set JOB_COMPLETIONS"):
        this_process()
    bare.setenv("JOB_COMPLETIONS", "8")
    assert this_process() == Process(5, 8)
    assert this_process(1, 2) == Process(1, 2)
    for numbers in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="there is no process"):
            this_process(*numbers)
    with pytest.raises(ValueError, match="or neither"):
        this_process(1)


@pytest.mark.parametrize("coordinator", ["host", ":8476", "host:", "host:port", "10.0.0.1", "http://host:8476"])
def test_a_coordinator_has_a_host_and_a_port(bare, coordinator):
    with pytest.raises(ValueError, match="the coordinator must be HOST:PORT, such as"):
        initialize(0, 2, coordinator)
    bare.setenv(COORDINATOR_VARIABLES[0], coordinator)
    with pytest.raises(ValueError, match="the coordinator must be HOST:PORT, such as"):
        initialize(0, 2)


def test_the_numbers_are_checked_before_anything_starts(bare):
    for numbers, says in (((2, 2), "there is no process 2 of 2"), ((1, None), "or neither")):
        with pytest.raises(ValueError, match=says):
            initialize(*numbers, "127.0.0.1:1")
    bare.setenv("SLURM_PROCID", "4")
    bare.setenv("SLURM_NTASKS", "4")
    with pytest.raises(ValueError, match="SLURM_PROCID and SLURM_NTASKS: there is no process 4 of 4"):
        initialize(coordinator="127.0.0.1:1")


def test_a_port_in_use_is_named(bare, unused_port):
    with socket.socket() as other:
        other.bind(("", unused_port))
        other.listen()
        with pytest.raises(ValueError, match=rf"process 0 cannot listen at port {unused_port} \(.*in use\)"):
            initialize(0, 2, f"127.0.0.1:{unused_port}")
    with pytest.raises(ValueError, match="process 0 cannot listen at port 99999"):
        initialize(0, 2, "127.0.0.1:99999")


def test_one_process_hears_itself():
    hosts = Hosts.here()
    assert hosts == Hosts(0, 1, ("",))
    assert hosts.gather([3, 4]).tolist() == [[3, 4]]
    assert hosts.exchange("ä") == ["ä"]
    assert hosts.from_first(lambda: {"a": 1}, ()) == {"a": 1}
    assert Hosts(1, 3, ("a", "b", "c")).describe(2) == "process 2 of 3 (c)"


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def train(*options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kandinsky_jax.cli", "train", "prior", "missing.toml", *options]
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHERS} | variables
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "variables", "says"),
    [
        (["--distributed"], {}, "No launcher was recognised"),
        (["--process", "1"], {}, "or neither"),
        (["--coordinator", "here"], {}, "the coordinator must be HOST:PORT"),
        (["--coordinator", "127.0.0.1:0"], {}, "No launcher was recognised"),
        (["--distributed"], {"KANDINSKY_JAX_COORDINATOR": "x:y"}, "the coordinator must be HOST:PORT"),
        (["--distributed"], {"KANDINSKY_JAX_PROCESS": "0", "KANDINSKY_JAX_PROCESSES": "2"}, "No launcher was recog"),
    ],
)
def test_a_wrong_start_is_one_line(options, variables, says):
    done = train(*options, **variables)
    assert done.returncode == 1
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert says in line


JOINING = """
import sys, time
from kandinsky_jax.parallel.liveness import HostLost, end_now, joined
try:
    with joined(int(sys.argv[1]), int(sys.argv[3]), sys.argv[2]) as hosts:
        print("joined", flush=True)
        time.sleep(60)
        hosts.gather([0])
except (HostLost, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    end_now()
"""


def joining(number: int, count: int, port: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", JOINING, str(number), f"127.0.0.1:{port}", str(count)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_processes_that_were_told_of_different_numbers(unused_port):
    first, second = joining(0, 2, unused_port), joining(1, 3, unused_port)
    said = second.communicate(timeout=100)[1]
    first.kill()
    first.communicate()
    assert second.returncode == 1
    assert "error: this process was told of 3 processes, and process 0 of 2\n" in said


@pytest.mark.slow
def test_a_second_process_of_one_number_is_named(unused_port):
    """A second one with the number 1, when both are there; Ctrl-C ends it while it waits.

    The first one with the number 1 is stopped until process 0 has said so, as on a busy machine.
    """
    processes = [joining(number, 2, unused_port) for number in (0, 1)]
    for process in processes:
        while "joined" not in process.stdout.readline():
            assert process.poll() is None
    processes[1].send_signal(signal.SIGSTOP)
    late = joining(1, 2, unused_port)
    said = ["", ""]
    while "--process" not in said[0]:
        said[0] += processes[0].stderr.readline()
        assert processes[0].poll() is None
    processes[1].send_signal(signal.SIGCONT)
    said[1] = processes[1].communicate(timeout=100)[1]
    processes[0].communicate(timeout=100)
    late.send_signal(signal.SIGINT)  # it waits for another run to start, up to JAX's five minutes
    late.communicate(timeout=10)
    assert late.returncode == -signal.SIGINT
    assert [process.returncode for process in processes] == [1, 1]
    assert all("two processes were started with the same --process" in text for text in said), said


@pytest.mark.slow
@pytest.mark.parametrize("variables", [("SLURM_PROCID", "SLURM_NTASKS"), ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS")])
def test_hosts_find_each_other_by_their_launcher_and_say_what_is_wrong(variables, unused_port):
    """Two processes, the second of which has no configuration: both end, and the first one names the second."""
    number, total = variables
    common = {total: "2", "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{unused_port}"}
    code = (
        "from kandinsky_jax.parallel.liveness import HostLost, end_now, joined\n"
        "import sys\n"
        "try:\n"
        "    with joined() as hosts:\n"
        "        assert hosts.exchange(str(hosts.index)) == ['0', '1']\n"
        "        assert hosts.from_first(lambda: hosts.index, ()) == 0\n"
        "        try:\n"
        "            hosts.from_first(lambda: [][1], (IndexError,))\n"
        "        except IndexError as error:\n"
        "            assert 'out of range' in str(error)\n"
        "        if hosts.index == 1:\n"
        "            raise KeyError('the data')\n"
        "        hosts.gather([0])\n"
        "except (HostLost, KeyError) as error:\n"
        "    print(type(error).__name__, error, flush=True)\n"
        "    end_now(3)\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | common | {number: str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [3, 3]
    assert said[1].splitlines()[-1] == "KeyError 'the data'"
    assert "HostLost process 1 of 2 (" in said[0]
    assert "has ended: KeyError: 'the data'" in said[0]
