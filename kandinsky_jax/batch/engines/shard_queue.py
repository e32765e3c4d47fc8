"""Which worker generates which shard: the rules of an engine, without the engine.

A worker that is free takes the next shard. While many are left it holds one more, which it reads meanwhile. A lost
worker's shards are dealt out again; shards that failed too, after all others, and each alone, since a fault is that of
one of the two that a worker holds. Towards the end slow ones are dealt out twice: "backup tasks" of MapReduce (Dean and
Ghemawat 2004, section 3.6). Whoever is first completes the shard; all have the same bytes.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable

HELD = 2  # shards of one worker: one that it generates, one that it reads
SLOW = 1.5  # medians after which a shard is dealt out a second time
UNKNOWN_SECONDS = 600.0  # the same before any shard is complete
RECENT = 200  # shards whose median counts


class ShardQueue:
    """Shards of a job that are not complete, and the workers that hold some.

    Args:
        shards: numbers, in the order in which they are dealt out.
        clock: seconds, from any beginning.
    """

    def __init__(self, shards: Iterable[int], clock: Callable[[], float] = time.monotonic):
        self._waiting = deque(shards)
        self._clock = clock
        self._left = set(self._waiting)
        self._holders: dict[int, dict[str, float]] = {}  # of shards that are not complete: workers, and since when
        self._load: dict[str, set[int]] = {}  # by worker: shards that it has not answered for
        self._suspects: set[int] = set()  # shards that have failed
        self._seconds: deque[float] = deque(maxlen=RECENT)  # from dealing out to completion
        self.repeated = 0  # shards dealt out while another worker held them

    @property
    def left(self) -> int:
        """Shards that are not complete."""
        return len(self._left)

    def join(self, worker: str) -> None:
        """Add a worker."""
        self._load[worker] = set()

    def leave(self, worker: str) -> None:
        """Remove a worker, if it is there; others get its shards."""
        for shard in self._load.pop(worker, ()):
            self._give_back(shard, worker)

    def take(self, worker: str) -> int | None:
        """Return the shard that a worker should begin; None while there is none for it."""
        load = self._load[worker]
        shard = None
        if self._waiting and (not load or self._may_hold_more(load)):
            shard = self._waiting.popleft()
        elif not load and (shard := self._slowest()) is not None:
            self.repeated += 1
        if shard is not None:
            self._holders.setdefault(shard, {})[worker] = self._clock()
            load.add(shard)
        return shard

    def _may_hold_more(self, load: set[int]) -> bool:
        enough_for_all = len(self._waiting) >= len(self._load)
        alone = self._waiting[0] in self._suspects or not load.isdisjoint(self._suspects)
        return len(load) < HELD and enough_for_all and not alone

    def complete(self, shard: int, worker: str) -> bool:
        """Record that a worker found or made a shard complete; return whether it was the first to say so."""
        self._load.get(worker, set()).discard(shard)
        if shard not in self._left:
            return False
        self._left.discard(shard)
        since = self._holders.pop(shard, {}).get(worker)
        if since is not None:
            self._seconds.append(self._clock() - since)
        return True

    def failed(self, shard: int, worker: str) -> None:
        """Record that a worker gave up a shard; it is dealt out again after all others."""
        self._load.get(worker, set()).discard(shard)
        self._suspects.add(shard)
        self._give_back(shard, worker)
        if shard in self._waiting:
            self._waiting.remove(shard)
            self._waiting.append(shard)

    def drop(self, shard: int) -> None:
        """Deal out a shard no more; it counts as complete."""
        self._left.discard(shard)
        self._holders.pop(shard, None)
        if shard in self._waiting:
            self._waiting.remove(shard)

    def _give_back(self, shard: int, worker: str) -> None:
        holders = self._holders.get(shard, {})
        holders.pop(worker, None)
        if shard in self._left and not holders and shard not in self._waiting:
            self._waiting.appendleft(shard)

    def _slowest(self) -> int | None:
        """Return the shard that has been held longest, if that is long; counted from when the last one got it."""
        limit = SLOW * statistics.median(self._seconds) if self._seconds else UNKNOWN_SECONDS
        now = self._clock()
        since = {
            shard: max(holders.values())
            for shard, holders in self._holders.items()
            if now - max(holders.values()) > limit
        }
        return min(since, key=lambda shard: since[shard], default=None)
