"""Shared by the tests: the trained model of shapes, the reference built from the same files, and comparisons."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from tests import shape_checks
from tests.xla_flags import QUICK_TO_COMPILE

shape_checks.install()  # before the package is imported

from kandinsky_jax.checkpoint import hub  # noqa: E402
from kandinsky_jax.compilation import set_compilation_cache  # noqa: E402
from tests import campaign_record  # noqa: E402

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Each of the suite's processes has cores of its own: XLA's threads lose more by sharing them than they gain. A process
# that a test starts, and that imports this, has its parent's already.
_OF_THE_SUITE = "PYTEST_XDIST_WORKER" in os.environ and "PYTEST_CURRENT_TEST" not in os.environ
if _OF_THE_SUITE and hasattr(os, "sched_setaffinity"):
    _CORES = sorted(os.sched_getaffinity(0))
    _OWN = _CORES[int(os.environ["PYTEST_XDIST_WORKER"][2:]) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]
    os.sched_setaffinity(0, _OWN or _CORES)
# Two threads of PyTorch that wait for each other beside XLA's lose more time than one alone.
torch.set_num_threads(1)
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")  # see docs/gpu.md

# What one process has compiled, the others of this run and of later ones need not compile again.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = Path(__file__).parents[1] / ".cache" / "compiled"
    set_compilation_cache(_CACHE)  # removes what a killed process has left
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_CACHE)
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)

# Trained to generate coloured shapes on plain backgrounds (tests/shapes.py); its three decoders share one MoVQ.
SHAPES_MODEL = Path(__file__).parent / "shapes_model"
OFFICIAL = Path(__file__).parent / "official"


def official_config(repository: str, component: str) -> dict:
    """The official repositories' `config.json`, or whatever a component's configuration is called."""
    [path] = (OFFICIAL / repository / component).glob("*.json")
    return json.loads(path.read_text())


def nhwc(tensor) -> jax.Array:
    """Convert a torch batch of pictures to ours."""
    return jax.numpy.asarray(tensor.numpy().transpose(0, 2, 3, 1))


def nchw(array) -> np.ndarray:
    """Convert our batch of pictures to torch's order of axes."""
    return np.asarray(array, np.float32).transpose(0, 3, 1, 2)


def quick_and_slow(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Mark parameters of a test: some run in the quick suite, the others in the slow one."""
    return _marked(values, quick, (), pytest.mark.slow)


def slow_and_campaign(values: Iterable[Any], *slow: Any) -> list[Any]:
    """Mark parameters of a long test: some run in the slow suite, the others in the campaign."""
    return _marked(values, slow, pytest.mark.slow, pytest.mark.campaign)


def _marked(values: Iterable[Any], chosen: tuple[Any, ...], mark: Any, other: Any) -> list[Any]:
    values = list(values)
    assert set(chosen) < set(values)
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=mark if value in chosen else other)
        for value in values
    ]


def pytest_configure(config: pytest.Config) -> None:
    """Compiling takes most of the time of all but campaigns, whose programs run long, and of GPUs' programs."""
    selected = config.getoption("markexpr")
    if selected == "gpu":
        jax.config.update("jax_platforms", "cuda,cpu")
    elif selected != "campaign":
        os.environ.setdefault("XLA_FLAGS", QUICK_TO_COMPILE)


def run_program(path: Path, folder: Path) -> str:
    """Run an example as its user would: a process of its own, without the suite's XLA flags, since it runs longer than
    it compiles. Returns what it printed.
    """
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, path.resolve()]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


BEGAN = time.monotonic()
FIGURES: dict[tuple[str, str], list[float]] = {}
TABLE: dict[str, dict[str, str]] = {}  # mode -> variant -> mean and max difference of pixels, of 255


def note(figure: float, what: str) -> float:
    """Record a measured figure for the table at the end of the run, and return it."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "::none").split(" ")[0].split("::", 1)[1].split("[")[0]
    FIGURES.setdefault((test, what), []).append(float(figure))
    return float(figure)


def pytest_sessionfinish(session) -> None:
    """Send the figures of a worker to the main process."""
    if hasattr(session.config, "workeroutput"):
        figures = [[*key, values] for key, values in FIGURES.items()]
        session.config.workeroutput["measured"] = json.dumps([figures, TABLE])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """Collect the figures of a worker."""
    figures, table = json.loads(node.workeroutput["measured"]) if "measured" in node.workeroutput else ([], {})
    for test, what, values in figures:
        FIGURES.setdefault((test, what), []).extend(values)
    for mode, row in table.items():
        TABLE.setdefault(mode, {}).update(row)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Print the figures that the README quotes, as measured in this run; a campaign's are kept as well."""
    of_a_worker = hasattr(config, "workerinput")
    if config.getoption("markexpr") == "campaign" and not of_a_worker and not config.getoption("collectonly"):
        path = campaign_record.record(terminalreporter.stats, FIGURES, time.monotonic() - BEGAN)
        terminalreporter.write_line(f"recorded in {path}" if path else "nothing recorded")
    if FIGURES:
        terminalreporter.section("measured")
    for (test, what), figures in FIGURES.items():
        line = f"{test}: {what}: worst {max(figures):.3g}, median {np.median(figures):.3g} of {len(figures)}"
        terminalreporter.write_line(line)
    if TABLE:
        terminalreporter.section("pixels beside the reference's: mean and max difference, of 255")
        variants = list(dict.fromkeys(variant for row in TABLE.values() for variant in row))
        for mode, row in {"": {variant: variant for variant in variants}, **TABLE}.items():
            cells = "".join(f"{row.get(variant, ''):>17}" for variant in variants)
            terminalreporter.write_line(f"{mode:34}{cells}")


def worst(ours, reference) -> float:
    """max |difference| / std(reference): the figure that the parity tests bound."""
    reference = np.asarray(reference, np.float32)
    ours = np.asarray(ours, np.float32)
    assert ours.shape == reference.shape
    return note(np.abs(ours - reference).max() / reference.std(), "max|d| / std")


@pytest.fixture(scope="session")
def shapes_pipe():
    """Our combined pipeline with the trained model of shapes, float32."""
    from kandinsky_jax.pipelines import KandinskyV22CombinedPipeline

    pipe = KandinskyV22CombinedPipeline.from_pretrained(SHAPES_MODEL, dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def reference():
    """The reference's (prior, decoder) pipelines on the same files, float32."""
    import diffusers

    pipes = (
        diffusers.KandinskyV22PriorPipeline.from_pretrained(SHAPES_MODEL / hub.PRIOR, dtype=torch.float32),
        diffusers.KandinskyV22Pipeline.from_pretrained(SHAPES_MODEL / hub.DECODER, dtype=torch.float32),
    )
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes


class Family(dict):
    """One pipeline per class name, made from its components when it is first asked for."""

    def __init__(self, module, **components):
        super().__init__()
        self._module, self._components = module, components

    def __missing__(self, name: str):
        kind = next((kind for kind in ("Inpaint", "Controlnet", "Prior") if kind in name), "Decoder")
        cls = getattr(self._module, name)
        parts = {} if kind == "Prior" else self._components[kind]
        if kind == "Prior" or "Combined" in name:
            prefix = "" if kind == "Prior" else "prior_"
            parts = parts | {prefix + key: part for key, part in self._components["Prior"].items()}
        self[name] = cls(**parts)
        self[name].set_progress_bar_config(disable=True)
        return self[name]


@pytest.fixture(scope="session")
def ours(shapes_pipe) -> Family:
    """Our pipelines by name, on the trained models of shapes, float32; they share what they can."""
    import kandinsky_jax

    prior, decoder = shapes_pipe.prior_pipe.components, shapes_pipe.decoder_pipe.components
    load = {"dtype": "float32", "movq": shapes_pipe.movq}
    inpaint = kandinsky_jax.KandinskyV22InpaintPipeline.from_pretrained(SHAPES_MODEL, **load).components
    controlnet = kandinsky_jax.KandinskyV22ControlnetPipeline.from_pretrained(SHAPES_MODEL, **load).components
    return Family(kandinsky_jax, Prior=prior, Decoder=decoder, Inpaint=inpaint, Controlnet=controlnet)


@pytest.fixture(scope="session")
def theirs(reference) -> Family:
    """The reference's pipelines by name, on the same files, float32."""
    import diffusers

    prior, decoder = (pipe.components for pipe in reference)
    load = {"dtype": torch.float32, "movq": decoder["movq"]}
    inpaint = diffusers.KandinskyV22InpaintPipeline.from_pretrained(SHAPES_MODEL / hub.INPAINT, **load).components
    controlnet = diffusers.KandinskyV22ControlnetPipeline.from_pretrained(
        SHAPES_MODEL / hub.CONTROLNET, **load
    ).components
    return Family(diffusers, Prior=prior, Decoder=decoder, Inpaint=inpaint, Controlnet=controlnet)
