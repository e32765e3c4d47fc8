"""Test environments for the versions that count as supported.

    nox --list
    nox --tags matrix                          # all of them, five to ten minutes each on a quiet machine
    nox --session gpu-machine -- -n 1 -k "not cli"   # one of them; what follows -- is pytest's

Each session tests what depends on JAX, the list that CI uses as well, and writes the versions, the counts and the
seconds to tpu_scripts/results/matrix-DATE.json. uv is used where it is installed.
"""

from __future__ import annotations

import datetime
import json
import time
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import nox
from packaging.requirements import Requirement

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.error_on_missing_interpreters = True
nox.options.reuse_existing_virtualenvs = True
nox.options.tags = ["matrix"]

ROOT = Path(__file__).parent
DEPENDS_ON_JAX = ".ci/depends_on_jax.txt"  # one test file a line

# What a machine with a GPU, CUDA 13 and PyTorch 2.11 came with.
GPU_MACHINE = (
    "jax==0.11.2",
    "transformers==5.17.0",
    "huggingface-hub==1.33.0",
    "numpy==2.5.2",
    "safetensors==0.8.0",
    "tokenizers==0.23.2",
)
REPORTED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain", "numpy", "ml-dtypes")
REPORTED += ("transformers", "huggingface-hub", "safetensors", "tokenizers", "diffusers", "peft", "torch", "regex")
REPORTED += ("pillow", "tqdm", "typer", "fsspec", "pytest")
VERSIONS = """
import importlib.metadata, json, platform, sys
versions = {name: importlib.metadata.version(name) for name in sys.argv[1:]}
print(json.dumps({"python": platform.python_version(), **versions}))
"""


@nox.session(tags=["matrix"])
@nox.parametrize("python,jax", [("3.11", "0.10"), ("3.12", "0.11"), ("3.12", "0.12"), ("3.13", "0.12")])
def newest(session: nox.Session, jax: str) -> None:
    """Every supported pair of Python and JAX, with the newest of everything else."""
    test(session, f"jax=={jax}.*")


@nox.session(python="3.11", tags=["matrix"])
def oldest(session: nox.Session) -> None:
    """Every dependency at the lower bound that pyproject.toml states."""
    test(session, *lower_bounds())


@nox.session(python="3.12", tags=["matrix"], name="gpu-machine")
def gpu_machine(session: nox.Session) -> None:
    """The versions of a GPU machine whose packages are not ours to choose."""
    test(session, *GPU_MACHINE)


@nox.session(python="3.12")
def pods(session: nox.Session) -> None:
    """Files for pods, by SkyPilot, XPK and, with `--jobset-crd FILE`, JobSet's schema; not of the matrix."""
    session.chdir(ROOT)
    session.install("skypilot>=0.14.1", "xpk>=1.16", "jsonschema", "pyyaml")
    script = "tpu_scripts/pods/check_published.py"
    session.run("python", script, *session.posargs, env={"SKYPILOT_DISABLE_USAGE_COLLECTION": "1"})


def lower_bounds() -> list[str]:
    """The dependencies at run time and in tests, each pinned to its `>=`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stated = [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"]["test"]]
    return [
        f"{requirement.name}=={bound.version}"
        for requirement in stated
        for bound in requirement.specifier
        if bound.operator == ">="
    ]


def test(session: nox.Session, *pinned: str) -> None:
    """Install the project with these pins, test it, and write down what came of it."""
    session.chdir(ROOT)
    session.install("-e", ".[test]", *pinned)
    versions = json.loads(session.run("python", "-c", VERSIONS, *REPORTED, silent=True))
    report = Path(session.create_tmp()) / "report.xml"
    report.unlink(missing_ok=True)
    start = time.monotonic()
    session.run("pytest", f"@{DEPENDS_ON_JAX}", f"--junitxml={report}", *session.posargs, success_codes=range(256))
    if not report.exists():
        session.error("pytest came to no end")
    found = outcome(report) | {"seconds": round(time.monotonic() - start), "arguments": session.posargs}
    write(session.name, {"versions": versions, **found})
    if found["failed"]:
        session.error(f"{len(found['failed'])} tests failed: {', '.join(found['failed'][:20])}")


def outcome(report: Path) -> dict[str, object]:
    """The counts of a JUnit report, and the names of what failed."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "skipped": len(skipped),
        "failed": [f"{case.get('classname')}::{case.get('name')}" for case in failed],
    }


def write(name: str, result: dict[str, object]) -> None:
    """Add a session's result to today's file."""
    path = ROOT / "tpu_scripts" / "results" / f"matrix-{datetime.date.today().isoformat()}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(dict(sorted({**results, name: result}.items())), indent=1) + "\n")
