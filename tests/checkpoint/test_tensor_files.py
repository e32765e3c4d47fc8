"""Tensors are read one by one; what was read does not stay in memory, and a file that is cut is an error."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from kandinsky_jax.checkpoint import tensor_files


def mapped_bytes() -> int:
    """Bytes of files that are mapped into this process's memory."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile")]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_has_been_read_of_a_file_does_not_stay_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "MAPPED_BYTES", 8 << 20)
    arrays = {f"{i}": np.full(1 << 20, i, np.float32) for i in range(16)}  # 64 MiB
    save_file(arrays, tmp_path / "all.safetensors")
    before, most = mapped_bytes(), 0
    for name, tensor in tensor_files.open_tensors(tmp_path / "all.safetensors").items():
        np.testing.assert_array_equal(tensor.read(), arrays[name])
        most = max(most, mapped_bytes())
    assert most - before < 32 << 20


def test_a_file_that_is_cut_while_it_is_read_is_an_error(tmp_path):
    save_file({f"{i}": np.zeros(1000, np.float32) for i in range(50)}, tmp_path / "all.safetensors")
    tensors = tensor_files.open_tensors(tmp_path / "all.safetensors")
    tensors["0"].read()
    os.truncate(tmp_path / "all.safetensors", 100_000)
    with pytest.raises(SafetensorError):
        tensors["30"].read()
