"""Makespan of a batch job whose hosts have fixed parts, and of one whose hosts take shards one by one.

Hosts are simulated; the rules are those of the engine, `ShardQueue`, by a simulated clock. A host needs one unit of
time for a shard, or two where it is slow. Now and then it is taken away in the middle of a shard, which is lost, and
comes back after a wait. The makespan is divided by the ideal: all shards over the sum of the hosts' rates, as if no
host ever went away. Each figure is the median of several seeds.

    python tpu_scripts/batch/shard_simulation.py --hosts 64 --shards 3907
"""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kandinsky_jax.batch.engines.shard_queue import ShardQueue


class Case(NamedTuple):
    """What disturbs a job."""

    name: str
    slow: int = 0  # hosts at half the rate
    interrupted: float = 0.0  # fraction of the shards that hosts begin
    wait: float = 0.0  # until an interrupted host is back


CASES = (
    Case("all hosts alike"),
    Case("one host at half speed", slow=1),
    Case("1 % of shards interrupted, a wait of 40", interrupted=0.01, wait=40.0),
    Case("both", slow=1, interrupted=0.01, wait=40.0),
)


def fixed_parts(shards: int, rates: Sequence[float], case: Case, seed: int) -> float:
    """Return when the last of the hosts has completed its part of the shards."""
    drawn = random.Random(seed)
    ends = []
    for host, rate in enumerate(rates):
        now, left = 0.0, len(range(host, shards, len(rates)))
        while left:
            if drawn.random() < case.interrupted:
                now += 0.5 / rate + case.wait
            else:
                now += 1 / rate
                left -= 1
        ends.append(now)
    return max(ends)


class OneByOne:
    """Hosts that take shards from a queue.

    Args:
        shards: number of shards.
        rates: shards per unit of time of each host.
        case: how often a host is interrupted, and for how long.
        seed: of the interruptions.
    """

    def __init__(self, shards: int, rates: Sequence[float], case: Case, seed: int):
        self._rates, self._case = rates, case
        self._drawn = random.Random(seed)
        self._now = 0.0
        self._queue = ShardQueue(range(shards), clock=lambda: self._now)
        self._held: dict[int, list[int]] = {}  # by host that is there: its shards, the first of which it generates
        self._events: list[tuple[float, int, str]] = []  # when, which host, and what it then does

    def makespan(self) -> float:
        """Return when the last shard is complete."""
        for host in range(len(self._rates)):
            self._join(host)
        self._deal_out()
        while self._queue.left:
            self._now, host, event = heapq.heappop(self._events)
            if event == "completes":
                self._queue.complete(self._held[host].pop(0), str(host))
                self._begin(host)
            elif event == "leaves":
                del self._held[host]
                self._queue.leave(str(host))
                heapq.heappush(self._events, (self._now + self._case.wait, host, "returns"))
            else:
                self._join(host)
            self._deal_out()
        return self._now

    def _join(self, host: int) -> None:
        self._held[host] = []
        self._queue.join(str(host))

    def _deal_out(self) -> None:
        for host, held in self._held.items():
            idle = not held
            while (shard := self._queue.take(str(host))) is not None:
                held.append(shard)
            if idle:
                self._begin(host)

    def _begin(self, host: int) -> None:
        """Generate the first shard that a host holds, if there is one."""
        if not self._held[host]:
            return
        interrupted = self._drawn.random() < self._case.interrupted
        seconds = (0.5 if interrupted else 1.0) / self._rates[host]
        event = "leaves" if interrupted else "completes"
        heapq.heappush(self._events, (self._now + seconds, host, event))


def one_by_one(shards: int, rates: Sequence[float], case: Case, seed: int) -> float:
    """Return when the last shard is complete, where hosts take shards from a queue."""
    return OneByOne(shards, rates, case, seed).makespan()


def multiple_of_ideal(
    simulate: Callable[[int, Sequence[float], Case, int], float], hosts: int, shards: int, case: Case, seeds: int
) -> float:
    """Return the median of the makespans over the ideal one."""
    rates = [0.5 if host < case.slow else 1.0 for host in range(hosts)]
    ideal = shards / sum(rates)
    return statistics.median(simulate(shards, rates, case, seed) / ideal for seed in range(seeds))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=64)
    parser.add_argument("--shards", type=int, default=3907, help="a million rows in shards of 256")
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    print(f"makespan of {given.shards} shards on {given.hosts} hosts, in multiples of the ideal\n")
    print("| | fixed parts | one by one |\n|---|---|---|")
    for case in CASES:
        fixed, stolen = (
            multiple_of_ideal(simulate, given.hosts, given.shards, case, given.seeds)
            for simulate in (fixed_parts, one_by_one)
        )
        print(f"| {case.name} | {fixed:.2f} | {stolen:.2f} |")


if __name__ == "__main__":
    main()
