"""Makes a batch job's process slow, for measurements: a seeded delay before each shard.

KANDINSKY_DELAY is the mean in seconds, KANDINSKY_SLOWNESS a factor. In a Ray cluster, `slow_down` is the hook that each
worker process runs when it starts; without one, this module is the command line with the hook:

    KANDINSKY_DELAY=2 KANDINSKY_SLOWNESS=10 python -m tpu_scripts.batch.slow_worker batch p.txt -o out -m tiny

With `--engine ray` it is the driver, whose workers get the hook.
"""

from __future__ import annotations

import os
import random
import sys
import time

HOOK = "tpu_scripts.batch.slow_worker.slow_down"


def delay_of(shard: int, mean: float) -> float:
    """Return the delay of a shard in seconds, from half to one and a half times the mean, the same in every process."""
    return mean * random.Random(shard).uniform(0.5, 1.5)


def slow_down() -> None:
    """Delay each shard of this process."""
    from kandinsky_jax.batch import runner

    generate = runner._Stages._generate_shard
    mean, factor = float(os.environ.get("KANDINSKY_DELAY", "0")), float(os.environ.get("KANDINSKY_SLOWNESS", "1"))

    def slow(stages, shard, stop, bar):
        time.sleep(delay_of(shard.number, mean) * factor)
        return generate(stages, shard, stop, bar)

    runner._Stages._generate_shard = slow


def main() -> None:
    """Run the command line with delays."""
    from kandinsky_jax.cli import main as command_line

    if "--address" in sys.argv:
        import ray

        address = sys.argv[sys.argv.index("--address") + 1]
        ray.init(address, runtime_env={"worker_process_setup_hook": HOOK}, logging_level="warning")
    else:
        slow_down()
    command_line()


if __name__ == "__main__":
    main()
