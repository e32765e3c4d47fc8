"""Training on eight simulated devices equals training on one; invalid meshes are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import PartitionSpec

from kandinsky_jax.training.config import TrainingConfigError, load
from kandinsky_jax.training.kinds import Kind
from kandinsky_jax.training.mesh import make_training_mesh, parts, state_shardings
from tests.conftest import note

ROOT = Path(__file__).parents[2]
MESHES = ("alone", "data=8", "fsdp=8", "data=2,fsdp=4")


@pytest.mark.parametrize(
    ("kind", "meshes"),
    [
        pytest.param(Kind.PRIOR, ("alone", "data=2,fsdp=4", "resumed"), marks=pytest.mark.slow, id="some"),
        pytest.param(Kind.PRIOR, (*MESHES, "by a rule", "resumed"), marks=pytest.mark.campaign, id="prior"),
        pytest.param(Kind.DECODER, MESHES, marks=pytest.mark.campaign, id="decoder"),
        pytest.param(Kind.LORA_DECODER, MESHES, marks=pytest.mark.campaign, id="lora-decoder"),
        pytest.param(Kind.MOVQ, MESHES, marks=pytest.mark.campaign, id="movq"),
        pytest.param(Kind.CLIP, ("alone", "data=2,fsdp=4"), marks=pytest.mark.campaign, id="clip"),
        pytest.param(Kind.DISTILL_PRIOR, ("alone", "data=2,fsdp=4"), marks=pytest.mark.campaign, id="distill-prior"),
        pytest.param(
            Kind.DISTILL_DECODER, ("alone", "data=2,fsdp=4"), marks=pytest.mark.campaign, id="distill-decoder"
        ),
    ],
)
def test_the_loss_curve_is_that_of_one_device(tmp_path, kind, meshes):
    """Ten AdamW steps with dropout: losses within 1e-5, on every mesh, and also where a run changes its mesh."""
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "tests.training.training_mesh_worker",
        tmp_path / "out.json",
        kind,
        *meshes,
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    alone = found.pop("alone")["losses"]
    assert max(alone) > min(alone)
    for name, other in found.items():
        difference = max(abs(a / b - 1) for a, b in zip(other["losses"], alone, strict=True))
        assert note(difference, f"{name}: loss, relative to one device's") < 1e-5, name
        trained = "frozen" if kind == Kind.LORA_DECODER else "params"
        if "fsdp" in name:  # small leaves lie everywhere
            least = 1 / 8 if name == "fsdp=8" else 1 / 4
            assert least <= note(other[trained], f"{name}: share of the weights on a device") < least + 0.35
            assert kind == Kind.LORA_DECODER or other["opt_state"] == pytest.approx(other["params"], rel=0.01)
        elif name == "data=8":
            assert other[trained] == 1


def test_what_is_no_mesh():
    assert make_training_mesh() is None
    assert parts(None) == 1
    with pytest.raises(ValueError, match="a mesh of data=2, fsdp=4 needs 8 devices, there are 1"):
        make_training_mesh(2, 4)
    with pytest.raises(ValueError, match="a mesh of fsdp=4 needs 4 devices, there are 1; a checkpoint fits"):
        make_training_mesh(fsdp=4)


def test_rules_that_cannot_be_followed():
    mesh = jax.sharding.Mesh([[jax.devices()[0]]], ("data", "fsdp"))
    tree = {"a": {"weight": jax.ShapeDtypeStruct((6, 4), "float32")}}
    assert state_shardings(mesh, tree)["a"]["weight"].spec == PartitionSpec()
    with pytest.raises(ValueError, match="sharded over 'fsdp' only"):
        state_shardings(mesh, tree, [("weight", PartitionSpec("rows"))])
    with pytest.raises(ValueError, match=r"a\.weight \[6, 4\] cannot be sharded"):
        state_shardings(mesh, tree, [("weight", PartitionSpec(None, None, "fsdp"))])


def test_a_mesh_in_a_configuration(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('model = "m"\ndata = "d"\noutput = "o"\n[mesh]\nfsdp = 16\n')
    assert load(path).mesh.fsdp == 16
    path.write_text('model = "m"\ndata = "d"\noutput = "o"\n[mesh]\nfsdp = 0\ndata = -1\nrows = 2\n')
    with pytest.raises(TrainingConfigError, match=r"no mesh\.rows"):
        load(path)
    path.write_text('model = "m"\ndata = "d"\noutput = "o"\n[mesh]\nfsdp = 0\ndata = -1\n')
    with pytest.raises(TrainingConfigError, match=r"(?s)mesh\.data must be at least 1, got -1.*mesh\.fsdp must be"):
        load(path)
