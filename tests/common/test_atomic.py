"""Atomic files and folders with several writers, killed and suspended processes, and failing disks."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from kandinsky_jax import images
from kandinsky_jax.common import atomic
from kandinsky_jax.common.storage import complete_or_absent

# Writes half a file, says so, and waits: for SIGKILL, or for a line on its standard input to finish. The module is
# loaded by itself, because importing the package takes seconds.
WRITER = """
import importlib.util, sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("atomic", sys.argv[1])
atomic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(atomic)

def fill(file):
    file.write(b"first ")
    file.flush()
    print("half", flush=True)
    sys.stdin.readline()
    file.write(b"second")

print(atomic.fill_file(Path(sys.argv[2]), fill, overwrite=False))
"""


def writer(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, atomic.__file__, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "half\n", process.stderr.read()
    return process


def test_a_running_or_stopped_writer_keeps_its_scratch_file_and_a_killed_one_does_not(tmp_path):
    """Two writers of one file share nothing; the sweep of a third knows which of them are alive."""
    target = tmp_path / "000000.tar"
    with writer(target) as running, writer(target) as killed:
        assert len(os.listdir(tmp_path)) == 2
        killed.kill()
        killed.wait()
        running.send_signal(signal.SIGSTOP)
        atomic.sweep(tmp_path)
        assert len(os.listdir(tmp_path)) == 1
        assert atomic.fill_file(target, lambda file: file.write(b"twin"), overwrite=False)
        running.send_signal(signal.SIGCONT)
        out, err = running.communicate("\n")
    assert (out, err, running.returncode) == ("False\n", "", 0)  # the loser finds the file there, and goes on
    assert os.listdir(tmp_path) == ["000000.tar"]
    assert target.read_bytes() == b"twin"


def test_of_two_writers_of_a_folder_the_later_one_says_that_it_is_there(tmp_path):
    target = tmp_path / "model"
    (tmp_path / ".model.0123456789abcdef.partial").mkdir()  # of a killed run
    slow = complete_or_absent(target)
    (slow.__enter__() / "slow").touch()
    with complete_or_absent(target) as fast:
        (fast / "fast").touch()
        assert len(os.listdir(tmp_path)) == 2  # the other's scratch folder stays, its writer is alive
    with pytest.raises(FileExistsError, match="model exists already"):
        slow.__exit__(None, None, None)
    assert os.listdir(tmp_path) == ["model"]
    assert os.listdir(target) == ["fast"]
    with complete_or_absent(target, overwrite=True) as slow:
        with complete_or_absent(target, overwrite=True) as fast:
            (fast / "fast again").touch()
        (slow / "slow").touch()
    assert os.listdir(tmp_path) == ["model"]
    assert os.listdir(target) == ["slow"]


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    atomic.replace_file(path, b"before")

    def full(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="could not be written: No space left on device") as caught:
        atomic.fill_file(path, full)
    assert caught.value.filename == str(path)
    with pytest.raises(KeyboardInterrupt):
        atomic.fill_file(path, lambda file: (_ for _ in ()).throw(KeyboardInterrupt))
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]


def test_a_scratch_file_that_another_host_has_swept_is_written_again(tmp_path):
    """Where a disk knows no locks, the sweep of another host may take a file that is being written."""
    calls = []

    def fill(file):
        calls.append(file)
        file.write(b"content")
        if len(calls) == 1:
            [scratch] = tmp_path.iterdir()
            scratch.unlink()

    assert atomic.fill_file(tmp_path / "file", fill)
    assert len(calls) == 2
    assert (tmp_path / "file").read_bytes() == b"content"


def test_without_locks_only_old_scratch_files_are_abandoned(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "fcntl", None)
    new, old = tmp_path / ".a.0123456789abcdef.partial", tmp_path / ".b.0123456789abcdef.partial"
    for path in (new, old):
        path.touch()
    os.utime(old, (time.time() - 2 * atomic.ABANDONED_SECONDS,) * 2)
    atomic.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [new.name]


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127, "a.b[c]"])
def test_a_name_may_be_as_long_as_the_system_allows(tmp_path, name):
    atomic.replace_file(tmp_path / name, b"1")
    (tmp_path / atomic._scratch_name(name)).touch()
    (tmp_path / ".other.0123456789abcdef.partial").touch()
    atomic.replace_file(tmp_path / name, b"2")  # sweeps what was left of this name, and of no other
    assert sorted(os.listdir(tmp_path)) == [".other.0123456789abcdef.partial", name]
    assert (tmp_path / name).read_bytes() == b"2"


def test_permissions_are_those_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        atomic.replace_file(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_two_processes_may_write_one_picture(tmp_path, ending):
    """Files that another process is writing are neither used nor removed; those of a killed one are removed."""
    path = tmp_path / f"picture.{ending}"
    abandoned = tmp_path / f".picture.{ending}.{'0' * 16}.partial"
    abandoned.touch()
    with writer(path) as twin:
        images.write(path, Image.new("RGB", (8, 8), "red"), {"prompt": "red"})
        with Image.open(path) as written:
            assert written.size == (8, 8)
        assert not abandoned.exists()
        assert len(os.listdir(tmp_path)) == 2
        out, _ = twin.communicate("\n")
    assert out == "False\n"
    assert os.listdir(tmp_path) == [path.name]
