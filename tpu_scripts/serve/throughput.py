"""Continuous batching beside a static batch and beside one request at a time: pictures a second, and latencies.

    python tpu_scripts/serve/throughput.py --model tiny --clients 8 --rounds 3

Clients ask for a picture, wait for it, and ask for the next one. The sides take turns, each with prompts of its own.

- static: the pipeline with as many prompts as there are clients, all with the same settings.
- same: that many clients of the service, all with these settings.
- one: a single client of the service.
- mixed: the clients ask for any number of steps around these, solver, and guidance; a static batch cannot.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
import statistics
import threading
import time
from pathlib import Path
from typing import Any

from kandinsky_jax.serve.requests import ImageRequest
from kandinsky_jax.serve.served_model import ServedModel
from kandinsky_jax.serve.server_settings import ServerSettings
from kandinsky_jax.serve.service import Service

SIDES = ("static", "same", "one", "mixed")
_numbers = itertools.count()


@dataclasses.dataclass
class Side:
    """What was measured of a side: pictures a second of each round, and seconds of each request."""

    rates: list[float] = dataclasses.field(default_factory=list)
    latencies: list[float] = dataclasses.field(default_factory=list)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--requests", type=int, default=6, help="of each client in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="a Markdown file")
    given = parser.parse_args()

    model = ServedModel.load(given.model, modes=["generate"])
    service = Service(model, ServerSettings(batch_sizes=(1, given.clients), max_queue=2 * given.clients))
    service.start()
    while not service.state.ready:
        time.sleep(0.1)
    sides = {name: Side() for name in SIDES}
    for round_ in range(given.rounds + 1):
        for name, side in sides.items():
            found = _run(name, model, service, given)
            if round_:  # the first one compiles and warms up
                side.rates.append(found.rates[0])
                side.latencies += found.latencies
    service.stop()
    text = _table(sides, given)
    print(text)
    if given.output is not None:
        given.output.write_text(text + "\n")


def _run(name: str, model: ServedModel, service: Service, given: argparse.Namespace) -> Side:
    """Run one side for a round."""
    began, latencies = time.perf_counter(), []
    if name == "static":
        for _ in range(given.requests):
            start = time.perf_counter()
            _static(model, given)
            latencies += [time.perf_counter() - start] * given.clients
    else:
        clients = 1 if name == "one" else given.clients
        threads = [
            threading.Thread(target=_client, args=(service, given, name == "mixed", latencies)) for _ in range(clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return Side([len(latencies) / (time.perf_counter() - began)], latencies)


def _static(model: ServedModel, given: argparse.Namespace) -> None:
    pipe, own = model.pipe("generate"), model.settings("generate")
    pipe.set_progress_bar_config(disable=True)
    height, width = model.native_size("generate")
    prompts = [f"heart number {next(_numbers)}" for _ in range(given.clients)]
    settings: dict[str, Any] = own.arguments() | {"num_inference_steps": given.steps, "height": height, "width": width}
    pipe(prompts, generator=next(_numbers), **settings)


def _client(service: Service, given: argparse.Namespace, mixed: bool, latencies: list[float]) -> None:
    """Ask for pictures one after the other."""
    rng = random.Random(next(_numbers))
    for _ in range(given.requests):
        number = next(_numbers)
        request = ImageRequest(prompt=f"heart number {number}", seed=number, num_inference_steps=given.steps)
        if mixed:
            request = dataclasses.replace(
                request,
                num_inference_steps=rng.randrange(given.steps // 2, given.steps * 3 // 2),
                guidance_scale=rng.choice((2.0, 3.0, 5.0)),
                scheduler=rng.choice((None, "dpm++2m", "euler-a", "unipc")),
            )
        start = time.perf_counter()
        service.submit(request).result()
        latencies.append(time.perf_counter() - start)


def _table(sides: dict[str, Side], given: argparse.Namespace) -> str:
    """Return what was measured, as Markdown."""
    static, one = (statistics.median(sides[name].rates) for name in ("static", "one"))
    lines = [
        f"`{given.model}`, {given.clients} clients, {given.steps} steps, median of {given.rounds} rounds of "
        f"{given.requests} requests each, the sides in turns.",
        "",
        "| | pictures a second | beside static | beside one at a time | latency: median | 95 % |",
        "|---|---|---|---|---|---|",
    ]
    for name, side in sides.items():
        rate = statistics.median(side.rates)
        last = sorted(side.latencies)[int(0.95 * (len(side.latencies) - 1))]
        lines.append(
            f"| {name} | {rate:.2f} | {rate / static:.2f} | {rate / one:.2f} | "
            f"{statistics.median(side.latencies):.2f} s | {last:.2f} s |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
