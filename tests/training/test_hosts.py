"""Training on many hosts, which processes stand for: small versions of tpu_scripts/hosts/train_hosts.py."""

from __future__ import annotations

import json
import re
import time

import numpy as np
import pytest

from kandinsky_jax.training.data import Batches
from kandinsky_jax.training.kinds import Kind
from tests.conftest import note, quick_and_slow, slow_and_campaign
from tpu_scripts.hosts import train_hosts
from tpu_scripts.hosts.train_hosts import Layout

EPSILON = 1e-3  # of AdamW: with 1e-8, rounding errors of near-zero gradients move weights as far as real ones


@pytest.fixture
def folder(tmp_path):
    train_hosts.write_data(tmp_path / "data")
    return tmp_path


def check_agreement(found: dict, epsilon: float, kind: Kind) -> None:
    """Several processes are bit-equal among themselves, and one process sums in another order.

    MoVQ's later losses then differ by up to 1e-5: where a latent lies between two codes, rounding chooses.
    """
    losses = "first_losses" if kind == Kind.MOVQ else "losses"
    layouts = list(found)
    for layout in layouts[1:]:
        for other in layouts[: layouts.index(layout)]:
            difference = found[layout][f"difference from {other}"]
            alone = other.startswith("1x")
            note(difference["losses"], f"all losses, {'to one process' if alone else 'among several'}")
            assert note(difference[losses], f"losses, {'to one process' if alone else 'among several'}") < 1e-6
            if not alone:
                assert difference["equal_bits"], (layout, other)
            elif epsilon == EPSILON:
                assert note(difference["weights"], f"weights with epsilon={epsilon}, to one process") < 1e-6
            else:
                note(difference["weights"], f"weights with epsilon={epsilon}, to one process")


@pytest.mark.parametrize("kind", slow_and_campaign(Kind, Kind.PRIOR))
def test_hosts_train_as_one(folder, kind, request):
    """Losses and weights of one process and of several; the state is really divided."""
    whole = request.node.get_closest_marker("campaign") is not None
    layouts = [Layout(1, 8), Layout(2, 4), Layout(4, 2)] if whole else [Layout(1, 4), Layout(2, 2)]
    fsdp = layouts[0].devices
    found = train_hosts.agree(folder, str(kind), layouts, 20 if whole else 5, fsdp, EPSILON)
    check_agreement(found, EPSILON, kind)
    for layout in layouts:
        shares = found[str(layout)]["share_of_state_in_each_process"]
        assert len(shares) == layout.processes
        for share in shares:  # small arrays lie everywhere
            assert 1 / layout.processes <= note(share, f"share of the state in a process of {layout}")
            assert share < 2 / layout.processes  # undivided, each of its devices has all of it


@pytest.mark.campaign
@pytest.mark.parametrize("kind", Kind)
def test_hosts_train_as_one_with_the_default_epsilon(folder, kind):
    layouts = [Layout(1, 8), Layout(2, 4), Layout(4, 2)]
    check_agreement(train_hosts.agree(folder, str(kind), layouts, 20), 1e-8, kind)


@pytest.mark.campaign  # CI kills one in test_hosts_encode_each_item_once_and_go_on_after_a_kill
@pytest.mark.parametrize(("layout", "kills", "steps"), [(Layout(2, 1), 3, 24), (Layout(4, 2), 20, 80)], ids=str)
def test_a_killed_host_ends_the_others_and_changes_nothing(folder, layout, kills, steps):
    found = train_hosts.kill(folder, "lora-prior", layout, kills, steps, 2, seed=1)
    assert len(found["kills"]) == kills
    assert note(found["slowest"], "seconds until all had ended") < 60


@pytest.mark.campaign  # CI stops one in the first step of the guide for training, tests/tpu_scripts/test_pods.py
@pytest.mark.parametrize("processes", [2, 4])
def test_sigterm_of_one_host_stops_all_with_one_checkpoint(folder, processes):
    layout = Layout(processes, 2)
    found = train_hosts.stop(folder, "lora-decoder", layout, 12, layout.processes - 1)
    assert note(found["seconds"], "seconds until all had ended") < 60


@pytest.mark.campaign
@pytest.mark.parametrize("layouts", [[Layout(2, 2), Layout(1, 4)], [Layout(4, 2), Layout(2, 4), Layout(1, 8)]], ids=str)
def test_a_run_goes_on_with_other_hosts(folder, layouts):
    found = train_hosts.resume(folder, "prior", layouts, 12)
    assert note(found["losses"], "losses") < 1e-6


FULL_DISK = """
import resource, signal, sys
if sys.argv[sys.argv.index("--process") + 1] == "1":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
"""


@pytest.mark.campaign
def test_a_host_that_cannot_write_its_part_of_a_checkpoint(folder):
    """The run ends with the reason, and not after the five minutes that hosts wait for each other's part."""
    config = train_hosts.write_config(folder / "c.toml", folder / "data", folder / "out", 100, 3)
    run = train_hosts.Run(Layout(2, 1), "prior", config, folder / "logs", FULL_DISK)
    unfinished = folder / "out" / "checkpoints"
    run.until(lambda: any(unfinished.glob("*orbax-checkpoint-tmp*")))
    began = time.monotonic()
    assert run.wait(120) == [1, 1]
    assert note(time.monotonic() - began, "seconds until both had ended") < 60
    reason = "a checkpoint could not be written: File too large; those before it stay"
    assert re.search(rf"^error: .*out/checkpoints: {reason}$", run.text(1), re.MULTILINE)
    assert re.search(rf"^error: process 1 of 2 .* has ended: .*{reason}", run.text(0), re.MULTILINE)


# Data -------------------------------------------------------------------------------------------------------------


class Numbers:
    """A reader of numbers, with something random, one of which cannot be read."""

    def __init__(self) -> None:
        self.unreadable: dict[str, str] = {}

    def __call__(self, item: int, rng: np.random.Generator) -> dict[str, np.ndarray] | None:
        return None if item == 4 else {"item": np.asarray(item), "random": rng.random()}


@pytest.mark.parametrize("seed", quick_and_slow(range(8), 0, 1))
def test_every_host_reads_its_part_of_one_order(seed):
    """Whatever the number of hosts, and where it changes, also with examples that are no neighbours."""
    rng = np.random.default_rng(seed)
    items, batch = list(range(int(rng.integers(5, 40)))), int(rng.choice([4, 8, 12]))
    whole = Batches(items, Numbers(), batch, seed)  # type: ignore[arg-type]
    wanted = [next(whole) for _ in range(3 * len(items) // batch + 3)]
    state, step = {"next_index": 0}, 0
    while step < len(wanted):
        hosts = int(rng.choice([1, 2, 4]))
        order = rng.permutation(batch) if rng.random() < 0.5 else np.arange(batch)
        parts = [np.sort(part) for part in np.split(order, hosts)]
        readers = [Batches(items, Numbers(), batch, seed, examples=part) for part in parts]  # type: ignore[arg-type]
        for reader in readers:
            reader.state = state
        for _ in range(min(int(rng.integers(1, 4)), len(wanted) - step)):
            for reader, part in zip(readers, parts, strict=True):
                found = next(reader)
                for name, array in wanted[step].items():
                    np.testing.assert_array_equal(found[name], array[part])
            step += 1
        states = [reader.state for reader in readers]
        assert all(each == states[0] for each in states)
        state = states[0]


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_no_example_is_missing_or_there_twice_in_an_epoch(hosts):
    items, batch, epochs = list(range(100, 124)), 8, 4
    parts = np.split(np.arange(batch), hosts)
    readers = [Batches(items, Numbers(), batch, 0, examples=part) for part in parts]  # type: ignore[arg-type]
    seen = np.concatenate([next(reader)["item"] for _ in range(epochs * len(items) // batch) for reader in readers])
    orders = seen.reshape(epochs, len(items))
    assert all(sorted(order) == items for order in orders)
    assert len({tuple(order) for order in orders}) == epochs


@pytest.mark.parametrize("kind", slow_and_campaign([Kind.LORA_PRIOR, Kind.DECODER]))
def test_hosts_encode_each_item_once_and_go_on_after_a_kill(folder, kind):
    """Parts of four items by two processes, one of which is killed; then by four: what was encoded stays."""
    config = train_hosts.write_config(folder / "c.toml", folder / "data", folder / "out", 2, 2, precompute=True)
    parts, small = (
        folder / "out" / "encoded",
        "from kandinsky_jax.training import latent_cache as cache\ncache.PART_ITEMS = 4",
    )
    options = {"logs": folder / "logs", "before": small}
    run = train_hosts.Run(Layout(2, 1), kind, config, **options)
    run.until(lambda: len(list(parts.glob("0*/about.json"))) >= 3)
    run.processes[1].kill()
    assert run.wait(60) == [1, -9]
    before = {path: path.stat().st_mtime_ns for path in parts.glob("0*/about.json")}
    assert len(before) < 10
    run = train_hosts.Run(Layout(4, 1), kind, config, **options)
    assert run.wait(300) == [0, 0, 0, 0], run.text()
    after = {path: json.loads(path.read_text()) for path in sorted(parts.glob("0*/about.json"))}
    assert [index for about in after.values() for index in about["which"]] == list(range(40))
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    encoded_by = {int(path.parent.name): about["process"] for path, about in after.items() if path not in before}
    assert encoded_by == {part: part % 4 for part in encoded_by}


# Wrong starts -----------------------------------------------------------------------------------------------------


@pytest.mark.campaign
def test_hosts_that_do_not_train_the_same_are_named(folder):
    """Another seed, mesh and output folder, each in the second process: both end with one sentence."""
    configs = [folder / f"{name}.toml" for name in ("first", "seed", "mesh", "output")]
    for config in configs:
        train_hosts.write_config(config, folder / "data", folder / ("o" if config.stem == "output" else "out"), 4, 4)
    configs[1].write_text("seed = 1\n" + configs[1].read_text())
    configs[2].write_text(configs[2].read_text().replace("fsdp = 2", "fsdp = 1"))
    for other, says in (
        (configs[1], r"beside process 0 of 2 \(.*\): process 1 of 2 \(.*\) differs in seed \(0, now 1\)$"),
        (configs[2], r"process 1 of 2 \(.*\) differs in mesh\.fsdp \(2, now 1\)$"),
        (configs[3], r"of process 1 of 2 \(.*\) is not the folder of process 0 of 2 .* all hosts share, such as"),
    ):
        run = train_hosts.Run(Layout(2, 1), "lora-prior", [configs[0], other], folder / "logs")
        assert run.wait(120) == [1, 1]
        for index in range(2):
            [error] = [line for line in run.text(index).splitlines() if line.startswith("error: ")]
            assert re.search(says, error), error
