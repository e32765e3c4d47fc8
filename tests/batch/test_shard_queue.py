"""Which worker generates which shard."""

from __future__ import annotations

import random

import pytest

from kandinsky_jax.batch.engines.shard_queue import SLOW, UNKNOWN_SECONDS, ShardQueue


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def queue_of(count: int, clock: Clock, *workers: str) -> ShardQueue:
    queue = ShardQueue(range(count), clock)
    for worker in workers:
        queue.join(worker)
    return queue


def test_shards_are_dealt_out_in_order_one_ahead(clock):
    queue = queue_of(10, clock, "a", "b")
    assert [queue.take(worker) for worker in "abab"] == [0, 1, 2, 3]
    assert queue.take("a") is None  # it generates 0 and reads 2
    assert queue.complete(0, "a")
    assert queue.take("a") == 4
    assert queue.left == 9


def test_nobody_holds_two_while_others_would_have_none(clock):
    queue = queue_of(4, clock, "a", "b", "c")
    assert [queue.take("a"), queue.take("a")] == [0, 1]
    assert queue.take("b") == 2
    assert queue.take("b") is None  # one is left, for c
    assert queue.take("c") == 3


def test_a_lost_worker_s_shards_come_next(clock):
    queue = queue_of(10, clock, "a", "b")
    assert [queue.take("a"), queue.take("a")] == [0, 1]
    queue.leave("a")
    assert {queue.take("b"), queue.take("b")} == {0, 1}
    assert queue.left == 10
    queue.leave("a")  # again, or never there
    queue.leave("x")


def test_a_lost_worker_s_shard_that_another_holds_is_not_dealt_out_again(clock):
    queue = queue_of(2, clock, "a", "b", "c")
    assert [queue.take("a"), queue.take("b")] == [0, 1]
    clock.now = 1.0
    queue.complete(1, "b")
    clock.now = 10.0
    assert queue.take("b") == 0
    queue.leave("a")
    assert queue.take("c") is None
    assert queue.complete(0, "b")
    assert queue.left == 0


def test_a_failed_shard_is_dealt_out_again(clock):
    queue = queue_of(2, clock, "a", "b")
    assert [queue.take("a"), queue.take("b")] == [0, 1]
    queue.failed(0, "a")
    assert queue.complete(1, "b")
    assert queue.take("b") == 0


def test_a_shard_that_has_failed_is_dealt_out_alone(clock):
    """An error is the answer for both shards that a worker holds, and one of them is innocent."""
    queue = queue_of(4, clock, "a")
    assert [queue.take("a"), queue.take("a")] == [0, 1]
    queue.failed(0, "a")
    queue.failed(1, "a")
    dealt = [queue.take("a"), queue.take("a"), queue.take("a")]
    assert dealt == [2, 3, None]
    queue.complete(2, "a")
    assert queue.take("a") is None
    queue.complete(3, "a")
    assert [queue.take("a"), queue.take("a")] == [0, None]
    queue.complete(0, "a")
    assert [queue.take("a"), queue.take("a")] == [1, None]


def test_nothing_is_dealt_out_to_the_holder_of_a_shard_that_has_failed(clock):
    queue = queue_of(3, clock, "a", "b")
    assert [queue.take("a"), queue.take("b")] == [0, 1]
    queue.failed(0, "a")
    assert queue.take("a") == 2
    queue.complete(2, "a")
    assert queue.take("a") == 0
    queue.leave("b")
    assert queue.take("a") is None
    queue.complete(0, "a")
    assert queue.take("a") == 1


def test_a_dropped_shard_is_dealt_out_no_more(clock):
    queue = queue_of(2, clock, "a", "b")
    assert [queue.take("a"), queue.take("b")] == [0, 1]
    queue.failed(0, "a")
    queue.drop(0)
    queue.drop(1)
    assert queue.left == 0
    assert queue.take("a") is None
    assert not queue.complete(1, "b")


def test_a_slow_shard_is_dealt_out_twice_at_the_end_and_the_first_wins(clock):
    queue = queue_of(5, clock, "fast", "slow")
    assert [queue.take("slow"), queue.take("fast")] == [0, 1]
    for shard in range(1, 5):
        clock.now += 2.0
        assert queue.complete(shard, "fast")
        taken = queue.take("fast")
        assert taken == (shard + 1 if shard < 4 else 0)  # at once: it has been held for four medians
    assert queue.repeated == 1
    assert queue.take("fast") is None
    clock.now += 2.0
    assert queue.complete(0, "fast")
    assert not queue.complete(0, "slow")  # too late
    assert queue.left == 0
    assert queue.take("slow") is None


def test_a_shard_is_not_dealt_out_twice_before_it_is_slow(clock):
    queue = queue_of(2, clock, "a", "b")
    assert [queue.take("a"), queue.take("b")] == [0, 1]
    clock.now = 10.0
    assert queue.complete(1, "b")  # the median is 10 s
    assert queue.take("b") is None
    clock.now = 10.0 * SLOW
    assert queue.take("b") is None
    clock.now = 10.0 * SLOW + 0.1
    assert queue.take("b") == 0
    queue.join("c")
    clock.now += 1.0
    assert queue.take("c") is None  # b has just begun
    clock.now += 10.0 * SLOW
    assert queue.take("c") == 0  # but b is as slow
    assert queue.repeated == 2


def test_a_failed_shard_comes_after_all_others(clock):
    queue = queue_of(4, clock, "a")
    assert queue.take("a") == 0
    queue.failed(0, "a")
    taken = []
    for _ in range(4):
        taken.append(queue.take("a"))
        queue.complete(taken[-1], "a")
    assert taken == [1, 2, 3, 0]


def test_slow_is_by_the_median_and_the_shard_held_longest_comes_first(clock):
    queue = queue_of(5, clock, "a", "b", "c", "d", "e")
    first = [queue.take("a")]
    clock.now = 2.0
    assert [*first, *map(queue.take, "bcde")] == [0, 1, 2, 3, 4]
    for now, shard, worker in ((4.0, 2, "c"), (4.0, 3, "d"), (20.0, 4, "e")):
        clock.now = now
        assert queue.complete(shard, worker)  # after 2, 2 and 18 s
    assert queue.take("c") == 0
    assert queue.take("d") == 1


def test_a_first_shard_that_never_ends_is_dealt_out_again(clock):
    queue = queue_of(1, clock, "a", "b")
    assert queue.take("a") == 0
    clock.now = UNKNOWN_SECONDS
    assert queue.take("b") is None
    clock.now += 1.0
    assert queue.take("b") == 0


def test_a_worker_that_hangs_gets_no_more(clock):
    queue = queue_of(6, clock, "a", "b")
    assert [queue.take("a"), queue.take("a")] == [0, 1]
    for shard in (2, 3, 4, 5, 0, 1):
        clock.now += 1.0
        assert queue.take("b") == shard
        clock.now += 1.0
        assert queue.complete(shard, "b")
        assert queue.take("a") is None
    assert queue.left == 0


@pytest.mark.parametrize("seed", range(30))
def test_every_shard_is_completed_whatever_happens(seed):
    """Workers of random speeds that come, die, fail and hang: each shard is said to be first complete exactly once."""
    rng, clock = random.Random(seed), Clock()
    queue, count = ShardQueue(range(40), clock), 40
    speed: dict[str, float] = {}
    work: dict[str, list[list[float]]] = {}  # by worker: [shard, seconds left]
    first: list[int] = []
    while queue.left:
        clock.now += 0.5
        assert clock.now < 50_000
        if rng.random() < 0.03 or not speed:
            name = f"w{len(work) + clock.now}"
            speed[name], work[name] = rng.choice([1.0, 1.0, 0.5, 0.1, 0.0]), []
            if not any(speed.values()):
                speed[name] = 1.0
            queue.join(name)
        if len(speed) > 1 and rng.random() < 0.02:
            lost = rng.choice([name for name in speed if sum(map(bool, speed.values())) > 1 or not speed[name]] or [""])
            if lost:
                queue.leave(lost)
                del speed[lost], work[lost]
        for name, rate in speed.items():
            while (shard := queue.take(name)) is not None:
                assert shard not in first, "a complete shard was dealt out"
                assert shard not in [held for held, _ in work[name]], "it has that one"
                work[name].append([shard, 2.0])
            if not work[name]:
                continue
            work[name][0][1] -= 0.5 * rate
            if work[name][0][1] <= 0:
                shard = int(work[name].pop(0)[0])
                if rng.random() < 0.05:
                    queue.failed(shard, name)
                elif queue.complete(shard, name):
                    first.append(shard)
    assert sorted(first) == list(range(count))
