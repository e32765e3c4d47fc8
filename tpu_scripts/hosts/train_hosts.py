"""Training on many hosts, which processes with simulated devices stand for.

    python tpu_scripts/hosts/train_hosts.py agree --kinds prior decoder --layouts 1x8 2x4 4x2
    python tpu_scripts/hosts/train_hosts.py kill --layout 4x2 --kills 20
    python tpu_scripts/hosts/train_hosts.py stop --layout 4x2
    python tpu_scripts/hosts/train_hosts.py resume --layouts 4x2 2x4 1x8

2x4 is two processes with four devices each. `agree` compares losses and weights of all layouts with those of the first.
`kill` kills a random process by SIGKILL, checks that the others end and name it, starts all again, and after the last
kill compares the weights with those of an undisturbed run, bit for bit. `stop` sends SIGTERM to one process. `resume`
goes on in another layout after every part of the steps. Results are added to tpu_scripts/results/train-hosts-DATE.json.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from kandinsky_jax.common.atomic import replace_file  # noqa: E402
from kandinsky_jax.training.kinds import DISTILLATION, DPO, Kind  # noqa: E402

MODEL = ROOT / "tests" / "shapes_model"
END_SECONDS = 60  # within which the others have to end
START_SECONDS = 300
FIRST_STEPS = 4
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
MOMENTS = ("start", "step", "checkpoint")


class Layout(NamedTuple):
    """Processes, and devices of each."""

    processes: int
    devices: int

    @classmethod
    def of(cls, text: str) -> Layout:
        """Parse "2x4"."""
        processes, _, devices = text.partition("x")
        return cls(int(processes), int(devices))

    def __str__(self) -> str:
        return f"{self.processes}x{self.devices}"


# Runs -------------------------------------------------------------------------------------------------------------


def write_data(folder: Path, count: int = 40) -> None:
    """Write captioned pictures, each of which is preferred to the next one."""
    lines = []
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(count):
        inside, outside = rng.choice(COLOURS, 2, replace=False)
        picture = Image.new("RGB", (80, 72), str(outside))
        left, top = (int(x) for x in rng.integers(0, 40, 2))
        ImageDraw.Draw(picture).ellipse((left, top, left + 30, top + 30), fill=str(inside))
        picture.save(folder / f"{i:03d}.png")
        text = f"a {inside} circle" + (f" on a {outside} background" if i % 2 else "")
        others = {"rejected_file_name": f"{(i + 1) % count:03d}.png"}
        lines.append(json.dumps({"file_name": f"{i:03d}.png", "text": text, **others}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def write_config(
    path: Path,
    data: Path | str,
    output: Path | str,
    steps: int,
    every: int,
    fsdp: int = 2,
    epsilon: float = 1e-8,
    precompute: bool = False,
    kind: str | None = None,
) -> Path:
    """Write the configuration of a run with dropout, flips and an average of the weights, so that all is compared.

    Args:
        kind: of the training. Distillation takes no dropout, and smaller steps, since its targets follow the weights;
            so does DPO, whose loss is steep.
    """
    options: dict[str, object] = {"model": str(MODEL), "data": str(data), "output": str(output), "resolution": 64}
    options |= {"train_batch_size": 16, "checkpointing_steps": every}
    options |= {} if kind in DISTILLATION else {"condition_dropout": 0.3}
    options |= {"precompute": True} if precompute else {"random_flip": True}
    lines = [f"{name} = {json.dumps(value)}" for name, value in options.items()]
    rate = 1e-4 if kind in (*DISTILLATION, *DPO) else 1e-3
    lines += ["[optimizer]", f"max_train_steps = {steps}", f"learning_rate = {rate}", "ema_decay = 0.9"]
    lines += [f"adam_epsilon = {epsilon}"]
    lines += ["[mesh]", f"fsdp = {fsdp}", "fsdp_min_size = 1024"]
    path.write_text("\n".join(lines) + "\n")
    return path


class Run:
    """The processes of one start of a run.

    Args:
        layout: how many.
        kind: of the training.
        config: of the training, or one for each process.
        logs: folder of their output.
        before: Python statements that each process runs first.
    """

    def __init__(self, layout: Layout, kind: str, config: Path | str | list[Path], logs: Path, before: str = ""):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"{index}.log" for index in range(layout.processes)]
        self.processes = []
        # The suite's hosts find each other's programs; a killed one may leave a part of a program, so nobody else does.
        programs = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", logs.parent)) / "hosts"
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(programs), "PYTHONPATH": str(ROOT)}
        flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
        # XLA divides sums of convolutions among threads, otherwise as many as a process has devices.
        environment["NPROC"] = str(layout.processes * layout.devices)
        environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={layout.devices}"
        for index, log in enumerate(self.logs):
            own = config[index] if isinstance(config, list) else config
            program = f"{before}\nimport tpu_scripts.hosts.keep_programs\n"
            program += "from kandinsky_jax.cli.main import main; main()"
            command = [sys.executable, "-c", program, "train", kind, str(own), "--quiet"]
            if layout.processes > 1:
                command += ["--coordinator", f"127.0.0.1:{port}", "--process", str(index)]
                command += ["--processes", str(layout.processes)]
            with log.open("wb") as file:
                self.processes.append(subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=ROOT))

    def wait(self, seconds: float) -> list[int]:
        """Wait for all processes; return their exit codes. Whoever is late is killed, and an error is raised."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not all processes ended in {seconds} s:\n{self.text()}") from None
        finally:
            for process in self.processes:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                process.wait()

    def text(self, index: int | None = None) -> str:
        """Return the output of one process, or of all."""
        chosen = self.logs if index is None else [self.logs[index]]
        return "\n".join(f"== {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in chosen)

    def until(self, condition: Callable[[], bool], seconds: float = START_SECONDS) -> None:
        """Wait for a condition; AssertionError if a process ends before."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [process.poll() for process in self.processes]
            assert time.monotonic() < deadline, self.text()
            assert not any(ended), f"{ended}\n{self.text()}"
            if all(code == 0 for code in ended):
                return
            time.sleep(0.01)


def finished(layout: Layout, kind: str, config: Path | str, logs: Path) -> None:
    """Run to the end."""
    run = Run(layout, kind, config, logs)
    codes = run.wait(1200)
    assert not any(codes), f"{codes}\n{run.text()}"


# What is compared -------------------------------------------------------------------------------------------------


def losses(output: Path) -> list[float]:
    """Return the losses of all steps, which must be there once each."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "steps are missing or there twice"
    return [line["loss"] for line in lines]


def weights(output: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a result by file and name."""
    files = sorted((output / "model").rglob("*.safetensors"))
    return {f"{file.name} {name}": array for file in files for name, array in load_file(file).items()}


def compare(output: Path, reference: Path) -> dict[str, float]:
    """Compare losses (largest relative difference) and weights (root mean square, relative to their own)."""
    mine, theirs = losses(output), losses(reference)
    assert len(mine) == len(theirs)
    found, wanted = weights(output), weights(reference)
    assert found.keys() == wanted.keys()
    squares = sum(float(np.square(found[name].astype(np.float64) - wanted[name]).sum()) for name in wanted)
    total = sum(float(np.square(array.astype(np.float64)).sum()) for array in wanted.values())
    apart = [abs(a / b - 1) for a, b in zip(mine, theirs, strict=True)]
    return {
        "losses": max(apart),
        "first_losses": max(apart[:FIRST_STEPS]),
        "weights": (squares / total) ** 0.5,
        "equal_bits": float(all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)),
    }


def layout_of(output: Path) -> dict[str, Any]:
    """Return what a run says of its processes and their bytes."""
    found: dict[str, Any] = json.loads((output / "layout.json").read_text())
    return found


# Commands ---------------------------------------------------------------------------------------------------------


def agree(
    folder: Path, kind: str, layouts: Sequence[Layout], steps: int, fsdp: int = 2, epsilon: float = 1e-8
) -> dict[str, Any]:
    """Compare runs in several layouts with each other.

    Args:
        epsilon: of AdamW, which divides each gradient by its own size plus this number. With the default of 1e-8 a
            gradient that is all rounding errors moves a weight as far as any other, so sums in another order show.
    """
    outputs = []
    for layout in layouts:
        output = folder / f"{kind}-{layout}"
        config = write_config(
            folder / f"{kind}-{layout}.toml", folder / "data", output, steps, steps, fsdp, epsilon, kind=kind
        )
        finished(layout, kind, config, folder / "logs")
        outputs.append(output)
    found: dict[str, Any] = {}
    for layout, output in zip(layouts, outputs, strict=True):
        about = layout_of(output)
        shares = [process["state_bytes"] / about["state_bytes"] for process in about["processes"]]
        found[str(layout)] = {"share_of_state_in_each_process": shares, "mesh": about["mesh"]}
        for other, reference in zip(layouts, outputs, strict=True):
            if other == layout:
                break
            found[str(layout)][f"difference from {other}"] = compare(output, reference)
    return found


def kill(folder: Path, kind: str, layout: Layout, kills: int, steps: int, every: int, seed: int) -> dict[str, Any]:
    """Kill random processes at random moments, and compare the end with that of an undisturbed run."""
    rng = random.Random(seed)
    undisturbed, output = folder / "undisturbed", folder / "killed"
    for target in (undisturbed, output):
        write_config(folder / f"{target.name}.toml", folder / "data", target, steps, every, kind=kind)
    finished(layout, kind, folder / "undisturbed.toml", folder / "logs")
    seen = []
    victims = rng.sample(range(layout.processes), layout.processes)
    for number in range(kills):
        moment, victim = MOMENTS[number % len(MOMENTS)], victims[number % len(victims)]
        run = Run(layout, kind, folder / "killed.toml", folder / "logs")
        reached(run, moment, output, rng)
        if all(process.poll() == 0 for process in run.processes):
            break  # the run came to its end before
        run.processes[victim].kill()
        killed = time.monotonic()
        codes = run.wait(END_SECONDS)
        seconds = time.monotonic() - killed
        for index, code in enumerate(codes):
            if index != victim:
                assert code == 1, f"{victim} was killed, and {index} ended with {code}\n{run.text()}"
                named = re.findall(r"^error: process (\d+) of", run.text(index), re.MULTILINE)
                assert named == [str(victim)], f"{victim} was killed, {index} names {named}\n{run.text()}"
        seen.append({"moment": moment, "process": victim, "seconds": round(seconds, 1)})
        print(seen[-1], flush=True)
    finished(layout, kind, folder / "killed.toml", folder / "logs")
    assert compare(output, undisturbed)["equal_bits"], "other weights than those of the undisturbed run"
    assert losses(output) == losses(undisturbed)
    return {"kills": seen, "slowest": max(each["seconds"] for each in seen), "equal_bits": True}


def reached(run: Run, moment: str, output: Path, rng: random.Random) -> None:
    """Wait for a random moment of a run: in its start, in its steps, or while a checkpoint is written."""
    about, began = output / "layout.json", time.time()
    if moment == "start":
        run.until(lambda: "[Gloo]" in run.text(0))
        time.sleep(rng.uniform(0, 5))
        return
    run.until(lambda: about.exists() and about.stat().st_mtime > began)
    if moment == "checkpoint":
        run.until(lambda: any((output / "checkpoints").glob("*orbax-checkpoint-tmp*")))
        time.sleep(rng.uniform(0, 0.1))
    else:
        time.sleep(rng.uniform(0, 10))


def stop(folder: Path, kind: str, layout: Layout, steps: int, victim: int) -> dict[str, Any]:
    """Send SIGTERM to one process: all end with one checkpoint of the same step, and the run goes on from there."""
    undisturbed, output = folder / "undisturbed", folder / "stopped"
    for target in (undisturbed, output):
        write_config(folder / f"{target.name}.toml", folder / "data", target, steps, steps, kind=kind)
    if not (undisturbed / "model").exists():
        finished(layout, kind, folder / "undisturbed.toml", folder / "logs")
    run = Run(layout, kind, folder / "stopped.toml", folder / "logs")
    metrics = output / "metrics.jsonl"
    run.until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 2)
    run.processes[victim].send_signal(signal.SIGTERM)
    asked = time.monotonic()
    codes = run.wait(END_SECONDS)
    assert set(codes) == {143}, f"{codes}\n{run.text()}"
    seconds = time.monotonic() - asked
    [checkpoint] = [int(path.name) for path in (output / "checkpoints").iterdir()]
    assert 2 <= checkpoint < steps
    assert len(losses(output)) == checkpoint
    finished(layout, kind, folder / "stopped.toml", folder / "logs")
    assert compare(output, undisturbed)["equal_bits"]
    return {"process": victim, "checkpoint": checkpoint, "seconds": round(seconds, 1), "equal_bits": True}


def resume(folder: Path, kind: str, layouts: Sequence[Layout], steps: int) -> dict[str, Any]:
    """Go on in another layout after every part of the steps, and compare with a run in the last layout alone."""
    undisturbed, output = folder / f"whole-{kind}", folder / f"parts-{kind}"
    write_config(folder / "whole.toml", folder / "data", undisturbed, steps, steps, kind=kind)
    finished(layouts[-1], kind, folder / "whole.toml", folder / "logs")
    for number, layout in enumerate(layouts, 1):
        config = write_config(
            folder / "parts.toml", folder / "data", output, steps * number // len(layouts), steps, kind=kind
        )
        finished(layout, kind, config, folder / "logs")
    return {"layouts": [str(layout) for layout in layouts], **compare(output, undisturbed)}


def main(argv: list[str] | None = None) -> None:
    """Run one command, print its result, and add it to today's file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("agree", "kill", "stop", "resume"))
    parser.add_argument("--kinds", nargs="+", default=["prior"], choices=[str(kind) for kind in Kind])
    parser.add_argument("--layouts", nargs="+", type=Layout.of, default=[Layout(1, 8), Layout(2, 4), Layout(4, 2)])
    parser.add_argument("--layout", type=Layout.of, default=Layout(4, 2), help="of kill and stop, default 4x2")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=2, help="steps between checkpoints while killing")
    parser.add_argument("--fsdp", type=int, default=2, help="shards of the weights in agree, default 2")
    parser.add_argument("--epsilon", type=float, default=1e-8, help="of AdamW in agree, default 1e-8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "tpu_scripts" / "results")
    given = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="train-hosts-"))
    write_data(folder / "data")
    try:
        for kind in given.kinds:
            if given.command == "agree":
                found = agree(folder, kind, given.layouts, given.steps, given.fsdp, given.epsilon)
            elif given.command == "kill":
                found = kill(folder, kind, given.layout, given.kills, given.steps, given.every, given.seed)
            elif given.command == "stop":
                victim = random.Random(given.seed).randrange(given.layout.processes)
                found = stop(folder, kind, given.layout, given.steps, victim)
            else:
                found = resume(folder, kind, given.layouts, given.steps)
            where = given.layout if given.command in ("kill", "stop") else "-".join(map(str, given.layouts))
            options = {"steps": given.steps, "fsdp": given.fsdp, "epsilon": given.epsilon}
            name = f"{given.command} {kind} {where}"
            if given.command == "agree":
                name += f" fsdp={given.fsdp} epsilon={given.epsilon}"
            add(given.output, name, {**options, **found})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def add(folder: Path, name: str, found: dict[str, Any]) -> None:
    """Print a result, and add it to today's file."""
    print(name, json.dumps(found), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"train-hosts-{datetime.date.today().isoformat()}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results[name] = found
    replace_file(path, (json.dumps(results, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
