"""A batch job's driver on Ray whose workers have faults: `python -m tests.batch.ray_faults batch ... --address X`.

KANDINSKY_FAULTS is a JSON object: `load` and, by number of a shard, `generate` are names in `KINDS` of errors to raise,
`delay` seconds before each shard, `patience` seconds without an answer after which the driver uses more hosts.
"""

from __future__ import annotations

import json
import os
import sys
import time


class Panic(BaseException):
    """As extensions in Rust raise."""


class Unprintable(RuntimeError):
    """An error whose message is one."""

    def __str__(self) -> str:
        raise OSError("no message")


KINDS = {"value": ValueError("poison"), "panic": Panic("boom"), "unprintable": Unprintable()}


def faults() -> dict:
    """Return what is to go wrong."""
    return json.loads(os.environ.get("KANDINSKY_FAULTS", "{}"))


def install() -> None:
    """Put the faults into this process; Ray calls it in each worker."""
    from kandinsky_jax.batch import runner
    from kandinsky_jax.batch.engines import ray_worker

    found = faults()
    generate, load = runner._Stages._generate_shard, ray_worker.load_pipeline

    def faulty_generate(stages, shard, stop, bar):
        time.sleep(found.get("delay", 0))
        if kind := found.get("generate", {}).get(str(shard.number)):
            raise KINDS[kind]
        return generate(stages, shard, stop, bar)

    def faulty_load(job):
        if kind := found.get("load"):
            raise KINDS[kind]
        return load(job)

    runner._Stages._generate_shard, ray_worker.load_pipeline = faulty_generate, faulty_load


def main() -> None:
    """Run the command line, whose workers have the faults."""
    import ray

    from kandinsky_jax.batch.engines import ray_engine
    from kandinsky_jax.cli import main as command_line

    ray_engine.PATIENCE_SECONDS = faults().get("patience", ray_engine.PATIENCE_SECONDS)
    address = sys.argv[sys.argv.index("--address") + 1]
    hook = {"worker_process_setup_hook": f"{install.__module__}.install"}
    ray.init(address, runtime_env=hook, logging_level="warning")
    command_line()


if __name__ == "__main__":
    sys.modules["tests.batch.ray_faults"] = sys.modules["__main__"]
    install.__module__ = "tests.batch.ray_faults"
    main()
