"""Batch jobs and training runs that one commit begins and another goes on with.

FOLDER/expected.json   records of the same runs when nothing interrupts them, by the commit that began them
FOLDER/NAME/           what SIGTERM left of each
FOLDER/NAME/models     a link to the small model; made anew when it is resumed
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from digest_cases import batch_jobs, inputs, training
from digest_cases.comparison import difference
from digest_cases.values import record_of

SECONDS = 600  # for any of the processes
MAX_REFUSAL = 1000  # characters of a refusal in one sentence
# Started by a program of its own, so that the code comes from PYTHONPATH alone.
START = (
    "from digest_cases.commands import launcher; import os, sys; c = launcher(); os.execv(c[0], [*c, *sys.argv[1:]])"
)


@dataclass(frozen=True)
class Work:
    """Something long that can be interrupted.

    Args:
        prepare: writes what it starts from into a folder.
        command: of `kandinsky-jax`, in that folder.
        far_enough: whether it has done some of its work there.
        result: what it comes to.
    """

    prepare: Callable[[Path], None]
    command: list[str]
    far_enough: Callable[[Path], bool]
    result: Callable[[Path], Any]


def _job(form: str) -> Work:
    def prepare(folder: Path) -> None:
        batch_jobs.write_job(folder, "text2img", 24)

    command = batch_jobs.command("text2img", ["--batch", "1", "--format", form, "--grace", "1"])
    shards = "out/*.tar" if form == "webdataset" else "out/manifest/*.parquet"
    return Work(
        prepare,
        command,
        lambda folder: len(list(folder.glob(shards))) >= 2,
        lambda folder: batch_jobs.result_of(folder / "out"),
    )


def _training(kind: str, settings: Mapping[str, Any], optimizer: Mapping[str, Any]) -> Work:
    def prepare(folder: Path) -> None:
        inputs.training_data(folder / "data")
        several = {"checkpointing_steps": 4, "checkpoints_total_limit": 1, **settings}
        training.write_config(folder, training.DECODER, several, {"max_train_steps": 40, **optimizer})

    def far_enough(folder: Path) -> bool:
        metrics = folder / "run" / "metrics.jsonl"
        return metrics.exists() and len(metrics.read_text().splitlines()) >= 6

    return Work(
        prepare, ["train", kind, "run.toml", "--quiet"], far_enough, lambda folder: training.result_of(folder / "run")
    )


WORK = {
    "batch webdataset": _job("webdataset"),
    "batch folder": _job("folder"),
    "training lora-prior": _training("lora-prior", {"random_flip": True}, {"ema_decay": 0.9}),
    "training decoder": _training("decoder", {"snr_gamma": 5.0}, {"lr_warmup_steps": 8}),
}


def begun(folder: Path, environment: Mapping[str, str], only: str = "") -> int:
    """Do all work once without interruption, and begin it once more in `folder`; the exit status."""
    if folder.exists() and any(folder.iterdir()):
        print(f"{folder} is not empty; take another folder", file=sys.stderr)
        return 1
    expected = {}
    for name, work in tqdm([(name, work) for name, work in WORK.items() if only in name], unit="run"):
        with tempfile.TemporaryDirectory(prefix="digests-") as scratch:
            _prepared(Path(scratch), work)
            done = _finished(_start(Path(scratch), work, environment))
            if done.returncode:
                raise RuntimeError(f"{name} ended with {done.returncode}: {done.stderr[-500:]}")
            expected[name] = record_of(work.result(Path(scratch)))
        own = folder / name.replace(" ", "-")
        own.mkdir(parents=True)
        _prepared(own, work)
        process, began = _start(own, work, environment), time.monotonic()
        while process.poll() is None and not work.far_enough(own) and time.monotonic() - began < SECONDS:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        done = _finished(process)
        if done.returncode != 128 + signal.SIGTERM:
            raise RuntimeError(f"{name} ended with {done.returncode} when interrupted: {done.stderr[-500:]}")
        (own / "models").unlink()
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{len(expected)} begun in {folder}, {size / 2**20:.1f} MB")
    return 0


def resume(folder: Path, environment: Mapping[str, str], only: str = "") -> int:
    """Go on with a copy of what was begun, and compare with the runs without interruption; the exit status."""
    failed, said = 0, []
    known = json.loads((folder / "expected.json").read_text())
    for name, expected in tqdm([(name, known[name]) for name in known if only in name], unit="run"):
        with tempfile.TemporaryDirectory(prefix="digests-") as scratch:
            own = Path(scratch) / "copy"
            shutil.copytree(folder / name.replace(" ", "-"), own)
            _link(own)
            done = _finished(_start(own, WORK[name], environment))
            message = " ".join(done.stderr.split())
            if done.returncode == 0:
                found = record_of(WORK[name].result(own))
                equal = found["sha256"] == expected["sha256"]
                failed += not equal
                said.append(f"{name}: {'equal' if equal else 'DIFFERENT, ' + difference(expected, found)}")
            elif "Traceback" not in done.stderr and 0 < len(message) <= MAX_REFUSAL:
                said.append(f"{name}: refused: {message}")
            else:
                failed += 1
                said.append(f"{name}: FAILED with {done.returncode}: {message[-500:]}")
    print("\n".join(said))
    return int(failed > 0)


def _link(folder: Path) -> None:
    (folder / "models").symlink_to(inputs.SHAPES_MODEL, target_is_directory=True)


def _prepared(folder: Path, work: Work) -> None:
    _link(folder)
    work.prepare(folder)


def _start(folder: Path, work: Work, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", START, *work.command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finished(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    out, error = process.communicate(timeout=SECONDS)
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)
