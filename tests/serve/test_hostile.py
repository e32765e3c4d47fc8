"""Whatever is sent to the server, it answers with an error of the client's, opens nothing, and goes on serving."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import note
from tests.serve.hostile import Attack, Made, send
from tests.serve.hostile_server import MAX_QUEUE

CLIENTS = 8
FIRST = 50  # requests before files and memory are watched
SLOW, CAMPAIGN = (500, 1), (10_000, 2)  # requests, and the seed
MAX_GROWTH = 64.0  # MiB, of the last third's median above that of the second; in the first one, malloc's arenas grow


@dataclass
class Seen:
    """What came of the requests."""

    report: dict[str, Any]
    statuses: Counter[tuple[str, int | None]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def attack_server(count: int, seed: int) -> Seen:
    """Send hostile requests to a server in a process of its own."""
    command = [sys.executable, "-m", "tests.serve.hostile_server", "--page"]
    root = Path(__file__).parents[2]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=root
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        seen = Seen({})
        try:
            port = int(process.stdout.readline())
            attacks = list(Made(seed).attacks(count))
            with ThreadPoolExecutor(CLIENTS) as pool:
                for attack in list(pool.map(lambda one: judged(one, port), attacks[:FIRST])):
                    add(seen, *attack)
                process.stdin.write("watch\n")
                process.stdin.flush()
                for attack in pool.map(lambda one: judged(one, port), attacks[FIRST:]):
                    add(seen, *attack)
            assert process.poll() is None, "the server has ended"
            process.stdin.close()
            seen.report = json.loads(process.stdout.read())
            assert process.wait(60) == 0
            log.seek(0)
            if "Traceback" in (logged := log.read()):
                seen.faults.append(f"the server's log: {logged[:3000]}")
        finally:
            process.kill()
    return seen


def judged(attack: Attack, port: int) -> tuple[Attack, int | None, str | None]:
    try:
        return attack, send(attack, port), None
    except (OSError, ValueError) as error:
        return attack, None, str(error)


def add(seen: Seen, attack: Attack, status: int | None, fault: str | None) -> None:
    """Judge an answer."""
    seen.statuses[attack.kind, status] += 1
    if fault is None and status is not None and status >= 500 and status not in (503, 504):
        fault = f"{status} for {attack.kind}"
    if fault is None and attack.valid and status not in (200, 429, 503):
        fault = f"{status} for a request that is in order"
    if fault is not None:
        seen.faults.append(f"{fault}: {attack.parts[0][:600]!r}")


def check(seen: Seen) -> None:
    assert not seen.faults, "\n".join(seen.faults[:5])
    report = seen.report
    assert report["strange"] == []
    assert report["most_queued"] <= MAX_QUEUE
    assert report["left"] == 0  # those of clients that have left are gone
    assert seen.statuses["valid", 200] > 0
    memory = report["memory"]
    third = max(1, len(memory) // 3)
    note(np.median(memory[-third:]) - memory[0], "MiB of growth since the first request")
    middle = memory[third : len(memory) - third] or memory
    assert note(np.median(memory[-third:]) - np.median(middle), "MiB of growth in the last third") < MAX_GROWTH


@pytest.mark.slow
def test_hostile_requests():
    check(attack_server(*SLOW))


@pytest.mark.campaign
def test_campaign_of_hostile_requests():
    seen = attack_server(*CAMPAIGN)
    for (kind, status), count in seen.statuses.items():
        note(count, f"{kind}, {status}")
    check(seen)
