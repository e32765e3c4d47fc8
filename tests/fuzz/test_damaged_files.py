"""Damaged files of every kind that the package reads load, or raise one short error with the path.

What is damaged, and how, follows from a seed. `python -m tests.fuzz.run NAME COUNT SEED` shows a reader's faults.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import json
import multiprocessing
import platform
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from tests.fuzz.harness import Reader, Trial, trials
from tests.fuzz.readers import READERS

WORKERS = 4
QUICK, SLOW, CAMPAIGN = (300, 1), (1000, 2), (5000, 3)  # inputs of all readers together, and the seed
RESULTS = Path(__file__).parents[2] / "tpu_scripts" / "results"


def share(reader: Reader, total: int) -> int:
    """How many of the inputs a reader gets."""
    whole, left = divmod(total, len(READERS))
    return whole + (READERS.index(reader) < left)


def of_reader(number: int, count: int, seed: int) -> list[Trial]:
    with tempfile.TemporaryDirectory() as scratch:
        return trials(READERS[number], share(READERS[number], count), seed, Path(scratch))


def check(found: list[Trial], seed: int) -> None:
    faults = [f"{t.reader}, input {t.index} of seed {seed} ({t.damage}): {t.fault}" for t in found if t.fault]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_damaged_file_gives_one_short_error(reader, tmp_path):
    check(trials(reader, share(reader, QUICK[0]), QUICK[1], tmp_path), QUICK[1])


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_more_damaged_files_give_one_short_error(reader, tmp_path):
    check(trials(reader, share(reader, SLOW[0]), SLOW[1], tmp_path), SLOW[1])


@pytest.mark.campaign
def test_campaign_of_damaged_files():
    """Also writes what came of it into tpu_scripts/results/."""
    count, seed = CAMPAIGN
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:  # a crash breaks it
        parts = pool.map(of_reader, range(len(READERS)), itertools.repeat(count), itertools.repeat(seed))
        found = [trial for part in parts for trial in part]
    versions = ("jax", "orbax-checkpoint", "transformers", "tokenizers", "safetensors", "torch", "Pillow", "pyarrow")
    result = {
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "inputs": len(found),
        "seed": seed,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in versions},
        "outcomes": Counter(trial.outcome for trial in found),
        "faults": [trial._asdict() for trial in found if trial.fault],
        "by damage": Counter(trial.damage for trial in found),
        "by reader": {r.name: Counter(t.outcome for t in found if t.reader == r.name) for r in READERS},
    }
    (RESULTS / f"fuzz-{result['date']}.json").write_text(json.dumps(result, indent=2) + "\n")
    check(found, seed)
