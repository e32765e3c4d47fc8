"""Checkpoints of a run: damaged, foreign, older, newer, and of another run."""

from __future__ import annotations

import json
import random
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from kandinsky_jax.training.checkpoints import Checkpoints
from kandinsky_jax.training.checksums import checksums
from kandinsky_jax.training.errors import TrainingError
from kandinsky_jax.training.step import OptimizerConfig, Trainer, TrainState

RECORD = {"kind": "prior", "seed": 0, "train_batch_size": 4, "number of pictures": 12, "data": "a", "lora.rank": 4}
TRAINER = Trainer(lambda params, batch: jnp.square(params["a"]["weight"] - batch).mean(), OptimizerConfig())


def initial() -> TrainState:
    weight = jnp.asarray(np.random.default_rng(0).standard_normal((64, 64)), jnp.float32)
    return TRAINER.init({"a": {"weight": weight}, "b": {"bias": jnp.ones(7)}})


def after(step: int) -> TrainState:
    state = initial()
    return state._replace(step=jnp.int32(step), params=jax.tree.map(lambda leaf: leaf + step, state.params))


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    """A run's folder with checkpoints of the steps 9 and 10."""
    folder = tmp_path_factory.mktemp("run")
    with Checkpoints(folder, RECORD, 3) as checkpoints:
        for step in (9, 10):
            checkpoints.save(step, after(step), {"next_index": step})
    return folder


@pytest.fixture
def run(intact, tmp_path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "run"))


def restored_step(folder: Path, record: dict | None = None, **options) -> int:
    """The step of what is restored, whose values have to be right."""
    found = Checkpoints(folder, record or RECORD, 3, **options).restore(initial())
    assert found is not None
    state, data = found
    step = int(state.step)
    assert data == {"next_index": step}
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(after(step)), strict=True))
    return step


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def edit(path: Path, **changed) -> None:
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | changed))


def other_shapes(folder: Path) -> None:
    """A whole checkpoint of this step, of another network."""
    shutil.rmtree(folder / "state")
    state = TRAINER.init({"a": {"weight": jnp.ones((3, 5))}, "b": {"bias": jnp.ones(7)}})
    with ocp.StandardCheckpointer() as writer:
        writer.save((folder / "state").absolute(), state._replace(step=jnp.int32(10)))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "an empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "a foreign folder": lambda folder: (shutil.rmtree(folder), folder.mkdir(), (folder / "a.txt").write_text("a")),
    "no state": lambda folder: shutil.rmtree(folder / "state"),
    "no place": lambda folder: shutil.rmtree(folder / "place"),
    "no array files": lambda folder: [path.unlink() for path in (folder / "state").rglob("d/*")],
    "a truncated array": lambda folder: largest(folder).write_bytes(largest(folder).read_bytes()[:9000]),
    "a flipped bit in an array": lambda folder: flip(largest(folder)),
    "a flipped bit in the manifest": lambda folder: flip(folder / "state" / "manifest.ocdbt"),
    "zeros for an array": lambda folder: largest(folder).write_bytes(bytes(largest(folder).stat().st_size)),
    "an empty metadata": lambda folder: (folder / "state" / "_METADATA").write_bytes(b""),
    "a place in another position": lambda folder: edit(folder / "place" / "metadata", data={"next_index": 11}),
    "a place that is no JSON": lambda folder: (folder / "place" / "metadata").write_text("[" * 100_000),
    "a place of another kind": lambda folder: (folder / "place" / "metadata").write_text("[1]"),
    "another step's state": lambda folder: (
        shutil.rmtree(folder / "state"),
        shutil.copytree(folder.with_name("9") / "state", folder / "state"),
    ),
    "another step": lambda folder: (shutil.rmtree(folder), shutil.copytree(folder.with_name("9"), folder)),
    "other shapes": other_shapes,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(run, damage):
    DAMAGE[damage](run / "checkpoints" / "10")
    with pytest.warns(UserWarning, match="damaged checkpoints are not used, training continues from step 9") as caught:
        assert restored_step(run) == 9
    assert len(caught) == 1
    assert len(str(caught[0].message)) < 500
    assert str(run) in str(caught[0].message)
    # What was damaged is out of the way: the step is written again, and read.
    assert [path.name for path in (run / "damaged_checkpoints").iterdir()] == ["10"]
    with Checkpoints(run, RECORD, 3) as checkpoints:
        checkpoints.save(10, after(10), {"next_index": 10})
    assert restored_step(run) == 10


@pytest.mark.parametrize("name", ["999999", "9" * 100, "0012"])
def test_foreign_folders_do_not_keep_checkpoints_from_being_written(run, name):
    """Orbax writes no step below the newest that is there, and says nothing."""
    (run / "checkpoints" / name).mkdir()
    for other in ("notes", "-3", "9e3", "٣"):
        (run / "checkpoints" / other).mkdir()
    (run / "checkpoints" / "77").write_text("a file")
    left = run / "checkpoints" / "11.orbax-checkpoint-tmp-3"
    shutil.copytree(run / "checkpoints" / "10", left)
    with pytest.warns(UserWarning, match="training continues from step 10"):
        assert restored_step(run) == 10
    assert not left.exists()
    with Checkpoints(run, RECORD, 3) as checkpoints:
        checkpoints.save(12, after(12), {"next_index": 12})
    assert restored_step(run) == 12


def test_without_an_intact_checkpoint_the_run_is_refused(run):
    for step in ("9", "10"):
        flip(largest(run / "checkpoints" / step))
    with pytest.raises(
        TrainingError, match=r"no checkpoint can be read; remove the folder to start again: 10: "
    ) as caught:
        restored_step(run)
    assert len(str(caught.value)) < 500
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["10", "9"]  # nothing is moved


def test_no_checkpoint_is_no_error(tmp_path):
    assert Checkpoints(tmp_path, RECORD, 3).restore(initial()) is None


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"seed": 1}, r"changed are seed \(0, now 1\)"),
        ({"train_batch_size": 8}, r"train_batch_size \(4, now 8\)"),
        ({"number of pictures": 13, "data": "b"}, r"number of pictures \(12, now 13\)"),
        ({"data": "b"}, "changed are data;"),
    ],
)
def test_another_run_is_refused_by_name(run, changed, says):
    record = RECORD | changed
    with pytest.raises(TrainingError, match=says) as caught:
        restored_step(run, record)
    assert len(str(caught.value)) < 500
    assert "--accept-changes" in str(caught.value)
    assert restored_step(run, record, accept_changes=True) == 10


@pytest.fixture
def changed_run(run) -> tuple[Path, dict]:
    """A run that went on with other settings after step 10, which was accepted, to step 11; and its record."""
    record = RECORD | {"train_batch_size": 2, "seed": 1}
    assert restored_step(run, record, accept_changes=True) == 10
    with Checkpoints(run, record, 5) as checkpoints:
        checkpoints.save(11, after(11), {"next_index": 11})
    return run, record


@pytest.mark.parametrize("damage", ["no state", "a truncated array", "a flipped bit in an array", "an empty metadata"])
def test_a_damaged_checkpoint_after_accepted_changes_gives_way_too(changed_run, damage):
    run, record = changed_run
    DAMAGE[damage](run / "checkpoints" / "11")
    flip(largest(run / "checkpoints" / "10"))
    with pytest.warns(UserWarning, match=r"continues from step 9; .*damaged_checkpoints: 11: .*; 10: "):
        assert restored_step(run, record) == 9


@pytest.mark.parametrize("damage", ["an empty folder", "no place", "a place that is no JSON"])
def test_a_refusal_after_a_damaged_checkpoint_names_the_damage(changed_run, damage):
    """Without its description, nobody knows whether the changes were accepted."""
    run, record = changed_run
    DAMAGE[damage](run / "checkpoints" / "11")
    says = (
        r"^newer checkpoints are damaged \(11: .*\), and of that of step 10: .*train_batch_size \(4, now 2\).*--accept"
    )
    with pytest.raises(TrainingError, match=says) as caught:
        restored_step(run, record)
    assert len(str(caught.value)) < 500
    assert (run / "checkpoints" / "11").exists()  # nothing is moved
    with pytest.warns(UserWarning, match="continues from step 10"):
        assert restored_step(run, record, accept_changes=True) == 10


def test_changes_that_were_never_accepted_are_refused_after_damage_too(changed_run):
    run, record = changed_run
    flip(largest(run / "checkpoints" / "11"))
    with pytest.raises(TrainingError, match=r"^(?!newer).*changed are seed \(1, now 2\)"):  # of the damaged one itself
        restored_step(run, record | {"seed": 2})


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"kind": "decoder"}, "holds checkpoints of prior, not of decoder"),
        ({"lora.rank": 8}, r"lora.rank \(4, now 8\); change that back or choose another output folder$"),
    ],
)
def test_another_structure_is_always_refused(run, changed, says):
    for accept in (False, True):
        with pytest.raises(TrainingError, match=says) as caught:
            restored_step(run, RECORD | changed, accept_changes=accept)
        assert "--accept-changes" not in str(caught.value)


def test_checkpoints_of_the_first_version_are_read(run):
    """As this project wrote them before they had a version: without a record and checksums."""
    for step in (9, 10):
        place = {"data": {"next_index": step}, "kind": "prior"}
        (run / "checkpoints" / f"{step}" / "place" / "metadata").write_text(json.dumps(place))
    with pytest.warns(UserWarning, match="is of format version 1: it says nothing of the run's settings"):
        assert restored_step(run) == 10
    with pytest.raises(TrainingError, match="holds checkpoints of prior, not of movq"):
        restored_step(run, RECORD | {"kind": "movq"})


def test_checkpoints_of_the_second_version_are_read_and_verified(run):
    """As this project wrote them before runs on many hosts: with CRC-32 of whole arrays."""
    for step in (9, 10):
        path = run / "checkpoints" / f"{step}" / "place" / "metadata"
        place = json.loads(path.read_text()) | {"format_version": 2, "state": checksums(after(step))}
        del place["checksum"]
        place["checksum"] = zlib.crc32(json.dumps(place, sort_keys=True).encode())
        path.write_text(json.dumps(place))
    assert restored_step(run) == 10
    flip(largest(run / "checkpoints" / "10"))
    with pytest.warns(UserWarning, match="damaged checkpoints are not used, training continues from step 9"):
        assert restored_step(run) == 9


def test_checkpoints_of_a_newer_version_are_refused(run):
    edit(run / "checkpoints" / "10" / "place" / "metadata", format_version=4)
    with pytest.raises(
        TrainingError, match="is of format version 4, this version of kandinsky_jax reads those up to 3"
    ):
        restored_step(run)


@pytest.mark.slow
def test_flipped_bits_never_come_through(intact, tmp_path):
    """In any file, at any place: the step before, the same values, or one error."""
    rng = random.Random(0)
    for trial in range(60):
        folder = Path(shutil.copytree(intact, tmp_path / f"{trial}"))
        flip(rng.choice([path for path in (folder / "checkpoints" / "10").rglob("*") if path.is_file()]), rng.random())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step = restored_step(folder)
        assert step == 10 or len(caught) == 1
        shutil.rmtree(folder)
