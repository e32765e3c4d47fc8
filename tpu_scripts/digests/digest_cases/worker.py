"""Runs the cases of one group, and writes a line of JSON for each to standard output.

python -m digest_cases.worker GROUP CHECKOUT [--quick] [--only TEXT]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

from digest_cases import GROUPS, cases_of
from digest_cases.values import record_of


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("checkout", type=Path, help="whose kandinsky_jax has to be the one that is imported")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="", help="cases whose names contain this text")
    options = parser.parse_args()
    spec = importlib.util.find_spec("kandinsky_jax")
    if spec is None or spec.origin is None or Path(spec.origin).resolve().parents[1] != options.checkout.resolve():
        parser.error(f"kandinsky_jax is imported from {spec and spec.origin}, not from {options.checkout}")
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what else is printed does not mix with the answers
    warnings.simplefilter("ignore")
    for case in cases_of(options.group, options.quick):
        if options.only in case.name:
            with tempfile.TemporaryDirectory(prefix="digests-") as folder:
                try:
                    found = record_of(case.run(Path(folder)))
                except Exception as error:
                    traceback.print_exc()
                    found = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
            answers.write(json.dumps([case.name, found]) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
