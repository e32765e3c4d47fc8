"""`python -m tests.fuzz.run [NAME] [COUNT] [SEED]`: damaged inputs of the readers whose name has NAME in it."""

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.fuzz.harness import trials
from tests.fuzz.readers import READERS

if __name__ == "__main__":
    part, count, seed = [*sys.argv[1:], *("", "20", "0")[len(sys.argv) - 1 :]]
    for reader in READERS:
        if part.lower() not in reader.name.lower():
            continue
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            found = trials(reader, int(count), int(seed), Path(scratch))
        took = time.perf_counter() - begun
        print(f"{reader.name}: {took / int(count) * 1e3:.0f} ms each, {dict(Counter(t.outcome for t in found))}")
        for fault, times in Counter((t.damage, t.fault) for t in found if t.fault).most_common():
            print(f"    {times} x {fault[0]}: {fault[1]}")
