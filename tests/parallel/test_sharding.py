"""Meshes: eight simulated devices generate the same pictures as one; invalid meshes are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from kandinsky_jax import KandinskyV22PriorPipeline
from kandinsky_jax.checkpoint import flat_params
from kandinsky_jax.parallel.mesh import ROWS_AXIS, make_mesh
from kandinsky_jax.parallel.sharding import parameter_shardings, rules_by_size
from tests.conftest import SHAPES_MODEL, note

ROOT = Path(__file__).parents[2]


def generated_by(folder: Path, *parts: str) -> dict[str, np.ndarray]:
    """Return the pictures that the worker generated on its meshes."""
    command = [sys.executable, "-W", "error", "-m", "tests.parallel.sharding_worker", folder / "generated.npz", *parts]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(folder / "generated.npz"))


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> dict[str, np.ndarray]:
    return generated_by(tmp_path_factory.mktemp("generated"), "over_data")


@pytest.fixture(scope="module")
def further(tmp_path_factory) -> dict[str, np.ndarray]:
    parts = ("over_data", "further_over_data", "other_meshes")
    return generated_by(tmp_path_factory.mktemp("further"), *parts)


def levels(pictures: np.ndarray) -> np.ndarray:
    return (pictures * 255).round().astype(int)


@pytest.mark.slow
def test_each_device_generates_the_same_as_alone(generated):
    """Bit for bit: the program on a device is that of a single picture."""
    assert np.array_equal(generated["data"], generated["alone"])
    assert len({picture.tobytes() for picture in generated["data"]}) == 8


@pytest.mark.slow
def test_a_batch_that_does_not_fill_the_devices(generated):
    assert len(generated["uneven"]) == 3
    assert np.array_equal(generated["uneven"], generated["alone"][:3])


@pytest.mark.campaign
def test_cached_features(tmp_path):
    """On each mesh: the pictures of one device, to rounding; of a device with a picture of its own, to the bit."""
    found = generated_by(tmp_path, "cached_features")
    assert np.array_equal(found["cached (8, 1, 1)"][:2], found["cached alone"])
    for shape in ("(8, 1, 1)", "(2, 2, 2)"):
        bound = 2 if shape == "(2, 2, 2)" else 0.05
        difference = np.abs(found[f"cached {shape}"] - found["cached batch"]).max() * 255
        assert note(difference, f"{shape}, max |d| of 255") <= bound
    assert np.abs(found["cached uneven"] - found["cached batch"][:3]).max() * 255 <= 2
    assert np.abs(found["cached batch"] - found["not cached"]).mean() * 255 > 1


@pytest.mark.campaign
def test_guiders(tmp_path):
    """On each mesh: the pictures of one device, to rounding."""
    found = generated_by(tmp_path, "guiders")
    for name in ("apg", "pag", "autoguidance"):
        for shape in ("(8, 1, 1)", "(2, 2, 2)"):
            difference = np.abs(found[f"{name} {shape}"] - found[name]).max() * 255
            assert note(difference, f"{name}, {shape}, max |d| of 255") <= 0.05
    assert np.abs(found["apg"] - found["pag"]).mean() * 255 > 1


@pytest.mark.campaign
def test_a_callback_sees_the_batch(further):
    assert np.array_equal(further["callback"], further["alone"][:3])


@pytest.mark.campaign
def test_a_batch_on_one_device(further):
    """Another program, of eight pictures: the last bits of float32 may differ, and rarely a level by one."""
    assert note(np.abs(further["data"] - further["batch"]).max() * 255, "data, max |d| of 255") <= 0.05
    assert np.abs(levels(further["data"]) - levels(further["batch"])).max() <= 1


@pytest.mark.campaign
@pytest.mark.parametrize("case", ["unguided", "negative", "torch", "Img2Img", "Inpaint", "Controlnet"])
def test_cases_over_data(further, case):
    ours, alone = further[case], further[f"{case} alone"]
    assert len(ours) == (3 if case[0].isupper() else 8)
    assert np.array_equal(ours[: len(alone)], alone)


@pytest.mark.campaign
@pytest.mark.parametrize("shape", [(1, 2, 1), (4, 2, 1), (1, 1, 8), (1, 2, 4), (2, 2, 2)], ids=str)
def test_guidance_and_rows(further, shape):
    ours, one = further[f"mesh {shape}"], further["batch"]
    kind = "rows" if shape[2] > 1 else "guidance"
    assert note(np.abs(ours - one).max() * 255, f"{kind}, max |d| of 255") <= (2 if kind == "rows" else 0.05)
    assert np.abs(levels(ours) - levels(one)).max() <= 1


@pytest.mark.campaign
def test_sharded_parameters(further):
    assert further["share"] < 0.2  # of eight devices, each has an eighth of what is large enough
    assert np.abs(further["sharded"] - further["alone"][:1]).max() * 255 <= 2


@pytest.mark.campaign
def test_quantized_networks_on_meshes(tmp_path):
    found = generated_by(tmp_path, "quantized")
    assert np.array_equal(found["data"][:3], found["alone"])
    assert note(np.abs(found["mesh"] - found["batch"]).mean() * 255, "int8, mesh (2, 2, 2), mean |d| of 255") <= 2


# One device, no process of its own --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"data": 0}, "data must be an integer of at least 1, got 0"),
        ({"rows": True}, "rows must be an integer"),
        ({"guidance": 3}, "guidance must be 1 or 2"),
        ({"data": 99}, "needs 99 devices, there are"),
        ({"guidance": 2}, "needs 2 devices, there are 1"),
    ],
)
def test_what_is_no_mesh(arguments, says):
    with pytest.raises(ValueError, match=says):
        make_mesh(**arguments)


def test_rules_that_cannot_be_followed_are_all_named():
    mesh = make_mesh()
    with pytest.raises(ValueError, match="only be sharded over a mesh"):
        parameter_shardings(None, {"a": (4,)}, [("a", PartitionSpec(ROWS_AXIS))])
    rules = [("a", PartitionSpec("data")), ("b", PartitionSpec(None, ROWS_AXIS))]
    with pytest.raises(ValueError, match=r"'a' asks for .*\n.*b \[4\] cannot be sharded"):
        parameter_shardings(mesh, {"a": (4,), "b": (4,)}, rules)


def test_the_first_rule_that_matches_counts():
    mesh = make_mesh()
    rules = [(r"^x\.kernel$", PartitionSpec(None, ROWS_AXIS)), ("kernel", PartitionSpec(ROWS_AXIS))]
    places = parameter_shardings(mesh, {"x.kernel": (2, 4), "y.kernel": (2, 4), "bias": (4,)}, rules)
    assert [tuple(place.spec) for place in places.values()] == [(None, ROWS_AXIS), (ROWS_AXIS,), ()]
    assert rules_by_size(mesh, {"a.b": (2, 400, 200), "c": (3,)}) == [(r"^a\.b$", PartitionSpec(None, ROWS_AXIS))]
    # Rows of whole tiles come before a larger axis.
    assert rules_by_size(mesh, {"a": (3, 3, 256, 400)}) == [("^a$", PartitionSpec(None, None, ROWS_AXIS))]


def test_a_pipeline_moves_with_its_late_parts(shapes_pipe):
    pipe = KandinskyV22PriorPipeline.from_pretrained(SHAPES_MODEL, dtype="float32")
    mesh = make_mesh()
    pipe.shard(mesh)
    assert not pipe._held()["image_encoder"].loaded
    for part in (pipe.prior, pipe.text_encoder, pipe.image_encoder):
        assert {leaf.sharding.mesh for leaf in flat_params(part).values()} == {mesh}
    pipe.shard(None)
    for part in (pipe.prior, pipe.image_encoder):
        assert {leaf.sharding for leaf in flat_params(part).values()} == {
            jax.sharding.SingleDeviceSharding(jax.devices()[0])
        }
