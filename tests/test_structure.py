"""Structure of the package: imports run one way, nothing needs torch at run time, files stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SHAPES_MODEL

ROOT = Path(__file__).parents[1]
PACKAGES = ("kandinsky_jax", "convert_weights")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# A module may import modules of lower layers, and of its own package.
LAYERS = (
    ("kandinsky_jax.common",),
    ("kandinsky_jax.picture_records",),
    ("kandinsky_jax.parallel", "kandinsky_jax.compilation", "kandinsky_jax.preemption", "kandinsky_jax.images"),
    ("kandinsky_jax.models", "kandinsky_jax.schedulers", "kandinsky_jax.utils"),
    ("kandinsky_jax.diffusion",),
    ("kandinsky_jax.lora", "kandinsky_jax.composition", "kandinsky_jax.editing"),
    ("kandinsky_jax.checkpoint",),
    ("kandinsky_jax.pipelines", "kandinsky_jax.rewards"),
    ("kandinsky_jax.batch", "kandinsky_jax.training"),
    ("kandinsky_jax.evaluation",),
    ("kandinsky_jax.serve",),
    ("kandinsky_jax.cli", "convert_weights"),
)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def layer(module: str) -> int | None:
    for height, modules in enumerate(LAYERS):
        if any(module == member or module.startswith(member + ".") for member in modules):
            return height
    return None


def imports(path: Path, everywhere: bool = True) -> set[str]:
    """Every module that a file imports; also those inside functions, unless `everywhere` is False."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_run_one_way(path):
    module = module_name(path)
    if module in PACKAGES:  # a package's __init__ re-exports names
        return
    own = layer(module)
    assert own is not None, f"{module} has no layer: add it to LAYERS"
    for name in imports(path):
        other = layer(name)
        package = ".".join(module.split(".")[:2])
        if other is not None and not name.startswith(package):
            assert other < own, f"{module} (layer {own}) imports {name} (layer {other})"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_nothing_imports_the_reference(path):
    """torch may be imported in one place, to read a tensors-only pickle; diffusers nowhere."""
    roots = {name.split(".")[0] for name in imports(path)}
    assert "diffusers" not in roots
    assert "torch" not in roots or module_name(path) == "kandinsky_jax.checkpoint.tensor_files"
    assert "torch" not in {name.split(".")[0] for name in imports(path, everywhere=False)}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.slow
def test_a_picture_without_torch():
    """The whole way from prompt to picture, where torch and diffusers cannot be imported."""
    program = """
import sys
for name in ("torch", "diffusers"):
    sys.modules[name] = None
from kandinsky_jax import KandinskyV22CombinedPipeline
pipe = KandinskyV22CombinedPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
image = pipe("a red circle", height=64, width=64, num_inference_steps=2, prior_num_inference_steps=2).images[0]
print(image.size)
"""
    done = subprocess.run([sys.executable, "-c", program, SHAPES_MODEL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(64, 64)"


def test_loading_a_pipeline_imports_nothing_that_it_does_not_need():
    """Not the reference, where it is installed; not what only training and Orbax checkpoints need: it takes long."""
    program = """
import sys, kandinsky_jax
from kandinsky_jax import KandinskyV22PriorPipeline
KandinskyV22PriorPipeline.from_pretrained(sys.argv[1])
needless = {"torch", "diffusers", "orbax", "tensorstore", "grain", "fsspec"} & set(sys.modules)
assert not needless, needless
"""
    done = subprocess.run([sys.executable, "-c", program, SHAPES_MODEL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
